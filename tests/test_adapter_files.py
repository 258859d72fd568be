"""Adapters as PEFT, TRL, axolotl, LLaMA-Factory and unsloth leave them: told from models, evaluated, packaged."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtgdm.checkpoints import full_precision
from mtgdm.errors import UserError
from mtgdm.export import lora
from mtgdm.export.merge import Merged, merge
from mtgdm.stages.package import run as package
from mtgdm.student import adapter_files, base, generation
from mtgdm.student.noise import quiet
from mtgdm.testing import run as run_stage
from tests.conftest import write_lines
from tests.tiny_student import make_base, teacher_row

pytestmark = pytest.mark.filterwarnings("ignore")

EXTRA = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("model") / "base")


def vocabulary_of(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def adapter(model: Path, folder: Path, *, extra: int = 0, **settings: Any) -> Path:
    """What PEFT's save_pretrained() writes: no tokenizer, no training.json."""
    with quiet():
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        loaded = AutoModelForCausalLM.from_pretrained(model)
        if extra:
            loaded.resize_token_embeddings(vocabulary_of(model) + extra)
        adapted = get_peft_model(
            loaded, LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": ["q_proj"], **settings})
        )
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.05)
        adapted.save_pretrained(folder)
    return folder


def merged(model: Path, folder: Path, out: Path, dtype: Any = "auto") -> Merged:
    with quiet():
        return merge(folder, str(model), "base", base.load_tokenizer(str(model), "base"), dtype, out)


def as_axolotl(model: Path, folder: Path) -> None:
    shutil.copy(model / "config.json", folder)
    (folder / "README.md").write_text("built with axolotl", encoding="utf-8")


def as_trl(model: Path, folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (model / name).is_file():
            shutil.copy(model / name, folder)
    (folder / "training_args.bin").write_bytes(b"\x80\x04")
    (folder / "checkpoint-2").mkdir()


def as_half_a_tokenizer(model: Path, folder: Path) -> None:
    shutil.copy(model / "tokenizer_config.json", folder)


def as_older_peft(model: Path, folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize("layout", [as_axolotl, as_trl, as_half_a_tokenizer, as_older_peft])
def test_adapters_of_other_tools_are_asked_and_packaged(model: Path, tmp_path: Path, layout: Any) -> None:
    folder = adapter(model, tmp_path / "theirs")
    layout(model, folder)
    assert base.is_adapter(str(folder))
    with quiet():
        assert generation.load_chat(str(folder), "theirs", tmp_path).tokenizer.chat_template
        loaded = generation.load(
            str(folder), "theirs", base.place("cpu"), workspace=tmp_path, load_in_4bit=False
        )
    assert type(loaded).__name__.startswith("Peft")
    write_lines(tmp_path / "data/teacher.jsonl", teacher_row("西湖", "val"))
    run_stage(package, tmp_path, model=folder, formats=("adapter", "merged"))
    made = tmp_path / "data/export/theirs-student"
    for part in ("adapter", "merged"):
        assert adapter_files.has_tokenizer(made / part)
    assert (
        load_file(made / "adapter/adapter_model.safetensors").keys() == adapter_files.tensors(folder).keys()
    )


def test_a_model_with_an_adapter_beside_it_is_a_model(model: Path, tmp_path: Path) -> None:
    folder = adapter(model, tmp_path / "both")
    shutil.copytree(model, folder, dirs_exist_ok=True)
    assert not base.is_adapter(str(folder))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", pickle.dumps([1, 2]), b"not a pickle"])
def test_damaged_pickled_weights_are_one_line(model: Path, tmp_path: Path, content: bytes) -> None:
    folder = adapter(model, tmp_path / "theirs")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read") as caught:
        generation.check_adapter(str(folder))
    assert "save_pretrained" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("settings", "added"),
    [
        ({}, EXTRA),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, EXTRA),
        ({"modules_to_save": ["embed_tokens"]}, EXTRA),
        ({"target_modules": ["q_proj", "embed_tokens"]}, EXTRA),
        ({"trainable_token_indices": [5, 6]}, 0),
        ({"trainable_token_indices": "new"}, EXTRA),
    ],
)
def test_a_vocabulary_that_grew_in_the_training_grows_in_the_base_too(
    model: Path, tmp_path: Path, settings: dict[str, Any], added: int
) -> None:
    known = vocabulary_of(model)
    if settings.get("trainable_token_indices") == "new":
        settings = {"trainable_token_indices": [known + number for number in range(EXTRA)]}
    folder = adapter(model, tmp_path / "grown", extra=added, **settings)
    assert adapter_files.vocabulary(folder, known) == known + added
    made = merged(model, folder, tmp_path / "merged")
    assert made.max_logit_difference is not None and made.max_logit_difference < 1e-4
    config = json.loads((tmp_path / "merged/config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == known + added
    write_lines(tmp_path / "data/teacher.jsonl", teacher_row("西湖", "val"))
    run_stage(package, tmp_path, model=folder, formats=("gguf",), quantize=("f32",))


def test_a_vocabulary_whose_new_rows_were_not_saved_is_told_with_the_way_on(
    model: Path, tmp_path: Path
) -> None:
    folder = adapter(model, tmp_path / "grown", extra=EXTRA)
    path = folder / "adapter_model.safetensors"
    kept = {key: value for key, value in load_file(path).items() if "lm_head" not in key}
    save_file(kept, path)
    with pytest.raises(UserError, match="the vocabulary was extended") as caught:
        merged(model, folder, tmp_path / "merged")
    assert "lm_head.weight" in caught.value.message
    assert "modules_to_save" in str(caught.value.hint)


def test_a_quantized_base_leads_to_the_model_it_was_made_from() -> None:
    assert full_precision("unsloth/Qwen2.5-7B-Instruct-bnb-4bit") == "unsloth/Qwen2.5-7B-Instruct"
    assert full_precision("unsloth/gemma-3-4b-it-unsloth-bnb-4bit") == "unsloth/gemma-3-4b-it"
    assert full_precision("Qwen/Qwen2.5-7B-Instruct") is None


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_auto_is_the_dtype_that_the_base_is_stored_in_whatever_its_config_says(
    model: Path, tmp_path: Path, stored: torch.dtype
) -> None:
    theirs = tmp_path / "base"
    shutil.copytree(model, theirs)
    weights = {key: value.to(stored) for key, value in load_file(model / "model.safetensors").items()}
    save_file(weights, theirs / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((theirs / "config.json").read_text(encoding="utf-8"))
    config.pop("dtype", None)
    (theirs / "config.json").write_text(json.dumps(config), encoding="utf-8")
    folder = adapter(model, tmp_path / "theirs")
    assert f"torch.{merged(theirs, folder, tmp_path / 'merged').dtype}" == str(stored)
    assert lora.read(folder).pairs
