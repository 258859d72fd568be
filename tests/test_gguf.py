"""GGUF files byte by byte: their keys, their tensors, their tokenizer, and the models that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mtgdm.errors import UserError
from mtgdm.export import architectures, quantize, vocabulary
from mtgdm.export.gguf import Written, convert, encode, gguf_bytes
from mtgdm.export.lora_gguf import convert_adapter
from mtgdm.student.noise import quiet
from tests.families import CHATML, FAMILIES, make_checkpoint, make_family, template_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of each family, as a merge would leave it."""
    folder = tmp_path_factory.mktemp("models")
    for kind in FAMILIES:
        make_family(folder / kind, kind)
    return folder


def converted(model: Path, out: Path, quant: str = "f32", **options: Any) -> Written:
    template = template_of(model)
    with quiet():
        return convert(model, out, quant, name="guide", template=template, **options)


def keys(path: Path) -> dict[str, Any]:
    """Every key of a file; of the lists only their lengths."""
    found = {}
    for name, field in gguf.GGUFReader(path).fields.items():
        value = field.contents()
        found[name] = len(value) if isinstance(value, list) else value
    return found


def tensors(path: Path) -> dict[str, Any]:
    return {str(one.name): one for one in gguf.GGUFReader(path).tensors}


def weights(model: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(model / "model.safetensors")


def config_of(model: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return config


def test_the_keys_say_what_the_configuration_says(models: Path, tmp_path: Path) -> None:
    found = keys(converted(models / "qwen3", tmp_path / "x.gguf").path)
    rounded = {key: round(value, 9) if isinstance(value, float) else value for key, value in found.items()}
    tokens = config_of(models / "qwen3")["vocab_size"]
    expected = {
        "general.architecture": "qwen3",
        "general.type": "model",
        "general.name": "guide",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "qwen3.block_count": 2,
        "qwen3.context_length": 512,
        "qwen3.embedding_length": 64,
        "qwen3.feed_forward_length": 96,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 32,
        "qwen3.attention.value_length": 32,
        "qwen3.attention.layer_norm_rms_epsilon": 1e-6,
        "qwen3.rope.dimension_count": 32,
        "qwen3.rope.freq_base": 1e6,
        "qwen3.vocab_size": tokens,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": tokens,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": CHATML,
    }
    assert {key: rounded.get(key) for key in expected} == expected
    assert found["tokenizer.ggml.eos_token_id"] - found["tokenizer.ggml.padding_token_id"] == 2


def test_every_tensor_of_a_float32_file_is_the_models_own(models: Path, tmp_path: Path) -> None:
    written = converted(models / "qwen2-untied", tmp_path / "x.gguf")
    found, own = tensors(written.path), weights(models / "qwen2-untied")
    assert written.tensors == len(found) == len(own)
    assert (found["token_embd.weight"].data == own["model.embed_tokens.weight"]).all()
    assert (found["output.weight"].data == own["lm_head.weight"]).all()
    assert (found["blk.1.attn_q.bias"].data == own["model.layers.1.self_attn.q_proj.bias"]).all()
    assert (found["blk.0.ffn_down.weight"].data == own["model.layers.0.mlp.down_proj.weight"]).all()


def test_tied_embeddings_are_stored_once(models: Path, tmp_path: Path) -> None:
    assert "output.weight" not in tensors(converted(models / "qwen2-tied", tmp_path / "x.gguf").path)


def test_the_halves_of_llamas_heads_are_interleaved_and_its_rotation_has_factors(
    models: Path, tmp_path: Path
) -> None:
    found = tensors(converted(models / "llama3", tmp_path / "x.gguf").path)
    own = weights(models / "llama3")["model.layers.0.self_attn.q_proj.weight"]
    head = found["blk.0.attn_q.weight"].data[:16]
    assert (head[0::2] == own[:8]).all()
    assert (head[1::2] == own[8:16]).all()
    factors = found["rope_freqs.weight"].data
    assert factors.shape == (8,)
    assert factors[0] == 1.0
    assert factors[-1] == 8.0


def test_the_bos_of_llama_stands_in_its_file(models: Path, tmp_path: Path) -> None:
    found = keys(converted(models / "llama3", tmp_path / "x.gguf").path)
    assert found["tokenizer.ggml.pre"] == "llama-bpe"
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.bos_token_id"] + 4 == found["tokenizer.ggml.eos_token_id"]


@pytest.mark.parametrize(("quant", "file_type"), [("f16", 1), ("bf16", 32), ("q8_0", 7)])
def test_matrices_are_encoded_and_vectors_stay_in_float32(
    quant: str, file_type: int, models: Path, tmp_path: Path
) -> None:
    written = converted(models / "qwen2-tied", tmp_path / "x.gguf", quant)
    found, own = tensors(written.path), weights(models / "qwen2-tied")["model.embed_tokens.weight"]
    assert keys(written.path)["general.file_type"] == file_type
    assert found["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    embedding = found["token_embd.weight"]
    assert embedding.tensor_type.name == quant.upper()
    decoded = gguf.dequantize(embedding.data, embedding.tensor_type)
    assert np.abs(decoded - own).max() / np.abs(own).max() < 0.01
    assert written.bytes == written.path.stat().st_size


def test_what_torch_casts_is_what_ggml_would_write() -> None:
    with quiet():
        import torch

    odd = torch.tensor([[1.0, -2.5, 3.0000002, 1e-8, 65000.0, 0.1, -0.1, 1.00390625] * 4])
    for kind in ("F16", "BF16", "Q8_0"):
        wanted = gguf.GGMLQuantizationType[kind]
        theirs = np.ascontiguousarray(gguf.quantize(odd.numpy(), wanted)).view(np.uint8)
        assert (encode(odd, wanted) == theirs).all(), kind


def test_rows_of_no_whole_number_of_blocks_keep_sixteen_bits(tmp_path: Path) -> None:
    make_family(tmp_path / "qwen2-tied", "qwen2-tied", shape={"intermediate_size": 72})
    found = tensors(converted(tmp_path / "qwen2-tied", tmp_path / "x.gguf", "q8_0").path)
    assert found["blk.0.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.F16
    assert found["blk.0.ffn_up.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0


def test_a_place_without_a_token_is_unused_and_a_thought_is_text(models: Path) -> None:
    size = config_of(models / "qwen2-tied")["vocab_size"]
    found = vocabulary.read(models / "qwen2-tied", size)
    assert found.types[-5:] == [vocabulary.UNUSED] * 5
    assert len(set(found.tokens)) == size
    kinds = dict(zip(found.tokens, found.types, strict=True))
    assert kinds["<|im_end|>"] == vocabulary.CONTROL
    assert kinds["<think>"] == vocabulary.USER_DEFINED


READ_BACK = ("qwen2-tied", "qwen2-untied", "smollm2", "deepseek", "llama2", "mistral", "mistral-nemo", "phi4")
"""Of the others the reader of transformers makes another model, or none."""


@pytest.mark.parametrize("kind", READ_BACK)
def test_transformers_reads_back_what_it_is_said_to_read(kind: str, models: Path, tmp_path: Path) -> None:
    reads_back(models / kind, tmp_path)


def test_transformers_is_said_to_read_no_others(models: Path) -> None:
    configs = {kind: config_of(models / kind) for kind in FAMILIES}
    read = {
        kind for kind, config in configs.items() if architectures.family(config).read_by_transformers(config)
    }
    assert read == set(READ_BACK)


def reads_back(model: Path, folder: Path) -> None:
    converted(model, folder / "x.gguf")
    with quiet():
        import torch
        from transformers import AutoModelForCausalLM

        own = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        read: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file="x.gguf", dtype=torch.float32)
        ids = torch.arange(0, 300, 3).unsqueeze(0)
        with torch.inference_mode():
            assert (own(ids).logits - read(ids).logits).abs().max() == 0.0


def test_a_gemma_as_on_the_hub_is_read_back_by_transformers(tmp_path: Path) -> None:
    rope = {kind: {"rope_type": "default", "rope_theta": base} for kind, base in HUB_BASES.items()}
    model = make_family(
        tmp_path / "gemma3", "gemma3", shape={"head_dim": 256, "query_pre_attn_scalar": 256}, rope=rope
    )
    assert architectures.family(config_of(model)).read_by_transformers(config_of(model))
    reads_back(model, tmp_path)


def test_transformers_reads_the_tokenizer_back(models: Path, tmp_path: Path) -> None:
    converted(models / "qwen2-tied", tmp_path / "x.gguf")
    with quiet():
        from transformers import AutoTokenizer

        tokenizers = [
            AutoTokenizer.from_pretrained(models / "qwen2-tied"),
            AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf"),
        ]
    text = "西湖在杭州市。<|im_end|> It's 12345 🎉"
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]


# --- what is peculiar to a family ----------------------------------------------------------------

HUB_BASES = {"full_attention": 1e6, "sliding_attention": 1e4}


def test_the_norms_of_gemma_hold_their_offset_and_its_windows_are_told(models: Path, tmp_path: Path) -> None:
    file = converted(models / "gemma3", tmp_path / "x.gguf", "q8_0").path
    found, own, about = tensors(file), weights(models / "gemma3"), keys(file)
    for ours, theirs in (
        ("attn_q_norm", "self_attn.q_norm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
    ):
        stored = own[f"model.layers.3.{theirs}.weight"]
        assert (found[f"blk.3.{ours}.weight"].data == stored + np.float32(1)).all()
    assert about["gemma3.attention.sliding_window"] == 16
    assert (about["gemma3.rope.freq_base"], about["gemma3.rope.freq_base_swa"]) == (1e6, 2e4)
    assert (about["gemma3.rope.scaling.type"], about["gemma3.rope.scaling.factor"]) == ("linear", 8.0)
    assert about["gemma3.context_length"] == 512, "llama.cpp lets the windows slide"


def test_the_fused_matrices_of_phi_stay_as_they_are_and_its_factors_are_written(
    models: Path, tmp_path: Path
) -> None:
    file = converted(models / "phi4-mini", tmp_path / "x.gguf").path
    found, own, about = tensors(file), weights(models / "phi4-mini"), keys(file)
    assert (found["blk.0.attn_qkv.weight"].data == own["model.layers.0.self_attn.qkv_proj.weight"]).all()
    assert (found["blk.1.ffn_up.weight"].data == own["model.layers.1.mlp.gate_up_proj.weight"]).all()
    rope = config_of(models / "phi4-mini")["rope_parameters"]
    for kind in ("long", "short"):
        assert np.allclose(found[f"rope_factors_{kind}.weight"].data, rope[f"{kind}_factor"])
    assert about["phi3.rope.dimension_count"] == 12, "three quarters of a head"
    assert about["phi3.rope.scaling.attn_factor"] == pytest.approx((1 + np.log(2) / np.log(256)) ** 0.5)


@pytest.mark.parametrize(
    ("kind", "shape", "context"),
    [
        ("mistral", {"sliding_window": 40}, 40),
        ("mistral", {"sliding_window": 4096}, 512),
        ("phi4", {"sliding_window": 100}, 100),
        ("phi4-mini", {}, 256),
        ("qwen2-tied", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, 64),
        ("qwen2-tied", {"use_sliding_window": False, "sliding_window": 64}, 512),
    ],
)
def test_the_context_ends_where_llama_cpp_would_compute_otherwise(
    kind: str, shape: dict[str, Any], context: int, tmp_path: Path
) -> None:
    model = make_family(tmp_path / kind, kind, shape=shape)
    config = config_of(model)
    assert architectures.problems(config, model) == []
    assert architectures.context_length(architectures.family(config), config) == context


@pytest.mark.parametrize(
    ("kind", "changed", "reason"),
    [
        ("gemma3", {"query_pre_attn_scalar": 64}, "its attention is scaled by 64, and llama.cpp's by 32"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "its attention is capped"),
        ("gemma3", {"use_bidirectional_attention": True}, "its attention looks ahead"),
        ("gemma3", {"layer_types": ["full_attention"] * 6}, "attend to a window in another order"),
        ("gemma3", {"hidden_activation": "silu"}, "activation silu is not that of Gemma 3"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "layers without positions are others than each 4th"),
        ("mistral", {"attention_bias": True}, "its attention has biases"),
        ("llama3", {"partial_rotary_factor": 0.5}, "only a part of each head turns"),
        ("phi3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "scaled by yarn"),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "LongRoPE has not a factor for each pair",
        ),
        ("glm4", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "scaled by linear"),
        ("glm4", {"rope_parameters": {"partial_rotary_factor": 0.32}}, "5 numbers of each head turn"),
    ],
)
def test_what_llama_cpp_has_only_in_one_form_is_refused_in_others(
    kind: str, changed: dict[str, Any], reason: str, models: Path
) -> None:
    (problem,) = architectures.problems(config_of(models / kind) | changed, models / kind)
    assert reason in problem


def test_an_adapter_on_fused_matrices_is_one_on_theirs(models: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", models / "phi3")
    written = convert_adapter(checkpoint, config_of(models / "phi3"), tmp_path / "a.gguf", name="guide")
    names = {name.removesuffix(".weight.lora_a") for name in tensors(written.path) if name.endswith("lora_a")}
    assert {"blk.0.attn_qkv", "blk.0.attn_output", "blk.1.ffn_up", "blk.1.ffn_down"} <= names


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM is not among .* Qwen2.5, Qwen3, Llama"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized already"),
        ({"architectures": ["InternLM2ForCausalLM"]}, "InternLM 2 and 2.5 comes with code of its own"),
        ({"mlp_bias": True}, "feed-forward layers have biases"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6}}, "scaled by dynamic"),
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"vocab_size": 100}, "makes token"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_named_from_its_configuration(
    changed: dict[str, Any], reason: str, models: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(models / "qwen2-tied", tmp_path / "qwen2-tied"))
    (model / "config.json").write_text(json.dumps(config_of(model) | changed), encoding="utf-8", newline="\n")
    with pytest.raises(UserError, match=reason):
        converted(model, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize(
    ("part", "changed", "reason"),
    [
        ("pre_tokenizer", {"type": "Whitespace"}, "neither of bytes nor with bytes for"),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}, "pattern to cut a text"),
        ("normalizer", {"type": "Lowercase"}, "changes texts"),
        ("model", {"type": "Unigram", "vocab": []}, "no BPE but Unigram"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_named(
    part: str, changed: dict[str, Any], reason: str, models: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(models / "qwen3", tmp_path / "qwen3"))
    change_tokenizer(model, {part: changed})
    (problem,) = architectures.problems(config_of(model), model)
    assert reason in problem


def test_another_pattern_is_refused_though_it_looks_alike(models: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(models / "qwen3", tmp_path / "qwen3"))
    about = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    split = about["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"\p{N}|", r"\p{N}{1,2}|")
    change_tokenizer(model, {"pre_tokenizer": about["pre_tokenizer"]})
    (problem,) = architectures.problems(config_of(model), model)
    assert "pattern to cut a text" in problem


def test_a_token_that_takes_spaces_is_refused_where_the_template_writes_some_beside_it(
    models: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(models / "llama3", tmp_path / "llama3"))
    added = tokenizer_of(model)["added_tokens"]
    next(one for one in added if one["content"] == "<|eot_id|>")["rstrip"] = True
    change_tokenizer(model, {"added_tokens": added})
    assert architectures.problems(config_of(model), model) == [], "no spaces there"
    next(one for one in added if one["content"] == "<|end_header_id|>")["rstrip"] = True
    change_tokenizer(model, {"added_tokens": added})
    (problem,) = architectures.problems(config_of(model), model)
    assert "<|end_header_id|> takes the spaces around it" in problem


def tokenizer_of(model: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    return about


def change_tokenizer(model: Path, changed: dict[str, Any]) -> None:
    path = model / "tokenizer.json"
    about = json.loads(path.read_text(encoding="utf-8")) | changed
    path.write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8", newline="\n")


def test_a_model_that_can_be_packaged_has_no_problems(models: Path) -> None:
    for kind in FAMILIES:
        assert architectures.problems(config_of(models / kind), models / kind) == []


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_check_before_training_agrees(kind: str, models: Path) -> None:
    with quiet():
        from mtgdm.student.base import load_config, load_tokenizer

        config = load_config(str(models / kind), kind).to_dict()
        tokenizer = load_tokenizer(str(models / kind), kind)
        assert architectures.base_problems(config, tokenizer) == []
        (problem,) = architectures.base_problems(config | {"quantization_config": {"bits": 4}}, tokenizer)
    assert "quantized already" in problem


def test_the_base_that_ships_can_be_packaged() -> None:
    from mtgdm.student.tiny import TINY_BASE

    assert architectures.problems(config_of(TINY_BASE), TINY_BASE) == []


def test_a_weight_that_is_no_number_leaves_no_file(models: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    model = Path(shutil.copytree(models / "qwen2-tied", tmp_path / "qwen2-tied"))
    own = weights(model)
    own["model.layers.1.mlp.up_proj.weight"][3, 3] = np.nan
    save_file(own, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight is infinite or no number"):
        converted(model, tmp_path / "x.gguf", "q8_0")
    assert list(tmp_path.iterdir()) == [model]


def test_a_k_quant_without_llama_cpp_is_refused_before_anything_is_written(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "is_installed", lambda: False)
    with pytest.raises(UserError, match="llama-cpp-python is not installed") as caught:
        converted(models / "qwen3", tmp_path / "x.gguf", "q4_k_m")
    assert "mtgdm[llama]" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []


def test_the_estimate_is_near_the_file(models: Path, tmp_path: Path) -> None:
    model = make_family(tmp_path / "qwen2-tied", "qwen2-tied", shape={"hidden_size": 256})
    parameters = sum(tensor.size for tensor in weights(model).values())
    for quant in ("f32", "bf16", "q8_0"):
        written = converted(model, tmp_path / "x.gguf", quant)
        assert abs(gguf_bytes(parameters, quant) / written.bytes - 1) < 0.1, quant


def test_the_progress_adds_up_to_the_stored_weights(models: Path, tmp_path: Path) -> None:
    done: list[int] = []
    converted(models / "qwen2-tied", tmp_path / "x.gguf", "q8_0", advance=done.append)
    assert sum(done) == sum(tensor.nbytes for tensor in weights(models / "qwen2-tied").values())


# --- adapters ------------------------------------------------------------------------------------


def test_an_adapter_alone_keeps_its_factors(models: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", models / "qwen3", use_rslora=True)
    written = convert_adapter(checkpoint, config_of(models / "qwen3"), tmp_path / "a.gguf", name="guide")
    found, about = tensors(written.path), keys(written.path)
    assert about["general.type"] == "adapter"
    assert about["adapter.type"] == "lora"
    assert about["adapter.lora.alpha"] == 8 * 2.0, "rsLoRA divides by the root of the rank"
    from safetensors.numpy import load_file

    own = load_file(checkpoint / "adapter_model.safetensors")
    a = own["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"]
    assert (found["blk.1.ffn_up.weight.lora_a"].data == a).all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"target_modules": ["embed_tokens"]}, "trained model.embed_tokens.weight as a whole"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "trained lm_head.weight as a whole"),
    ],
)
def test_an_adapter_that_needs_its_base_to_be_changed_is_refused(
    options: dict[str, Any], reason: str, models: Path, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", models / "qwen2-tied", **options)
    with pytest.raises(UserError, match=reason):
        convert_adapter(checkpoint, config_of(models / "qwen2-tied"), tmp_path / "a.gguf", name="guide")
    assert not (tmp_path / "a.gguf").exists()
