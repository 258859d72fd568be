"""Which models can be written as GGUF, known from their configuration and tokenizer alone, and the keys they get."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mtgdm.errors import UserError
from mtgdm.export import rotary, vocabulary
from mtgdm.export.rotary import head_size as head_size
from mtgdm.export.rotary import rope_of as rope_of

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

Config = Mapping[str, Any]

GEMMA_PERIOD = 6
"""Of the layers of Gemma 3 every sixth attends to everything, in llama.cpp as well."""
SMOLLM3_PERIOD = 4
"""Of the layers of SmolLM 3 every fourth has no positions, in llama.cpp as well."""
_GEMMA_27B_LAYERS = 62
_WINDOWED = "sliding_attention"


# --- what is peculiar to one architecture --------------------------------------------------------


def _gemma3_problems(config: Config) -> Iterator[str]:
    # llama.cpp takes the scale of the attention from the size of a head, but for the model of 62 layers.
    divided = config["num_hidden_layers"] == _GEMMA_27B_LAYERS
    scaled = config["hidden_size"] // config["num_attention_heads"] if divided else head_size(config)
    if config.get("query_pre_attn_scalar", scaled) != scaled:
        yield f"its attention is scaled by {config['query_pre_attn_scalar']}, and llama.cpp's by {scaled}"
    if config.get("attn_logit_softcapping"):
        yield "its attention is capped, which llama.cpp does not do for Gemma 3"
    if config.get("use_bidirectional_attention"):
        yield "its attention looks ahead"
    kinds = config.get("layer_types")
    if kinds and any(
        (kind == _WINDOWED) == ((place + 1) % GEMMA_PERIOD == 0) for place, kind in enumerate(kinds)
    ):
        yield f"its layers attend to a window in another order than llama.cpp's: all but each {GEMMA_PERIOD}th"
    if rotary.windowed_rope_of(config)["rope_type"] != "default":
        yield "the positions of its layers with a window are scaled"


def _gemma3_keys(writer: GGUFWriter, config: Config) -> None:
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_freq_base_swa(rotary.windowed_rope_of(config)["rope_theta"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def _phi3_keys(writer: GGUFWriter, config: Config) -> None:
    writer.add_rope_scaling_orig_ctx_len(
        rotary.first_context(config) or int(config["max_position_embeddings"])
    )
    # llama.cpp leaves the window out of account; 0 tells it that the model has none.
    writer.add_sliding_window(config.get("sliding_window") or 0)


def _smollm3_problems(config: Config) -> Iterator[str]:
    turning = config.get("no_rope_layers") or []
    if any(bool(turns) == ((place + 1) % SMOLLM3_PERIOD == 0) for place, turns in enumerate(turning)):
        yield f"its layers without positions are others than each {SMOLLM3_PERIOD}th, which llama.cpp takes"


def _no_problems(_: Config) -> Iterator[str]:
    return iter(())


def _no_keys(_: GGUFWriter, __: Config) -> None:
    """Nothing beside what all have."""


def _heads_of_128(config: Config) -> bool:
    return head_size(config) == 128


def _plain_rope(config: Config) -> bool:
    return bool(rope_of(config)["rope_type"] == "default")


def _plain_llama(config: Config) -> bool:
    return _plain_rope(config) and not config.get("attention_bias") and not config.get("mlp_bias")


def _plain_gemma3(config: Config) -> bool:
    """With what the reader takes for granted: how the attention is scaled, and how windowed layers turn."""
    local = rotary.windowed_rope_of(config)["rope_theta"]
    return _plain_rope(config) and (config.get("query_pre_attn_scalar"), local) == (256, rotary.LOCAL_BASE)


def _plain_phi3(config: Config) -> bool:
    return _plain_rope(config) and rotary.turned(config) == head_size(config) and window_of(config) is None


def _never(_: Config) -> bool:
    return False


# --- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Models that llama.cpp computes by the same graph."""

    architecture: str
    """As GGUF calls it."""
    class_name: str
    """As config.json calls it."""
    known_as: str
    pairs_neighbours: bool = False
    """Whether llama.cpp turns neighbouring rows of Q and K where transformers turns those half a head apart."""
    attention_bias: bool | None = False
    """Whether Q, K and V have biases; None leaves it to the configuration."""
    forward_bias: bool = False
    """Whether llama.cpp has biases in the feed-forward layers, where the configuration asks for them."""
    activation: tuple[str, str] = ("hidden_act", "silu")
    """The key that names the activation, and the one that llama.cpp has."""
    scaled_rope: tuple[str, ...] = ("yarn", "linear")
    turns_in_part: bool = False
    """Whether llama.cpp knows heads of which only a part turns."""
    norm_offset: float = 0.0
    """What the weights of norms are added to when they are used, and llama.cpp has them added already."""
    windows: bool = False
    """Whether llama.cpp lets the layers attend to a window that the configuration names."""
    problems: Callable[[Config], Iterator[str]] = _no_problems
    """What llama.cpp would compute otherwise, beside what is looked at for all."""
    add_keys: Callable[[GGUFWriter, Config], None] = _no_keys
    read_by_transformers: Callable[[Config], bool] = _never
    """Whether the GGUF reader of transformers makes the same model of a file."""


FAMILIES = (
    Family(
        "qwen2", "Qwen2ForCausalLM", "Qwen2, Qwen2.5", attention_bias=True, read_by_transformers=_plain_rope
    ),
    Family("qwen3", "Qwen3ForCausalLM", "Qwen3", read_by_transformers=_heads_of_128),
    Family(
        "llama",
        "LlamaForCausalLM",
        "Llama, SmolLM2",
        pairs_neighbours=True,
        attention_bias=None,
        forward_bias=True,
        scaled_rope=("llama3", "linear"),
        read_by_transformers=_plain_llama,
    ),
    Family(
        "llama",
        "MistralForCausalLM",
        "Mistral",
        pairs_neighbours=True,
        scaled_rope=("linear",),
        read_by_transformers=_plain_llama,
    ),
    Family(
        "gemma3",
        "Gemma3ForCausalLM",
        "Gemma 3",
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        scaled_rope=("linear",),
        norm_offset=1.0,
        windows=True,
        problems=_gemma3_problems,
        add_keys=_gemma3_keys,
        read_by_transformers=_plain_gemma3,
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        "Phi-3, Phi-4",
        scaled_rope=("longrope",),
        turns_in_part=True,
        add_keys=_phi3_keys,
        read_by_transformers=_plain_phi3,
    ),
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        "SmolLM3",
        pairs_neighbours=True,
        problems=_smollm3_problems,
    ),
    Family("glm4", "Glm4ForCausalLM", "GLM-4-0414", attention_bias=None, scaled_rope=(), turns_in_part=True),
    Family("chatglm", "GlmForCausalLM", "GLM-4", attention_bias=None, scaled_rope=(), turns_in_part=True),
    Family(
        "llama",
        "InternLM3ForCausalLM",
        "InternLM3",
        pairs_neighbours=True,
        attention_bias=None,
        forward_bias=True,
        scaled_rope=("linear",),
        read_by_transformers=_plain_llama,
    ),
)
KNOWN = ", ".join(family.known_as for family in FAMILIES)
_REMOTE = "comes with code of its own from the Hub, which is not run here"
_REFUSED = {
    "InternLM2ForCausalLM": f"InternLM 2 and 2.5 {_REMOTE}; InternLM3 can be written",
    "ChatGLMModel": f"this form of GLM-4 {_REMOTE}; the one whose name ends in -hf can be written",
    "Phi3SmallForCausalLM": f"Phi-3-small {_REMOTE}",
    "Gemma3ForConditionalGeneration": "Gemma 3 with eyes (4B and more) is merged with its images' part, which a GGUF "
    "of text has no place for; the models of text alone (270M, 1B) can be written",
}


def problems(model_config: Config, tokenizer_folder: Path, template: str | None = None) -> list[str]:
    """Why a model cannot be written as GGUF; an empty list where it can. Looks at no weights.

    `template` is the chat template in use, the folder's own by default.
    """
    try:
        found = family(model_config)
    except UserError as error:
        return [error.message]
    return [
        *_config_problems(found, model_config),
        *vocabulary.problems(tokenizer_folder, int(model_config["vocab_size"]), template),
    ]


def base_problems(model_config: Config, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The same of a base that lies on the Hub or in a folder, whose tokenizer is loaded."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return problems(model_config, Path(folder))


def family(config: Config) -> Family:
    """The family of a model's configuration; UserError for one that is not known."""
    names = config.get("architectures") or ["none"]
    for known in FAMILIES:
        if known.class_name in names:
            return known
    if reason := _REFUSED.get(names[0]):
        raise UserError(reason)
    raise UserError(f"the architecture {names[0]} is not among those written as GGUF: {KNOWN}")


def _config_problems(found: Family, config: Config) -> Iterator[str]:
    """What llama.cpp would compute otherwise than transformers."""
    if config.get("quantization_config"):
        yield "the base is quantized already; name the one in full precision that it was made from"
    key, activation = found.activation
    if config.get(key, activation) != activation:
        yield f"its activation {config[key]} is not that of {found.known_as}"
    if found.attention_bias is False and config.get("attention_bias"):
        yield f"its attention has biases, which those of {found.known_as} have not"
    if not found.forward_bias and config.get("mlp_bias"):
        yield f"its feed-forward layers have biases, which those of {found.known_as} have not"
    yield from rotary.problems(config, found.scaled_rope, in_part=found.turns_in_part)
    yield from found.problems(config)


def window_of(config: Config) -> int | None:
    """How many tokens some of the layers attend to; None where all attend to everything."""
    kinds = config.get("layer_types")
    if not config.get("use_sliding_window", True) or (kinds and _WINDOWED not in kinds):
        return None
    window = config.get("sliding_window")
    return None if window is None else int(window)


def context_length(found: Family, config: Config) -> int:
    """The longest text for which llama.cpp computes what transformers does.

    Where it lets all layers attend to everything, that ends where a window would begin to slide. With LongRoPE
    llama.cpp chooses the factors by the room for a text, and transformers by the text itself: both take those of
    short texts where there is no room for a longer one, as servers make it that take this number for the room.
    """
    longest, window = int(config["max_position_embeddings"]), window_of(config)
    ends = [longest]
    if window is not None and not found.windows:
        ends.append(window)
    if rope_of(config)["rope_type"] == "longrope" and (first := rotary.first_context(config)):
        ends.append(first)
    return min(ends)


def add_keys(writer: GGUFWriter, config: Config) -> None:
    """What the graph needs to know."""
    found, heads = family(config), int(config["num_attention_heads"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(context_length(found, config))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    rotary.add_keys(writer, config)
    found.add_keys(writer, config)


def in_gguf(name: str, tensor: torch.Tensor, config: Config) -> torch.Tensor:
    """A tensor of transformers as GGUF holds it: the rows of Q and K in another order, and norms with their offset."""
    found = family(config)
    if interleaved(found, name):
        return interleave(tensor, head_size(config))
    if found.norm_offset and name.endswith("norm.weight"):
        return tensor.float() + found.norm_offset
    return tensor


def interleaved(found: Family, name: str) -> bool:
    """Whether the rows of a tensor stand in another order in GGUF: those of Q and K, weights and biases."""
    return found.pairs_neighbours and name.rpartition(".")[0].endswith(
        ("self_attn.q_proj", "self_attn.k_proj")
    )


def interleave(rows: torch.Tensor, head: int) -> torch.Tensor:
    """The rows of Q or K with the two halves of each head interleaved: 0, n/2, 1, n/2+1, ..."""
    halves = rows.reshape(-1, 2, head // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)
