"""The proof that a GGUF answers like the model that was trained: the same tokens, logits and greedy answers.

The file is read by llama.cpp where llama-cpp-python is installed, else by the GGUF reader of transformers where
that is right, else the file stays plainly unproved. Both sides are asked the same rows; llama.cpp keeps its
keys and values in float32 for it, so that what differs is the file and not its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from mtgdm.checkpoints import json_object
from mtgdm.export import architectures, engines, quantize
from mtgdm.export.engines import Array, Engine, EngineName, Trained
from mtgdm.export.weights import Weights, ignore
from mtgdm.rows import Row
from mtgdm.student import generation
from mtgdm.student.base import load_model, locate, place
from mtgdm.student.chat import Chat

GREEDY_TOKENS = 48
"""So many tokens of each answer are compared."""
_MEMORY_SHARE = 0.9
"""Of the free memory, what the two models may take."""
_BYTES_A_LOGIT = 80
"""What both sides hold for each logit of the positions at hand, with what is computed of it in float64."""


@dataclass(frozen=True)
class Limit:
    """From where on a file is another model than the one trained."""

    mean_kl: float
    top1: float


LIMITS = {
    "f32": Limit(1e-5, 0.99),
    "f16": Limit(1e-4, 0.99),
    "bf16": Limit(1e-3, 0.95),
    "q8_0": Limit(5e-3, 0.90),
    "q6_k": Limit(1e-2, 0.90),
    "q5_k_m": Limit(1e-1, 0.85),
    "q4_k_m": Limit(1e-1, 0.85),
}
"""Mean divergence in nats a token, and the share of positions with the same likeliest token.

A student of mtgdm-tiny, whose copying makes it sharp for its size, gave 3e-10, 2e-6, 2e-4, 1.8e-3, 2e-3, 3.2e-2 and
4.2e-2 from top to bottom, with 93 % of the likeliest tokens at least. On the other side, in a small trained Llama
a file with the rows of Q and K in the wrong order gave 0.3 with 73 %, one without the factors of its rotation 0.1
with 82 %.
"""
FLOAT32_LOGIT = 1e-3
"""Largest difference of a logit of a file in float32, for logits that spread by one (measured: 3e-5 to 1e-4)."""
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
        if not self.top1_agreement >= top1:
            found.append(f"the likeliest token is the same at {self.top1_agreement:.1%} (limit {top1:.0%})")
        furthest = FLOAT32_LOGIT * max(1.0, self.logit_spread)
        if quant == source == "f32" and not self.max_logit_difference <= furthest:
            found.append(f"a logit differs by {self.max_logit_difference:.2g} (limit {furthest:.2g})")
        return found

    def as_dict(self) -> dict[str, Any]:
        """For a manifest."""
        return asdict(self)

    def __str__(self) -> str:
        if self.engine is None:
            return f"unproved: {self.reason}"
        return (
            f"{self.engine}, {self.rows} rows: mean KL {self.mean_kl:.1e}, the same likeliest token at "
            f"{self.top1_agreement:.1%}, {self.greedy_equal} of {self.rows} greedy answers equal"
        )


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
) -> list[Proof]:
    """Compare GGUF files with the trained model, base and adapter in float32, on rows that end with an answer.

    `base` is where the base called `name` lies, if elsewhere, `merged` the folder the files were made from; `advance`
    gets a 1 after every row of every file.
    """
    config = json_object(merged / "config.json")
    chat = generation.load_chat(str(checkpoint), name, workspace)
    longest = max((len(chat.tokens(chat.trained_text(row.messages))) for row in rows), default=0)
    if reason := _not_provable(files, longest, config, merged):
        return [Proof(reason=reason) for _ in files]
    loaded = load_model(base or locate(name, workspace), name, place("cpu"))
    model = generation.ready(generation.with_adapter(loaded, str(checkpoint), name))
    trained = Trained(model, chat)
    proofs = []
    for file in files:
        with engines.opened(file, chat, longest + GREEDY_TOKENS + 1) as (engine_name, engine):
            proofs.append(compare(trained, engine, chat, rows, engine_name, advance))
    return proofs


def _not_provable(files: Sequence[Path], longest: int, config: Mapping[str, Any], merged: Path) -> str | None:
    if longest == 0:
        return "there are no rows of the split val to compare on"
    if not quantize.is_installed() and not engines.read_rightly_by_transformers(config):
        return (
            "llama-cpp-python is not installed, and transformers reads GGUF files of this model wrongly: "
            f"{quantize.INSTALL}"
        )
    needed = memory_needed(files, longest, config, merged)
    free = psutil.virtual_memory().available
    if needed > _MEMORY_SHARE * free:
        return f"the trained model and the file take {needed / 2**30:,.0f} GiB, of which {free / 2**30:,.0f} are free"
    return None


def memory_needed(files: Sequence[Path], longest: int, config: Mapping[str, Any], merged: Path) -> int:
    """About how many bytes a proof takes at its most, on rows of at most so many tokens."""
    weights = sum(stored.numbers for stored in Weights(merged).stored.values())
    needed = 4 * weights + max(file.stat().st_size for file in files)
    if not quantize.is_installed():
        needed += 2 * 4 * weights  # while transformers reads a file it holds its weights twice
    needed += 2 * _cache_bytes(config, longest + GREEDY_TOKENS)
    return needed + _BYTES_A_LOGIT * engines.POSITIONS_AT_ONCE * int(config["vocab_size"])


def _cache_bytes(config: Mapping[str, Any], positions: int) -> int:
    """What the keys and values of so many positions take in float32."""
    heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    return 2 * 4 * positions * int(config["num_hidden_layers"]) * heads * architectures.head_size(config)


def compare(
    trained: Engine,
    written: Engine,
    chat: Chat,
    rows: Sequence[Row],
    engine: EngineName,
    advance: Callable[[int], None] = ignore,
) -> Proof:
    """Ask both the same rows: tokens of prompt and answer, logits along them, and the answer each would write."""
    sums, same_tokens, same_answers = _Sums(), 0, 0
    tokenizes = True
    for row in rows:
        text = chat.trained_text(row.messages)
        ids = chat.tokens(text)
        theirs = written.tokens(text)
        tokenizes = theirs is not None
        same_tokens += theirs == ids
        for pair in zip(trained.logits(ids), written.logits(ids), strict=True):
            sums.add(*pair)
        prompt = chat.prompt(row.prompt)
        same_answers += trained.greedy(prompt, GREEDY_TOKENS) == written.greedy(prompt, GREEDY_TOKENS)
        advance(1)
    return Proof(
        engine=engine,
        rows=len(rows),
        positions=sums.positions,
        tokens_equal=same_tokens if tokenizes else None,
        mean_kl=sums.kl / sums.positions,
        max_logit_difference=sums.furthest,
        logit_spread=float(np.sqrt(sums.squares / sums.positions)),
        top1_agreement=sums.agreeing / sums.positions,
        greedy_equal=same_answers,
    )


@dataclass
class _Sums:
    """What is added up over the positions."""

    positions: int = 0
    kl: float = 0.0
    agreeing: int = 0
    squares: float = 0.0
    furthest: float = field(default=0.0)

    def add(self, model: Array, file: Array) -> None:
        one, other = model.astype(np.float64), file.astype(np.float64)
        p, q = _log_softmax(one), _log_softmax(other)
        self.kl += float((np.exp(p) * (p - q)).sum())
        self.agreeing += int((one.argmax(-1) == other.argmax(-1)).sum())
        self.squares += float(one.var(-1).sum())
        # A maximum that passes over what is no number would call it equal.
        furthest = float(np.abs(one - other).max())
        self.furthest = furthest if np.isnan(furthest) else max(self.furthest, furthest)
        self.positions += len(model)


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
