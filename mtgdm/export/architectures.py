"""Which models can be written as GGUF, known from their configuration and tokenizer alone, and the keys they get."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mtgdm.errors import UserError
from mtgdm.export import vocabulary

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Family:
    """Models that llama.cpp computes by the same graph."""

    architecture: str
    """As GGUF calls it."""
    class_name: str
    """As config.json calls it."""
    known_as: str
    pairs_neighbours: bool = False
    """Whether the rotary embedding turns neighbouring rows of Q and K rather than those half a head apart."""
    attention_bias: bool | None = False
    """Whether Q, K and V have biases; None leaves it to the configuration."""
    scaled_rope: tuple[str, ...] = ("yarn", "linear")


FAMILIES = (
    Family("qwen2", "Qwen2ForCausalLM", "Qwen2, Qwen2.5", attention_bias=True),
    Family("qwen3", "Qwen3ForCausalLM", "Qwen3"),
    Family(
        "llama",
        "LlamaForCausalLM",
        "Llama 3",
        pairs_neighbours=True,
        attention_bias=None,
        scaled_rope=("llama3", "linear"),
    ),
)
KNOWN = ", ".join(family.known_as for family in FAMILIES)


def problems(model_config: Mapping[str, Any], tokenizer_folder: Path) -> list[str]:
    """Why a model cannot be written as GGUF; an empty list where it can. Looks at no weights."""
    names = model_config.get("architectures") or ["none"]
    found = next((one for one in FAMILIES if one.class_name in names), None)
    if found is None:
        return [f"the architecture {names[0]} is not among those written as GGUF: {KNOWN}"]
    return [
        *_config_problems(found, model_config),
        *vocabulary.problems(tokenizer_folder, int(model_config["vocab_size"])),
    ]


def base_problems(model_config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The same of a base that lies on the Hub or in a folder, whose tokenizer is loaded."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return problems(model_config, Path(folder))


def family(config: Mapping[str, Any]) -> Family:
    """The family of a model's configuration; UserError for one that is not known."""
    names = config.get("architectures") or ["none"]
    for known in FAMILIES:
        if known.class_name in names:
            return known
    raise UserError(f"the architecture {names[0]} is not among those written as GGUF: {KNOWN}")


def _config_problems(found: Family, config: Mapping[str, Any]) -> Iterator[str]:
    """What llama.cpp would compute otherwise than transformers."""
    if config.get("quantization_config"):
        yield "the base is quantized already; name the one in full precision that it was made from"
    if config.get("hidden_act", "silu") != "silu":
        yield f"its activation {config['hidden_act']} is not that of {found.known_as}"
    windowed = "sliding_attention" in (config.get("layer_types") or []) or config.get("use_sliding_window")
    if windowed:
        yield "its layers attend to a sliding window, which llama.cpp does not do for this architecture"
    bias = config.get("attention_bias")
    if found.attention_bias is False and bias:
        yield f"its attention has biases, which those of {found.known_as} have not"
    rope = rope_of(config)
    if rope["rope_type"] not in ("default", *found.scaled_rope):
        yield f"its positions are scaled by {rope['rope_type']}, of which GGUF holds no such form here"
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        yield "only a part of each head turns with the position"
    if rope["rope_type"] == "yarn" and any(rope.get(key) is not None for key in _YARN_EXTRAS):
        yield "its YaRN has settings of its own beside the factor"


_YARN_EXTRAS = ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate")


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding, from `rope_parameters` or from the two keys that older files have."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = config.get("rope_theta") or 10_000.0
    return rope


def head_size(config: Mapping[str, Any]) -> int:
    """Numbers of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def add_keys(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """What the graph needs to know."""
    rope, heads = rope_of(config), int(config["num_attention_heads"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if original := rope.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(original)


def rope_factors(config: Mapping[str, Any]) -> np.ndarray[Any, Any] | None:
    """By what Llama 3.1 and later divide the frequency of each pair of a head; None where they divide by nothing.

    Frequencies whose wave is longer than the context of the first training are divided by `factor`, short ones
    by 1, and those between go from one to the other.
    """
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    import numpy as np

    context = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    size = head_size(config)
    waves = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float64) / size)
    share = np.clip((context / waves - low) / (high - low), 0.0, 1.0)
    factors: np.ndarray[Any, Any] = (1 / ((1 - share) / factor + share)).astype(np.float32)
    return factors


def interleaved(found: Family, name: str) -> bool:
    """Whether the rows of a tensor stand in another order in GGUF: those of Q and K, weights and biases."""
    return found.pairs_neighbours and name.rpartition(".")[0].endswith(
        ("self_attn.q_proj", "self_attn.k_proj")
    )


def interleave(rows: torch.Tensor, head: int) -> torch.Tensor:
    """The rows of Q or K with the two halves of each head interleaved: 0, n/2, 1, n/2+1, ..."""
    halves = rows.reshape(-1, 2, head // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)
