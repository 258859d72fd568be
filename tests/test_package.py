"""Packaging: what goes in, that the merged model is the trained one, and that a failure leaves the old package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mtgdm.errors import SettingError, UserError
from mtgdm.export import merge
from mtgdm.stages.package import run as package
from mtgdm.stages.train import run as train
from mtgdm.student.noise import quiet
from mtgdm.testing import StageRun
from mtgdm.testing import run as run_stage
from tests.conftest import write_lines
from tests.tiny_student import make_base, teacher_file

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a base and a finished checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    make_base(folder / "base")
    teacher_file(folder)
    run_stage(
        train, folder, student_base="base", device_mode="cpu", max_steps=4, batch=2, grad_accum=1, lr=0.02
    )
    return folder


@pytest.fixture
def workspace(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "workspace"))


def packaged(workspace: Path, **settings: Any) -> StageRun:
    return run_stage(package, workspace, **settings)


def student(workspace: Path) -> Path:
    return workspace / "data/export/base-student"


def test_the_merged_folder_answers_like_base_and_adapter(workspace: Path) -> None:
    packaged(workspace)
    with quiet():
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        base = AutoModelForCausalLM.from_pretrained(workspace / "base", dtype=torch.float32)
        adapted = PeftModel.from_pretrained(base, student(workspace) / "adapter")
        merged = AutoModelForCausalLM.from_pretrained(student(workspace) / "merged", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(student(workspace) / "merged")
        tokens = tokenizer("西湖在杭州市，始建于1089年。", return_tensors="pt")
        with torch.inference_mode():
            difference = (adapted(**tokens).logits - merged(**tokens).logits).abs().max().item()
            plain = AutoModelForCausalLM.from_pretrained(workspace / "base", dtype=torch.float32)
            learned = (adapted(**tokens).logits - plain(**tokens).logits).abs().max().item()
    assert difference < 1e-4
    assert learned > 100 * difference, "the adapter changes something"


def test_the_merged_folder_can_be_read_by_ollama(workspace: Path) -> None:
    packaged(workspace, formats="merged")
    config = json.loads((student(workspace) / "merged/config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((student(workspace) / "merged/tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert "<|im_start|>" in tokenizer["chat_template"]
    assert not (student(workspace) / "adapter").exists()


def test_the_adapter_names_its_base_and_not_a_place_on_this_machine(workspace: Path) -> None:
    packaged(workspace, formats="adapter")
    text = (student(workspace) / "adapter/adapter_config.json").read_text(encoding="utf-8")
    assert json.loads(text)["base_model_name_or_path"] == "base"
    assert str(workspace) not in text


def test_the_card_quotes_the_newest_report(workspace: Path) -> None:
    report = {
        "rows": 51,
        "student": {"char_f1": {"mean": 0.876, "ci95": [0.81, 0.92]}},
        "base": {"char_f1": {"mean": 0.123, "ci95": [0.1, 0.2]}},
    }
    write_lines(workspace / "data/report/eval-report-20260101-000000.json", report | {"rows": 7})
    write_lines(workspace / "data/report/eval-report-20260102-000000.json", report)
    packaged(workspace, formats="adapter", name="guide")
    card = (workspace / "data/export/guide/README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlanguage:\n- zh\n- en\n")
    assert "51 held-out rows" in card
    assert "| char-F1 | 0.876 [0.810, 0.920] | 0.123 [0.100, 0.200] |" in card
    assert "base_model: base" in card


def test_a_merge_that_differs_is_refused_and_the_old_package_stays(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged(workspace)
    before = (student(workspace) / "SHA256SUMS").read_bytes()
    monkeypatch.setattr(merge, "LOGIT_LIMIT", -1.0)
    with pytest.raises(UserError, match="differs from base and adapter"):
        packaged(workspace)
    assert (student(workspace) / "SHA256SUMS").read_bytes() == before
    assert [path.name for path in student(workspace).parent.iterdir() if path.is_dir()] == ["base-student"]


def test_what_cannot_be_packaged_is_one_line(workspace: Path) -> None:
    with pytest.raises(SettingError, match="GGUF"):
        packaged(workspace, formats="gguf")
    with pytest.raises(UserError, match=r"adapter_config\.json is missing"):
        packaged(workspace, model="base")
    adapter = workspace / "data/checkpoints/base-lora/adapter_model.safetensors"
    adapter.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", encoding="utf-8")
    with pytest.raises(UserError, match="Git-LFS pointer") as caught:
        packaged(workspace)
    assert "git lfs pull" in (caught.value.hint or "")
    shutil.rmtree(workspace / "data/checkpoints")
    with pytest.raises(UserError, match="no finished checkpoint"):
        packaged(workspace)


def test_another_chat_template_than_that_of_the_training_is_refused(workspace: Path) -> None:
    template = workspace / "data/checkpoints/base-lora/chat_template.jinja"
    template.write_bytes(template.read_bytes().replace(b"assistant", b"helper"))
    with pytest.raises(UserError, match="the chat template is not the one that the student was trained with"):
        packaged(workspace)
    assert not student(workspace).exists()
    template.write_bytes(template.read_bytes().replace(b"helper", b"assistant"))
    packaged(workspace, formats=("adapter",))
