"""Training: what is trained on, what is kept, and that a killed run reaches the same end."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mtgdm.errors import MtgdmError, UserError
from mtgdm.stages.package import run as package
from mtgdm.stages.train import TrainConfig
from mtgdm.stages.train import run as train
from mtgdm.student.noise import quiet
from mtgdm.student.resume import MARK, whole_checkpoints
from mtgdm.testing import StageRun
from mtgdm.testing import run as run_stage
from tests.conftest import CommandLine, clean_environment, read_rows, write_lines
from tests.tiny_student import THINKING, make_base, teacher_file, teacher_row

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

QUICK: dict[str, Any] = {
    "student_base": "base",
    "device_mode": "cpu",
    "max_steps": 6,
    "batch": 2,
    "grad_accum": 2,
    "lr": 1e-2,
    "lora_r": 4,
    "lora_dropout": 0.1,
    "eval_steps": 3,
    "save_steps": 2,
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def workspace(tmp_path: Path, base: Path) -> Path:
    shutil.copytree(base, tmp_path / "base")
    teacher_file(tmp_path)
    return tmp_path


def trained(workspace: Path, **settings: Any) -> StageRun:
    return run_stage(train, workspace, **{**QUICK, **settings})


def checkpoint(workspace: Path) -> Path:
    return workspace / "data" / "checkpoints" / "base-lora"


def points(workspace: Path, event: str | None = None) -> list[dict[str, Any]]:
    newest = sorted(
        (workspace / "log").glob("train-*.metrics.jsonl"), key=lambda path: path.stat().st_mtime_ns
    )[-1]
    return [point for point in read_rows(newest) if event in (None, point["event"])]


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def furthest(one: Path, other: Path) -> float:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


# --- what comes out ------------------------------------------------------------------------------


def test_a_run_leaves_a_checkpoint_its_metrics_and_nothing_else(workspace: Path) -> None:
    ran = trained(workspace)
    folder = checkpoint(workspace)
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert training["train_spots"] == [f"train景区{number}" for number in range(10)]
    assert (training["base_model"], training["train_rows"], training["val_rows"]) == ("base", 10, 3)
    assert training["best_eval_loss"] < training["first_eval_loss"]
    assert ran.manifests[0].counts["best_step"] == training["best_step"]
    assert "loss on val" in ran.result.summary


def test_the_metrics_tell_the_whole_run(workspace: Path) -> None:
    trained(workspace)
    events = [(point["event"], point.get("step")) for point in points(workspace)]
    assert events[:2] == [("start", None), ("eval", 0)]
    assert [step for event, step in events if event == "train"] == [1, 2, 3, 4, 5, 6]
    assert [step for event, step in events if event == "eval"] == [0, 3, 6]
    assert events[-1][0] == "end"
    start, end = points(workspace, "start")[0], points(workspace, "end")[0]
    assert start["trainable_parameters"] == sum(
        tensor.numel() for tensor in weights(checkpoint(workspace)).values()
    )
    assert (start["total_steps"], start["settings"]["lr"]) == (6, 1e-2)
    assert end["best_eval_loss"] == min(point["eval_loss"] for point in points(workspace, "eval"))
    for point in points(workspace, "eval"):
        assert point["perplexity"] == pytest.approx(math.exp(point["eval_loss"]))
    first = points(workspace, "train")[0]
    assert first["step_seconds"] > 0 and first["tokens_per_s"] > first["trained_tokens_per_s"] > 0


def test_the_best_checkpoint_is_the_result_not_the_last(workspace: Path) -> None:
    trained(workspace, lr=0.5, scheduler="constant", max_steps=6, eval_steps=1, keep_checkpoints=True)
    losses = {point["step"]: point["eval_loss"] for point in points(workspace, "eval") if point["step"]}
    best = min(losses, key=lambda step: losses[step])
    training = json.loads((checkpoint(workspace) / "training.json").read_text(encoding="utf-8"))
    assert (training["best_step"], training["best_eval_loss"]) == (best, losses[best])
    assert furthest(checkpoint(workspace), checkpoint(workspace) / f"checkpoint-{best}") == 0


def test_training_stops_early_when_val_no_longer_gains(workspace: Path) -> None:
    trained(
        workspace,
        max_steps=50,
        eval_steps=1,
        early_stop=True,
        early_stop_patience=2,
        early_stop_threshold=100,
    )
    end = points(workspace, "end")[0]
    assert end["stopped_early"] is True
    assert end["steps"] == 3  # the first measurement sets the mark, two more do not beat it by 100


def test_epochs_count_steps_as_the_rows_do(workspace: Path) -> None:
    trained(workspace, max_steps=0, epochs=2, batch=3, grad_accum=2)
    assert points(workspace, "end")[0]["steps"] == points(workspace, "start")[0]["total_steps"] == 4


# --- the loss ------------------------------------------------------------------------------------


def test_the_loss_is_the_models_own_over_all_trained_tokens(workspace: Path) -> None:
    """Logits at trained positions alone give the loss of full logits, on padded rows of unlike length."""
    import torch

    from mtgdm import rows
    from mtgdm.student import base, examples
    from mtgdm.student.chat import Chat

    trained(workspace)
    val = [row for row in rows.read_rows(workspace / "data" / "teacher.jsonl") if row.split == "val"]
    with quiet():
        from peft import PeftModel

        source = str(workspace / "base")
        chat = Chat(base.load_tokenizer(source, "base"), "base")
        model = base.load_model(source, "base", base.place("cpu"))
        summed, tokens = 0.0, 0
        adapted = PeftModel.from_pretrained(model, checkpoint(workspace)).eval()
        for example in examples.encode_rows(val, chat):
            ids, labels = torch.tensor([example.tokens.ids]), torch.tensor([example.tokens.labels])
            with torch.no_grad():
                summed += float(adapted(input_ids=ids, labels=labels).loss) * example.tokens.trained
            tokens += example.tokens.trained
    assert points(workspace, "end")[0]["best_eval_loss"] == pytest.approx(summed / tokens, abs=1e-5)


def test_every_row_comes_once_an_epoch_in_an_order_of_seed_and_epoch() -> None:
    from mtgdm.student.packing import Batches, padded

    lengths = [7 * number % 100 for number in range(203)]
    layout = padded(lengths, batch=4, grad_accum=2, seed=1)
    order = Batches(lengths, layout, seed=1)
    first = list(order)
    assert len(first) == len(order) == 51
    assert sorted(row for batch in first for (row,) in batch) == list(range(203))
    assert list(order) == first
    order.set_epoch(1)
    assert list(order) != first
    assert list(Batches(lengths, layout, seed=2)) != first
    spread = [
        max(lengths[row] for (row,) in batch) - min(lengths[row] for (row,) in batch) for batch in first
    ]
    assert sum(spread) / len(spread) < 15  # of 100: rows of like length share a batch


# --- interruptions -------------------------------------------------------------------------------

KILLED = """
import os, sys
from pathlib import Path
from mtgdm.stages.train import run
from mtgdm.student import watch
from mtgdm.testing import run as run_stage

def kill(self, args, state, control, **kwargs):
    if state.global_step == int(sys.argv[2]):
        os._exit(9)
    before(self, args, state, control, **kwargs)

before, watch.Watch.on_step_end = watch.Watch.on_step_end, kill
import json
run_stage(run, Path(sys.argv[1]), **json.loads(sys.argv[3]))
"""


def killed(workspace: Path, step: int, **settings: Any) -> None:
    """A run in a process of its own that ends without a word in the middle of a step."""
    arguments = [str(workspace), str(step), json.dumps({**QUICK, **settings})]
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        env=clean_environment(),
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert ended.returncode == 9, ended.stderr.decode("utf-8", "replace")[-2000:]


def test_a_killed_run_goes_on_and_reaches_the_same_end(workspace: Path) -> None:
    trained(workspace)
    whole = [point for point in points(workspace) if point["event"] in ("train", "eval")]
    finished = checkpoint(workspace).rename(workspace / "whole")
    (workspace / "data" / "checkpoints" / "base-lora.manifest.json").unlink()

    killed(workspace, 6)  # checkpoints at 2, 3 (a new best) and 4; the sixth step is lost
    assert not (checkpoint(workspace) / "adapter_config.json").exists()
    left = whole_checkpoints(checkpoint(workspace))
    assert left[-1].mark.step == 4
    ran = trained(workspace)
    assert any("going on from step 4 of 6" in line for line in ran.printed)

    assert furthest(checkpoint(workspace), finished) <= 1e-6
    again = [point for point in points(workspace) if point["event"] in ("train", "eval")]
    assert [(point["event"], point["step"]) for point in again] == [
        (point["event"], point["step"]) for point in whole
    ]
    for one, other in zip(again, whole, strict=True):
        key = "loss" if one["event"] == "train" else "eval_loss"
        assert one[key] == pytest.approx(other[key], abs=1e-6)
    assert not list(checkpoint(workspace).glob("checkpoint-*"))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on Windows")
def test_runs_killed_at_any_moment_reach_the_same_end(workspace: Path) -> None:
    settings = {**QUICK, "max_steps": 12, "save_steps": 1, "eval_steps": 4}
    trained(workspace, **settings)
    whole = {point["step"]: point["loss"] for point in points(workspace, "train")}
    finished = checkpoint(workspace).rename(workspace / "whole")
    (workspace / "data" / "checkpoints" / "base-lora.manifest.json").unlink()

    program = (
        "import json, sys; from pathlib import Path; from mtgdm.stages.train import run; "
        "from mtgdm.testing import run as run_stage; run_stage(run, Path(sys.argv[1]), **json.loads(sys.argv[2]))"
    )
    moments = random.Random(7)
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(workspace), json.dumps(settings)],
            env=clean_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        before = {path.name for path in checkpoint(workspace).glob("checkpoint-*")}
        patience = time.monotonic() + 120
        while time.monotonic() < patience and process.poll() is None:
            if {path.name for path in checkpoint(workspace).glob("checkpoint-*")} - before:
                break
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.4))
        process.kill()
        process.wait()
    trained(workspace, **settings)
    assert {point["step"]: point["loss"] for point in points(workspace, "train")} == pytest.approx(
        whole, abs=1e-6
    )
    assert furthest(checkpoint(workspace), finished) <= 1e-6


def test_other_batches_and_less_memory_go_on_with_the_same_training(workspace: Path) -> None:
    settings = {"lora_dropout": 0, "batch": 4, "grad_accum": 1}
    trained(workspace, **settings)
    whole = {point["step"]: point["loss"] for point in points(workspace, "train")}
    finished = checkpoint(workspace).rename(workspace / "whole")
    (workspace / "data" / "checkpoints" / "base-lora.manifest.json").unlink()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(5, patch)
        trained(workspace, **settings)
    ran = trained(
        workspace, lora_dropout=0, batch=1, grad_accum=4, gradient_checkpointing=True, attention="eager"
    )
    assert any("going on from step 4 of 6" in line for line in ran.printed)
    assert {point["step"]: point["loss"] for point in points(workspace, "train")} == pytest.approx(
        whole, abs=1e-5
    )
    assert furthest(checkpoint(workspace), finished) <= 1e-5


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the end of a step, once."""
    from mtgdm.student import watch

    before = watch.Watch.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt
        before(self, args, state, control, **kwargs)

    monkeypatch.setattr(watch.Watch, "on_step_end", stop)


def test_a_checkpoint_that_a_kill_cut_off_is_not_gone_on_from(workspace: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(5, patch)
        trained(workspace)
    (checkpoint(workspace) / "checkpoint-4" / MARK).unlink()
    ran = trained(workspace)
    assert any("going on from step 3 of 6" in line for line in ran.printed)


def test_other_settings_start_anew(workspace: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(5, patch)
        trained(workspace)
    ran = trained(workspace, lr=2e-2)
    assert any("starting anew" in line for line in ran.printed)
    assert [point["step"] for point in points(workspace, "train")] == [1, 2, 3, 4, 5, 6]


def test_a_run_cut_off_after_its_last_step_only_writes_its_result(workspace: Path) -> None:
    from mtgdm.student import adapter

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(adapter, "finish", stop)
        trained(workspace)
    best = min(points(workspace, "eval"), key=lambda point: point["eval_loss"])
    ran = trained(workspace)
    assert any("going on from step 6 of 6" in line for line in ran.printed)
    assert points(workspace, "end")[-1]["best_step"] == best["step"]
    assert (checkpoint(workspace) / "adapter_config.json").is_file()


def test_an_earlier_result_stays_whole_until_the_next_one_is(workspace: Path) -> None:
    trained(workspace)
    before = {path.name: path.read_bytes() for path in checkpoint(workspace).iterdir()}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(5, patch)
        trained(workspace, lr=2e-2, overwrite=True)
    assert {
        path.name: path.read_bytes() for path in checkpoint(workspace).iterdir() if path.is_file()
    } == before
    assert (checkpoint(workspace).parent / "base-lora.manifest.json").is_file()
    on = trained(workspace, lr=2e-2)
    assert any("going on from step" in line for line in on.printed)


def test_status_knows_how_far_an_interrupted_run_came(workspace: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(5, patch)
        trained(workspace)
    same = TrainConfig(**QUICK).resolved(workspace)
    assert same.finished() == (4, 6)
    assert same.model_copy(update={"gradient_checkpointing": True}).finished() == (4, 6)
    assert same.model_copy(update={"lr": 1e-5}).finished() is None


# --- rows ----------------------------------------------------------------------------------------


def refused(workspace: Path, **settings: Any) -> MtgdmError:
    with pytest.raises(MtgdmError) as caught:
        trained(workspace, **settings)
    assert not (checkpoint(workspace) / "adapter_config.json").exists()
    return caught.value


def test_a_spot_in_two_splits_is_refused(workspace: Path) -> None:
    path = workspace / "data" / "teacher.jsonl"
    write_lines(
        path,
        teacher_row("西湖", "train"),
        teacher_row("西湖", "test", "另一句。"),
        teacher_row("泰山", "train"),
    )
    assert "1 spots stand in more than one split" in str(refused(workspace))


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], "there are no rows"),
        ([teacher_row("西湖", "test")], "none of the 1 rows is in the split `train`"),
        ([{"messages": [{"role": "user", "content": "?"}]}], "teacher.jsonl:1: the row has no answer"),
        ([teacher_row("西湖", "train", " ")], "teacher.jsonl:1: the answer is empty"),
        (
            [teacher_row("西湖", "train"), teacher_row("泰山", "train", "a<|im_end|>b")],
            "teacher.jsonl:2: .*control token",
        ),
    ],
)
def test_rows_that_cannot_be_trained_on_are_one_clear_line(workspace: Path, lines: Any, reason: str) -> None:
    write_lines(workspace / "data" / "teacher.jsonl", *lines)
    with pytest.raises(UserError) as caught:
        trained(workspace)
    assert re.search(reason, str(caught.value))


def test_without_val_rows_the_last_step_counts_and_a_warning_says_so(workspace: Path) -> None:
    teacher_file(workspace, val=0)
    ran = trained(workspace)
    assert any("no row of teacher.jsonl is in the split `val`" in line for line in ran.warnings)
    training = json.loads((checkpoint(workspace) / "training.json").read_text(encoding="utf-8"))
    assert (training["best_step"], training["best_eval_loss"]) == (6, None)
    assert points(workspace, "eval") == []


def test_rows_without_a_split_of_their_own_get_one_by_hash(workspace: Path) -> None:
    found = [teacher_row(f"景区{number}", None) for number in range(30)]
    write_lines(workspace / "data" / "teacher.jsonl", *found)
    trained(workspace, val_ratio=0.4)
    start = points(workspace, "start")[0]
    assert start["val_rows"] > 5 and start["train_rows"] + start["val_rows"] < 30


def test_long_rows_stop_the_run_with_the_table_of_lengths(workspace: Path) -> None:
    with pytest.raises(UserError) as caught:
        trained(workspace, max_len=60)
    assert "rows are longer than --max-len 60" in str(caught.value)
    assert "--too-long drop" in str(caught.value.hint)


def test_long_rows_are_dropped_or_cut_on_request(workspace: Path) -> None:
    dropped = trained(workspace, max_len=60, too_long="drop")
    assert any("left out, 0 cut" in line for line in dropped.warnings)
    left = points(workspace, "start")[0]["train_rows"]
    assert 0 < left < 10
    cut = trained(workspace, max_len=60, too_long="truncate", overwrite=True)
    assert any("0 left out" in line for line in cut.warnings)
    assert points(workspace, "start")[0]["train_rows"] == 10


def test_the_preview_shows_tokens_with_their_mask_and_trains_nothing(workspace: Path) -> None:
    ran = trained(workspace, preview=True)
    text = "\n".join(ran.printed)
    read, answer = (next(line for line in ran.printed if line.startswith(f"  {mark} ")) for mark in "-+")
    assert read.endswith("|assistant|\\n")
    assert answer.endswith("|景|区|0|在|杭|州|市|。|湖|光|山|色|。|<|im_end|>")
    assert "train: trained" in text
    assert not checkpoint(workspace).exists()


def test_the_log_holds_the_preview_before_the_first_step(workspace: Path) -> None:
    trained(workspace)
    log = next((workspace / "log").glob("train-*.log")).read_text(encoding="utf-8")
    assert log.index("|<|im_end|>") < log.index("start {")


# --- bases and devices ---------------------------------------------------------------------------


def test_an_adapter_is_no_base(workspace: Path) -> None:
    trained(workspace)
    with pytest.raises(UserError, match="is a LoRA adapter, not a model") as caught:
        trained(workspace, student_base="data/checkpoints/base-lora")
    assert caught.value.hint == "--student-base base, which it was trained on"


def test_a_git_lfs_pointer_is_named_with_the_command_that_fetches_the_file(
    workspace: Path, base: Path
) -> None:
    shutil.copytree(base, workspace / "pointer")
    weights_file = workspace / "pointer" / "model.safetensors"
    weights_file.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", encoding="utf-8"
    )
    error = refused(workspace, student_base="pointer")
    assert str(error).endswith("model.safetensors: this is a Git-LFS pointer, not the file itself")
    assert error.hint == "git lfs pull && git lfs checkout"


def test_a_base_that_is_nowhere_is_one_line(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with quiet():
        from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused(workspace, student_base="nobody/no-such-model")
    assert "'nobody/no-such-model'" in str(error) and "--student-base mtgdm-tiny" in str(error.hint)
    assert "there is no such model folder" in str(refused(workspace, student_base="./nowhere"))


def test_cuda0_without_a_gpu_is_refused(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device-mode cpu" in str(refused(workspace, device_mode="cuda0").hint)


def test_a_loss_that_is_no_number_stops_the_run(workspace: Path) -> None:
    error = refused(workspace, lr=1e30, scheduler="constant", warmup=0)
    assert "became" in str(error) and "lower --lr" in str(error.hint)


def test_a_loss_on_val_that_is_no_number_stops_the_run_and_leaves_the_checkpoint_before(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtgdm.student.trainer import StudentTrainer

    real = StudentTrainer.summed_loss

    def lost(self: StudentTrainer, model: Any, inputs: dict[str, Any]) -> Any:
        loss, trained = real(self, model, inputs)
        return (loss if model.training or self.state.global_step < 6 else loss * math.nan), trained

    monkeypatch.setattr(StudentTrainer, "summed_loss", lost)
    error = refused(workspace)
    assert "the loss on val became nan at step 6" in str(error) and "lower --lr" in str(error.hint)
    assert [one.mark.step for one in whole_checkpoints(checkpoint(workspace))][-1] == 4
    assert all(math.isfinite(point["eval_loss"]) for point in points(workspace, "eval"))


def test_the_peak_of_memory_is_one_measure_on_the_way_and_at_the_end(workspace: Path) -> None:
    trained(workspace)
    on_the_way = [point["peak_memory_mib"] for point in points(workspace, "train")]
    assert max(on_the_way) <= points(workspace, "end")[0]["peak_memory_mib"]


def test_it_is_told_that_max_steps_decides_and_not_epochs(workspace: Path) -> None:
    assert any(
        "--max-steps 6 decides, not --epochs 4 (12 steps)" in line
        for line in trained(workspace, epochs=4.0).printed
    )
    for settings in ({"max_steps": 6}, {"max_steps": 0, "epochs": 1.0}):
        assert not any("decides" in line for line in trained(workspace, overwrite=True, **settings).printed)


def test_memory_that_runs_out_names_the_settings_to_change(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from mtgdm.student import trainer

    def too_much(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(trainer.StudentTrainer, "summed_loss", too_much)
    stopped = refused(workspace)
    assert str(stopped) == "the largest batch does not fit: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert str(stopped.hint).startswith(
        "--batch 1 --grad-accum 4; --gradient-checkpointing (this far the same training goes on); --load-in-4bit"
    )
    saving = refused(workspace, batch=1, gradient_checkpointing=True)
    assert str(saving.hint).startswith("--load-in-4bit; a --max-len below 2048")


def test_the_largest_batch_is_tried_first_and_leaves_nothing_behind(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from mtgdm.student import trainer

    tried: list[int] = []
    before = trainer.StudentTrainer.try_batch

    def watched(self: Any, model: Any, items: Any) -> None:
        state = torch.get_rng_state()
        before(self, model, items)
        assert torch.equal(state, torch.get_rng_state())
        assert all(value.grad is None for value in model.parameters())
        tried.append(max(self.train_dataset[item][0].length for item in items))

    monkeypatch.setattr(trainer.StudentTrainer, "try_batch", watched)
    trained(workspace)
    start = points(workspace, "start")[0]
    log = next((workspace / "log").glob("train-*.log")).read_text(encoding="utf-8")
    longest = next(line.split()[-2] for line in log.splitlines() if line.startswith("train: tokens"))
    assert tried == [int(longest)]
    assert start["expected_memory_mib"]["total"] >= start["expected_memory_mib"]["logits"] > 0


def test_a_large_model_is_not_trained_on_a_cpu_by_accident(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from mtgdm.stages import train as stage_module

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(stage_module, "CPU_PARAMETERS", 1000)
    error = refused(workspace, device_mode="auto")
    assert str(error).startswith("PyTorch sees no GPU, and base with 0.0 billion parameters would be trained")
    assert "--allow-cpu" in str(error.hint)
    trained(workspace, device_mode="auto", allow_cpu=True, max_steps=1)
    trained(workspace, device_mode="cpu", max_steps=1)
    assert "needs a GPU" in str(refused_again(workspace, precision="float16"))


def refused_again(workspace: Path, **settings: Any) -> MtgdmError:
    with pytest.raises(MtgdmError) as caught:
        trained(workspace, **settings)
    return caught.value


@pytest.mark.parametrize("kind", ["lora_rslora", "lora_dora"])
def test_the_other_kinds_of_lora_train_and_package(workspace: Path, kind: str) -> None:
    trained(workspace, **{kind: True})
    end = points(workspace, "end")[0]
    assert end["best_eval_loss"] < end["first_eval_loss"]
    config = json.loads((checkpoint(workspace) / "adapter_config.json").read_text(encoding="utf-8"))
    assert config[{"lora_rslora": "use_rslora", "lora_dora": "use_dora"}[kind]] is True
    run_stage(package, workspace)  # merged, and compared with base and adapter


def test_an_end_of_turn_that_also_pads_is_trained_and_counted(workspace: Path) -> None:
    """Tokenizers without a token for padding: the mask goes by place, so nothing is lost."""
    trained(workspace, max_steps=1, eval_steps=1)
    before = points(workspace, "train")[0]
    path = workspace / "base" / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "pad_token": "<|im_end|>"}), encoding="utf-8")
    trained(workspace, max_steps=1, eval_steps=1)
    after = points(workspace, "train")[0]
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-6)
    for key in ("tokens_per_s", "trained_tokens_per_s"):
        assert round(after[key] * after["step_seconds"]) == round(before[key] * before["step_seconds"])


def test_metrics_go_to_a_tracker_too(workspace: Path) -> None:
    pytest.importorskip("tensorboardX")
    trained(workspace, report_to=["tensorboard"])
    (folder,) = (workspace / "log" / "tensorboard").iterdir()
    assert any(path.name.startswith("events.out.tfevents") for path in folder.iterdir())
    assert not (checkpoint(workspace) / "runs").exists()
    error = refused_again(workspace, report_to=["tensorbord"])
    assert str(error) == "--report-to: there is no tracker 'tensorbord'"
    assert error.hint == "did you mean 'tensorboard'?" and error.exit_code == 2
    error = refused_again(workspace, report_to=["swanlab"])
    assert (str(error), error.hint) == ("--report-to: swanlab is not installed", "pip install swanlab")


def test_plan_tells_tokens_steps_memory_and_the_hours_of_an_earlier_run(workspace: Path) -> None:
    config = train.config(**{**QUICK, "max_steps": 0, "epochs": 3}).resolved(workspace)
    estimate = config.estimate()
    assert (estimate["train_rows"], estimate["val_rows"], estimate["steps"]) == (10, 3, 9)
    assert estimate["tokens_in_all"] == 3 * estimate["tokens_an_epoch"]
    assert set(estimate["mib_of_memory"]) == {
        "weights", "adapter", "gradients", "optimizer", "activations", "logits", "total",
    }  # fmt: skip
    assert estimate["mib_of_disk"] > 0 and "hours" not in estimate
    trained(workspace, max_steps=0, epochs=3)
    assert points(workspace, "end")[0]["steps"] == 9
    hours = config.estimate()["hours"]
    assert 0 < hours.low <= hours.mean <= hours.high < 1
    assert train.config(**{**QUICK, "max_len": 16}).resolved(workspace).estimate() == {
        "train_rows": 10,
        "rows_longer_than_max_len": 10,
    }
    (workspace / "data" / "teacher.jsonl").unlink()
    assert config.estimate() == {}


def test_plan_says_why_it_knows_no_tokens_without_the_base(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quiet():
        from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    estimate = train.config(student_base="nobody/no-such-model").resolved(workspace).estimate()
    assert (estimate["train_rows"], estimate["val_rows"]) == (10, 3)
    assert "'nobody/no-such-model' is not on this machine" in estimate["tokens_and_memory_are_not_known"]


ON_A_GPU = pytest.param("cuda0", marks=pytest.mark.gpu)


def need(device_mode: str) -> None:
    import torch

    if device_mode == "cuda0" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.mark.parametrize("device_mode", ["cpu", ON_A_GPU])
def test_qlora_trains(workspace: Path, device_mode: str) -> None:
    need(device_mode)
    pytest.importorskip("bitsandbytes")
    make_base(workspace / "wide", hidden=64)  # bitsandbytes packs 64 numbers to a block
    trained(
        workspace,
        device_mode=device_mode,
        student_base="wide",
        load_in_4bit=True,
        bnb_compute_dtype="float32" if device_mode == "cpu" else "bfloat16",
        gradient_checkpointing=True,
    )
    end = points(workspace, "end")[0]
    assert end["best_eval_loss"] < end["first_eval_loss"]
    assert (workspace / "data" / "checkpoints" / "wide-lora" / "adapter_config.json").is_file()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["auto", "float32", "float16"])
def test_packed_rows_train_on_a_gpu_as_on_the_cpu(workspace: Path, precision: str) -> None:
    need("cuda0")
    settings: dict[str, Any] = {"lora_dropout": 0, "packing": True, "max_len": 256, "lr": 1e-3}
    trained(workspace, **settings)
    on_cpu = points(workspace, "end")[0]["best_eval_loss"]
    trained(workspace, device_mode="cuda0", precision=precision, **settings)
    end = points(workspace, "end")[0]
    assert end["best_eval_loss"] == pytest.approx(on_cpu, rel=1e-3 if precision == "float32" else 0.05)
    assert end["peak_memory_mib"] > 0


def test_gradient_checkpointing_changes_memory_and_not_the_result(workspace: Path) -> None:
    trained(workspace, lora_dropout=0)
    plain = checkpoint(workspace).rename(workspace / "plain")
    trained(workspace, lora_dropout=0, gradient_checkpointing=True)
    assert furthest(plain, checkpoint(workspace)) <= 1e-6


# --- what users brought --------------------------------------------------------------------------


def test_targets_that_name_no_layer_are_refused_with_the_names_there_are(workspace: Path) -> None:
    for targets in (["nosuch"], ["q_proj", "nosuch"], ["q_proj", "all-linear"]):
        error = refused_again(workspace, lora_targets=targets)
        assert error.exit_code == 2 and str(error).startswith(
            "--lora-targets: no layer of this model is called"
        )
        assert error.hint and error.hint.endswith(
            "gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
        )
    assert "no adapter can be put on this model" in str(
        refused_again(workspace, lora_targets=["input_layernorm"])
    )
    trained(workspace, lora_targets=["q_proj", "v_proj"], max_steps=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": -1},
        {"seed": 2**32},
        {"warmup": math.inf},
        {"lr": math.inf},
        {"epochs": math.nan},
        {"student_base": ""},
    ],
)
def test_numbers_that_no_training_can_have_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="1 validation error"):
        train.config(**settings)


def test_weights_that_are_damaged_are_one_line(workspace: Path) -> None:
    path = workspace / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "the model cannot be loaded" in str(refused(workspace))


def test_a_tokenizer_of_another_model_is_seen_before_the_first_step(workspace: Path) -> None:
    path = workspace / "base" / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "vocab_size": 50}), encoding="utf-8")
    assert re.search(r"makes token [\d,]+, and the model knows 50", str(refused(workspace)))


def test_a_prompt_in_two_splits_is_refused_whatever_its_spot(workspace: Path) -> None:
    copy = teacher_row("西湖", "val")
    write_lines(
        workspace / "data" / "teacher.jsonl",
        teacher_row("西湖", "train"),
        teacher_row("泰山", "train"),
        {**copy, "meta": {**copy["meta"], "spot": "另一个"}},
    )
    assert "1 prompts stand in more than one split" in str(refused(workspace))


def test_a_lone_surrogate_in_an_answer_is_trained_as_a_replacement_character(workspace: Path) -> None:
    row = json.dumps(teacher_row("西湖", "train", "湖光\ud800山色"), ensure_ascii=True)
    path = workspace / "data" / "teacher.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + row + "\n", encoding="utf-8")
    trained(workspace, max_steps=1)


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("[enforce fail at inline_container.cc:672]")],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    workspace: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtgdm.student import trainer

    def full(*_: Any, **__: Any) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.StudentTrainer, "_save_optimizer_and_scheduler", full)
        stopped = refused(workspace)
    assert "there is no room left for a checkpoint" in str(stopped) and "make room" in str(stopped.hint)
    trained(workspace)


def test_a_kill_between_the_adapter_and_its_manifest_costs_nothing(workspace: Path) -> None:
    ran = trained(workspace)
    (checkpoint(workspace).parent / "base-lora.manifest.json").unlink()
    again = trained(workspace)
    assert any("this very training is finished" in line for line in again.printed)
    assert again.result.summary == ran.result.summary
    assert (checkpoint(workspace).parent / "base-lora.manifest.json").is_file()


def test_a_finished_training_is_not_done_again_unless_that_is_asked_for(workspace: Path) -> None:
    trained(workspace)
    weights = checkpoint(workspace) / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    again = trained(workspace)
    assert any("--overwrite trains anew" in line for line in again.printed)
    assert weights.stat().st_mtime_ns == before
    trained(workspace, overwrite=True)
    assert weights.stat().st_mtime_ns > before
    anew = trained(workspace, lr=1e-3, overwrite=True)
    assert not any("is finished" in line for line in anew.printed)


def test_a_finished_checkpoint_gives_way_to_another_training_only_where_that_is_asked_for(
    workspace: Path,
) -> None:
    trained(workspace)
    before = (checkpoint(workspace) / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UserError, match="another training lies here") as caught:
        trained(workspace, lr=1e-3)
    assert "lr 0.01 → 0.001" in caught.value.message
    assert "--overwrite" in str(caught.value.hint) and "--ckpt-out" in str(caught.value.hint)
    teacher_file(workspace, train=11)
    with pytest.raises(UserError, match="other rows"):
        trained(workspace)
    assert (checkpoint(workspace) / "adapter_model.safetensors").read_bytes() == before
    trained(workspace, lr=1e-3, overwrite=True)
    assert (checkpoint(workspace) / "adapter_model.safetensors").read_bytes() != before
    trained(workspace, ckpt_out="data/checkpoints/beside")


def test_an_adapter_of_another_tool_is_not_trained_over(workspace: Path) -> None:
    checkpoint(workspace).mkdir(parents=True)
    (checkpoint(workspace) / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="adapter of another tool lies here"):
        trained(workspace)


def test_a_base_with_named_templates_trains_again_into_the_same_folder(workspace: Path) -> None:
    templates = workspace / "base" / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ messages }}", encoding="utf-8")
    for lr in (1e-2, 1e-3, 1e-4):
        trained(workspace, lr=lr, overwrite=True)
        assert (checkpoint(workspace) / "chat_template.jinja").is_file()
        assert not (checkpoint(workspace) / "additional_chat_templates").exists(), "none of them was trained"


def test_all_retrains_what_it_made_itself_and_nothing_else(workspace: Path) -> None:
    mtgdm = CommandLine(workspace)
    settings = {key: value for key, value in QUICK.items() if key != "lr"}
    profile = {"pipeline": ["train"], "train": settings}
    write_lines(workspace / "configs/mine.yaml", json.dumps(profile))
    assert mtgdm("all", "--profile", "mine").code == 0
    settings["epochs"] = 2
    write_lines(workspace / "configs/mine.yaml", json.dumps(profile))
    alone = mtgdm("train", "--profile", "mine")
    assert (alone.code, "epochs 3.0 → 2.0" in alone.err) == (1, True)
    again = mtgdm("all", "--profile", "mine")
    assert again.code == 0, again.err
    assert "it was made by this pipeline, and is replaced" in again.out
    (checkpoint(workspace) / "adapter_config.json").write_bytes(b"{}\n")
    settings["epochs"] = 1
    write_lines(workspace / "configs/mine.yaml", json.dumps(profile))
    assert mtgdm("all", "--profile", "mine").code == 1


def test_a_base_that_was_only_touched_is_the_same_base(workspace: Path) -> None:
    trained(workspace)
    for path in (workspace / "base").iterdir():
        os.utime(path, (1, 1))
    assert any("is finished" in line for line in trained(workspace).printed)


def test_a_training_of_one_step_learns(workspace: Path) -> None:
    trained(workspace, max_steps=1)
    (point,) = points(workspace, "train")
    assert point["learning_rate"] > 0


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_that_cannot_train_here_is_told_before_anything_is_loaded(
    workspace: Path, attention: str
) -> None:
    error = refused(workspace, attention=attention)
    assert attention in error.message and "--attention" in str(error.hint)


def test_half_a_launcher_is_refused(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = refused(workspace)
    assert "WORLD_SIZE is 2, and RANK, LOCAL_RANK" in error.message and "torchrun" in str(error.hint)


def test_no_tracker_may_be_asked_for_by_its_name_in_transformers(workspace: Path) -> None:
    trained(workspace, report_to=("none",))


def test_a_checkpoint_whose_best_one_is_gone_is_not_gone_on_from(workspace: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(5, patch)
        trained(workspace)
    path = checkpoint(workspace) / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    assert state["best_global_step"] == 3
    path.write_text(json.dumps({**state, "best_global_step": 1}), encoding="utf-8")
    ran = trained(workspace)
    assert any("going on from step 3 of 6" in line for line in ran.printed)


def test_the_newest_checkpoint_is_deleted_first(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that the run is finished: without the best one beside it nothing could be made of it."""
    from mtgdm.student import resume

    for step in (3, 20, 100):
        (workspace / f"checkpoint-{step}").mkdir()
    gone: list[str] = []
    monkeypatch.setattr(shutil, "rmtree", lambda path: gone.append(path.name))
    assert resume.remove_checkpoints(workspace, keep=frozenset({workspace / "checkpoint-3"})) == 2
    assert gone == ["checkpoint-100", "checkpoint-20"]


def test_a_base_that_cannot_be_packaged_as_gguf_is_told_before_the_training(workspace: Path) -> None:
    assert not any("GGUF" in line for line in trained(workspace, max_steps=1).warnings)
    path = workspace / "base" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"hidden_act": "gelu"}
    path.write_text(json.dumps(config), encoding="utf-8", newline="\n")
    (warning,) = trained(workspace, max_steps=1, overwrite=True).warnings
    assert (
        "base can be trained, but not packaged as GGUF: its activation gelu is not that of Qwen2" in warning
    )
    assert trained(workspace, max_steps=1, ckpt_out=workspace / "unasked", package_check=False).warnings == []


# --- thoughts, turns and weights -----------------------------------------------------------------


def thinking(name: str, split: str, answer: str, **message: Any) -> dict[str, Any]:
    row = teacher_row(name, split, answer)
    row["messages"][-1] |= message
    return row


def record(workspace: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((checkpoint(workspace) / "training.json").read_text(encoding="utf-8"))
    return value


def test_thoughts_are_trained_where_every_row_has_them_and_the_checkpoint_says_so(workspace: Path) -> None:
    write_lines(
        workspace / "data" / "teacher.jsonl",
        thinking("甲", "train", "<think>\n先看资料。\n</think>\n\n甲在杭州市。"),
        thinking("乙", "train", "乙在杭州市。", reasoning_content="先看资料。"),
        thinking("丙", "val", "丙在杭州市。", reasoning_content="先看资料。"),
    )
    printed = "\n".join(trained(workspace, preview=True).printed)
    assert printed.count("先") == 2, "once in each row that is shown"
    trained(workspace, max_steps=1, eval_steps=1)
    assert record(workspace)["thoughts"] is True


def test_rows_of_both_kinds_stop_the_run_and_the_hint_says_what_can_be_done(workspace: Path) -> None:
    write_lines(
        workspace / "data" / "teacher.jsonl",
        teacher_row("甲", "train"),
        thinking("乙", "train", "乙在杭州市。", reasoning_content="先看资料。"),
    )
    with pytest.raises(MtgdmError, match="comes with thoughts, as 1 of 2 do") as caught:
        trained(workspace, preview=True)
    assert str(caught.value.where).endswith("teacher.jsonl:2")
    assert "--thoughts drop" in (caught.value.hint or "")
    dropped = "\n".join(trained(workspace, preview=True, thoughts="drop").printed)
    assert "资料。" not in dropped.split("写一句介绍")[-1]
    trained(workspace, preview=True, thoughts="keep")


def test_an_answer_of_weight_0_is_read_and_not_trained(workspace: Path) -> None:
    row = teacher_row("甲", "train", "好的回答。")
    bad = {"role": "assistant", "content": "坏的回答。", "weight": 0}
    row["messages"][2:2] = [bad, {"role": "user", "content": "再说"}]
    write_lines(workspace / "data" / "teacher.jsonl", row)
    lines = trained(workspace, preview=True).printed
    trained_lines = "".join(line for line in lines if line.startswith("  +")).replace("|", "")
    assert "好的回答" in trained_lines
    assert "坏的" not in trained_lines
    assert "坏的" in "".join(lines).replace("|", "")


def test_the_checkpoint_carries_the_template_it_was_trained_by(workspace: Path) -> None:
    from mtgdm.student.generation import load_chat

    template = workspace / "base" / "chat_template.jinja"
    template.write_text(THINKING, encoding="utf-8")
    ran = trained(workspace, max_steps=1, eval_steps=1)
    assert any("thinking is off" in line for line in ran.printed)
    saved = (checkpoint(workspace) / "chat_template.jinja").read_text(encoding="utf-8")
    assert saved != THINKING
    with quiet():
        chat = load_chat(str(checkpoint(workspace)), "checkpoint", workspace)
    assert chat.template == saved
    assert record(workspace)["answer_start"] == chat.answer_start
    assert chat.answer_start.endswith("<think>\n\n</think>\n\n")


def test_a_row_of_several_turns_may_make_several_examples_and_that_is_told(workspace: Path) -> None:
    (workspace / "base" / "chat_template.jinja").write_text(THINKING, encoding="utf-8")
    row = teacher_row("甲", "train")
    row["messages"] += [{"role": "user", "content": "在哪？"}, {"role": "assistant", "content": "在杭州市。"}]
    write_lines(workspace / "data" / "teacher.jsonl", row)
    ran = trained(workspace, preview=True)
    assert any("1 rows of train make 2" in line for line in ran.printed)
