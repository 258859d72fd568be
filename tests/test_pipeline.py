"""What is done, stale, partial or missing, and who may work in a workspace."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtgdm.manifest import Manifest
from mtgdm.rows import manifest_path
from tests.conftest import CommandLine, clean_environment, read_rows, spot, write_lines

PROFILE = """\
extends: default
pipeline: [prompts, teacher]
prompts:
  spots: spots.jsonl
teacher:
  backend: offline
"""


def states(mtgdm: CommandLine) -> dict[str, tuple[str, str]]:
    ran = mtgdm("status", "--profile", "mine", "--json")
    assert ran.code == 0, ran.err
    return {one["stage"]: (one["state"], one["why"]) for one in ran.json}


def workspace(mtgdm: CommandLine, text: str = PROFILE) -> Path:
    write_lines(mtgdm.folder / "spots.jsonl", *(spot(f"景区{n}") for n in range(12)))
    write_lines(mtgdm.folder / "configs/mine.yaml", text)
    return mtgdm.folder


def test_all_runs_what_is_not_up_to_date_and_nothing_else(mtgdm: CommandLine) -> None:
    folder = workspace(mtgdm)
    assert states(mtgdm) == {"prompts": ("missing", ""), "teacher": ("missing", "")}
    first = mtgdm("all", "--profile", "mine")
    assert first.code == 0, first.err
    assert "[1/2] prompts" in first.out
    assert "[2/2] teacher" in first.out
    before = {path: path.stat().st_mtime_ns for path in (folder / "data").iterdir()}
    second = mtgdm("all", "--profile", "mine")
    assert "everything is up to date" in second.out
    assert {path: path.stat().st_mtime_ns for path in (folder / "data").iterdir()} == before


def test_a_changed_setting_or_input_makes_stale_and_says_why(mtgdm: CommandLine) -> None:
    folder = workspace(mtgdm)
    assert mtgdm("all", "--profile", "mine").code == 0
    write_lines(folder / "configs/mine.yaml", PROFILE.replace("spots.jsonl", "spots.jsonl\n  limit: 5"))
    assert states(mtgdm) == {
        "prompts": ("stale", "limit changed: 0 → 5"),
        "teacher": ("stale", "prompts comes first"),
    }
    write_lines(folder / "configs/mine.yaml", PROFILE)
    assert states(mtgdm)["prompts"] == ("done", "")
    write_lines(folder / "spots.jsonl", *(spot(f"景区{n}") for n in range(13)))
    assert states(mtgdm)["prompts"] == ("stale", "spots.jsonl changed")
    ran = mtgdm("all", "--profile", "mine")
    assert "(stale: spots.jsonl changed)" in ran.out
    assert len(read_rows(folder / "data/teacher.jsonl")) == 39


def test_touching_an_input_without_changing_it_is_not_stale(mtgdm: CommandLine) -> None:
    folder = workspace(mtgdm)
    mtgdm("prompts", "--profile", "mine")
    (folder / "spots.jsonl").touch()
    assert states(mtgdm)["prompts"] == ("done", "")


def test_a_setting_that_changes_no_answer_is_not_stale(mtgdm: CommandLine) -> None:
    folder = workspace(mtgdm)
    mtgdm("all", "--profile", "mine")
    write_lines(folder / "configs/mine.yaml", PROFILE + "  timeout_s: 17\n  concurrency: 2")
    assert states(mtgdm)["teacher"] == ("done", "")


def test_the_manifest_says_what_the_output_was_made_from(mtgdm: CommandLine) -> None:
    folder = workspace(mtgdm)
    mtgdm("prompts", "--profile", "mine", "--val-ratio", "0.2")
    text = manifest_path(folder / "data/prompts.jsonl").read_text(encoding="utf-8")
    made = Manifest.model_validate_json(text)
    assert made.stage == "prompts"
    assert [state.path for state in made.inputs] == ["spots.jsonl"]
    assert (made.settings["val_ratio"].value, made.settings["val_ratio"].source) == (0.2, "--val-ratio")
    assert made.settings["spots"].source.endswith("mine.yaml:4")
    assert made.counts["prompts"] == 36
    assert made.versions["mtgdm"]


def test_an_output_without_its_manifest_is_partial(mtgdm: CommandLine) -> None:
    folder = workspace(mtgdm)
    mtgdm("all", "--profile", "mine")
    manifest_path(folder / "data/teacher.jsonl").unlink()
    rows = read_rows(folder / "data/teacher.jsonl")
    write_lines(folder / "data/teacher.jsonl", *rows[:10])
    assert states(mtgdm)["teacher"] == ("partial", "10 of 36")
    assert mtgdm("all", "--profile", "mine").code == 0
    assert read_rows(folder / "data/teacher.jsonl")[:10] == rows[:10]
    assert len(read_rows(folder / "data/teacher.jsonl")) == 36


def test_from_and_to_cut_the_pipeline(mtgdm: CommandLine) -> None:
    folder = workspace(mtgdm)
    assert mtgdm("all", "--profile", "mine", "--to", "prompts").code == 0
    assert not (folder / "data/teacher.jsonl").exists()
    assert mtgdm("all", "--profile", "mine", "--from", "teacher").code == 0
    assert mtgdm("all", "--profile", "mine", "--from", "teacher", "--to", "prompts").code == 2
    assert mtgdm("all", "--profile", "mine", "--from", "train").code == 2
    assert mtgdm("all", "--profile", "mine", "--from", "teachr").code == 2


def test_force_runs_everything_anew(mtgdm: CommandLine) -> None:
    folder = workspace(mtgdm)
    mtgdm("all", "--profile", "mine")
    before = (folder / "data/prompts.jsonl").stat().st_mtime_ns
    ran = mtgdm("all", "--profile", "mine", "--force")
    assert (ran.code, "[2/2] teacher" in ran.out) == (0, True), ran.err
    assert (folder / "data/prompts.jsonl").stat().st_mtime_ns > before


def test_a_second_run_in_a_workspace_is_refused_and_a_dead_one_is_not_in_the_way(mtgdm: CommandLine) -> None:
    folder = workspace(mtgdm)
    holder = (
        "import sys, time; from pathlib import Path; from mtgdm.pipeline import locked\n"
        "with locked(Path('.'), 'mtgdm train'):\n    print('held', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder], cwd=folder, env=clean_environment(), stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    refused = mtgdm("prompts", "--profile", "mine")
    process.kill()
    process.communicate()
    assert refused.code == 1
    assert f"process {process.pid}: mtgdm train" in refused.err
    assert (folder / ".mtgdm/running.json").exists(), "what the kill left behind"
    assert mtgdm("prompts", "--profile", "mine").code == 0
    assert not (folder / ".mtgdm/running.json").exists()


def test_an_output_has_one_writer_wherever_it_lies_and_a_killed_one_is_not_in_the_way(tmp_path: Path) -> None:
    one, two = (CommandLine(tmp_path / name) for name in ("one", "two"))
    write_lines(one.folder / "spots.jsonl", *(spot(f"景区{n}") for n in range(60_000)))
    write_lines(two.folder / "spots.jsonl", spot("西湖"))
    shared = one.folder / "data/prompts.jsonl"
    there = ("prompts", "--spots", "spots.jsonl", "--out", shared)
    process = subprocess.Popen(
        [sys.executable, "-m", "mtgdm", "prompts", "--spots", "spots.jsonl"],
        cwd=one.folder,
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not list(shared.parent.glob(".prompts.jsonl.tmp")):
        time.sleep(0.02)
    refused = two(*there)
    assert process.poll() is None, "the first one must still be at work"
    process.kill()
    process.communicate()
    assert refused.code == 1
    assert refused.err.splitlines() == [
        f"error: {shared}: another mtgdm run is writing here",
        "hint: wait for it, stop it, or write to another place",
    ]
    assert (shared.parent / ".prompts.jsonl.lock").exists(), "what the kill left behind"
    assert two(*there).code == 0
    assert len(read_rows(shared)) == 3
    assert sorted(path.name for path in shared.parent.iterdir()) == [
        "prompts.jsonl",
        "prompts.jsonl.manifest.json",
    ]


def test_a_folder_that_may_not_be_written_is_named(mtgdm: CommandLine) -> None:
    folder = workspace(mtgdm)
    closed = folder / "closed"
    closed.mkdir(mode=0o500)
    if os.access(closed, os.W_OK):
        pytest.skip("root may write anywhere, and Windows knows no such folder")
    ran = mtgdm("prompts", "--spots", "spots.jsonl", "--out", closed / "prompts.jsonl")
    assert (ran.code, ran.err) == (1, f"error: {closed}: nothing may be written in this folder\n")


def test_an_output_below_a_file_is_refused_with_the_file_and_a_way_out(mtgdm: CommandLine) -> None:
    folder = workspace(mtgdm)
    for out in ("spots.jsonl/prompts.jsonl", "spots.jsonl/deeper/prompts.jsonl"):
        ran = mtgdm("prompts", "--spots", "spots.jsonl", "--out", out)
        told, hint = ran.err.splitlines()
        where = (folder / out).parent
        assert (ran.code, told) == (1, f"error: {where}: no folder can be made here: spots.jsonl is a file")
        assert "--out" in hint


def test_a_workspace_of_its_own_holds_everything(mtgdm: CommandLine) -> None:
    folder = workspace(mtgdm, PROFILE + "workspace: elsewhere")
    write_lines(folder / "elsewhere/spots.jsonl", spot("西湖"))
    assert mtgdm("all", "--profile", "mine").code == 0
    assert len(read_rows(folder / "elsewhere/data/teacher.jsonl")) == 3
    assert not (folder / "data").exists()


def test_an_output_may_not_be_an_input(mtgdm: CommandLine) -> None:
    folder = workspace(mtgdm)
    before = (folder / "spots.jsonl").read_bytes()
    ran = mtgdm("prompts", "--spots", "spots.jsonl", "--out", "spots.jsonl")
    assert (ran.code, "read and written at once" in ran.err) == (2, True)
    assert (folder / "spots.jsonl").read_bytes() == before


def test_a_damaged_manifest_is_no_manifest(mtgdm: CommandLine) -> None:
    folder = workspace(mtgdm)
    mtgdm("prompts", "--profile", "mine")
    manifest_path(folder / "data/prompts.jsonl").write_text("{", encoding="utf-8")
    assert states(mtgdm)["prompts"][0] == "partial"
    assert mtgdm("all", "--profile", "mine").code == 0


def test_strict_counts_in_all_too(mtgdm: CommandLine) -> None:
    folder = workspace(mtgdm)
    mtgdm("all", "--profile", "mine")
    write_lines(folder / "configs/mine.yaml", PROFILE + "  strict: true")
    assert states(mtgdm)["teacher"] == ("stale", "strict changed: False → True")
