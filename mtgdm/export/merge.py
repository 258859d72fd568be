"""The adapter merged into its base, tensor by tensor: added in float32, cast, written, and proved equal.

Nothing holds the whole model: a tensor of the base is read, what the adapter adds is added in float32, and the
sum is cast and appended to its shard. So the memory is that of the largest tensor and of the adapter, whatever the
size of the model. Where the whole model fits into memory twice, its logits are compared as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from transformers import PretrainedConfig

from mtgdm.errors import UserError
from mtgdm.export import disk, lora
from mtgdm.export.lora import Lora
from mtgdm.export.weights import (
    SHARD_BYTES,
    Planned,
    Stored,
    Weights,
    ignore,
    is_finite,
    is_float,
    named_dtype,
    width,
    write_shards,
)
from mtgdm.student.base import folder_of, load_config, load_model, place
from mtgdm.student.chat import Chat
from mtgdm.student.generation import with_adapter

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

LOGIT_LIMIT = 1e-3
"""Largest difference of a logit between adapter and merged model in float32 (measured: 3e-5 to 8e-5)."""
MEMORY_SHARE = 0.5
"""The logits are compared where base and merged model in float32 take less than this share of the free memory."""
_PROBE_SHAPE = (4, 64)
_EMBEDDINGS, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Merged:
    """How the merged model compares with base and adapter on a fixed set of random tokens."""

    dtype: str
    parameters: int
    max_logit_difference: float | None
    """In float32, before the cast; None where it was not measured."""
    top1_agreement: float | None
    """Share of positions with the same likeliest token after the cast; None where it was not measured."""
    unproved: str | None = None
    """Why the logits were not compared."""


def merge(
    checkpoint: Path,
    base: str,
    name: str,
    chat: Chat,
    dtype: Dtype,
    out: Path,
    *,
    advance: Callable[[int], None] = ignore,
    shard_bytes: int = SHARD_BYTES,
) -> Merged:
    """Merge the adapter of `checkpoint` into `base` and write the model and its tokenizer to `out`.

    `advance` gets the bytes written. Raises UserError where the adapter is of a kind that is not merged here or
    does not fit, where a merged weight is no number, and where the merged model does not answer like base and
    adapter.
    """
    adapter, config = lora.read(checkpoint), load_config(base, name)
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"the base {name} is stored quantized, and an adapter is merged into full precision",
            hint="`base_model` in training.json may name the model in full precision that it was made from",
        )
    merger = _Merger(Weights(folder_of(base, name)), adapter, config, _dtype(base, name, dtype))
    adapter.check({one: stored.shape for one, stored in merger.stored.items()}, name, checkpoint)
    parameters = sum(stored.numbers for stored in merger.stored.values())
    unproved = _too_large(parameters)
    difference, agreement = (None, None) if unproved else _prove(merger, checkpoint, base, name)
    out.mkdir(parents=True, exist_ok=True)
    write_shards(merger.plan, merger.cast, out, advance=advance, shard_bytes=shard_bytes)
    _write_config(merger.config, out)
    _write_generation(merger.weights.folder, out, chat.end_of_turn)
    with disk.full_as_os_error(out / "tokenizer.json"):
        chat.tokenizer.save_pretrained(out, save_jinja_files=False)
    return Merged(str(merger.dtype).removeprefix("torch."), parameters, difference, agreement, unproved)


def merged_bytes(base: str, dtype: Dtype, *, name: str = "") -> int:
    """How much room the merged model takes on disk."""
    weights = Weights(folder_of(base, name or base))
    wanted = named_dtype(_dtype(base, name or base, dtype))
    return sum(stored.numbers for stored in weights.stored.values()) * width(wanted)


class _Merger:
    """The tensors of the merged model, each made when it is asked for."""

    def __init__(self, weights: Weights, adapter: Lora, config: PretrainedConfig, dtype: torch.dtype) -> None:
        self.weights = weights
        self.adapter = adapter
        self.config = config
        self.dtype = dtype
        self._part_ways = bool(config.tie_word_embeddings) and any(
            adapter.changes(one) for one in (_EMBEDDINGS, _OUTPUT)
        )
        if self._part_ways:
            # An adapter on one of two tied matrices: the merged ones differ, so each needs a place of its own.
            config.tie_word_embeddings = False
        config.dtype = dtype

    @property
    def stored(self) -> dict[str, Stored]:
        """What the base holds, with the output apart where it has to be written apart."""
        found = dict(self.weights.stored)
        if self._part_ways:
            found.setdefault(_OUTPUT, found[_EMBEDDINGS])
        elif self.config.tie_word_embeddings:
            found.pop(_OUTPUT, None)
        return found

    @property
    def plan(self) -> list[Planned]:
        """What will be written."""
        return [
            Planned(name, stored.shape, named_dtype(self.dtype) if is_float(stored.dtype) else stored.dtype)
            for name, stored in self.stored.items()
        ]

    def exact(self, name: str) -> torch.Tensor:
        """A tensor in float32, before the cast."""
        source = name if name in self.weights.stored else _EMBEDDINGS
        return self.adapter.tensor(name, self.weights.tensor(source))

    def cast(self, name: str) -> torch.Tensor:
        """A tensor as it is written; UserError where it is no number, or none in that dtype."""
        exact = self.exact(name)
        cast = exact.to(self.dtype)
        if not is_finite(cast):
            if is_finite(exact):
                raise UserError(f"a weight of {name} is too large for float16", hint="--dtype bfloat16")
            raise UserError(f"a merged weight of {name} is infinite or no number", where=self.weights.folder)
        return cast


def _dtype(base: str, name: str, wanted: Dtype) -> torch.dtype:
    """The dtype asked for; `auto` is the one the base is stored in."""
    if wanted != "auto":
        dtype: torch.dtype = getattr(torch, wanted)
        return dtype
    stored = load_config(base, name).dtype
    return stored if isinstance(stored, torch.dtype) else torch.bfloat16


# --- proof ---------------------------------------------------------------------------------------


def _too_large(parameters: int) -> str | None:
    """Why the logits of base and merged model are not compared: both in float32 would fill the memory."""
    needed, free = 2 * 4 * parameters, psutil.virtual_memory().available
    if needed <= MEMORY_SHARE * free:
        return None
    return (
        f"comparing the logits would take {needed / 2**30:,.0f} GiB of memory, more than {MEMORY_SHARE:.0%} of the "
        f"{free / 2**30:,.0f} GiB that are free"
    )


def _prove(merger: _Merger, checkpoint: Path, base: str, name: str) -> tuple[float, float]:
    """The largest difference of a logit in float32, and how often the likeliest token is the same after the cast."""
    tokens = _probe(merger.config.vocab_size)
    model = load_model(base, name, place("cpu"))
    before = _logits(with_adapter(model, str(checkpoint), name), tokens)
    kind: Any = type(model)
    del model
    merged = kind.from_pretrained(
        None,
        config=merger.config,
        state_dict={one: merger.exact(one) for one in merger.stored},
        dtype=torch.float32,
    )
    difference = (before - _logits(merged, tokens)).abs().max().item()
    # Rounding grows with the logits themselves; those of small models are of the order of one.
    limit = LOGIT_LIMIT * max(1.0, before.std().item())
    if not difference <= limit:
        raise UserError(
            f"the merged model differs from base and adapter by {difference:.2g} in a logit (limit {limit:.2g})",
            where=checkpoint,
        )
    torch.nn.Module.to(merged, dtype=merger.dtype)
    agreement = (before.argmax(-1) == _logits(merged, tokens).argmax(-1)).float().mean().item()
    return difference, agreement


def _probe(vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, _PROBE_SHAPE, generator=torch.Generator().manual_seed(0))


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.float()


# --- what lies beside the weights ----------------------------------------------------------------


def _write_config(config: PretrainedConfig, out: Path) -> None:
    """config.json with the rotary embedding at the top level too, where Ollama and older readers look for it."""
    config.save_pretrained(out)
    path = out / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written.update(_older_rope(written.get("rope_parameters") or {}))
    _write_json(path, written)


def _older_rope(rope: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if "rope_theta" in rope:
        yield "rope_theta", rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        yield "rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"}


def _write_generation(base: Path, out: Path, end_of_turn: int) -> None:
    """generation_config.json by which engines decode as `mtgdm eval` does: greedily, up to the trained end of turn.

    A base's own has penalties and sampling, which transformers and vLLM apply unasked. vLLM samples at a temperature
    of 1 where none is named.
    """
    path = base / "generation_config.json"
    of_base = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    declared = of_base.get("eos_token_id")
    ends = [declared] if isinstance(declared, int) else list(declared or [])
    config = {key: of_base[key] for key in ("bos_token_id", "pad_token_id") if of_base.get(key) is not None}
    config["eos_token_id"] = [*ends, *([] if end_of_turn in ends else [end_of_turn])]
    _write_json(out / "generation_config.json", config | {"do_sample": False, "temperature": 0.0})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")
