"""An adapter alone as GGUF, to be put on a GGUF of its base by llama.cpp (`--lora`) and Ollama (ADAPTER)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch

from mtgdm.errors import UserError
from mtgdm.export import architectures, disk, lora
from mtgdm.export.gguf import Written, name_map
from mtgdm.export.lora import Lora
from mtgdm.export.weights import ignore

_MERGE = "--formats merged,gguf holds the same student whole"


def convert_adapter(
    adapter: Path,
    base_config: Mapping[str, Any],
    out: Path,
    *,
    name: str,
    advance: Callable[[int], None] = ignore,
) -> Written:
    """Write the LoRA adapter of a folder to `out` in float32; `advance` gets the bytes written.

    Raises UserError, before any work, for an adapter that is more than a sum of two factors on linear layers.
    """
    found, trained = architectures.family(base_config), lora.read(adapter)
    if reason := adapter_problem(trained, base_config):
        raise UserError(f"{reason}, which a GGUF adapter cannot hold", where=adapter, hint=_MERGE)
    names = name_map(found, base_config)
    alpha = _alpha(trained)
    writer = gguf.GGUFWriter(out.with_name(f".{out.name}.tmp"), found.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(name)
    try:
        for target, pair in trained.pairs.items():
            named = names.get_name(target, try_suffixes=(".weight",))
            if named is None:
                raise UserError(f"{target} has no place in a GGUF of {found.known_as}", where=adapter)
            # llama.cpp scales by alpha / rank alike everywhere: what differs from that goes into B.
            b = pair.b * (pair.scale * pair.rank / alpha)
            if architectures.interleaved(found, target):
                b = architectures.interleave(b, architectures.head_size(base_config))
            writer.add_tensor(f"{named}.lora_a", _array(pair.a))
            writer.add_tensor(f"{named}.lora_b", _array(b))
            advance(4 * (pair.a.numel() + b.numel()))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        with disk.full_as_os_error(out):
            writer.write_tensors_to_file()
        os.fsync(writer.fout[0].fileno())
        writer.close()
        writer.path.replace(out)
    finally:
        writer.close()
        writer.path.unlink(missing_ok=True)
    return Written(out, out.stat().st_size, "f32", 2 * len(trained.pairs))


def adapter_problem(trained: Lora, base_config: Mapping[str, Any]) -> str | None:
    """Why an adapter cannot be written apart from its base; None where it can."""
    if trained.replaced:
        return f"it trained {next(iter(trained.replaced))} as a whole"
    if trained.tokens:
        return f"it trained single tokens of {next(iter(trained.tokens))}"
    if any(pair.magnitude is not None for pair in trained.pairs.values()):
        return "it is a DoRA adapter"
    if "model.embed_tokens.weight" in trained.pairs:
        return "it changes the embeddings"
    if "lm_head.weight" in trained.pairs and base_config.get("tie_word_embeddings"):
        return "it changes an output layer that is tied to the embeddings"
    return None


def _alpha(trained: Lora) -> float:
    """The first layer's, which is everybody's where no pattern sets them apart; with rsLoRA alpha x sqrt(rank)."""
    first = next(iter(trained.pairs.values()))
    return first.scale * first.rank


def _array(tensor: torch.Tensor) -> Any:
    return tensor.float().contiguous().numpy()
