"""The whole chain: one command from records to a packaged student, also when it is killed on the way."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mtgdm.rows import manifest_path
from mtgdm.shipped import shipped
from tests.conftest import CommandLine, clean_environment, read_rows, spot, write_lines
from tests.tiny_student import make_base

PROFILE = """\
extends: quickstart
prompts: {spots: spots.jsonl}
train: {student_base: base, max_steps: 9, save_steps: 2, eval_steps: 3, logging_steps: 1, batch: 2, grad_accum: 1}
eval: {max_new_tokens: 16}
"""
TIMED = ("seconds", "latency_s", "tokens_per_s", "batch_rows")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")


def a_workspace(folder: Path) -> CommandLine:
    write_lines(folder / "spots.jsonl", *(spot(f"第{n}景区") for n in range(24)))
    write_lines(folder / "configs/mine.yaml", PROFILE)
    make_base(folder / "base")
    return CommandLine(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """A workspace in which the chain ran through, undisturbed."""
    mtgdm = a_workspace(tmp_path_factory.mktemp("whole"))
    ran = mtgdm("all", "--profile", "mine")
    assert ran.code == 0, ran.err
    return mtgdm


def test_every_file_of_the_contract_is_there(whole: CommandLine) -> None:
    folder = whole.folder
    for name in (
        "prompts.jsonl",
        "teacher.jsonl",
        "eval_outputs.jsonl",
        "checkpoints/base-lora",
        "export/base-student",
    ):
        assert manifest_path(folder / "data" / name).is_file(), name
    for kind in ("train", "eval"):
        (page,) = (folder / "data/report").glob(f"{kind}-report-*.html")
        assert page.with_suffix(".md").is_file()
        assert manifest_path(page.with_suffix(".json")).is_file()
        assert list((folder / "log").glob(f"{kind}-*.metrics.jsonl"))
        assert list((folder / "log").glob(f"{kind}-*.log"))
    assert list((folder / "log").glob("teacher-*.log"))
    export = folder / "data/export/base-student"
    assert {path.name for path in export.iterdir()} == {
        "adapter",
        "merged",
        "base-student-q8_0.gguf",
        "Modelfile",
        "README.md",
        "provenance.json",
        "SHA256SUMS",
    }


@pytest.mark.skipif(BROWSER is None and "CI" not in os.environ, reason="no browser on this machine")
def test_the_four_charts_are_drawn(whole: CommandLine) -> None:
    for pattern in (
        "train-report-*.loss",
        "train-report-*.optim",
        "eval-report-*.runtime",
        "eval-report-*.quality",
    ):
        (chart,) = (whole.folder / "data/diagrams").glob(f"{pattern}.png")
        assert chart.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_checksums_hold(whole: CommandLine) -> None:
    export = whole.folder / "data/export/base-student"
    ended = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=export, capture_output=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    listed = (export / "SHA256SUMS").read_text(encoding="utf-8").count("\n")
    assert listed == sum(path.is_file() for path in export.rglob("*")) - 1


def test_no_evaluated_spot_was_trained_on(whole: CommandLine) -> None:
    training = json.loads(
        (whole.folder / "data/checkpoints/base-lora/training.json").read_text(encoding="utf-8")
    )
    asked = {row["meta"]["spot"] for row in read_rows(whole.folder / "data/eval_outputs.jsonl")}
    assert asked
    assert not asked & set(training["train_spots"])


def test_the_merged_model_answers_like_base_and_adapter(whole: CommandLine) -> None:
    made = json.loads(manifest_path(whole.folder / "data/export/base-student").read_text(encoding="utf-8"))
    assert made["counts"]["max_logit_difference"] < 1e-4
    assert made["counts"]["top1_agreement"] == 1.0


def test_a_second_run_does_nothing_and_says_so(whole: CommandLine) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole.folder / "data").rglob("*")}
    ran = whole("all", "--profile", "mine")
    assert (ran.code, "everything is up to date" in ran.out) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in (whole.folder / "data").rglob("*")} == before


def test_the_manifests_lead_back_to_the_records(whole: CommandLine) -> None:
    """From the package every input is found by its hash among the outputs of an earlier stage."""
    made = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in (whole.folder / "data").rglob("*.manifest.json")
    ]
    outputs = {one["output"]["sha256"] for one in made}
    for one in made:
        for state in one["inputs"]:
            logs = state["path"].startswith("log/")  # metrics are written beside the stage's output
            assert logs or state["path"] == "spots.jsonl" or state["sha256"] in outputs, state["path"]


def comparable(value: Any) -> Any:
    """A row without its times."""
    if isinstance(value, dict):
        return {key: comparable(one) for key, one in value.items() if key not in TIMED}
    return value


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_at_any_moment_and_started_again_it_reaches_the_same_end(
    whole: CommandLine, tmp_path: Path
) -> None:
    a_workspace(tmp_path)
    moments = random.Random(7)
    kills = 0
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-m", "mtgdm", "all", "--profile", "mine"],
            cwd=tmp_path,
            env=clean_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(moments.uniform(1, 14))
        kills += process.poll() is None
        process.kill()
        process.wait()
    ran = CommandLine(tmp_path)("all", "--profile", "mine")
    assert ran.code == 0, ran.err
    assert kills >= 2
    for name in ("prompts.jsonl", "teacher.jsonl", "eval_outputs.jsonl"):
        undisturbed = [comparable(row) for row in read_rows(whole.folder / "data" / name)]
        assert [comparable(row) for row in read_rows(tmp_path / "data" / name)] == undisturbed, name
    adapters = [
        load_file(folder / "data/checkpoints/base-lora/adapter_model.safetensors")
        for folder in (whole.folder, tmp_path)
    ]
    assert adapters[0].keys() == adapters[1].keys()
    for key, weights in adapters[0].items():
        assert (weights - adapters[1][key]).abs().max() <= 1e-6, key
    states = {
        one["stage"]: one["state"]
        for one in CommandLine(tmp_path)("status", "--profile", "mine", "--json").json
    }
    assert set(states.values()) == {"done"}


def test_the_sample_makes_its_six_hundred_prompts(mtgdm: CommandLine) -> None:
    ran = mtgdm("prompts", "--profile", "quickstart")
    assert "200 spots → 600 prompts" in ran.out, ran.err
    names = {row["meta"]["spot"] for row in read_rows(mtgdm.folder / "data/prompts.jsonl")}
    assert len(names) == len(read_rows(shipped("data/sample/spots.jsonl"))) == 200
