"""Small models of every family that is written as GGUF, with tokenizers of their kind, made here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtgdm.export.pretokenizers import RULES
from mtgdm.student.noise import quiet

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_ANSWERS = "{% for m in messages %}{% if m['role'] == 'assistant' %}"
DEEPSEEK = (
    "{{ '<｜begin▁of▁sentence｜>' }}"
    + _ANSWERS
    + "{{ '<｜Assistant｜>' + m['content'] + '<｜end▁of▁sentence｜>' }}"
    "{% else %}{{ '<｜User｜>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
INST = (
    "{{ '<s>' }}"
    + _ANSWERS
    + "{{ m['content'] + '</s>' }}{% else %}{{ '[INST]' + m['content'] + '[/INST]' }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ '<bos>' }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim "
    "+ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
GLM4 = (
    "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TEXT = """西湖在杭州市，始建于1089年。湖光山色，四季皆宜，门票 80 元，开放时间 08:00-17:30。
The temple was built in 1089 and rebuilt in 1736; it's open from 8:00 to 17:30, and they're happy to see you.
灵隐寺位于北纬30.24度，东经120.10度。游客可乘公交前往。It'll take 45 minutes by bus, 12345 steps.
故宫、长城、兵马俑、九寨沟、黄山、泰山。 {"name": "西湖", "province": "浙江省", "tips": ["早到", "防晒"]}
"""
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    # Far from the usual 0.02: what a wrong conversion does shall show in every logit.
    "initializer_range": 0.2,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def longrope(pairs: int) -> dict[str, Any]:
    """LongRoPE with factors of its own for each of so many pairs of a head."""
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + 0.05 * pair for pair in range(pairs)],
        "long_factor": [1.5 + 0.5 * pair for pair in range(pairs)],
        "original_max_position_embeddings": 256,
    }


# --- tokenizers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """A kind of tokenizer: byte-level with the rules that llama.cpp knows by a name, or SentencePiece's kind."""

    template: str
    rules: str | None = None
    """None for SentencePiece's kind."""
    special: Sequence[str] = ()
    written: Sequence[str] = ()
    """Added tokens that are not special."""
    first: Sequence[str] = ()
    """What the post-processor puts in front of a text."""
    names: dict[str, str] = field(default_factory=dict)
    space: str | None = None
    """Where SentencePiece's kind puts a space: by the normalizer (`always`), or a scheme of Metaspace."""
    nfc: bool = False
    rstrip: Sequence[str] = ()


_DEEPSEEK = ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>")
_PHI3 = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
WORDS = {
    "qwen": Words(
        CHATML,
        "qwen2",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        ("<think>", "</think>"),
        names={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        nfc=True,
    ),
    "llama": Words(
        LLAMA3,
        "llama-bpe",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        first=("<|begin_of_text|>",),
        names={
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "pad_token": "<|end_of_text|>",
        },
    ),
    "smollm": Words(
        CHATML,
        "smollm",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        names={
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
        },
    ),
    "smollm3": Words(
        CHATML,
        "llama-bpe",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"),
        ("<think>", "</think>"),
        names={"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    ),
    "deepseek": Words(
        DEEPSEEK,
        "qwen2",
        _DEEPSEEK,
        ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        first=_DEEPSEEK[1:],
        names={"bos_token": _DEEPSEEK[1], "eos_token": _DEEPSEEK[0], "pad_token": _DEEPSEEK[0]},
        nfc=True,
    ),
    "tekken": Words(
        INST,
        "tekken",
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        first=("<s>",),
        names={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    ),
    "gpt-4o": Words(
        PHI3,
        "gpt-4o",
        _PHI3,
        names={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    ),
    "phi4": Words(
        PHI4,
        "dbrx",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"),
        names={"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        rstrip=("<|im_start|>", "<|im_end|>", "<|im_sep|>"),
    ),
    "glm": Words(
        GLM4,
        "llama-bpe",
        (
            "<|endoftext|>",
            "[MASK]",
            "[gMASK]",
            "<sop>",
            "<|system|>",
            "<|user|>",
            "<|assistant|>",
            "<|observation|>",
        ),
        first=("[gMASK]", "<sop>"),
        names={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    ),
    "llama2": Words(
        INST,
        special=("<unk>", "<s>", "</s>"),
        first=("<s>",),
        names={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        space="always",
    ),
    "mistral": Words(
        INST,
        special=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        first=("<s>",),
        names={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        space="first",
    ),
    "phi3": Words(
        PHI3,
        special=("<unk>", "<s>", "</s>", *_PHI3),
        names={
            "bos_token": "<s>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "<unk>",
        },
        space="always",
        rstrip=("</s>", *_PHI3[1:]),
    ),
    "gemma": Words(
        GEMMA,
        special=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        written=("<mask>", "<unused0>", "\n", "\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<b>", "</b>"),
        first=("<bos>",),
        names={
            "bos_token": "<bos>",
            "eos_token": "<end_of_turn>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "mask_token": "<mask>",
        },
        space="never",
    ),
}


def make_tokenizer(words: Words) -> Any:
    """A BPE trained on a page of text, with the rules and the added tokens of its kind."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    inner = _sentencepiece(words) if words.rules is None else _byte_level(words)
    for names, special in ((words.special, True), (words.written, False)):
        added = [
            AddedToken(one, special=special, normalized=False, rstrip=one in words.rstrip) for one in names
        ]
        (inner.add_special_tokens if special else inner.add_tokens)(added)
    if words.first:
        steps = [processors.ByteLevel(trim_offsets=False)] if words.rules else []
        inner.post_processor = processors.Sequence(
            [
                *steps,
                processors.TemplateProcessing(
                    single=" ".join([*words.first, "$A"]),
                    special_tokens=[(one, inner.token_to_id(one)) for one in words.first],
                ),
            ]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **words.names)  # type: ignore[no-untyped-call]
    tokenizer.chat_template = words.template
    return tokenizer


def _byte_level(words: Words) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.trainers import BpeTrainer

    rules = next(one for one in RULES if one.name == words.rules)
    inner = Tokenizer(models.BPE(ignore_merges=rules.ignore_merges))
    if words.nfc:
        inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rules.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(TEXT.split("\n") * 3, trainer)
    return inner


def _sentencepiece(words: Words) -> Any:
    """Special tokens, bytes, what merges make, characters; and every pair that makes a token is a merge."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.trainers import BpeTrainer

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXT.split("\n") * 3, BpeTrainer(vocab_size=340, show_progress=False))
    numbered = trained.get_vocab()
    learned = sorted(numbered, key=numbered.__getitem__)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    made = [token for token in learned if len(token) > 1]
    runs = [token for token in words.written if set(token) == {"▁"}]
    whole = [*words.special, *bytes_, *runs, *made, *(token for token in learned if len(token) == 1)]
    vocabulary = {token: place for place, token in enumerate(dict.fromkeys(whole))}
    merges = [
        (token[:cut], token[cut:])
        for token in [*reversed(runs), *made]
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    inner = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    escape = normalizers.Replace(" ", "▁")
    if words.space == "always":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), escape])
    elif words.space == "never":
        inner.normalizer = escape
    elif words.space is not None:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=words.space, split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return inner


# --- models --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A family as it is made here: its configuration, and the kind of its tokenizer."""

    config: str
    words: str
    shape: dict[str, Any] = field(default_factory=dict)
    rope: dict[str, Any] = field(default_factory=lambda: PLAIN)


KINDS = {
    "qwen2-tied": Kind("Qwen2", "qwen", {"tie_word_embeddings": True}),
    "qwen2-untied": Kind("Qwen2", "qwen", {"tie_word_embeddings": False}),
    "qwen3": Kind("Qwen3", "qwen", {"tie_word_embeddings": True, "head_dim": 32}),
    "llama3": Kind("Llama", "llama", {"tie_word_embeddings": False}, LLAMA3_ROPE),
    "smollm2": Kind("Llama", "smollm", {"tie_word_embeddings": True}),
    "deepseek": Kind("Qwen2", "deepseek", {"tie_word_embeddings": False}),
    "llama2": Kind("Llama", "llama2", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "mistral": Kind("Mistral", "mistral", {"tie_word_embeddings": False, "sliding_window": None}),
    "mistral-nemo": Kind(
        "Mistral", "tekken", {"tie_word_embeddings": False, "sliding_window": None, "head_dim": 32}
    ),
    "gemma3": Kind(
        "Gemma3Text",
        "gemma",
        {
            "num_hidden_layers": 6,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
        },
        {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
    ),
    "phi3": Kind(
        "Phi3",
        "phi3",
        {"tie_word_embeddings": False, "original_max_position_embeddings": 256},
        longrope(8),
    ),
    "phi4": Kind("Phi3", "phi4", {"tie_word_embeddings": False}),
    "phi4-mini": Kind(
        "Phi3",
        "gpt-4o",
        {"tie_word_embeddings": True, "original_max_position_embeddings": 256},
        {**longrope(6), "partial_rotary_factor": 0.75},
    ),
    "smollm3": Kind(
        "SmolLM3",
        "smollm3",
        {"num_hidden_layers": 4, "tie_word_embeddings": True},
    ),
    "glm4": Kind(
        "Glm4",
        "glm",
        {"head_dim": 16, "attention_bias": True},
        {**PLAIN, "partial_rotary_factor": 0.5},
    ),
    "glm": Kind(
        "Glm",
        "glm",
        {"head_dim": 16, "attention_bias": True},
        {**PLAIN, "partial_rotary_factor": 0.5},
    ),
    "internlm3": Kind("InternLM3", "mistral", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
}
FAMILIES = tuple(KINDS)


def template_of(model: Path) -> str:
    """The chat template of a family's model."""
    return WORDS[KINDS[model.name].words].template


def make_family(
    folder: Path,
    kind: str,
    *,
    seed: int = 0,
    shape: dict[str, Any] | None = None,
    rope: dict[str, Any] | None = None,
) -> Path:
    """A model folder of a family as the Hub would give it, with random weights."""
    with quiet():
        import torch

        tokenizer = make_tokenizer(WORDS[KINDS[kind].words])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _model(kind, tokenizer, shape or {}, rope)
            for name, tensor in model.named_parameters():
                if (
                    tensor.ndim == 1
                ):  # biases are made as zeros and norms as ones, which would hide what is lost
                    offset = float("norm" in name and "Gemma" not in KINDS[kind].config)
                    torch.nn.init.normal_(tensor, mean=offset, std=0.2)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    if (
        KINDS[kind].config == "InternLM3"
    ):  # transformers computes it as a Llama; on the Hub it has its own name
        path = folder / "config.json"
        text = path.read_text(encoding="utf-8").replace("LlamaForCausalLM", "InternLM3ForCausalLM")
        path.write_text(text, encoding="utf-8", newline="\n")
    return folder


def _model(kind: str, tokenizer: Any, shape: dict[str, Any], rope: dict[str, Any] | None) -> Any:
    import transformers
    from transformers import AutoModelForCausalLM

    made = KINDS[kind]
    config = getattr(transformers, f"{made.config}Config")(
        # A few places more than tokens, as those of Qwen have.
        **{"vocab_size": len(tokenizer) + 5, **SHAPE, **made.shape, **shape},
        **{f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")},
        rope_parameters=dict(rope or made.rope),
    )
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


def make_checkpoint(folder: Path, base: Path, *, seed: int = 1, rank: int = 4, **lora: Any) -> Path:
    """A finished checkpoint over a base, with random factors in place of trained ones."""
    with quiet():
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        options: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_alpha": 8}
        adapted = get_peft_model(model, LoraConfig(r=rank, **(options | lora)))
        torch.manual_seed(seed)
        for name, tensor in adapted.named_parameters():
            if tensor.requires_grad and "lora_magnitude" not in name:
                torch.nn.init.normal_(tensor, std=0.1)
            elif tensor.requires_grad:
                tensor.data *= 1 + 0.3 * torch.rand_like(tensor)
        adapted.save_pretrained(str(folder))
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder
