"""The train report: which run it takes, what it says of odd ones, other tools' states, several runs in one."""

from __future__ import annotations

import json
import math
import os
import random
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from mtgdm import manifest
from mtgdm.charts.lines import MOST_POINTS, averaged, thinned, trend
from mtgdm.errors import UserError
from mtgdm.manifest import Manifest
from mtgdm.reports.trainer_state import newest_state
from mtgdm.reports.training_comparison import comparison_figure, differing, run_names
from mtgdm.reports.training_figures import loss_figure, optimizer_figure
from mtgdm.reports.training_health import describe, judge
from mtgdm.reports.training_report import key_figures
from mtgdm.reports.training_run import TrainingRun, has_steps, read_run
from mtgdm.stages.report import run as train_report
from mtgdm.testing import run as run_stage
from tests.conftest import write_lines
from tests.test_reports import no_browser, report_json, strict_figure, train_metrics, training_events  # noqa: F401

NAN = float("nan")


def written(folder: Path, name: str = "20261123-100000", **about: Any) -> Path:
    """A run of 60 steps whose settings are those of `training_events` and these."""
    events = training_events()
    events[0]["settings"] |= about
    return write_lines(folder / f"log/train-{name}.metrics.jsonl", *events)


def state(folder: Path, *history: dict[str, Any], **more: Any) -> Path:
    """A trainer_state.json as transformers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trainer_state.json"
    value = {
        "best_global_step": None,
        "best_metric": None,
        "best_model_checkpoint": None,
        "epoch": 3.0,
        "eval_steps": 10,
        "global_step": 30,
        "log_history": list(history),
        "logging_steps": 5,
        "max_steps": 30,
        "num_train_epochs": 3,
        "train_batch_size": 4,
        **more,
    }
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def logged(step: int, loss: float, **more: float) -> dict[str, Any]:
    return {"epoch": step / 10, "grad_norm": 0.7, "learning_rate": 1e-4, "loss": loss, "step": step, **more}


# --- which run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lines", [[], [{"event": "start", "total_steps": 10}], ['{"event": "tra']])
@pytest.mark.usefixtures("no_browser")
def test_a_run_without_a_step_is_one_clear_error(tmp_path: Path, lines: list[Any]) -> None:
    path = train_metrics(tmp_path, *lines)
    with pytest.raises(UserError, match="no step was logged here") as error:
        run_stage(train_report, tmp_path)
    assert error.value.where == str(path)
    assert not list(tmp_path.glob("data/report/*report*"))


@pytest.mark.usefixtures("no_browser")
def test_a_newer_run_that_logged_nothing_does_not_hide_the_last_good_one(tmp_path: Path) -> None:
    good = written(tmp_path)
    newer = write_lines(tmp_path / "log/train-20261124-000000.metrics.jsonl", training_events()[0])
    run = run_stage(train_report, tmp_path)
    assert report_json(run)["metrics_file"] == f"log/{good.name}"
    assert f"{newer.name} is newer and logged no step: this is the run before it" in report_json(run)["notes"]
    assert any(newer.name in line for line in run.printed)
    assert has_steps(good) and not has_steps(newer)


@pytest.mark.usefixtures("no_browser")
def test_two_reports_within_one_second_are_two_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OneSecond(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> OneSecond:
            return cls(2026, 11, 23, 14, 30, 0)

    monkeypatch.setattr("mtgdm.pipeline.datetime", OneSecond)
    written(tmp_path)
    first, second = (run_stage(train_report, tmp_path).result.outputs for _ in range(2))
    assert first and first[0].name == "train-report-20261123-143000.json"
    assert second and second[0].name == "train-report-20261123-143001.json"
    assert first[0].exists() and second[0].exists()


@pytest.mark.usefixtures("no_browser")
def test_each_figure_is_kept_as_json_to_be_drawn_anew(tmp_path: Path) -> None:
    import plotly.io

    written(tmp_path)
    run_stage(train_report, tmp_path)
    kept = sorted((tmp_path / "data/diagrams").glob("*.json"))
    assert [path.suffixes[0] for path in kept] == [".loss", ".optim"]
    assert [plotly.io.read_json(path).layout.title.text for path in kept] == [
        "<b>Training loss</b>",
        "<b>Optimizer and speed</b>",
    ]


@pytest.mark.usefixtures("no_browser")
def test_the_report_tells_what_the_checkpoint_was_made_from(tmp_path: Path) -> None:
    written(tmp_path)
    checkpoint = tmp_path / "data/checkpoints/tiny-lora"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_config.json").write_text("{}", encoding="utf-8")
    began = datetime(2026, 11, 23, 10, 0, 0).astimezone()
    made = Manifest(
        stage="train",
        output=manifest.state(checkpoint, tmp_path),
        inputs=[],
        settings={"lr": manifest.SettingValue(value=0.5, source="mine.yaml:3")},
        profile="mine",
        domain="tourism",
        counts={},
        summary="60 steps",
        versions=manifest.versions(),
        started=began,
        finished=began,
        seconds=1.0,
    )
    manifest.write(made, checkpoint)
    run = run_stage(train_report, tmp_path)
    assert run.result.outputs
    html = run.result.outputs[0].with_suffix(".html").read_text(encoding="utf-8")
    assert [one["stage"] for one in report_json(run)["lineage"]] == ["train"]
    assert "What it was made from" in html and "mine.yaml:3" in html
    assert "`lr=0.5`" in run.result.outputs[0].with_suffix(".md").read_text(encoding="utf-8")


# --- how it went ---------------------------------------------------------------------------------


def told(folder: Path, *events: Any) -> tuple[str, str]:
    word, reasons = judge(read_run(train_metrics(folder, *events)))
    return word, "; ".join(reasons)


def test_a_loss_that_hardly_falls_is_under_fitting(tmp_path: Path) -> None:
    steps = [{"event": "train", "step": step, "loss": 2 - step / 1000} for step in range(1, 41)]
    word, why = told(tmp_path, *steps)
    assert word == "under-fitting"
    assert "a higher --lr" in why


def test_another_checkpoint_kept_than_the_best_is_told(tmp_path: Path) -> None:
    events = training_events(val=lambda t: 1 + abs(t - 0.5))
    events[-1]["best_step"] = 60
    assert "the checkpoint kept is that of step 60" in told(tmp_path, *events)[1]
    del events[-1]
    assert "use the checkpoint of that step, if it was kept" in told(tmp_path, *events)[1]


def test_a_run_without_an_end_took_the_time_of_its_steps(tmp_path: Path) -> None:
    points = [{"event": "train", "step": step, "loss": 1.0, "step_seconds": 2.0} for step in (1, 10, 20)]
    assert describe(read_run(train_metrics(tmp_path, *points)))["seconds"] == 40.0


def test_steps_that_grow_slower_are_told(tmp_path: Path) -> None:
    assert "a step took 70% longer at the end" in told(tmp_path, *training_events())[1]


def test_gradients_are_held_to_the_clip_that_the_run_names(tmp_path: Path) -> None:
    events = training_events()
    del events[0]["settings"]["max_grad_norm"]
    events[0]["max_grad_norm"] = 0.25
    figures = describe(read_run(train_metrics(tmp_path, *events)))["gradient_norm"]
    assert (figures["clip"], figures["clipped"]) == (0.25, 1.0)


def falling(steps: int = 40, **more: Any) -> list[dict[str, Any]]:
    """Points of a train loss that falls from 3 to 1."""
    return [
        {"event": "train", "step": step, "loss": 3 - 2 * step / steps, "grad_norm": 0.5, **more}
        for step in range(1, steps + 1)
    ]


def evaluations(*losses: float | None) -> list[dict[str, Any]]:
    """Evaluations every ten steps."""
    return [
        {"event": "eval", "step": 10 * (place + 1), "eval_loss": loss} for place, loss in enumerate(losses)
    ]


@pytest.mark.parametrize(
    ("losses", "first", "best"),
    [
        ((NAN, NAN), 10, None),
        ((2.0, 1.5, NAN, NAN), 30, 20),
        ((2.0, math.inf, 1.0), 20, 30),
        ((2.0, 1.5, None), 30, 20),
    ],
)
def test_an_eval_loss_that_is_no_number_has_diverged(
    tmp_path: Path, losses: tuple[float | None, ...], first: int, best: int | None
) -> None:
    word, why = told(tmp_path, *falling(), *evaluations(*losses), {"event": "end", "seconds": 1.0})
    assert word == "diverged"
    assert (
        f"the eval loss is not a finite number at {sum(not loss or not loss < 9 for loss in losses)} ev"
        in why
    )
    assert f"first at step {first}" in why
    assert (f"eval loss was lowest at step {best} " in why) == (best is not None)
    assert "--epochs" not in why and "nothing was evaluated" not in why


def test_gradients_lost_to_the_end_have_diverged_and_a_few_have_not(tmp_path: Path) -> None:
    events = falling()
    for event in events[3:5]:
        event["grad_norm"] = math.inf
    events[7]["grad_norm"] = NAN
    word, why = told(tmp_path, *events)
    assert word == "healthy"
    assert "the gradient norm was not a finite number at 3 logged steps, first at step 4" in why
    for event in events[30:]:
        event["grad_norm"] = NAN
    word, why = told(tmp_path, *events)
    assert word == "diverged"
    assert "the gradient norm is not a finite number from step 31 to the end" in why


def test_a_gradient_norm_that_is_not_logged_is_none_that_is_lost(tmp_path: Path) -> None:
    events = falling(grad_norm=None)
    del events[-1]["grad_norm"]
    run = read_run(train_metrics(tmp_path, *events))
    assert judge(run)[0] == "healthy"
    assert describe(run)["gradient_norm"]["not_finite"] == 0


def test_the_zero_that_transformers_writes_for_a_lost_loss_is_no_loss(tmp_path: Path) -> None:
    history = [
        logged(5, 2.0),
        logged(10, 1.5),
        *(logged(step, 0.0, grad_norm=NAN) for step in (15, 20, 25, 30)),
    ]
    run = read_run(state(tmp_path, *history, {"eval_loss": NAN, "step": 30}))
    word, reasons = judge(run)
    assert word == "diverged"
    assert "the train loss is not a finite number at 4 steps, first at step 15" in reasons
    assert "the eval loss is not a finite number at 1 evaluation, first at step 30" in reasons
    assert describe(run)["loss"]["min"] == 1.5
    cards = key_figures(describe(run))
    assert ("final eval loss", "–", "no finite number at step 30") in cards
    strict_figure(loss_figure(run))


def noisy(folder: Path, points: int, slope: float, noise: float, seed: int) -> str:
    source = random.Random(seed)
    run = TrainingRun(folder)
    for step in range(1, points + 1):
        run.add_train({"step": step, "loss": (1 + slope * step / points) * (1 + source.gauss(0, noise))})
    return judge(run)[0]


@pytest.mark.parametrize("points", [10, 20, 39, 56, 200])
def test_noise_alone_has_not_diverged_and_a_rise_has(tmp_path: Path, points: int) -> None:
    fallen = [noisy(tmp_path, points, -0.1, 0.15, seed) for seed in range(300)]
    assert fallen.count("diverged") <= 6
    risen = [noisy(tmp_path, points, 1.0, 0.1, seed) for seed in range(100)]
    assert risen.count("diverged") >= 98


def test_a_run_whose_eval_loss_falls_has_not_diverged(tmp_path: Path) -> None:
    rising = [{"event": "train", "step": step, "loss": 1 + step / 10} for step in range(1, 31)]
    assert told(tmp_path, *rising)[0] == "diverged"
    word, why = told(tmp_path, *rising, *evaluations(2.0, 1.5, 1.0))
    assert word == "still improving"
    assert "the train loss rose, but eval loss falls" in why


def test_a_few_points_that_scatter_are_too_little_to_judge_by(tmp_path: Path) -> None:
    points = [{"event": "train", "step": step, "loss": loss} for step, loss in enumerate((2.0, 1.7, 2.2), 1)]
    assert told(tmp_path, *points)[0] == "too little data"


def test_the_advice_names_the_setting_that_ended_the_run(tmp_path: Path) -> None:
    events = training_events(val=lambda t: 3 - t)
    assert "more --epochs may help" in told(tmp_path, *events)[1]
    events[0]["settings"] |= {"max_steps": 60, "epochs": 3.0}
    assert "more --max-steps may help" in told(tmp_path, *events)[1]


def test_tokens_a_second_are_all_tokens_by_all_time(tmp_path: Path) -> None:
    points = [
        {"event": "train", "step": step, "loss": 1.0, "step_seconds": seconds, "tokens_per_s": rate}
        for step, seconds, rate in ((1, 1.0, 100.0), (2, 1.0, 100.0), (4, 9.0, 10.0))
    ]
    figures = describe(read_run(train_metrics(tmp_path, *points)))["tokens_per_s"]
    assert figures["p50"] == 100.0
    assert figures["overall"] == (100 + 100 + 2 * 90) / (1 + 1 + 2 * 9)


def test_the_peak_of_memory_is_that_of_the_whole_run(tmp_path: Path) -> None:
    end = {"event": "end", "seconds": 1.0, "peak_memory_mib": 700}
    run = read_run(train_metrics(tmp_path, *falling(peak_memory_mib=500), end))
    assert describe(run)["peak_memory_mib"] == 700.0


def test_of_two_runs_in_one_file_the_last_is_told(tmp_path: Path) -> None:
    start = {"event": "start", "total_steps": 40}
    path = train_metrics(tmp_path, start, *falling(), {"event": "end"}, start, *falling(20), start)
    run = read_run(path)
    assert (run.last_step, len(run.train["step"]), run.end) == (20, 20, None)
    assert run.notes == ["the file holds 2 runs, one after the other: this is the last of them"]


# --- long runs -----------------------------------------------------------------------------------


def test_a_long_line_keeps_its_extremes_and_its_gaps_are_no_values() -> None:
    values = [1.0] * 50_000
    values[12_345], values[40_000] = 9.0, -9.0
    values[100:30_000:3] = [NAN] * len(values[100:30_000:3])
    values[12_345] = 9.0
    x, y = thinned(range(len(values)), values)
    assert len(x) <= MOST_POINTS
    assert (max(y), min(y), x[y.index(9.0)]) == (9.0, -9.0, 12_345)
    assert all(map(math.isfinite, y))


def test_means_by_bucket_leave_out_what_is_no_number() -> None:
    assert averaged([1.0, 3.0, NAN, 5.0, math.inf, NAN, 7.0], 4)[:2] == [2.0, 5.0]
    assert math.isnan(averaged([1.0, 3.0, NAN, 5.0, math.inf, NAN, 7.0], 4)[2])


def test_the_trend_of_a_long_line_is_as_short_as_a_chart_can_hold() -> None:
    steps = [float(step) for step in range(200_000)]
    smooth = trend(steps, [step / 1000 for step in steps])
    assert smooth is not None and len(smooth[0]) <= MOST_POINTS
    middle = len(smooth[0]) // 2
    assert smooth[1][middle] == pytest.approx(smooth[0][middle] / 1000, rel=0.01)
    assert trend([1.0, 2.0], [1.0, 2.0]) is None


# --- the states of other tools -------------------------------------------------------------------


def test_a_state_of_transformers_is_a_run(tmp_path: Path) -> None:
    history = [logged(5, 2.0), logged(10, 1.5), {"eval_loss": 1.6, "epoch": 1.0, "step": 10}]
    history += [logged(20, 1.2), {"eval_loss": 1.3, "epoch": 2.0, "step": 20}, logged(30, 1.0)]
    history += [{"eval_loss": 1.4, "step": 30}, {"train_runtime": 12.5, "train_loss": 1.4, "step": 30}]
    path = state(tmp_path / "out", *history, best_global_step=20, best_model_checkpoint="out/checkpoint-20")
    run = read_run(path)
    figures = describe(run)
    assert figures["steps"] == {"last": 30, "total": 30, "logged": 4}
    assert figures["eval"]["best"]["step"] == figures["eval"]["kept_step"] == 20
    assert (figures["complete"], figures["seconds"]) == (True, 12.5)
    assert run.settings["batch"] == 4
    assert run.name.endswith("/out")
    strict_figure(loss_figure(run))
    strict_figure(optimizer_figure(run))


def test_the_best_step_of_an_older_state_is_that_of_its_folder(tmp_path: Path) -> None:
    path = state(tmp_path, logged(30, 1.0), best_model_checkpoint="/runs/checkpoint-20")
    assert read_run(path).kept_step == 20


def test_a_state_of_a_run_that_was_killed_has_no_end(tmp_path: Path) -> None:
    run = read_run(state(tmp_path, logged(10, 1.0), logged(15, 0.9)))
    assert run.end is None
    assert "the run did not end: the last step known is 15 of 30" in judge(run)[1]


def test_of_several_eval_losses_the_first_is_taken_and_the_others_named(tmp_path: Path) -> None:
    history = [logged(5, 2.0), {"eval_zh_loss": 1.0, "step": 5}, {"eval_en_loss": 3.0, "step": 5}]
    run = read_run(state(tmp_path, *history, {"eval_zh_loss": 0.9, "step": 9}))
    assert run.evaluations() == [(5.0, 1.0), (9.0, 0.9)]
    assert run.notes == ["the eval loss is eval_zh_loss; not shown: eval_en_loss"]


def test_the_newest_checkpoint_of_a_folder_is_read(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        state(tmp_path / f"checkpoint-{step}", logged(step, 1.0))
    assert newest_state(tmp_path) == tmp_path / "checkpoint-100" / "trainer_state.json"
    assert newest_state(tmp_path / "checkpoint-5").parent.name == "checkpoint-5"
    assert newest_state(tmp_path / "a.jsonl") == tmp_path / "a.jsonl"


@pytest.mark.usefixtures("no_browser")
def test_a_folder_of_checkpoints_can_be_reported_on(tmp_path: Path) -> None:
    state(tmp_path / "out/checkpoint-30", logged(10, 2.0), logged(20, 1.5), logged(30, 1.0))
    run = run_stage(train_report, tmp_path, metrics="out")
    assert report_json(run)["metrics_file"] == "out/checkpoint-30/trainer_state.json"
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="there are no training metrics"):
        run_stage(train_report, tmp_path, metrics="empty")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "no log_history"),
        ('{"a": 1}', "no log_history"),
        ('{"log_history": []}', "no step"),
    ],
)
def test_other_json_is_no_state(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "trainer_state.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=says):
        read_run(path)


# --- several runs --------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_browser")
def test_several_runs_stand_in_one_report_with_what_differs(tmp_path: Path) -> None:
    written(tmp_path, "20261123-100000", lora_r=16)
    other = written(tmp_path, "20261123-090000", lora_r=64, dora=True)
    state(tmp_path / "trl", logged(10, 2.0), logged(30, 1.0))
    compare = f"{other},trl"
    run = run_stage(
        train_report, tmp_path, metrics="log/train-20261123-100000.metrics.jsonl", compare=compare
    )
    comparison = report_json(run)["comparison"]
    assert [one["name"].split("/")[-1] for one in comparison["runs"]] == [
        "train-20261123-100000",
        "train-20261123-090000",
        "trl",
    ]
    assert comparison["settings"] == {"lora_r": [16, 64, None]}
    assert run.result.outputs
    text = run.result.outputs[0].with_suffix(".md").read_text(encoding="utf-8")
    assert "| `lora_r` | `16` | `64` | `–` |" in text
    assert 'data-figure="compare"' in run.result.outputs[0].with_suffix(".html").read_text(encoding="utf-8")
    assert any("lora_r" in line for line in run.printed)
    assert len(run.manifests[0].inputs) == 3


@pytest.mark.usefixtures("no_browser")
def test_runs_of_the_same_settings_have_no_table_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path)
    other = written(tmp_path, "20261123-090000")
    run = run_stage(train_report, tmp_path, compare=str(other))
    assert "no setting differs between them" in run.printed
    assert not any("setting that differs" in line for line in run.printed)


def test_a_setting_that_a_run_does_not_name_is_not_known_to_differ() -> None:
    runs = [{"lr": 1, "seed": 1, "rank": 8}, {"lr": 1, "rank": 4, "dora": True}, {"lr": 1, "seed": 2}]
    assert differing(runs) == {"seed": [1, None, 2], "rank": [8, 4, None]}


def test_runs_that_name_epochs_are_drawn_over_them(tmp_path: Path) -> None:
    short = training_events(steps=30)
    runs = [read_run(written(tmp_path)), read_run(write_lines(tmp_path / "b.metrics.jsonl", *short))]
    chart = comparison_figure(runs)
    strict_figure(chart)
    assert chart["layout"]["xaxis2"]["title"]["text"] == "epoch"
    assert {round(max(trace["x"]), 6) for trace in chart["data"] if trace["mode"] != "markers"} == {3.0}
    runs.append(read_run(write_lines(tmp_path / "c.jsonl", {"event": "train", "step": 7, "loss": 1})))
    assert comparison_figure(runs)["layout"]["xaxis2"]["title"]["text"] == "optimizer step"


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = [read_run(written(tmp_path / folder)) for folder in ("a", "b")]
    assert run_names(runs) == ["train-20261123-100000 (1)", "train-20261123-100000 (2)"]


@pytest.mark.skipif(os.name == "nt", reason="a name of a file there holds no bar")
@pytest.mark.usefixtures("no_browser")
def test_nothing_in_a_name_breaks_the_markdown(tmp_path: Path) -> None:
    written(tmp_path)
    other = write_lines(tmp_path / "a|<b>*.metrics.jsonl", *training_events())
    run = run_stage(train_report, tmp_path, compare=str(other))
    assert run.result.outputs
    text = run.result.outputs[0].with_suffix(".md").read_text(encoding="utf-8")
    assert "a\\|\\<b\\>\\*" in text and "<b>" not in text
