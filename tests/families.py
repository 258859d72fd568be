"""Small models of every family that is written as GGUF, with tokenizers of their kind, made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtgdm.export.vocabulary import RULES
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
SPECIAL = {
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama": [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ],
}
FAMILIES = ("qwen2-tied", "qwen2-untied", "qwen3", "llama3")


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

        tokenizer = make_tokenizer("llama" if kind == "llama3" else "qwen")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _model(kind, len(tokenizer), SHAPE | (shape or {}), rope or PLAIN)
            for name, tensor in model.named_parameters():
                if (
                    tensor.ndim == 1
                ):  # biases are made as zeros and norms as ones, which would hide what is lost
                    torch.nn.init.normal_(tensor, mean=float("norm" in name), std=0.2)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def _model(kind: str, tokens: int, shape: dict[str, Any], plain: dict[str, Any]) -> Any:
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    # A few places more than tokens, as those of Qwen have.
    shape = {"vocab_size": tokens + 5, **shape}
    if kind.startswith("qwen2"):
        return Qwen2ForCausalLM(
            Qwen2Config(**shape, rope_parameters=plain, tie_word_embeddings=kind == "qwen2-tied")
        )
    if kind == "qwen3":
        return Qwen3ForCausalLM(
            Qwen3Config(**{**shape, "head_dim": 32}, rope_parameters=plain, tie_word_embeddings=True)
        )
    scaled = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=scaled, tie_word_embeddings=False))


def make_tokenizer(kind: str) -> Any:
    """A byte-level BPE trained on a page of text, with the pattern and the special tokens of its kind."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    rules = RULES[0] if kind == "qwen" else RULES[1]
    inner = Tokenizer(models.BPE(ignore_merges=rules.ignore_merges))
    if kind == "qwen":
        inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rules.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(TEXT.split("\n") * 3, trainer)
    inner.add_special_tokens([AddedToken(one, special=True) for one in SPECIAL[kind]])
    if kind == "qwen":
        inner.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
        names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    else:
        first = inner.token_to_id("<|begin_of_text|>")
        inner.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", first)]
                ),
            ]
        )
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|end_of_text|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)  # type: ignore[no-untyped-call]
    tokenizer.chat_template = CHATML if kind == "qwen" else LLAMA3
    return tokenizer


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
