"""The merge: every kind of adapter it takes answers like base and adapter, and the others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtgdm.errors import UserError
from mtgdm.export import lora
from mtgdm.export.merge import Merged, merge, merged_bytes
from mtgdm.export.weights import Weights
from mtgdm.student.chat import Chat
from mtgdm.student.noise import quiet
from tests.families import SHAPE, make_checkpoint, make_family, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("qwen2-untied", {}),
    "rslora": ("qwen2-tied", {"use_rslora": True}),
    "dora": ("qwen3", {"use_dora": True}),
    "patterns": (
        "llama3",
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, "alpha_pattern": {"down_proj": 3}},
    ),
    "output of its own": ("qwen2-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "output": ("qwen2-untied", {"target_modules": ["v_proj", "lm_head"]}),
    "tied embeddings": ("qwen2-tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "embeddings": ("llama3", {"target_modules": ["o_proj", "embed_tokens"]}),
    "biases": ("qwen2-tied", {"target_modules": ["q_proj", "k_proj"], "bias": "all"}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for kind in ("qwen2-tied", "qwen2-untied", "qwen3", "llama3"):
        make_family(folder / kind, kind)
    return folder


def merged_into(out: Path, base: Path, checkpoint: Path, **options: Any) -> Merged:
    from mtgdm.student.base import load_tokenizer

    with quiet():
        chat = Chat(load_tokenizer(str(checkpoint), "checkpoint"), "checkpoint")
        given = {"dtype": "float32", **options}
        return merge(checkpoint, str(base), base.name, chat, out=out, **given)


def logits(base: Path, adapter: Path | None = None) -> Any:
    with quiet():
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if adapter:
            model = PeftModel.from_pretrained(model, str(adapter))
        with torch.inference_mode():
            return model.eval()(input_ids=torch.arange(1, 200, 3).unsqueeze(0)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_answers_like_base_and_adapter(kind: str, bases: Path, tmp_path: Path) -> None:
    family, options = KINDS[kind]
    checkpoint = make_checkpoint(tmp_path / "checkpoint", bases / family, **options)
    merged = merged_into(tmp_path / "merged", bases / family, checkpoint)
    trained = logits(bases / family, checkpoint)
    assert (trained - logits(tmp_path / "merged")).abs().max() < 1e-4
    assert (trained - logits(bases / family)).abs().max() > 1e-2, "the adapter changes something"
    assert merged.max_logit_difference is not None
    assert merged.max_logit_difference < 1e-4


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"lora_bias": True}, "biases inside LoRA"),
        ({"init_lora_weights": "pissa"}, "changes the base too"),
        ({"peft_type": "LOHA"}, "this is no LoRA adapter: its peft_type is 'LOHA'"),
        ({"fan_in_fan_out": True}, "Conv1D"),
        ({"lora_alpha": None}, "`lora_alpha` is None"),
    ],
)
def test_an_adapter_that_is_more_than_a_sum_is_refused(
    changed: dict[str, Any], reason: str, bases: Path, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", bases / "qwen3")
    path = checkpoint / "adapter_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | changed), encoding="utf-8", newline="\n"
    )
    with pytest.raises(UserError, match=reason):
        merged_into(tmp_path / "merged", bases / "qwen3", checkpoint)
    assert not (tmp_path / "merged").exists()


def test_a_broken_configuration_is_one_line(bases: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", bases / "qwen3")
    (checkpoint / "adapter_config.json").write_text("{bad", encoding="utf-8")
    with pytest.raises(UserError, match=r"adapter_config\.json: this file cannot be read"):
        lora.read(checkpoint)


@pytest.mark.parametrize(("key", "edited"), [("lora_alpha", 80), ("use_rslora", True), ("r", 8)])
def test_a_scale_edited_after_the_training_is_refused(
    key: str, edited: Any, bases: Path, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", bases / "qwen3")
    settings = {"lora_r": 4, "lora_alpha": 8, "lora_rslora": False}
    (checkpoint / "training.json").write_text(json.dumps({"settings": settings}), encoding="utf-8")
    assert lora.read(checkpoint).pairs
    path = checkpoint / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {key: edited}
    path.write_text(json.dumps(config), encoding="utf-8", newline="\n")
    with pytest.raises(UserError, match=f"`{key}` is {edited}, and the training had"):
        lora.read(checkpoint)


def test_an_adapter_of_another_base_is_refused(bases: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", bases / "qwen2-tied")
    with pytest.raises(UserError, match=r"does not fit its base qwen3: .* has the shape"):
        merged_into(tmp_path / "merged", bases / "qwen3", checkpoint)


def test_a_base_that_is_stored_quantized_is_refused(bases: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", bases / "qwen3")
    base = make_family(tmp_path / "base", "qwen3")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8", newline="\n")
    with pytest.raises(UserError, match="stored quantized"):
        merged_into(tmp_path / "merged", base, checkpoint)


def test_a_base_in_shards_becomes_shards_that_transformers_reads(bases: Path, tmp_path: Path) -> None:
    with quiet():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(bases / "llama3")
        model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    checkpoint = make_checkpoint(tmp_path / "checkpoint", bases / "llama3")
    written: list[int] = []
    merged = merged_into(
        tmp_path / "merged", tmp_path / "base", checkpoint, shard_bytes=100_000, advance=written.append
    )
    shards = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(shards) > 3
    assert all(shard.stat().st_size < 120_000 for shard in shards)
    assert sum(written) == 4 * merged.parameters == merged_bytes(str(tmp_path / "base"), "float32")
    assert (logits(bases / "llama3", checkpoint) - logits(tmp_path / "merged")).abs().max() < 1e-4


def test_the_merge_is_cast_once_from_float32(bases: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", bases / "qwen2-tied")
    merged_into(tmp_path / "exact", bases / "qwen2-tied", checkpoint)
    merged = merged_into(tmp_path / "narrow", bases / "qwen2-tied", checkpoint, dtype="bfloat16")
    exact, narrow = Weights(tmp_path / "exact"), Weights(tmp_path / "narrow")
    assert exact.stored.keys() == narrow.stored.keys()
    assert all((exact.tensor(name).bfloat16() == narrow.tensor(name)).all() for name in exact.stored)
    assert merged.dtype == "bfloat16"
    assert json.loads((tmp_path / "narrow/config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_a_weight_that_float16_cannot_hold_is_refused(bases: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", bases / "qwen3", lora_alpha=10_000_000)
    with pytest.raises(UserError, match="too large for float16"):
        merged_into(tmp_path / "merged", bases / "qwen3", checkpoint, dtype="float16")


def test_the_memory_of_the_proof_is_that_of_a_layer(bases: Path, tmp_path: Path) -> None:
    import torch

    checkpoint = make_checkpoint(tmp_path / "checkpoint", bases / "qwen2-untied")
    held: list[set[str]] = []

    def note(module: Any, *_: Any) -> None:
        if type(module).__name__ == "Qwen2ForCausalLM":
            held.append({one.device.type for one in module.parameters()})

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        merged = merged_into(tmp_path / "merged", bases / "qwen2-untied", checkpoint)
    finally:
        hook.remove()
    assert held == [{"cpu"}, {"meta"}, {"meta"}], (
        "base and adapter, the merged model, and the same after the cast"
    )
    assert merged.unproved is None


def test_a_base_whose_files_name_its_weights_otherwise_is_merged_and_plainly_unproved(tmp_path: Path) -> None:
    """The experts of a mixture lie in the files one by one, and in the model together."""
    with quiet():
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        tokenizer = make_tokenizer("qwen")
        shape: dict[str, Any] = {**SHAPE, "head_dim": 16, "vocab_size": len(tokenizer)}
        shape |= {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape))
        model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
    checkpoint = make_checkpoint(tmp_path / "checkpoint", tmp_path / "base", target_modules=["q_proj"])
    merged = merged_into(tmp_path / "merged", tmp_path / "base", checkpoint)
    assert merged.max_logit_difference is None
    assert "model.layers.0.mlp.experts.gate_up_proj" in (merged.unproved or "")
    assert (logits(tmp_path / "base", checkpoint) - logits(tmp_path / "merged")).abs().max() < 1e-4


def test_the_merged_model_ends_an_answer_where_the_student_learned_to(bases: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", bases / "qwen2-tied")
    merged_into(tmp_path / "merged", bases / "qwen2-tied", checkpoint)
    with quiet():
        from transformers import AutoTokenizer

        end = AutoTokenizer.from_pretrained(checkpoint).convert_tokens_to_ids("<|im_end|>")
    found = json.loads((tmp_path / "merged/generation_config.json").read_text(encoding="utf-8"))
    assert end in found["eos_token_id"]


def test_a_rotation_that_is_scaled_stands_where_ollama_reads_it(bases: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", bases / "llama3")
    merged_into(tmp_path / "merged", bases / "llama3", checkpoint)
    config = json.loads((tmp_path / "merged/config.json").read_text(encoding="utf-8"))
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"]["factor"] == 8.0


def test_a_cut_weights_file_is_one_line(bases: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", bases / "qwen3")
    base = make_family(tmp_path / "base", "qwen3")
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        merged_into(tmp_path / "merged", base, checkpoint)
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError, match="file of the model is missing"):
        merged_into(tmp_path / "merged", base, checkpoint)
