"""How rows lie in a batch: padded beside rows of like length, or several to a bin, where none sees another."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.utils.data import Dataset, Sampler

from mtgdm.student.base import Placement
from mtgdm.student.chat import IGNORED
from mtgdm.student.examples import Example

LENGTH_GROUPS = 16
"""So many batches' rows are sorted by length together: most of the padding goes, the order stays mixed."""

BIN_TOKENS = 2048
"""Longest bin, unless a row is longer: attention costs the square of it, and longer ones fill little better."""

LONGEST_PAYING = 4096
"""Longer bins are made on request alone: their attention is no longer small beside the matrix products."""


@dataclass(frozen=True)
class Layout:
    """Batches of an epoch on one device: `batch` items at once, `grad_accum` batches to a step.

    An item is a row where `bin_tokens` is 0, else a bin of at most so many tokens.
    """

    rows: int
    items: int
    bin_tokens: int
    batch: int
    grad_accum: int
    padding: float
    """Share of the computed positions that hold no token, in the first epoch."""

    def __str__(self) -> str:
        share = f"{self.padding:.0%} padding".replace("%", " %")
        if not self.bin_tokens:
            return f"{self.rows:,} rows, {self.batch:,} of like length to a batch, {share}"
        bins = self.batch * self.grad_accum
        return (
            f"packed: {self.rows:,} rows in {self.items:,} bins of {self.bin_tokens:,} tokens, {share}; a step takes "
            f"{bins:,} bins, about {bins * self.rows / self.items:,.0f} rows"
        )


def padded(lengths: Sequence[int], *, batch: int, grad_accum: int, seed: int) -> Layout:
    """Rows of like length in one batch."""
    order = [lengths[row] for row in LengthGrouped(lengths, batch, seed)]
    return Layout(len(lengths), len(lengths), 0, batch, grad_accum, _padding(order, batch))


def packed(lengths: Sequence[int], *, batch: int, grad_accum: int, max_len: int, seed: int) -> Layout:
    """Rows in bins, as many to a step as `batch` x `grad_accum` names, or as near as whole bins come.

    So learning rate, warm-up, `eval_steps` and `max_steps` mean what they mean without packing. At most
    `batch` bins are computed at once: no more positions than `batch` rows of `max_len`.
    """
    rows_a_step = batch * grad_accum
    tokens = sum(lengths)
    tokens_a_step = math.ceil(rows_a_step * tokens / len(lengths))
    bin_tokens = min(max_len, max(max(lengths), min(BIN_TOKENS, tokens_a_step)))
    order = [sum(lengths[row] for row in found) for found in Packed(lengths, bin_tokens, seed)]
    bins = len(order)
    wanted = rows_a_step * bins / len(lengths)
    ways = [(at_once, max(1, round(wanted / at_once))) for at_once in range(1, batch + 1)]
    at_once, times = min(ways, key=lambda way: (abs(way[0] * way[1] - wanted), -way[0]))
    return Layout(len(lengths), bins, bin_tokens, at_once, times, _padding(order, at_once))


def _padding(order: Sequence[int], batch: int) -> float:
    """Share of padding where items of these lengths are taken by the batch, each padded to its longest."""
    taken = (order[start : start + batch] for start in range(0, len(order), batch))
    return 1 - sum(order) / sum(len(lengths) * max(lengths) for lengths in taken)


def pays(padded: Layout, packed: Layout, *, on_cpu: bool) -> bool:
    """Whether bins are likely the faster layout: on a GPU, where they are a quarter fewer than rows and not long.

    A bin costs attention over its whole square, what is masked included, in exchange for fewer and larger
    matrix products. A CPU gains nothing from those. Tokens per CPU-second of the tiny base with LoRA, one
    thread, 256 rows, batch 2: rows of 320-420 tokens 3,842 padded (0.4 % padding), 1,513 in bins of 2,048;
    lengths of 20-1,279 3,574 padded (7 %), 1,524 in bins of 2,048 and 2,225 in bins of 1,279 (2 %). On a
    GPU a batch of two short rows leaves most of it idle, which is the gain here; that side is not measured.
    """
    return not on_cpu and packed.bin_tokens <= LONGEST_PAYING and packed.items <= 0.75 * padded.items


def best_fit(lengths: Sequence[int], capacity: int, order: Sequence[int] | None = None) -> list[list[int]]:
    """Row numbers in bins of at most `capacity` tokens: the longest first, each into the fullest bin it fits in.

    Among rows of one length `order` decides; the number of bins hangs on the lengths alone.
    """
    bins: list[list[int]] = []
    of_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of `of_room`, ascending: `capacity` at most
    for row in sorted(range(len(lengths)) if order is None else order, key=lambda row: -lengths[row]):
        length = lengths[row]
        if length > capacity:
            raise ValueError(f"a row of {length} tokens in a bin of {capacity}")
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[place]
            number = of_room[room].pop()
            if not of_room[room]:
                del of_room[room], rooms[place]
        bins[number].append(row)
        if room > length:
            if room - length not in of_room:
                insort(rooms, room - length)
                of_room[room - length] = []
            of_room[room - length].append(number)
    return bins


# --- the order of an epoch -----------------------------------------------------------------------


class LengthGrouped(Sampler[int]):
    """Row numbers in an order that puts rows of like length into one batch.

    The order of an epoch hangs on the seed and the epoch alone, so a resumed run finds the place where
    it was; transformers' own sampler draws it from the global random state, and would not.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self._lengths = lengths
        self._batch = batch
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the loop before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = _generator(self._seed, self._epoch)
        shuffled = torch.randperm(len(self._lengths), generator=generator).tolist()
        group = self._batch * LENGTH_GROUPS
        ordered: list[int] = []
        for start in range(0, len(shuffled), group):
            ordered += sorted(shuffled[start : start + group], key=lambda row: -self._lengths[row])
        batches = [ordered[start : start + self._batch] for start in range(0, len(ordered), self._batch)]
        # A short batch stays last: the loader cuts the order into batches by counting.
        short = [batches.pop()] if len(batches[-1]) < self._batch else []
        for place in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[place]
        for batch in short:
            yield from batch


class Packed(Sampler[list[int]]):
    """Bins as lists of row numbers: every row once an epoch, packed and shuffled anew by seed and epoch."""

    def __init__(self, lengths: Sequence[int], bin_tokens: int, seed: int) -> None:
        self._lengths = lengths
        self._bin_tokens = bin_tokens
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the loop before each epoch."""
        self._epoch = epoch

    @cached_property
    def _bins(self) -> int:
        return len(best_fit(self._lengths, self._bin_tokens))

    def __len__(self) -> int:
        return self._bins

    def __iter__(self) -> Iterator[list[int]]:
        generator = _generator(self._seed, self._epoch)
        shuffled = torch.randperm(len(self._lengths), generator=generator).tolist()
        bins = best_fit(self._lengths, self._bin_tokens, shuffled)
        for place in torch.randperm(len(bins), generator=generator).tolist():
            yield bins[place]


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


class Bins(Dataset[list[Example]]):
    """The rows, taken by the bin."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, rows: list[int]) -> list[Example]:
        return [self._examples[row] for row in rows]


# --- tensors -------------------------------------------------------------------------------------


def collate(examples: Sequence[Example], pad: int) -> dict[str, torch.Tensor]:
    """Rows padded on the right: causal attention never looks there, so no attention mask is needed."""
    width = max(example.length for example in examples)
    ids = torch.full((len(examples), width), pad, dtype=torch.long)
    labels = torch.full((len(examples), width), IGNORED, dtype=torch.long)
    for place, example in enumerate(examples):
        ids[place, : example.length] = torch.tensor(example.tokens.ids)
        labels[place, : example.length] = torch.tensor(example.tokens.labels)
    return {"input_ids": ids, "labels": labels}


def collate_bins(bins: Sequence[Sequence[Example]], pad: int) -> dict[str, torch.Tensor]:
    """Bins stacked, each of shape (tokens,) with its rows one behind the other and padding at its end.

    `position_ids` start at 0 with every row and with the padding. From them alone transformers makes the
    attention block-diagonal, but only without an attention mask and without a cache.
    """
    width = max(sum(example.length for example in rows) for rows in bins)
    ids = torch.full((len(bins), width), pad, dtype=torch.long)
    labels = torch.full((len(bins), width), IGNORED, dtype=torch.long)
    positions = torch.zeros((len(bins), width), dtype=torch.long)
    for place, rows in enumerate(bins):
        start = 0
        for example in rows:
            end = start + example.length
            ids[place, start:end] = torch.tensor(example.tokens.ids)
            # The first token of a row would be guessed from the row before it.
            labels[place, start + 1 : end] = torch.tensor(example.tokens.labels[1:])
            positions[place, start:end] = torch.arange(example.length)
            start = end
        positions[place, start:] = torch.arange(width - start)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


# --- whether a model can -------------------------------------------------------------------------

_PROBE_TOKENS = 16


def keeps_rows_apart(model: torch.nn.Module, placement: Placement) -> bool:
    """Whether a row in a bin is computed as if it were alone.

    Tried with random tokens on two stacked bins that differ in their first row alone. What that changes in
    the second row is compared with what it changes where positions do not restart and everything is seen;
    some attention kernels take only one bin at a time, recurrent layers carry their state over, convolutions
    look over the border. Masked attention changes nothing at all (0.0 in float32 and under bfloat16), a short
    convolution with fresh weights 5e-4 of what could leak, hence the narrow bound.
    """
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    firsts = torch.randint(vocabulary, (2, _PROBE_TOKENS), generator=generator)
    second = torch.randint(vocabulary, (1, _PROBE_TOKENS), generator=generator)
    ids = torch.cat([firsts, second.expand(2, -1)], dim=1)
    restarting = torch.arange(_PROBE_TOKENS).repeat(2).expand(2, -1)
    device = next(model.parameters()).device
    narrow = torch.autocast(device.type, dtype=placement.autocast, enabled=placement.autocast is not None)
    training = model.training
    model.eval()

    def logits(tokens: torch.Tensor, **positions: torch.Tensor) -> torch.Tensor:
        found = model(input_ids=tokens.to(device), use_cache=False, **positions).logits
        return found[:, -_PROBE_TOKENS:].float().cpu()  # type: ignore[no-any-return]

    try:
        with torch.no_grad(), narrow:
            apart = logits(ids, position_ids=restarting.to(device))
            mixed = logits(ids)
            alone = logits(second)
    except (TypeError, ValueError):  # a model that takes no position_ids
        return False
    finally:
        model.train(training)
    leaked, could_leak = _spread(apart[0] - apart[1]), _spread(mixed[0] - mixed[1])
    moved, could_move = _spread(apart[0] - alone[0]), _spread(mixed[0] - alone[0])
    return leaked <= 1e-4 * could_leak and moved <= 0.5 * could_move


def _spread(difference: torch.Tensor) -> float:
    return float(difference.square().mean().sqrt())
