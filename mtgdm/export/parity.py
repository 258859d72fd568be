"""The proof that a GGUF answers like the model that was trained: the same tokens, logits and greedy answers.

The trained model is asked once, for all files: it writes greedy answers after some prompts and reads the answers of
the other rows, and the logits along the last positions of each text are kept. Then it is gone, and each file reads
the same texts in one forward pass: by llama.cpp where llama-cpp-python is installed, else by the GGUF reader of
transformers where that is right, else the file stays plainly unproved. llama.cpp keeps its keys and values in
float32 for it, so that what differs is the file and not its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from mtgdm.checkpoints import json_object
from mtgdm.export import architectures, engines, quantize, widening
from mtgdm.export.engines import Array, Engine, EngineName, InTorch
from mtgdm.export.weights import Weights, ignore
from mtgdm.rows import Row
from mtgdm.student import generation
from mtgdm.student.base import Placement, load_model, locate, place
from mtgdm.student.chat import Chat

GREEDY_ROWS = 2
"""So many rows are answered greedily; along the others the answer that they hold is read."""
ANSWER_TOKENS = 48
"""So many tokens of each answer are compared."""
POSITIONS = 128
"""So many positions of each text are compared, its last ones: what damages one alone, the reading back finds."""
_MEMORY_SHARE = 0.9
"""Of the free memory, what a proof may take."""
_BYTES_A_LOGIT = 16
"""What is held for each kept logit: itself, with its row while that is put together, and the file's own."""
_POSITIONS_AT_ONCE = 16
"""Positions that are compared at once: with 150,000 tokens each number of them takes 19 MB in float64."""


@dataclass(frozen=True)
class Limit:
    """From where on a file is another model than the one trained."""

    mean_kl: float
    top1: float


LIMITS = {
    "f32": Limit(1e-5, 0.99),
    "f16": Limit(1e-4, 0.99),
    "bf16": Limit(5e-3, 0.95),
    "q8_0": Limit(2e-2, 0.90),
    "q6_k": Limit(5e-2, 0.88),
    "q5_k_m": Limit(1e-1, 0.85),
    "q4_k_m": Limit(1e-1, 0.85),
}
"""Mean divergence in nats a token, and the share of positions with the same likeliest token.

A student of mtgdm-tiny, whose copying makes it sharp for its size, gave 3e-10, 2e-6, 2e-4, 1.8e-3, 2e-3, 3.2e-2 and
4.2e-2 from top to bottom, with 93 % of the likeliest tokens at least. A real SmolLM2-135M, merged in bfloat16, gave
f16 1.0e-3 (its merge is rounded), q8_0 5.5e-3, q6_k 1.7e-2 with 92 %, q4_k_m 5.6e-2 with 88 %. On the other side,
in a small trained Llama a file with the rows of Q and K in the wrong order gave 0.3 with 73 %, one without the
factors of its rotation 0.1 with 82 %.
"""
CHANCE = 6
"""So many positions may have another likeliest token whatever their share, which of a few hundred says no more.

Of a file of mtgdm-tiny in f16 0.3 % have: of 384 positions 7 or more once in 3,000 times.
"""
FLOAT32_LOGIT = 1e-3
"""Largest difference of a logit of a file in float32, for logits that spread by one (measured: 3e-5 to 1e-4)."""
FLOAT16_TABLE_LOGIT = 5e-3
"""The same where llama.cpp reads GELU from a table in float16, as for Gemma (measured: 1.5e-3)."""
_AS_QUANT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Proof:
    """How a GGUF compares with the trained model; `reason` says why there is nothing to compare."""

    engine: EngineName | None = None
    rows: int = 0
    positions: int = 0
    tokens_equal: int | None = None
    """Rows with the same tokens; None where the engine's tokenizer is not the one that will be used."""
    mean_kl: float | None = None
    """Mean over the positions of the divergence of the file's probabilities from the model's, in nats."""
    max_logit_difference: float | None = None
    logit_spread: float | None = None
    """Standard deviation of the model's logits."""
    top1_agreement: float | None = None
    greedy_equal: int | None = None
    """Rows whose answers begin with the same tokens, or are the same where they are shorter."""
    reason: str | None = None
    greedy_rows: int = 0
    """Rows that were answered greedily; none where the model had to be asked layer by layer."""
    logit_limit: float = FLOAT32_LOGIT
    """How far a logit of a file in float32 may differ, of logits that spread by one."""

    def failures(self, quant: str, merged_dtype: str = "float32") -> list[str]:
        """What is beyond the limits of the type, or of the dtype it was made from where that is coarser."""
        if self.engine is None:
            return []
        assert self.mean_kl is not None and self.top1_agreement is not None
        assert self.max_logit_difference is not None and self.logit_spread is not None
        source = _AS_QUANT[merged_dtype]
        mean_kl = max(LIMITS[quant].mean_kl, LIMITS[source].mean_kl)
        top1 = min(LIMITS[quant].top1, LIMITS[source].top1)
        found = []
        if self.tokens_equal is not None and self.tokens_equal < self.rows:
            found.append(f"{self.rows - self.tokens_equal} of {self.rows} rows have other tokens")
        if not self.mean_kl <= mean_kl:
            found.append(f"mean KL {self.mean_kl:.2g} (limit {mean_kl:g})")
        if not (1 - self.top1_agreement) * self.positions <= max((1 - top1) * self.positions, CHANCE):
            found.append(f"the likeliest token is the same at {self.top1_agreement:.1%} (limit {top1:.0%})")
        furthest = self.logit_limit * max(1.0, self.logit_spread)
        if quant == source == "f32" and not self.max_logit_difference <= furthest:
            found.append(f"a logit differs by {self.max_logit_difference:.2g} (limit {furthest:.2g})")
        return found

    def as_dict(self) -> dict[str, Any]:
        """For a manifest."""
        return asdict(self)

    def __str__(self) -> str:
        if self.engine is None:
            return f"unproved: {self.reason}"
        greedy = f"{self.greedy_equal} of {self.greedy_rows} greedy answers equal"
        return (
            f"{self.engine}, {self.rows} rows: mean KL {self.mean_kl:.1e}, the same likeliest token at "
            f"{self.top1_agreement:.1%}, {greedy if self.greedy_rows else 'greedy answers not compared'}"
        )


@dataclass(frozen=True)
class Asked:
    """A row as both sides read it, with what the trained model makes of it."""

    text: str
    tokens: list[int]
    """Of the whole row."""
    ids: list[int]
    """Prompt and beginning of an answer, of which the last positions are compared."""
    logits: Array
    """(positions, vocabulary) of the trained model at those positions."""
    written: list[int] | None
    """What it writes after the prompt, the token that ends it included; None where `ids` hold another answer."""


def _ignore_note(_: str) -> None:
    """A note that nobody reads."""


def prove_all(
    files: Sequence[Path],
    checkpoint: Path,
    rows: Sequence[Row],
    *,
    name: str,
    base: str | None = None,
    workspace: Path,
    merged: Path,
    advance: Callable[[int], None] = ignore,
    note: Callable[[str], None] = _ignore_note,
) -> list[Proof]:
    """Compare GGUF files with the trained model, base and adapter in float32, on rows that end with an answer.

    `base` is where the base called `name` lies, if elsewhere, `merged` the folder the files were made from; `advance`
    gets the rows that the trained model, then each file has read, and `note` what is being done.
    """
    config = json_object(merged / "config.json")
    parameters = sum(stored.numbers for stored in Weights(merged).stored.values())
    chat = generation.load_chat(str(checkpoint), name, workspace, base_source=base)
    longest = max((len(chat.tokens(chat.trained_text(row.messages))) for row in rows), default=0)
    need = Need(parameters, config, len(rows), longest)
    reasons = [not_provable(file.stat().st_size, need, config) for file in files]
    if all(reasons):
        return [Proof(reason=reason) for reason in reasons]
    note("loading the trained model")
    asked = _asked(checkpoint, base or locate(name, workspace), name, chat, rows, need, advance, note)
    by_table = "gelu" in architectures.family(config).activation[1]
    limit = FLOAT16_TABLE_LOGIT if by_table else FLOAT32_LOGIT
    return [
        Proof(reason=reason)
        if reason
        else replace(_proof(file, chat, asked, longest, advance, note), logit_limit=limit)
        for file, reason in zip(files, reasons, strict=True)
    ]


def _proof(
    file: Path,
    chat: Chat,
    asked: Sequence[Asked],
    longest: int,
    advance: Callable[[int], None],
    note: Callable[[str], None],
) -> Proof:
    note(f"loading {file.name}")
    with engines.opened(file, chat, longest + ANSWER_TOKENS + 1) as (name, engine):
        note(f"comparing {file.name} with the trained model")
        return compare(asked, engine, name, advance)


def not_provable(size: int, need: Need, config: Mapping[str, Any]) -> str | None:
    """Why a file of so many bytes cannot be compared with the trained model here."""
    if need.rows == 0:
        return "there are no rows of the split val to compare on"
    if not quantize.is_installed() and not engines.read_rightly_by_transformers(config):
        return (
            "llama-cpp-python is not installed, and transformers reads GGUF files of this model wrongly: "
            f"{quantize.INSTALL}"
        )
    needed = max(need.layered, need.of_file(size))
    free = psutil.virtual_memory().available
    if needed > _MEMORY_SHARE * free:
        return f"the proof takes {needed / 2**30:,.1f} GiB of memory, of which {free / 2**30:,.1f} are free"
    return None


def place_of_whole(need: Need) -> Placement | None:
    """Where the trained model fits in float32: on a GPU, else on the CPU; None where it does not."""
    found = place("auto", "float32")
    if not found.on_cpu:
        if need.whole <= _MEMORY_SHARE * torch.cuda.mem_get_info()[0]:
            return found
        found = place("cpu")
    return found if need.whole <= _MEMORY_SHARE * psutil.virtual_memory().available else None


@dataclass(frozen=True)
class Need:
    """About how many bytes of memory a proof takes, first of the trained model, then of each file."""

    parameters: int
    config: Mapping[str, Any]
    rows: int
    longest: int
    """Tokens of the longest row."""

    @property
    def whole(self) -> int:
        """The trained model, held in float32."""
        return 4 * self.parameters + self._work + self._cache

    @property
    def layered(self) -> int:
        """The trained model, of which one layer is in float32 at a time."""
        return 4 * self.largest_layer + self._work

    @property
    def largest_layer(self) -> int:
        """Weights of the embeddings, or of a decoder layer."""
        embeddings = self._vocabulary * int(self.config["hidden_size"])
        return max(embeddings, (self.parameters - embeddings) // int(self.config["num_hidden_layers"]))

    def of_file(self, size: int) -> int:
        """A file of so many bytes, beside the logits of the trained model."""
        # While transformers reads a file it holds its weights twice.
        weights = size if quantize.is_installed() else 2 * 4 * self.parameters
        return weights + self._kept + self._cache

    @property
    def _vocabulary(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def _kept(self) -> int:
        return _BYTES_A_LOGIT * self.rows * POSITIONS * self._vocabulary

    @property
    def _work(self) -> int:
        """The logits, and the widest numbers inside a layer: gate, its activation, and their product."""
        wide = int(self.config.get("intermediate_size") or 4 * int(self.config["hidden_size"]))
        return self._kept + 3 * 4 * wide * self.rows * self.longest

    @property
    def _cache(self) -> int:
        """The keys and values in float32 of the rows that are answered at once."""
        heads = int(self.config.get("num_key_value_heads") or self.config["num_attention_heads"])
        layers = int(self.config["num_hidden_layers"])
        positions = GREEDY_ROWS * (self.longest + ANSWER_TOKENS)
        return 2 * 4 * positions * layers * heads * architectures.head_size(self.config)


# --- the trained model ---------------------------------------------------------------------------


def _asked(
    checkpoint: Path,
    source: str,
    name: str,
    chat: Chat,
    rows: Sequence[Row],
    need: Need,
    advance: Callable[[int], None],
    note: Callable[[str], None],
) -> list[Asked]:
    """What the trained model makes of the rows; it is gone from memory afterwards."""
    whole = place_of_whole(need)
    placement = whole or widening.as_stored(source, name)
    model = generation.with_adapter(load_model(source, name, placement), str(checkpoint), name)
    trained = InTorch(generation.ready(model), chat)
    greedy = GREEDY_ROWS if whole else 0
    asked = []
    with nullcontext() if whole else widening.computing_in_float32(model):
        for group, answers in ((rows[:greedy], _written), (rows[greedy:], _read)):
            if group:
                note(f"the trained model reads {len(group)} of {len(rows)} rows")
                asked += answers(trained, chat, group)
                advance(len(group))
    return asked


def _written(trained: InTorch, chat: Chat, rows: Sequence[Row]) -> list[Asked]:
    """Rows with the answer that the model writes itself."""
    prompts = [chat.prompt(row.prompt) for row in rows]
    found = trained.continued(prompts, POSITIONS - ANSWER_TOKENS + 1, ANSWER_TOKENS)
    asked = []
    for row, prompt, one in zip(rows, prompts, found, strict=True):
        text = chat.trained_text(row.messages)
        asked.append(Asked(text, chat.tokens(text), prompt + one.tokens[:-1], one.logits, one.tokens))
    return asked


def _read(trained: InTorch, chat: Chat, rows: Sequence[Row]) -> list[Asked]:
    """Rows with the answer that they hold."""
    texts = [chat.trained_text(row.messages) for row in rows]
    tokens = [chat.tokens(text) for text in texts]
    ids = [
        one[: _alike(one, chat.prompt(row.prompt)) + ANSWER_TOKENS]
        for one, row in zip(tokens, rows, strict=True)
    ]
    logits = trained.last_logits(ids, POSITIONS)
    return [Asked(*one, None) for one in zip(texts, tokens, ids, logits, strict=True)]


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many tokens both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


# --- the comparison ------------------------------------------------------------------------------


def compare(
    asked: Sequence[Asked], written: Engine, name: EngineName, advance: Callable[[int], None] = ignore
) -> Proof:
    """Let a file read what the trained model has read and written: tokens, logits, and the answer it would write."""
    sums, same_tokens, same_answers = _Sums(), 0, 0
    tokenizes = True
    for row in asked:
        theirs = written.tokens(row.text)
        tokenizes = theirs is not None
        same_tokens += theirs == row.tokens
        likeliest: list[int] = []
        place = 0
        for part in written.logits(row.ids, len(row.ids) - len(row.logits)):
            likeliest += sums.add(row.logits[place : place + len(part)], part)
            place += len(part)
        same_answers += row.written is not None and _writes(row.written, likeliest, written)
        advance(1)
    answered = sum(row.written is not None for row in asked)
    return Proof(
        engine=name,
        rows=len(asked),
        positions=sums.positions,
        tokens_equal=same_tokens if tokenizes else None,
        mean_kl=sums.kl / sums.positions,
        max_logit_difference=sums.furthest,
        logit_spread=float(np.sqrt(sums.squares / sums.positions)),
        top1_agreement=sums.agreeing / sums.positions,
        greedy_equal=same_answers if answered else None,
        greedy_rows=answered,
    )


def _writes(answer: Sequence[int], likeliest: Sequence[int], file: Engine) -> bool:
    """Whether a file writes an answer too, whose likeliest tokens along it are given.

    While they are those of the answer, the file would have written it up to there.
    """
    *before, last = answer
    own = likeliest[-len(answer) :]
    if own[:-1] != before or any(file.ends(token) for token in before):
        return False
    return own[-1] == last if len(answer) == ANSWER_TOKENS else file.ends(own[-1])


@dataclass
class _Sums:
    """What is added up over the positions."""

    positions: int = 0
    kl: float = 0.0
    agreeing: int = 0
    squares: float = 0.0
    furthest: float = 0.0

    def add(self, model: Array, file: Array) -> list[int]:
        """Compare the logits of some positions; the file's likeliest tokens there."""
        likeliest: list[int] = []
        for first in range(0, len(model), _POSITIONS_AT_ONCE):
            some = slice(first, first + _POSITIONS_AT_ONCE)
            # A copy: llama.cpp's own numbers may not be written to, of which PyTorch would warn.
            one, other = torch.tensor(model[some]).double(), torch.tensor(file[some]).double()
            p, q = one.log_softmax(-1), other.log_softmax(-1)
            self.kl += float((p.exp() * (p - q)).sum())
            theirs = other.argmax(-1)
            self.agreeing += int((one.argmax(-1) == theirs).sum())
            self.squares += float(one.var(-1, correction=0).sum())
            # A maximum that passes over what is no number would call it equal.
            furthest = float((one - other).abs().max())
            self.furthest = furthest if np.isnan(furthest) else max(self.furthest, furthest)
            self.positions += len(one)
            likeliest += theirs.tolist()
        return likeliest
