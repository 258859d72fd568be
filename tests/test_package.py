"""Packaging: what goes in, that the merged model is the trained one, and that a failure leaves the old package."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from gguf import GGUFReader

from mtgdm import manifest
from mtgdm.errors import SettingError, UserError
from mtgdm.export import build, gguf, hub, merge, parity, quantize
from mtgdm.export.lineage import lineage
from mtgdm.stages.package import PackageConfig, Quant
from mtgdm.stages.package import run as package
from mtgdm.stages.train import run as train
from mtgdm.student.noise import quiet
from mtgdm.testing import StageRun
from mtgdm.testing import run as run_stage
from tests.conftest import write_lines
from tests.ollama_server import OllamaServer
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


def eval_report(workspace: Path, number: int, **told: Any) -> None:
    """A report of the checkpoint, made after it; later numbers are newer."""
    report = {
        "model": "data/checkpoints/base-lora on test, beside its base",
        "created": (datetime.now() + timedelta(minutes=number)).strftime("%Y-%m-%d %H:%M:%S"),
        "rows": 51,
        "student": {"char_f1": {"mean": 0.876, "ci95": [0.81, 0.92]}},
        "base": {"char_f1": {"mean": 0.123, "ci95": [0.1, 0.2]}},
    }
    write_lines(workspace / f"data/report/eval-report-2026010{number}-000000.json", report | told)


def test_the_card_quotes_the_newest_report_of_this_very_student(workspace: Path) -> None:
    eval_report(workspace, 1, rows=7)
    eval_report(workspace, 2)
    eval_report(workspace, 3, rows=8, model="data/checkpoints/base-lora-2 on test")
    eval_report(workspace, 4, rows=9, created="2020-01-01 00:00:00")  # of before it was trained again
    ran = packaged(workspace, formats="adapter", name="guide")
    card = (workspace / "data/export/guide/README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlanguage:\n- zh\n- en\n")
    assert "51 held-out rows (the split `test`): means" in card
    assert "| char-F1 | 0.876 [0.810, 0.920] | 0.123 [0.100, 0.200] |" in card
    assert "data/report/eval-report-20260102-000000.json" in {one.path for one in ran.manifests[0].inputs}


def test_rows_that_were_trained_or_chosen_on_are_never_quoted_as_an_evaluation(workspace: Path) -> None:
    for number, split in enumerate(("train", "val", "all"), start=1):
        eval_report(workspace, number, model=f"data/checkpoints/base-lora on {split}, beside its base")
    packaged(workspace, formats="adapter")
    card = (student(workspace) / "README.md").read_text(encoding="utf-8")
    assert "There was no evaluation report of this student" in card
    told = "data/checkpoints/base-lora on test, beside /far/away/base, in 4-bit"
    eval_report(workspace, 4, model=told, leaked_rows=5)
    packaged(workspace, formats="adapter")
    card = (student(workspace) / "README.md").read_text(encoding="utf-8")
    assert "51 rows of the split `test`, 5 of them about spots of the training, in 4-bit: means" in card
    assert "Evaluated was the checkpoint" not in card, "nothing else is in the package"
    assert "no evaluated spot is among them" not in card
    assert "/far/away" not in card


def test_the_card_says_whose_rows_proved_a_file_and_nothing_of_those_that_were_not(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged(workspace)
    card = (student(workspace) / "README.md").read_text(encoding="utf-8")
    assert "on rows of the split `val`, which it was not trained on:" in card
    teacher_file(workspace, val=0)
    packaged(workspace)
    card = (student(workspace) / "README.md").read_text(encoding="utf-8")
    assert "on rows of the split `train`, which it was trained on" in card
    unproved = parity.Proof(reason="there is no room")
    monkeypatch.setattr(parity, "prove_all", lambda files, *rest, **more: [unproved for _ in files])
    packaged(workspace, license="mit")
    card = (student(workspace) / "README.md").read_text(encoding="utf-8")
    assert "is **unproved**: there is no room." in card
    assert "compared with the trained model" not in card


def test_a_name_that_ollama_does_not_take_is_not_what_the_card_calls_it_there(workspace: Path) -> None:
    packaged(workspace, formats="gguf", name="导游")
    card = (workspace / "data/export/导游/README.md").read_text(encoding="utf-8")
    assert "ollama create student -f Modelfile" in card
    assert "`导游-q8_0.gguf`" in card


def test_every_file_of_the_package_has_its_checksum(workspace: Path) -> None:
    packaged(workspace)
    lines = (student(workspace) / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = {path for path in student(workspace).rglob("*") if path.is_file() and path.name != "SHA256SUMS"}
    assert {student(workspace) / name for name in sums} == files
    assert all(
        hashlib.sha256(path.read_bytes()).hexdigest() == sums[path.relative_to(student(workspace)).as_posix()]
        for path in files
    )


def test_the_gguf_is_proved_on_rows_of_val_and_the_figures_are_kept(workspace: Path) -> None:
    ran = packaged(workspace)
    (file,) = ran.result.counts["files"]
    proof = file["proof"]
    assert file["name"] == "base-student-q8_0.gguf"
    assert (proof["rows"], proof["tokens_equal"]) == (3, 3)
    assert proof["mean_kl"] < 1e-3
    card = (student(workspace) / "README.md").read_text(encoding="utf-8")
    assert (
        f"| `base-student-q8_0.gguf` | {proof['engine']}, 3 rows | 3 of 3 | {proof['mean_kl']:.1e} |" in card
    )
    assert "prompts in NFC" in card
    weights = file["weights"]
    assert 0 < weights["equal"] < weights["tensors"]
    assert f"the others within {weights['largest_error']:.1%}" in card
    assert any("3 of 3" in line for line in ran.printed)


def test_a_gguf_that_answers_otherwise_is_refused_and_the_old_package_stays(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged(workspace)
    before = (student(workspace) / "SHA256SUMS").read_bytes()
    for quant in ("f16", "f32"):
        monkeypatch.setitem(parity.LIMITS, quant, parity.Limit(-1.0, 0.0))
    with pytest.raises(
        UserError, match=r"base-student-f16\.gguf does not answer as the trained model: mean KL"
    ):
        packaged(workspace, quantize="f16", overwrite=True)
    assert (student(workspace) / "SHA256SUMS").read_bytes() == before
    assert [path.name for path in student(workspace).parent.iterdir() if path.is_dir()] == ["base-student"]


def test_of_several_types_the_one_that_fails_is_named_and_the_good_ones_too(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity.LIMITS, "q8_0", parity.Limit(-1.0, 0.0))
    monkeypatch.setitem(parity.LIMITS, "f32", parity.Limit(-1.0, 0.0))
    with pytest.raises(UserError, match=r"^base-student-q8_0\.gguf does not answer [^.]*: mean KL") as caught:
        packaged(workspace, quantize="q8_0,f16")
    assert caught.value.hint is not None
    assert caught.value.hint.endswith("the rest is good: --quantize f16")


def test_a_gguf_with_damage_that_no_row_of_val_shows_is_refused(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*args: Any, **options: Any) -> gguf.Written:
        written = gguf.convert(*args, **options)
        reader = GGUFReader(written.path, "r+")
        next(one for one in reader.tensors if one.name == "token_embd.weight").data[-1] = 0
        reader.data.flush()
        return written

    monkeypatch.setattr(build, "gguf", SimpleNamespace(convert=damaged))
    with pytest.raises(UserError, match=r"base-student-q8_0\.gguf: .* token_embd\.weight has 1 rows"):
        packaged(workspace)
    assert not student(workspace).exists()


def test_a_base_with_other_weights_than_in_training_is_refused(workspace: Path) -> None:
    make_base(workspace / "base", seed=7)
    with pytest.raises(UserError, match="other weights than the one that the student was trained on"):
        packaged(workspace)


def retold(path: Path, **told: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | told), encoding="utf-8")


def move_base(workspace: Path) -> Path:
    """A checkpoint that was trained on a base outside the workspace, named by its whole path."""
    place = workspace.parent / "far away/base"
    place.parent.mkdir()
    (workspace / "base").rename(place)
    checkpoint = workspace / "data/checkpoints/base-lora"
    settings = json.loads((checkpoint / "training.json").read_text(encoding="utf-8"))["settings"]
    settings |= {"student_base": str(place)}
    retold(checkpoint / "training.json", base_model=str(place), settings=settings)
    retold(checkpoint / "adapter_config.json", base_model_name_or_path=str(place))
    return place


def test_no_place_on_this_machine_leaves_it(workspace: Path) -> None:
    move_base(workspace)
    packaged(workspace, formats="adapter,merged,gguf,gguf-adapter")
    for path in student(workspace).rglob("*"):
        if path.is_file():
            assert str(workspace.parent).encode() not in path.read_bytes(), path.name
    training = json.loads((student(workspace) / "adapter/training.json").read_text(encoding="utf-8"))
    assert (training["base_model"], training["settings"]["student_base"]) == ("base", "base")
    assert len(training["train_spots"]) == 10
    assert "base_model:" not in (student(workspace) / "README.md").read_text(encoding="utf-8")


def test_a_folder_of_the_workspace_is_not_told_as_if_the_hub_knew_it(workspace: Path) -> None:
    (workspace / "bases").mkdir()
    (workspace / "base").rename(workspace / "bases/one")
    checkpoint = workspace / "data/checkpoints/base-lora"
    retold(checkpoint / "training.json", base_model="bases/one")
    retold(checkpoint / "adapter_config.json", base_model_name_or_path="bases/one")
    packaged(workspace, formats="adapter")
    adapter = json.loads((student(workspace) / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["base_model_name_or_path"] == "one"
    card = (student(workspace) / "README.md").read_text(encoding="utf-8")
    assert "base_model:" not in card
    assert "A LoRA student of `one`" in card


def test_a_base_that_was_moved_is_named_by_its_new_place_and_nothing_is_made_anew(workspace: Path) -> None:
    packaged(workspace)
    place = workspace / "models/here"
    place.parent.mkdir()
    (workspace / "base").rename(place)
    with pytest.raises(UserError, match="the base of the training is not there: base") as caught:
        packaged(workspace)
    assert "--base-model FOLDER" in (caught.value.hint or "")
    again = packaged(workspace, base_model="models/here")
    assert any("is there already, and whole" in line for line in again.printed)
    with pytest.raises(UserError, match="'no/where' is not on this machine"):
        packaged(workspace, base_model="no/where")
    shutil.rmtree(student(workspace))
    ran = packaged(workspace, base_model=str(place))
    assert ran.result.counts["files"][0]["proof"]["rows"] == 3
    assert ran.result.counts["base_model"] == "base"
    make_base(place, seed=7)
    with pytest.raises(UserError, match="other weights") as caught:
        packaged(workspace, base_model=str(place))
    assert "--base-model FOLDER" in (caught.value.hint or "")


def test_another_state_of_the_base_makes_another_package(workspace: Path) -> None:
    packaged(workspace, formats="adapter,merged")
    retold(workspace / "base/config.json", rms_norm_eps=1e-5)
    again = packaged(workspace, formats="adapter,merged")
    assert not any("is there already" in line for line in again.printed)


def test_files_of_two_checkpoints_in_one_folder_are_refused(workspace: Path) -> None:
    retold(workspace / "data/checkpoints/base-lora/adapter_config.json", base_model_name_or_path="another")
    with pytest.raises(UserError, match=r"base was base, adapter_config\.json that it is another"):
        packaged(workspace, formats="adapter")


def test_weights_are_looked_at_even_where_the_adapter_is_only_copied(workspace: Path) -> None:
    checkpoint = workspace / "data/checkpoints/base-lora"
    weights = checkpoint / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="weights cannot be read"):
        packaged(workspace, formats="adapter")
    weights.write_bytes(whole)
    retold(checkpoint / "adapter_config.json", r=4)
    with pytest.raises(UserError, match=r"rank 16, adapter_config\.json says 4"):
        packaged(workspace, formats="adapter")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"packaged from adapter_model\.safetensors"):
        packaged(workspace, formats="adapter")
    (checkpoint / "adapter_config.json").write_text("{bad", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read"):
        packaged(workspace, formats="adapter")
    assert not student(workspace).exists()


def test_a_package_that_is_there_and_whole_is_not_made_again(workspace: Path) -> None:
    packaged(workspace)
    gguf = student(workspace) / "base-student-q8_0.gguf"
    made = gguf.stat().st_mtime_ns
    again = packaged(workspace)
    assert "data/export/base-student is there already, and whole" in again.printed
    assert again.result.counts["files"][0]["proof"]["rows"] == 3
    assert gguf.stat().st_mtime_ns == made
    with gguf.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    packaged(workspace, overwrite=True)
    assert gguf.stat().st_mtime_ns != made
    packaged(workspace, formats="gguf", quantize="f32,f16", overwrite=True)
    assert sorted(path.name for path in student(workspace).iterdir()) == [
        "Modelfile",
        "README.md",
        "SHA256SUMS",
        "base-student-f16.gguf",
        "base-student-f32.gguf",
        "provenance.json",
    ]


# --- what lies there already ---------------------------------------------------------------------


def test_a_folder_that_is_no_package_is_left_as_it_is(workspace: Path) -> None:
    mine = write_lines(workspace / "mine/models/llama/notes.md", "mine")
    for more in ({}, {"overwrite": True}):
        with pytest.raises(UserError, match="not empty and no package of mtgdm's") as caught:
            packaged(workspace, out="mine/models", name="llama", formats="adapter", **more)
    assert "another --name" in (caught.value.hint or "")
    assert mine.is_file()
    mine.with_name("provenance.json").write_text('{"of": "another tool"}', encoding="utf-8")
    with pytest.raises(UserError, match="no package of mtgdm's"):
        packaged(workspace, out="mine/models", name="llama", formats="adapter")
    file = write_lines(workspace / "mine/models/file", "mine")
    with pytest.raises(UserError, match="this is a file"):
        packaged(workspace, out="mine/models", name="file", formats="adapter")
    assert file.is_file()
    (workspace / "mine/models/empty").mkdir()
    packaged(workspace, out="mine/models", name="empty", formats="adapter")


@pytest.mark.parametrize(
    ("then", "lost"),
    [
        ({"quantize": "q8_0"}, r"base-student-f16\.gguf \(not asked for now\)$"),
        ({"quantize": "f16"}, r"base-student-q8_0\.gguf \(not"),
        ({"formats": "gguf", "quantize": "q8_0,f16"}, r"adapter/ \(not asked for now\), merged/ \(not"),
        ({"formats": "adapter,merged"}, r"Modelfile \(not .*base-student-f16\.gguf"),
    ],
)
def test_a_narrower_order_does_not_delete_what_is_there_unasked(
    then: dict[str, str], lost: str, both_types: Path, tmp_path: Path
) -> None:
    workspace = Path(shutil.copytree(both_types, tmp_path / "workspace"))
    before = {path.name for path in student(workspace).iterdir()}
    with pytest.raises(UserError, match=f"would lose: .*{lost}") as caught:
        packaged(workspace, **then)
    assert "--overwrite" in (caught.value.hint or "")
    assert {path.name for path in student(workspace).iterdir()} == before
    packaged(workspace, **then, overwrite=True)
    assert {path.name for path in student(workspace).iterdir()} < before


@pytest.fixture(scope="module")
def both_types(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a package of two GGUF files."""
    workspace = Path(shutil.copytree(trained, tmp_path_factory.mktemp("both") / "workspace"))
    packaged(workspace, quantize="q8_0,f16")
    return workspace


def test_a_wider_order_needs_no_permission_and_the_order_of_formats_is_nothing(workspace: Path) -> None:
    packaged(workspace, formats="adapter,merged")
    again = packaged(workspace, formats="merged,adapter,merged")
    assert any("is there already, and whole" in line for line in again.printed)
    packaged(workspace)
    assert (student(workspace) / "base-student-q8_0.gguf").is_file()


def test_what_somebody_wrote_into_a_package_stays(workspace: Path) -> None:
    packaged(workspace, formats="adapter")
    card, notes = student(workspace) / "README.md", student(workspace) / "samples/first.md"
    card.write_text(card.read_text(encoding="utf-8") + "By hand.\n", encoding="utf-8")
    write_lines(notes, "西湖")
    (student(workspace) / ".DS_Store").write_bytes(b"\0")
    again = packaged(workspace, formats="adapter", push="me/guide")
    assert any(
        "kept as you left them, unlike SHA256SUMS: README.md, samples/first.md" in line
        for line in again.printed
    )
    with pytest.raises(
        UserError, match=r"README\.md \(changed since it was made\), samples/first\.md \(added"
    ):
        packaged(workspace, formats="adapter", license="mit")
    assert card.read_text(encoding="utf-8").endswith("By hand.\n")
    packaged(workspace, formats="adapter", overwrite=True)
    assert not notes.exists()
    assert not card.read_text(encoding="utf-8").endswith("By hand.\n")


def test_a_file_that_was_changed_is_not_replaced_unasked_and_one_that_is_missing_is_made(
    workspace: Path,
) -> None:
    packaged(workspace, formats="adapter")
    template = student(workspace) / "adapter/chat_template.jinja"
    template.unlink()
    packaged(workspace, formats="adapter")
    template.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"adapter/chat_template\.jinja \(changed since it was made\)"):
        packaged(workspace, formats="adapter")


def test_another_student_does_not_take_a_packages_place_but_the_same_one_trained_again_does(
    workspace: Path,
) -> None:
    packaged(workspace, formats="adapter", name="guide")
    checkpoints = workspace / "data/checkpoints"
    shutil.copytree(checkpoints / "base-lora", checkpoints / "other-lora")
    with pytest.raises(UserError, match="would lose: the package of data/checkpoints/base-lora"):
        packaged(workspace, formats="adapter", name="guide", model="data/checkpoints/other-lora")
    run_stage(train, workspace, student_base="base", device_mode="cpu", max_steps=2, overwrite=True)
    before = (workspace / "data/export/guide/SHA256SUMS").read_bytes()
    packaged(workspace, formats="adapter", name="guide", model="data/checkpoints/base-lora")
    assert (workspace / "data/export/guide/SHA256SUMS").read_bytes() != before


def test_the_modelfile_is_made_for_the_first_gguf_from_what_the_training_knew(workspace: Path) -> None:
    packaged(workspace, formats="gguf", quantize="F16,q8_0,Q8_0", license="apache-2.0")
    lines = (student(workspace) / "Modelfile").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "FROM ./base-student-f16.gguf"
    assert "PARAMETER temperature 0" in lines
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert "PARAMETER num_ctx 2048" in lines
    assert 'SYSTEM """你是讲解员。"""' in lines
    assert 'LICENSE """apache-2.0"""' in lines
    assert lines[1].startswith('TEMPLATE """{{ range $i, $_ := .Messages }}')


def test_the_lineage_leads_back_over_the_manifests(workspace: Path) -> None:
    ran = packaged(workspace, formats="adapter")
    (step,) = ran.result.counts["lineage"]
    assert (step["stage"], step["inputs"][0]["path"]) == ("train", "data/teacher.jsonl")
    about = json.loads((student(workspace) / "provenance.json").read_text(encoding="utf-8"))
    assert about["lineage"] == [step]
    assert str(workspace) not in json.dumps(about)


def test_a_step_whose_file_was_changed_since_is_marked_and_what_lies_behind_is_not_told(
    workspace: Path,
) -> None:
    answered = workspace / "data/teacher.jsonl"
    made = manifest.read(workspace / "data/checkpoints/base-lora")
    assert made is not None
    prompts = made.inputs[0].model_copy(update={"path": str(workspace.parent / "far/prompts.jsonl")})
    of_teacher = made.model_copy(update={"stage": "teacher", "output": made.inputs[0], "inputs": [prompts]})
    manifest.write(of_teacher, answered)
    steps = lineage(workspace / "data/checkpoints/base-lora", workspace)
    assert [step["stage"] for step in steps] == ["train", "teacher"]
    assert steps[1]["inputs"][0]["path"] == "prompts.jsonl", "a place on this machine is nobody's business"
    other = made.inputs[0].model_copy(update={"sha256": "0" * 64})
    manifest.write(of_teacher.model_copy(update={"output": other}), answered)
    steps = lineage(workspace / "data/checkpoints/base-lora", workspace)
    assert (steps[1]["changed_since"], "inputs" in steps[1]) == (True, False)


def test_lora_alone_may_be_packaged_as_gguf(workspace: Path) -> None:
    ran = packaged(workspace, formats="gguf-adapter")
    (file,) = ran.result.counts["files"]
    assert (file["name"], file["proof"]) == ("base-student-adapter.gguf", None)
    assert (student(workspace) / "base-student-adapter.gguf").stat().st_size == file["bytes"]
    card = (student(workspace) / "README.md").read_text(encoding="utf-8")
    assert "it is nothing without a GGUF of the base" in card
    assert not (student(workspace) / "Modelfile").exists()


def test_plan_tells_the_room_by_format(workspace: Path) -> None:
    config = PackageConfig(formats=("gguf",), quantize=("f16", "q8_0")).resolved(workspace)
    told = config.estimate()
    assert told["parameters"] == 194_976
    assert told["mib_of_disk"].keys() == {"gguf", "on_the_way"}
    assert PackageConfig().resolved(workspace / "nowhere").estimate() == {}


def test_plan_tells_time_and_memory_of_conversion_and_proof(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PackageConfig(formats=("gguf",)).resolved(workspace)
    told = config.estimate()
    for part in ("conversion", "proof"):
        assert told[part]["hours"].low < told[part]["hours"].mean < told[part]["hours"].high
        assert told[part]["mib_of_memory"] > 500
    two = PackageConfig(formats=("gguf",), quantize=("f16", "q8_0")).resolved(workspace).estimate()
    assert two["proof"]["hours"].mean > told["proof"]["hours"].mean
    monkeypatch.setattr(parity.Need, "whole", 2**60)
    assert "no greedy answers" in config.estimate()["proof"]["layer_by_layer"]
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**20))
    assert "GiB of memory" in config.estimate()["proof"]["unproved"]
    (workspace / "data/teacher.jsonl").unlink()
    assert config.estimate()["proof"] is None
    merged = PackageConfig(formats=("merged",)).resolved(workspace).estimate()
    assert not {"conversion", "proof"} & merged.keys()


def test_the_types_of_gguf_are_those_of_the_converter() -> None:
    assert get_args(Quant) == gguf.QUANTS


def test_a_base_that_gguf_does_not_know_is_packaged_without_and_refused_where_gguf_was_asked_for(
    workspace: Path,
) -> None:
    config = workspace / "base/config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"silu"', '"gelu"'), encoding="utf-8")
    with pytest.raises(UserError, match="base cannot be written as GGUF: its activation gelu"):
        packaged(workspace, formats="gguf")
    ran = packaged(workspace)
    assert ran.result.counts["formats"] == ["adapter", "merged"]
    assert any("no GGUF: its activation gelu" in line for line in ran.warnings)
    assert not (student(workspace) / "Modelfile").exists()


def test_a_disk_that_is_too_small_is_told_before_any_work(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    with pytest.raises(UserError, match="while it is made, and"):
        packaged(workspace)
    assert not student(workspace).exists()
    left = workspace / "data/export/.base-student.tmp/half.gguf"
    left.parent.mkdir()
    left.write_bytes(b"0" * 10**7)
    packaged(workspace)
    assert not left.exists()


@pytest.mark.parametrize(
    ("kind", "method", "error"),
    [
        ("transformers.PreTrainedTokenizerFast", "save_pretrained", "No space left on device (os error 28)"),
        ("gguf.GGUFWriter", "write_tensors_to_file", "4096 requested and 0 written"),
    ],
)
def test_a_disk_that_fills_up_meanwhile_is_told_with_the_need(
    kind: str, method: str, error: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(error) if "requested" in error else Exception(error)

    monkeypatch.setattr(f"{kind}.{method}", fail)
    with pytest.raises(UserError, match=r"the disk is full: the package takes about \d\.\d MB .* are free"):
        packaged(workspace, formats="merged,gguf-adapter")
    assert not any((workspace / "data/export").iterdir())


def test_the_room_counts_the_tokenizer_in_every_format(workspace: Path) -> None:
    config = PackageConfig(formats=("adapter", "merged", "gguf")).resolved(workspace)
    assert all(size < 5 for size in config.estimate()["mib_of_disk"].values())
    path = workspace / "data/checkpoints/base-lora/tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8") + " " * 5 * 2**20, encoding="utf-8")
    room = config.estimate()["mib_of_disk"]
    assert all(room[key] >= 5 for key in ("adapter", "merged", "gguf"))


def test_a_quantization_without_llama_cpp_is_refused_before_any_work(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "is_installed", lambda: False)
    with pytest.raises(UserError, match="llama-cpp-python is not installed") as caught:
        packaged(workspace, quantize="q4_K_M")
    assert 'pip install "mtgdm[llama]"' in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"ollama_create": "guide", "formats": "merged"}, "Ollama is given a GGUF"),
        ({"ollama_create": "guide", "ollama_quantize": "q4_K_M"}, "none is among --quantize q8_0"),
        ({"ollama_quantize": "q4_K_M", "quantize": "f16"}, "name the model with --ollama-create"),
        ({"ollama_create": "我的导游"}, "Ollama takes no model of the name"),
        ({"ollama_create": "my guide"}, "Ollama takes no model of the name"),
        ({"push_now": True}, "does not say where to"),
        ({"push": "guide"}, "names no owner"),
        ({"push": "me/gui de"}, "is no repository"),
        ({"quantize": "q9"}, "q9"),
        ({"name": "../guide"}, "name"),
        ({"name": ".."}, "name"),
        ({"name": "."}, "name"),
        ({"name": "guide."}, "Windows"),
        ({"name": "NUL"}, "Windows"),
        ({"name": "com1.v2"}, "Windows"),
    ],
)
def test_settings_that_do_not_fit_are_refused(workspace: Path, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(SettingError, match=why):
        packaged(workspace, **settings)
    assert not student(workspace).exists()


# --- to Ollama and to the Hub --------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[OllamaServer]:
    with OllamaServer(lambda question: "  在杭州市。\n") as running:
        yield running


def count_of(workspace: Path) -> Callable[[str], int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(workspace / "data/checkpoints/base-lora/tokenizer.json"))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def test_the_student_is_made_in_ollama_and_reads_there_what_it_read_in_the_training(
    workspace: Path, server: OllamaServer
) -> None:
    server.count = count_of(workspace)
    ran = packaged(workspace, ollama_create="guide", url=server.url)
    assert "在杭州市。" in ran.printed
    assert not ran.warnings
    made = server.made["guide"]
    assert made.file == (student(workspace) / "base-student-q8_0.gguf").read_bytes()
    assert made.request["parameters"]["num_ctx"] == 2048
    assert server.questions[0].body["messages"][-1]["content"].startswith("资料：\n名称：val景区")


def test_ollama_may_quantize_what_is_packaged_in_16_bits(workspace: Path, server: OllamaServer) -> None:
    packaged(workspace, ollama_create="guide", url=server.url, quantize="q8_0,f16", ollama_quantize="q4_K_M")
    assert server.made["guide"].request["quantize"] == "q4_K_M"
    assert [*server.made["guide"].request["files"]] == ["base-student-f16.gguf"]


def test_another_template_in_ollama_is_noticed_by_the_tokens_it_reads(
    workspace: Path, server: OllamaServer
) -> None:
    count = count_of(workspace)
    server.count = lambda text: count(f"<|im_start|>system\nYou are Qwen.<|im_end|>\n{text}")
    ran = packaged(workspace, ollama_create="guide", url=server.url)
    assert any("it does not use the template of the package" in line for line in ran.warnings)


def test_a_server_that_fails_leaves_the_package_whole_and_nothing_is_made_again(
    workspace: Path, server: OllamaServer
) -> None:
    server.dies = "creating"
    with pytest.raises(UserError, match="went away"):
        packaged(workspace, ollama_create="guide", url=server.url)
    assert (student(workspace) / "SHA256SUMS").is_file()
    server.dies = ""
    ran = packaged(workspace, ollama_create="guide", url=server.url)
    assert any("is there already, and whole" in line for line in ran.printed)
    assert (server.uploads, [*server.made]) == (1, ["guide"])


def test_a_model_of_somebody_elses_in_ollama_is_not_replaced_and_nothing_is_made_before(
    workspace: Path, server: OllamaServer
) -> None:
    with pytest.raises(UserError, match="teacher:7b is in Ollama already"):
        packaged(workspace, ollama_create="teacher:7b", url=server.url)
    assert not student(workspace).exists()
    packaged(workspace, ollama_create="teacher:7b", url=server.url, overwrite=True)
    again = packaged(workspace, ollama_create="teacher:7b", url=server.url)
    assert "Ollama has base-student-q8_0.gguf already" in again.printed


def test_a_server_that_is_not_there_is_told_before_any_work(workspace: Path) -> None:
    with pytest.raises(UserError, match="no Ollama server answers"):
        packaged(workspace, ollama_create="guide", url="http://127.0.0.1:9")
    assert not student(workspace).exists()


def test_a_push_is_a_list_until_it_is_meant(workspace: Path) -> None:
    ran = packaged(workspace, formats="adapter", push="me/guide")
    assert any(line.startswith("adapter/adapter_model.safetensors  ") for line in ran.printed)
    assert "would go to me/guide: --push-now uploads them" in ran.printed[-1]


def test_without_a_token_nothing_is_made_for_the_hub(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="wants a token"):
        packaged(workspace, formats="adapter", push="me/guide", push_now=True)
    assert not student(workspace).exists()


def test_a_merge_that_differs_is_refused_and_the_old_package_stays(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged(workspace)
    before = (student(workspace) / "SHA256SUMS").read_bytes()
    monkeypatch.setattr(merge, "LOGIT_LIMIT", -1.0)
    with pytest.raises(UserError, match="differs from base and adapter"):
        packaged(workspace, dtype="float16")
    assert (student(workspace) / "SHA256SUMS").read_bytes() == before
    assert [path.name for path in student(workspace).parent.iterdir() if path.is_dir()] == ["base-student"]


@pytest.mark.parametrize("formats", ["adapter", "merged", "gguf-adapter"])
def test_an_adapter_whose_scale_was_edited_is_packaged_in_no_format(formats: str, workspace: Path) -> None:
    path = workspace / "data/checkpoints/base-lora/adapter_config.json"
    edited = json.loads(path.read_text(encoding="utf-8")) | {"lora_alpha": 320}
    path.write_text(json.dumps(edited), encoding="utf-8")
    with pytest.raises(UserError, match="`lora_alpha` is 320, and the training had 32"):
        packaged(workspace, formats=formats)


def test_what_cannot_be_packaged_is_one_line(workspace: Path) -> None:
    with pytest.raises(SettingError, match="names nothing to make"):
        packaged(workspace, formats="")
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
