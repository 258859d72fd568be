"""The adapter merged into its base, tensor by tensor: added in float32, cast, written, and proved equal.

Nothing holds the whole model: a tensor of the base is read, what the adapter adds is added in float32, and the
sum is cast and appended to its shard. So the memory is that of the largest tensor and of the adapter, whatever the
size of the model. The logits of both are compared in the same way, a layer at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from transformers import PretrainedConfig

from mtgdm.checkpoints import full_precision
from mtgdm.errors import UserError
from mtgdm.export import disk, lora, widening
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
from mtgdm.student import adapter_files
from mtgdm.student.adapter_files import EMBEDDINGS, OUTPUT
from mtgdm.student.base import at_hand, folder_of, load_config, load_model
from mtgdm.student.chat import Chat
from mtgdm.student.generation import with_adapter

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

LOGIT_LIMIT = 1e-3
"""Largest difference of a logit between adapter and merged model in float32 (measured: 3e-5 to 8e-5)."""
_PROBE_SHAPE = (2, 64)


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
            hint="name the model that it was made from: --base-model "
            + (full_precision(name) or "NAME, in full precision"),
        )
    weights = Weights(folder_of(base, name))
    if EMBEDDINGS in weights.stored:
        known = weights.stored[EMBEDDINGS].shape[0]
        tied = bool(config.tie_word_embeddings)
        config.vocab_size = adapter_files.check_vocabulary(checkpoint, known, name, tied=tied)
    merger = _Merger(weights, adapter, config, dtype_of(base, name, dtype))
    shapes = {one: stored.shape for one, stored in merger.stored.items()}
    if config.tie_word_embeddings:
        shapes[OUTPUT] = shapes[EMBEDDINGS]
    adapter.check(shapes, name, checkpoint)
    parameters = sum(stored.numbers for stored in merger.stored.values())
    proof = _prove(merger, checkpoint, base, name)
    unproved, (difference, agreement) = (proof, (None, None)) if isinstance(proof, str) else (None, proof)
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
    wanted = named_dtype(dtype_of(base, name or base, dtype))
    return sum(stored.numbers for stored in weights.stored.values()) * width(wanted)


class _Merger:
    """The tensors of the merged model, each made when it is asked for."""

    def __init__(self, weights: Weights, adapter: Lora, config: PretrainedConfig, dtype: torch.dtype) -> None:
        if config.tie_word_embeddings and EMBEDDINGS in adapter.pairs and EMBEDDINGS in adapter.replaced:
            # The output layer is what lies under the adapter of the embeddings.
            under = {OUTPUT: adapter.replaced[EMBEDDINGS], **adapter.replaced}
            adapter = replace(adapter, replaced=under)
        self.weights = weights
        self.adapter = adapter
        self.config = config
        self.dtype = dtype
        self._part_ways = bool(config.tie_word_embeddings) and adapter.part_ways(EMBEDDINGS, OUTPUT)
        if self._part_ways:
            # An adapter on one of two tied matrices: the merged ones differ, so each needs a place of its own.
            config.tie_word_embeddings = False
        config.dtype = dtype

    @property
    def stored(self) -> dict[str, Stored]:
        """What the base holds, with the output apart where it has to be written apart."""
        found = dict(self.weights.stored)
        if self._part_ways:
            found.setdefault(OUTPUT, found[EMBEDDINGS])
        for name in (EMBEDDINGS, OUTPUT):
            if name in found:
                stored = found[name]
                found[name] = replace(stored, shape=(self.config.vocab_size, *stored.shape[1:]))
        if self._part_ways:
            return found
        if self.config.tie_word_embeddings:
            found.pop(OUTPUT, None)
        return found

    @property
    def plan(self) -> list[Planned]:
        """What will be written."""
        return [
            Planned(name, stored.shape, named_dtype(self.dtype) if is_float(stored.dtype) else stored.dtype)
            for name, stored in self.stored.items()
        ]

    def named(self, name: str) -> str:
        """What a weight of the model is written as: an output that is tied to the embeddings has none of its own."""
        return name if name in self.stored else EMBEDDINGS

    def exact(self, name: str) -> torch.Tensor:
        """A tensor in float32, before the cast."""
        source = name if name in self.weights.stored else EMBEDDINGS
        tensor = self.adapter.tensor(name, self.weights.tensor(source))
        # Of a vocabulary that was cut for the training, what was not trained is cut too.
        return tensor[: self.config.vocab_size] if name in (EMBEDDINGS, OUTPUT) else tensor

    def cast(self, name: str) -> torch.Tensor:
        """A tensor as it is written; UserError where it is no number, or none in that dtype."""
        exact = self.exact(name)
        cast = exact.to(self.dtype)
        if not is_finite(cast):
            if is_finite(exact):
                raise UserError(f"a weight of {name} is too large for float16", hint="--dtype bfloat16")
            raise UserError(f"a merged weight of {name} is infinite or no number", where=self.weights.folder)
        return cast


def dtype_of(base: str, name: str, wanted: str) -> torch.dtype:
    """The dtype asked for; `auto` is the one that most of the base's bytes are stored in.

    Of a base that is not at hand it is what its config.json says, which need not say anything.
    """
    if wanted != "auto":
        dtype: torch.dtype = getattr(torch, wanted)
        return dtype
    if (folder := at_hand(base)) is not None and (stored := Weights(folder).main_dtype) is not None:
        return stored
    declared = load_config(base, name).dtype
    return declared if isinstance(declared, torch.dtype) else torch.bfloat16


# --- proof ---------------------------------------------------------------------------------------


def _prove(merger: _Merger, checkpoint: Path, base: str, name: str) -> tuple[float, float] | str:
    """The largest difference of a logit in float32, and how often the likeliest token is the same after the cast.

    Both models are read layer by layer. Why nothing was compared, where the merged one cannot be.
    """
    model = load_model(base, name, widening.as_stored(base, name))
    kind: Any = type(model)
    with init_empty_weights(include_buffers=False):
        merged = kind(merger.config)
    known = {*merger.stored, *merged.all_tied_weights_keys}
    if unknown := next((one for one, _ in merged.named_parameters() if one not in known), None):
        return f"the base's files do not hold {unknown} under the name that the model has for it"
    tokens = _probe(merger.config.vocab_size)
    before = _logits(with_adapter(model, str(checkpoint), name), tokens)
    exact = _logits(merged, tokens, lambda one, _: merger.exact(merger.named(one)))
    difference = (before - exact).abs().max().item()
    # Rounding grows with the logits themselves; those of small models are of the order of one.
    limit = LOGIT_LIMIT * max(1.0, before.std().item())
    if not difference <= limit:
        raise UserError(
            f"the merged model differs from base and adapter by {difference:.2g} in a logit (limit {limit:.2g})",
            where=checkpoint,
        )
    cast = _logits(merged, tokens, lambda one, _: merger.cast(merger.named(one)).float())
    return difference, (before.argmax(-1) == cast.argmax(-1)).float().mean().item()


def _probe(vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, _PROBE_SHAPE, generator=torch.Generator().manual_seed(0))


def _logits(model: Any, tokens: torch.Tensor, make: widening.Make = widening.as_they_are) -> torch.Tensor:
    model.eval()
    with torch.inference_mode(), widening.computing_in_float32(model, make):
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
