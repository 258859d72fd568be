"""How rows lie in a batch: padded beside rows of like length, or several to a bin, where none sees another."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from mtgdm.student.base import Placement
from mtgdm.student.chat import IGNORED
from mtgdm.student.examples import Example

ALIKE = 8
"""So many rows of like length follow one another: most of the padding goes, a step of more holds several kinds."""

LENGTH_GROUPS = 16
"""So many of those groups are sorted by length together, so that the order stays mixed."""

BIN_TOKENS = 2048
"""Longest bin, unless a row is longer: attention costs the square of it, and longer ones fill little better."""

LONGEST_PAYING = 4096
"""Longer bins are made on request alone: their attention is no longer small beside the matrix products."""


@dataclass(frozen=True)
class Layout:
    """How an epoch is cut into steps, and a step into what a device computes at once.

    An item is a row where `bin_tokens` is 0, else a bin of at most so many tokens.
    """

    rows: int
    items: int
    bin_tokens: int
    items_a_step: int
    """Items whose gradient one optimizer step takes, over all processes."""
    batch: int
    """Most items a process computes at once."""
    processes: int
    padding: float
    """Share of the computed positions that hold no token, in the first epoch."""

    @property
    def grad_accum(self) -> int:
        """Batches of a process to a step."""
        return math.ceil(self.items_a_step / (self.batch * self.processes))

    @property
    def steps_an_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(self.items / self.items_a_step)

    def steps(self, epochs: float) -> int:
        """Optimizer steps of so many epochs."""
        return max(1, math.ceil(epochs * self.steps_an_epoch))

    @property
    def rows_a_step(self) -> float:
        """Rows whose gradient one optimizer step takes, on average."""
        return self.items_a_step * self.rows / self.items

    def __str__(self) -> str:
        share = f"{self.padding:.0%} padding".replace("%", " %")
        shared = f" on each of {self.processes} processes" if self.processes > 1 else ""
        if not self.bin_tokens:
            return f"{self.rows:,} rows, {self.batch:,} of like length to a batch{shared}, {share}"
        return (
            f"packed: {self.rows:,} rows in {self.items:,} bins of {self.bin_tokens:,} tokens, {share}; a step takes "
            f"{self.items_a_step:,} bins, about {self.rows_a_step:,.0f} rows, {self.batch:,} to a batch{shared}"
        )


def padded(lengths: Sequence[int], *, batch: int, grad_accum: int, seed: int, processes: int = 1) -> Layout:
    """Rows of like length in one batch."""
    return _measured(lengths, len(lengths), 0, batch * grad_accum * processes, batch, processes, seed)


def packed(
    lengths: Sequence[int], *, batch: int, grad_accum: int, max_len: int, seed: int, processes: int = 1
) -> Layout:
    """Rows in bins, as many to a step as without packing, or as near as whole bins come.

    So learning rate, warm-up, `eval_steps` and `max_steps` mean what they mean without packing. At most
    `batch` bins are computed at once: no more positions than `batch` rows of `max_len`.
    """
    rows_a_step = batch * grad_accum * processes
    tokens_a_step = math.ceil(rows_a_step * sum(lengths) / len(lengths))
    bin_tokens = min(max_len, max(max(lengths), min(BIN_TOKENS, tokens_a_step)))
    bins = len(best_fit(lengths, bin_tokens))
    bins_a_step = min(bins, max(1, round(rows_a_step * bins / len(lengths))))
    return _measured(lengths, bins, bin_tokens, bins_a_step, min(batch, bins_a_step), processes, seed)


def _measured(
    lengths: Sequence[int],
    items: int,
    bin_tokens: int,
    items_a_step: int,
    batch: int,
    processes: int,
    seed: int,
) -> Layout:
    """The layout with the padding of its first epoch."""
    layout = Layout(len(lengths), items, bin_tokens, items_a_step, batch, processes, 0.0)
    computed = sum(
        len(items) * max(sum(lengths[row] for row in item) for item in items)
        for rank in range(processes)
        for items in Batches(lengths, layout, seed, rank)
    )
    return replace(layout, padding=1 - sum(lengths) / computed)


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

Item = list[int]
"""Numbers of the rows computed in one line of a batch: one, those of a bin, or none where there is nothing left."""


class Batches(Sampler[list[Item]]):
    """What one process computes at once, batch after batch of an epoch; every row comes once an epoch.

    Which rows a step takes hangs on the lengths, the seed, the epoch and the items a step alone: two batches
    of 4, one of 8, or two processes with one of 4 each train the same. So a resumed run finds its place, and
    one that ran out of memory can go on with smaller batches.
    """

    def __init__(self, lengths: Sequence[int], layout: Layout, seed: int, rank: int = 0) -> None:
        self._lengths = lengths
        self._layout = layout
        self._seed = seed
        self._rank = rank
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the loop before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        steps, rest = divmod(self._layout.items, self._layout.items_a_step)
        at_once = self._layout.batch * self._layout.processes
        return steps * self._layout.grad_accum + math.ceil(rest / at_once)

    def __iter__(self) -> Iterator[list[Item]]:
        batch, processes = self._layout.batch, self._layout.processes
        items = self._items()
        for start in range(0, len(items), self._layout.items_a_step):
            step = sorted(items[start : start + self._layout.items_a_step], key=self._tokens, reverse=True)
            batches = [step[place : place + batch] for place in range(0, len(step), batch)]
            # All processes compute equally often: where rows run short, one computes nothing but padding.
            batches += [[[]]] * (-len(batches) % processes)
            yield from batches[self._rank :: processes]

    def _items(self) -> list[Item]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        shuffled = torch.randperm(len(self._lengths), generator=generator).tolist()
        if self._layout.bin_tokens:
            bins = best_fit(self._lengths, self._layout.bin_tokens, shuffled)
            return [bins[place] for place in torch.randperm(len(bins), generator=generator).tolist()]
        return [[row] for row in self._grouped(shuffled, generator)]

    def _grouped(self, shuffled: Sequence[int], generator: torch.Generator) -> Iterator[int]:
        """The rows with those of like length behind one another."""
        alike = min(ALIKE, self._layout.items_a_step)
        window = alike * LENGTH_GROUPS
        ordered: list[int] = []
        for start in range(0, len(shuffled), window):
            ordered += sorted(shuffled[start : start + window], key=lambda row: -self._lengths[row])
        groups = [ordered[start : start + alike] for start in range(0, len(ordered), alike)]
        short = [groups.pop()] if len(groups[-1]) < alike else []
        for place in torch.randperm(len(groups), generator=generator).tolist():
            yield from groups[place]
        for group in short:
            yield from group

    def _tokens(self, item: Item) -> int:
        return sum(self._lengths[row] for row in item)


def hungriest(
    lengths: Sequence[int], trained: Sequence[int], layout: Layout, seed: int, cost: Callable[[int, int], int]
) -> list[Item]:
    """The batch of the first epoch, over all processes, that costs most by its positions and its trained tokens."""

    def cost_of(batch: Sequence[Item]) -> int:
        width = max(sum(lengths[row] for row in item) for item in batch)
        return cost(len(batch) * width, sum(trained[row] for item in batch for row in item))

    found = [batch for rank in range(layout.processes) for batch in Batches(lengths, layout, seed, rank)]
    return max(found, key=cost_of)


class Rows(Dataset[list[Example]]):
    """The rows, taken by the item."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, item: Item) -> list[Example]:
        return [self._examples[row] for row in item]


# --- tensors -------------------------------------------------------------------------------------


def collate(items: Sequence[Sequence[Example]], pad: int, *, packed: bool) -> dict[str, Any]:
    """A batch of shape (items, tokens): the rows of an item one behind the other, padding at its end.

    Causal attention never looks to the right, so padding needs no mask. `position_ids`, where `packed`, start
    at 0 with every row and with the padding: from them alone transformers makes the attention block-diagonal,
    but only without an attention mask and without a cache. `trained` are the places, counted through the whole
    batch, whose logits guess the `targets`: found here, on the CPU, since a GPU would have to stop for them.
    """
    width = max(1, *(sum(example.length for example in item) for item in items))
    ids = torch.full((len(items), width), pad, dtype=torch.long)
    labels = torch.full((len(items), width), IGNORED, dtype=torch.long)
    positions = torch.zeros((len(items), width), dtype=torch.long)
    for place, item in enumerate(items):
        start = 0
        for example in item:
            end = start + example.length
            ids[place, start:end] = torch.tensor(example.tokens.ids)
            # The first token of a row would be guessed from the row before it.
            labels[place, start + 1 : end] = torch.tensor(example.tokens.labels[1:])
            positions[place, start:end] = torch.arange(example.length)
            start = end
        positions[place, start:] = torch.arange(width - start)
    guessed = torch.full_like(labels, IGNORED)
    guessed[:, :-1] = labels[:, 1:]
    trained = (guessed.flatten() != IGNORED).nonzero().squeeze(1)
    batch = {
        "input_ids": ids,
        "labels": labels,
        "trained": trained,
        "targets": guessed.flatten()[trained],
        "tokens": sum(example.length for item in items for example in item),
    }
    return {**batch, "position_ids": positions} if packed else batch


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
