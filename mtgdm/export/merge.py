"""The adapter merged into its base: in float32, proved equal, then cast and written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mtgdm.errors import UserError
from mtgdm.student.base import load_model, place
from mtgdm.student.generation import with_adapter

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

LOGIT_LIMIT = 1e-3
"""Largest difference of a logit between adapter and merged model in float32 (measured: 3e-5 to 8e-5)."""
_PROBE_SHAPE = (4, 64)


@dataclass(frozen=True)
class Merged:
    """How the merged model compares with base and adapter on a fixed set of random tokens."""

    dtype: str
    parameters: int
    max_logit_difference: float
    """In float32, before the cast."""
    top1_agreement: float
    """Share of positions with the same likeliest token after the cast."""


def merge(
    checkpoint: Path, base: str, name: str, tokenizer: PreTrainedTokenizerBase, dtype: Dtype, out: Path
) -> Merged:
    """Merge the adapter of `checkpoint` into `base` and write the model and its tokenizer to `out`.

    Raises UserError where the merged model does not answer like base and adapter.
    """
    model = load_model(base, name, place("cpu"))
    wanted = _stored_dtype(base) if dtype == "auto" else getattr(torch, dtype)
    adapted: Any = with_adapter(model, str(checkpoint), name)
    tokens = _probe(model.config.vocab_size)
    before = _logits(adapted, tokens)
    merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    difference = (before - _logits(merged, tokens)).abs().max().item()
    if not difference <= LOGIT_LIMIT:
        raise UserError(
            f"the merged model differs from base and adapter by {difference:.2g} in a logit (limit {LOGIT_LIMIT})",
            where=checkpoint,
        )
    torch.nn.Module.to(merged, dtype=wanted)
    agreement = (before.argmax(-1) == _logits(merged, tokens).argmax(-1)).float().mean().item()
    merged.save_pretrained(out)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    _write_rope_theta(out / "config.json")
    return Merged(str(wanted).removeprefix("torch."), merged.num_parameters(), difference, agreement)


def _stored_dtype(base: str) -> torch.dtype:
    from transformers import AutoConfig

    stored = AutoConfig.from_pretrained(base).dtype
    return stored if isinstance(stored, torch.dtype) else torch.bfloat16


def _probe(vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, _PROBE_SHAPE, generator=torch.Generator().manual_seed(0))


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.float()


def _write_rope_theta(path: Path) -> None:
    """Ollama reads `rope_theta` at the top level alone, where transformers 5 no longer writes it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope and "rope_theta" not in config:
        config["rope_theta"] = rope["rope_theta"]
        path.write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n"
        )
