"""The rotary embedding of a configuration: what GGUF holds of it, and what llama.cpp would turn otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter

    Array = np.ndarray[Any, Any]

_YARN_EXTRAS = ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate")
_WINDOWED, _FULL = "sliding_attention", "full_attention"
LOCAL_BASE = 10_000.0
"""What llama.cpp takes for the windowed layers of Gemma 3 where a file says nothing."""


def head_size(config: Mapping[str, Any]) -> int:
    """Numbers of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding, from `rope_parameters` or from the two keys that older files have.

    Where layers differ by the kind of their attention, that of those which attend to everything.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = dict(given.get(_FULL, given))
    rope.setdefault("rope_type", rope.get("type", "default"))
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = config.get("rope_theta") or 10_000.0
    return rope


def windowed_rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding of the layers that attend to a window, where it is one of its own."""
    given = config.get("rope_parameters") or {}
    local = config.get("rope_local_base_freq") or LOCAL_BASE
    return {"rope_type": "default", "rope_theta": local, **given.get(_WINDOWED, {})}


def turned(config: Mapping[str, Any]) -> int:
    """Numbers of one head that turn with the position."""
    part = rope_of(config).get("partial_rotary_factor")
    if part is None:
        part = config.get("partial_rotary_factor")
    return int(head_size(config) * (1.0 if part is None else part))


def problems(config: Mapping[str, Any], kinds: tuple[str, ...], *, in_part: bool) -> Iterator[str]:
    """What llama.cpp would turn otherwise; `kinds` are the scaled ones it knows, `in_part` whether of heads in part."""
    rope = rope_of(config)
    if rope["rope_type"] not in ("default", *kinds):
        yield f"its positions are scaled by {rope['rope_type']}, of which GGUF holds no such form here"
    if not in_part and turned(config) != head_size(config):
        yield "only a part of each head turns with the position"
    if turned(config) % 2:
        yield f"{turned(config)} numbers of each head turn with the position, which makes no pairs"
    if rope["rope_type"] == "yarn" and any(rope.get(key) is not None for key in _YARN_EXTRAS):
        yield "its YaRN has settings of its own beside the factor"
    if rope["rope_type"] == "longrope" and not (
        len(rope["short_factor"]) == len(rope["long_factor"]) == turned(config) // 2
    ):
        yield "its LongRoPE has not a factor for each pair of a head"


def add_keys(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """How far the positions turn, and how they are scaled."""
    from gguf import RopeScalingType

    rope = rope_of(config)
    writer.add_rope_dimension_count(turned(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if original := first_context(config):
            writer.add_rope_scaling_orig_ctx_len(original)
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_attn_factors(_longrope_attention(config))


def first_context(config: Mapping[str, Any]) -> int | None:
    """Tokens of the context before it was stretched, as far as the configuration tells."""
    rope = rope_of(config)
    found = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return int(found) if found else None


def _longrope_attention(config: Mapping[str, Any]) -> float:
    """By what LongRoPE multiplies queries and keys: sqrt(1 + ln(stretch) / ln(first context)) unless told."""
    rope = rope_of(config)
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    first = first_context(config)
    assert first is not None
    stretch = rope.get("factor") or config["max_position_embeddings"] / first
    return math.sqrt(1 + math.log(stretch) / math.log(first)) if stretch > 1.0 else 1.0


def tensors(config: Mapping[str, Any]) -> dict[str, Array]:
    """Tensors that are computed from the configuration: by what the frequency of each pair of a head is divided."""
    import numpy as np

    rope = rope_of(config)
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_factors(config, rope)}
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], dtype=np.float32)
            for kind in ("long", "short")
        }
    return {}


def _llama3_factors(config: Mapping[str, Any], rope: Mapping[str, Any]) -> Array:
    """Frequencies whose wave is longer than the context of the first training are divided by `factor`, short ones
    by 1, and those between go from one to the other. In float32 as transformers computes, so that all bits agree.
    """
    import torch

    context = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    size = turned(config)
    waves = 2 * math.pi / (1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    share = (context / waves - low) / (high - low)
    between = 1 / ((1 - share) / factor + share)
    factors = torch.where(
        waves < context / high, 1.0, torch.where(waves > context / low, float(factor), between)
    )
    found: Array = factors.numpy()
    return found
