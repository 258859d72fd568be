"""Several processes of one training, as torchrun starts them: the same losses as in one, and one voice."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mtgdm.stages.train import run as train
from mtgdm.student.resume import whole_checkpoints
from mtgdm.testing import run as run_stage
from tests.conftest import CommandLine, Ran, clean_environment, write_lines
from tests.test_train import QUICK, checkpoint, furthest, points
from tests.tiny_student import make_base, teacher_file

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SETTINGS: dict[str, Any] = {
    **QUICK,
    "max_steps": 4,
    "eval_steps": 2,
    "lora_dropout": 0,
    "batch": 4,
    "grad_accum": 2,
}
"""Of 18 rows a step takes 8: the last step of an epoch has two, and none for the second process."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def workspace(tmp_path: Path, base: Path) -> Path:
    shutil.copytree(base, tmp_path / "base")
    teacher_file(tmp_path, train=18, val=5)
    return tmp_path


def torchrun(workspace: Path, *program: str) -> Ran:
    """A program in two processes, as torchrun starts them on a machine without a GPU."""
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program],
        cwd=workspace,
        env=clean_environment() | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        timeout=300,
        check=False,
    )
    return Ran(ended.returncode, ended.stdout, ended.stderr)


def flags(settings: dict[str, Any]) -> list[str]:
    found = []
    for key, value in settings.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{name}" if value else f"--no-{name}")
        else:
            found += [f"--{name}", str(value)]
    return found


def in_two_processes(workspace: Path, settings: dict[str, Any]) -> Ran:
    return torchrun(workspace, "-m", "mtgdm", "train", *flags(settings))


def losses(workspace: Path) -> dict[tuple[str, int], float]:
    return {
        (point["event"], point["step"]): point["loss" if point["event"] == "train" else "eval_loss"]
        for point in points(workspace)
        if point["event"] in ("train", "eval")
    }


def put_aside(workspace: Path) -> Path:
    (workspace / "data" / "checkpoints" / "base-lora.manifest.json").unlink()
    for path in (workspace / "log").iterdir():
        path.unlink()
    return checkpoint(workspace).rename(workspace / "one")


@pytest.mark.parametrize("packing", [False, True])
def test_two_processes_train_as_one_does_and_the_first_speaks_for_both(
    workspace: Path, packing: bool
) -> None:
    layout: dict[str, Any] = {"packing": packing, "max_len": 128}
    run_stage(train, workspace, **SETTINGS, **layout)
    alone, whole = losses(workspace), points(workspace, "train")
    one = put_aside(workspace)

    ran = in_two_processes(workspace, {**SETTINGS, **layout, "batch": 2})
    assert ran.code == 0, ran.err
    assert losses(workspace) == pytest.approx(alone, abs=1e-5)
    assert furthest(one, checkpoint(workspace)) <= 1e-5

    assert ran.out.count("train: 4 steps in ") == 1 and ran.out.count("rows to train on") == 1
    assert "2 processes" in ran.out
    assert sorted(path.suffix for path in (workspace / "log").iterdir()) == [".jsonl", ".log"]
    assert points(workspace, "start")[0]["processes"] == 2
    both = points(workspace, "train")
    assert [point["epoch"] for point in both] == [point["epoch"] for point in whole]
    for point in both:  # the tokens of both processes
        tokens = round(point["tokens_per_s"] * point["step_seconds"])
        alike = next(other for other in whole if other["step"] == point["step"])
        assert tokens == round(alike["tokens_per_s"] * alike["step_seconds"])
    assert json.loads((checkpoint(workspace) / "training.json").read_text("utf-8"))["steps"] == 4


KILLED = """
import json, os, signal, sys
from pathlib import Path
from mtgdm import processes
from mtgdm.student import watch

def kill(self, args, state, control, **kwargs):
    if state.global_step == 3 and not processes.is_first():
        os.kill(os.getpid(), signal.SIGKILL)
    before(self, args, state, control, **kwargs)

before, watch.Watch.on_step_end = watch.Watch.on_step_end, kill
sys.argv = ["mtgdm", "train", *sys.argv[1:]]
from mtgdm.cli import main
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs a signal to be killed by")
def test_a_run_of_which_one_process_was_killed_goes_on(workspace: Path) -> None:
    settings = {**SETTINGS, "batch": 2, "save_steps": 1}
    run_stage(train, workspace, **{**settings, "grad_accum": 4})
    alone = losses(workspace)
    one = put_aside(workspace)

    (workspace / "killed.py").write_text(KILLED, encoding="utf-8")
    ran = torchrun(workspace, "killed.py", *flags(settings))
    assert ran.code != 0
    assert whole_checkpoints(checkpoint(workspace))[-1].mark.step == 2
    ran = in_two_processes(workspace, settings)
    assert ran.code == 0, ran.err
    assert "going on from step 2 of 4" in ran.out
    assert losses(workspace) == pytest.approx(alone, abs=1e-5)
    assert furthest(one, checkpoint(workspace)) <= 1e-5


def test_an_error_of_all_is_told_once_and_one_of_another_process_with_its_number(workspace: Path) -> None:
    write_lines(workspace / "bad.jsonl", {"messages": []})
    ran = in_two_processes(workspace, {**SETTINGS, "in": "bad.jsonl"})
    assert ran.code != 0
    assert len(re.findall("^error: .*bad.jsonl:1: ", ran.err, re.MULTILINE)) == 1

    failing = KILLED.replace(
        "os.kill(os.getpid(), signal.SIGKILL)", "raise watch.UserError('this GPU fell out')"
    )
    (workspace / "failing.py").write_text(failing, encoding="utf-8")
    ran = torchrun(workspace, "failing.py", *flags({**SETTINGS, "batch": 2}))
    assert ran.code != 0
    assert "error: process 1: this GPU fell out" in ran.err
    assert "Traceback" not in ran.err.split("error: process 1")[0]


def test_checkpoints_of_fsdp_must_hold_the_whole_adapter(workspace: Path) -> None:
    mtgdm = CommandLine(workspace)
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}
    launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    ran = mtgdm("train", *flags(SETTINGS), env=launched)
    assert ran.code == 1 and "FSDP is set to save checkpoints as SHARDED_STATE_DICT" in ran.err
    assert "hint: fsdp_state_dict_type: FULL_STATE_DICT" in ran.err


def test_what_runs_in_one_process_alone_says_so(workspace: Path) -> None:
    mtgdm = CommandLine(workspace)
    several = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    ran = mtgdm("all", "--profile", "quickstart", env=several)
    assert (ran.code, ran.out) == (1, "")
    assert "`mtgdm all` runs in one process, and 2 were started" in ran.err
    assert "train --profile quickstart" in ran.err
    ran = mtgdm("prompts", "--profile", "quickstart", env=several)
    assert ran.code == 1 and "hint: without torchrun or accelerate launch: mtgdm prompts" in ran.err
    ran = mtgdm("train", "--preview", *flags(SETTINGS), env=several | {"RANK": "1", "LOCAL_RANK": "1"})
    assert (ran.code, ran.out, ran.err) == (0, "", "")
