"""Reports over whole and broken metrics: what they say, and that they are written whatever happens."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtgdm.charts.lines import ema, smoothed, thinned
from mtgdm.charts.style import Figure
from mtgdm.errors import SettingError, UserError
from mtgdm.reports.evaluation import read_evaluation
from mtgdm.reports.evaluation_quality import quality_figure
from mtgdm.reports.evaluation_runtime import runtime_figure
from mtgdm.reports.evaluation_summary import describe as describe_evaluation
from mtgdm.reports.page import page
from mtgdm.reports.training_figures import loss_figure, optimizer_figure
from mtgdm.reports.training_health import describe, judge
from mtgdm.reports.training_run import read_run
from mtgdm.reports.values import finite
from mtgdm.stages.eval_report import run as eval_report
from mtgdm.stages.report import run as train_report
from mtgdm.testing import StageRun
from mtgdm.testing import run as run_stage
from tests.conftest import write_lines
from tests.pages import Look, look_at
from tests.test_charts import browser, fake_browser  # noqa: F401 - a fixture

SPOTS = ["故宫博物院", "嘉峪关文物景区", "<b>钟山</b>", "苏州园林", "蜈支洲岛", "九寨沟", "平遥古城"]
TYPES = ("general", "itinerary", "bilingual")
Loss = Callable[[float], float]


def training_events(
    steps: int = 60, *, val: Loss = lambda t: 3 * math.exp(-3 * t), ended: bool = True
) -> list[Any]:
    """The events of a run: train loss falls, eval loss follows `val` over the share of the run."""
    settings = {"lr": 1e-3, "batch": 4, "max_grad_norm": 1.0}
    events: list[Any] = [
        {
            "event": "start",
            "base_model": "mtgdm-tiny",
            "total_steps": steps,
            "train_rows": 40,
            "settings": settings,
        },
        {"event": "eval", "step": 0, "eval_loss": val(0), "seconds": 1.0},
    ]
    for step in range(1, steps + 1):
        share = step / steps
        events.append(
            {
                "event": "train",
                "step": step,
                "epoch": share * 3,
                "loss": 3 * math.exp(-3 * share) + 0.01,
                "learning_rate": 1e-3 * (1 - share),
                "grad_norm": 0.5,
                "step_seconds": 0.1 + 0.1 * share,
                "tokens_per_s": 9000.0,
            }
        )
        if step % (steps // 6) == 0:
            events.append({"event": "eval", "step": step, "eval_loss": val(share), "seconds": 1.0})
    if ended:
        events.append({"event": "end", "steps": steps, "best_step": steps, "seconds": 12.5})
    return events


def eval_rows(*, base: bool = True, spots: list[str] = SPOTS) -> list[dict[str, Any]]:
    source = random.Random(5)
    rows: list[dict[str, Any]] = []
    for spot in spots:
        for kind in TYPES:
            likeness = source.uniform(0.7, 0.95)
            rows.append(
                {
                    "id": f"{len(rows):024x}",
                    "spot": spot,
                    "province": "北京市",
                    "type": kind,
                    "metrics": eval_metrics(likeness, kind),
                    "base_metrics": eval_metrics(likeness / 20, kind) if base else None,
                }
            )
    return rows


def eval_metrics(likeness: float, kind: str) -> dict[str, Any]:
    return {
        "prompt_tokens": 300,
        "output_tokens": 200,
        "latency_s": 0.5 / likeness,
        "tokens_per_s": 400 * likeness,
        "finish_reason": "stop",
        "char_f1": likeness,
        "sequence_ratio": likeness * 0.9,
        "exact_match": False,
        "chrf": likeness * 0.8,
        "contract_valid": None if kind == "bilingual" else likeness > 0.5,
        "fact_recall": None if kind == "itinerary" else likeness,
        "unsupported_facts": 0,
    }


def train_metrics(workspace: Path, *events: Any) -> Path:
    return write_lines(workspace / "log" / "train-20261123-100000.metrics.jsonl", *events)


def eval_metrics_file(workspace: Path, *rows: Any) -> Path:
    return write_lines(workspace / "log" / "eval-20261123-110000.metrics.jsonl", *rows)


@pytest.fixture
def no_browser(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "no-browser"))


def report_json(run: StageRun) -> Any:
    assert run.result.outputs is not None
    return json.loads(run.result.outputs[0].read_text(encoding="utf-8"), parse_constant=pytest.fail)


def strict_figure(figure: Figure) -> None:
    """Plotly itself refuses what is no figure: a wrong name anywhere is an error."""
    import plotly.graph_objects

    plotly.graph_objects.Figure(finite(figure))


# --- how training went ---------------------------------------------------------------------------


def verdict(folder: Path, *events: Any) -> tuple[str, str]:
    word, reasons = judge(read_run(train_metrics(folder, *events)))
    return word, "; ".join(reasons)


def test_a_run_that_levels_out_is_healthy(tmp_path: Path) -> None:
    word, why = verdict(tmp_path, *training_events(val=lambda t: 0.5 + 2 * math.exp(-12 * t)))
    assert word == "healthy"
    assert "levelled out" in why


def test_eval_loss_that_rises_is_over_fitting(tmp_path: Path) -> None:
    events = training_events(val=lambda t: 1 + abs(t - 0.5))
    events[-1]["best_step"] = 30
    word, why = verdict(tmp_path, *events)
    assert word == "over-fitting"
    assert (
        "has stood above its lowest (1.000 at step 30) for 3 evaluations and ends at 1.500 at step 60: "
        in why
    )
    assert "use that checkpoint, it is the one kept" in why


def test_eval_loss_that_still_falls_asks_for_more(tmp_path: Path) -> None:
    assert verdict(tmp_path, *training_events(val=lambda t: 3 - t))[0] == "still improving"


def test_a_loss_that_rises_or_is_no_number_has_diverged(tmp_path: Path) -> None:
    events = training_events()
    events[40]["loss"] = math.nan
    word, why = verdict(tmp_path, *events)
    assert word == "diverged"
    assert f"first at step {events[40]['step']}" in why
    rising = [{"event": "train", "step": step, "loss": 1 + step} for step in range(30)]
    assert verdict(tmp_path, *rising)[0] == "diverged"


def test_a_spike_of_the_gradient_and_clipping_are_told(tmp_path: Path) -> None:
    events = training_events()
    events[25]["grad_norm"] = 40.0
    assert "spiked 1 time over 5 times its median, most at step" in verdict(tmp_path, *events)[1]
    for event in events:
        if "grad_norm" in event:
            event["grad_norm"] = 3.0
    assert "100% of the logged steps were clipped at 1" in verdict(tmp_path, *events)[1]


def test_the_figures_of_a_run_are_what_was_logged(tmp_path: Path) -> None:
    figures = describe(read_run(train_metrics(tmp_path, *training_events(val=lambda t: 1 + abs(t - 0.5)))))
    assert figures["eval"]["best"] == {"step": 30, "loss": 1.0, "perplexity": math.e}
    assert figures["eval"]["final"]["loss"] == 1.5
    assert figures["eval"]["evaluations"] == 7
    assert figures["loss"]["reduction"] == pytest.approx(
        1 - figures["loss"]["final"] / figures["loss"]["first"]
    )
    assert 0.5 < figures["step_seconds"]["drift"] < 0.9
    assert figures["tokens_per_s"]["p50"] == 9000.0
    assert figures["seconds"] == 12.5


def test_a_killed_run_is_read_up_to_its_torn_line(tmp_path: Path) -> None:
    path = train_metrics(tmp_path, *training_events(ended=False))
    path.write_bytes(path.read_bytes() + b'{"event": "train", "step": 61, "lo')
    run = read_run(path)
    assert run.last_step == 60
    assert "is torn" in run.notes[0]
    assert "the run did not end: the last step known is 60 of 60" in judge(run)[1]


def test_unknown_events_are_passed_over_and_other_files_refused(tmp_path: Path) -> None:
    path = train_metrics(tmp_path, {"event": "weather", "rain": 1}, *training_events())
    assert read_run(path).last_step == 60
    with pytest.raises(UserError, match="no training metrics"):
        read_run(write_lines(tmp_path / "other.jsonl", {"id": "a", "messages": []}))


def test_extremes_survive_when_a_line_is_thinned() -> None:
    values = [math.sin(place / 50) for place in range(100_000)]
    values[54_321], values[54_322] = 99.0, -99.0
    x, y = thinned(range(len(values)), values)
    assert len(x) <= 3100
    assert (max(y), min(y)) == (99.0, -99.0)
    assert x[y.index(99.0)] == 54_321
    assert x == sorted(x)


def test_smoothing_is_without_bias_and_lag() -> None:
    assert ema([2.0] * 10, 0.9) == pytest.approx([2.0] * 10)
    ramp = [float(place) for place in range(200)]
    assert smoothed(ramp, 0.9)[100] == pytest.approx(100, abs=0.01)
    assert math.isfinite(smoothed([1.0, math.nan, 3.0], 0.5)[1])


# --- the train report ----------------------------------------------------------------------------

ODD_RUNS: dict[str, list[Any]] = {
    "one point": [{"event": "train", "step": 1, "loss": 2.5}],
    "one evaluation": [{"event": "eval", "step": 5, "eval_loss": 2.0}],
    "nothing but NaN": ['{"event": "train", "step": 1, "loss": NaN, "grad_norm": Infinity}'] * 3,
    "null values": [{"event": "train", "step": 1, "loss": None, "grad_norm": None}] * 3,
    "eval loss beyond exp": [{"event": "eval", "step": step, "eval_loss": 1e5} for step in (1, 2)],
    "a zero loss": [{"event": "train", "step": step, "loss": 0.0} for step in range(5)],
    "a healthy run": training_events(),
    "a killed run": training_events(ended=False),
}


@pytest.mark.parametrize("name", ODD_RUNS)
@pytest.mark.usefixtures("no_browser")
def test_a_train_report_is_written_over_any_metrics(name: str, tmp_path: Path) -> None:
    train_metrics(tmp_path, *ODD_RUNS[name])
    run = run_stage(train_report, tmp_path)
    data = report_json(run)
    assert data["verdict"]
    assert run.result.summary
    folder = tmp_path / "data" / "report"
    assert {path.suffix for path in folder.glob("train-report-*") if "manifest" not in path.name} == {
        ".json",
        ".md",
        ".html",
    }
    training = read_run(tmp_path / "log" / "train-20261123-100000.metrics.jsonl")
    strict_figure(loss_figure(training))
    strict_figure(optimizer_figure(training))


@pytest.mark.usefixtures("no_browser")
def test_a_report_without_a_browser_is_whole_and_says_what_is_missing(tmp_path: Path) -> None:
    train_metrics(tmp_path, *training_events())
    run = run_stage(train_report, tmp_path)
    assert any("no PNG charts" in line for line in run.warnings)
    assert any(line.startswith("hint: ") for line in run.printed)
    assert "![" not in next((tmp_path / "data/report").glob("*.md")).read_text(encoding="utf-8")
    assert run.manifests and run.manifests[0].counts["pictures"] == 0


@pytest.mark.usefixtures("no_browser")
def test_require_png_makes_a_missing_chart_an_error_after_the_report(tmp_path: Path) -> None:
    train_metrics(tmp_path, *training_events())
    with pytest.raises(UserError, match="no PNG charts"):
        run_stage(train_report, tmp_path, require_png=True)
    assert list((tmp_path / "data/report").glob("train-report-*.html"))


def test_a_hanging_browser_costs_its_limit_and_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(fake_browser(tmp_path, "sleep 300")))
    train_metrics(tmp_path, *training_events())
    run = run_stage(train_report, tmp_path, chart_timeout_s=3)
    assert any("did not finish within 3 s" in line for line in run.warnings)
    assert report_json(run)["verdict"] == "still improving"


def test_the_charts_of_a_train_report_are_drawn_and_linked(tmp_path: Path, browser: str) -> None:  # noqa: F811
    train_metrics(tmp_path, *training_events())
    run = run_stage(train_report, tmp_path)
    assert run.warnings == []
    pictures = sorted((tmp_path / "data/diagrams").glob("*.png"))
    assert [path.suffixes[-2:] for path in pictures] == [[".loss", ".png"], [".optim", ".png"]]
    assert all(path.with_suffix(".json").is_file() for path in pictures)
    markdown = next((tmp_path / "data/report").glob("*.md")).read_text(encoding="utf-8")
    links = re.findall(r"!\[.*\]\((.+)\)", markdown)
    assert sorted((tmp_path / "data/report" / link).resolve() for link in links) == pictures


@pytest.mark.usefixtures("no_browser")
def test_the_newest_run_is_reported_unless_one_is_named(tmp_path: Path) -> None:
    train_metrics(tmp_path, *training_events())
    newer = write_lines(tmp_path / "log/train-20261124-000000.metrics.jsonl", *training_events(steps=12))
    log = tmp_path / "log/train-20261123-100000.log"
    log.write_text("2026 WARNING the disk is nearly full\n2026 INFO fine\n", encoding="utf-8")
    assert report_json(run_stage(train_report, tmp_path))["metrics_file"] == f"log/{newer.name}"
    named = report_json(run_stage(train_report, tmp_path, log="log/train-20261123-100000.log"))
    assert named["steps"]["last"] == 60
    assert named["warnings"] == ["2026 WARNING the disk is nearly full"]
    assert report_json(run_stage(train_report, tmp_path, metrics=str(newer)))["steps"]["last"] == 12
    with pytest.raises(SettingError, match="--no-latest"):
        run_stage(train_report, tmp_path, latest=False)


def test_no_metrics_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no training metrics") as train:
        run_stage(train_report, tmp_path)
    assert train.value.hint == "run `mtgdm train` first"
    with pytest.raises(UserError, match="no eval metrics"):
        run_stage(eval_report, tmp_path)


# --- the eval report -----------------------------------------------------------------------------


@pytest.mark.usefixtures("no_browser")
def test_an_eval_report_has_the_shape_others_rely_on(tmp_path: Path) -> None:
    rows = eval_rows()
    eval_metrics_file(tmp_path, *rows)
    run = run_stage(eval_report, tmp_path)
    data = report_json(run)
    assert (data["rows"], data["spots"]) == (21, 7)
    likeness = [row["metrics"]["char_f1"] for row in rows]
    assert data["student"]["char_f1"]["mean"] == pytest.approx(sum(likeness) / 21, rel=1e-5)
    low, high = data["student"]["char_f1"]["ci95"]
    assert low < data["student"]["char_f1"]["mean"] < high
    assert set(data["student"]["latency_s"]) == {"mean", "p50", "p95"}
    assert set(data["student"]["tokens_per_s"]) == {"mean", "p50", "p95"}
    assert data["student"]["contract_valid"]["rows"] == 14
    assert data["difference"]["char_f1"]["verdict"] == "better"
    assert data["difference"]["exact_match"]["verdict"] == "too few rows to tell"
    assert set(data["by_type"]) == set(TYPES)
    assert "contract_valid" not in data["by_type"]["bilingual"]["student"]
    assert "fact_recall" not in data["by_type"]["itinerary"]["student"]
    assert data["by_type"]["general"]["base"]["char_f1"]["mean"] < 0.1
    assert run.result.summary.startswith(
        "student beats its base on 5 of 7 metrics (21 rows, 7 spots): char_f1 0.0"
    )


def with_teacher(rows: list[dict[str, Any]], **metrics: Any) -> list[dict[str, Any]]:
    """The rows with what is told of the teacher's own answers."""
    valid = {"contract_valid": True, "fact_recall": 1.0, "unsupported_facts": 0, "repetition": 0.1}
    return [row | {"reference_metrics": valid | metrics} for row in rows]


@pytest.mark.usefixtures("no_browser")
def test_the_teacher_stands_beside_and_the_distance_to_it_is_told(tmp_path: Path) -> None:
    eval_metrics_file(tmp_path, *with_teacher(eval_rows()))
    run = run_stage(eval_report, tmp_path)
    data = report_json(run)
    assert data["teacher"]["fact_recall"]["mean"] == 1
    assert "char_f1" not in data["teacher"]
    gain = data["teacher_difference"]["fact_recall"]
    assert gain["verdict"] == "worse" and gain["mean"] < 0
    assert data["teacher_difference"]["contract_valid"]["verdict"] == "too few rows to tell"
    said = next(line for line in run.printed if "behind its teacher on fact recall −0." in line)
    assert "no difference to its teacher can be told on contract valid" in said
    assert data["by_type"]["general"]["teacher_difference"]["fact_recall"]["verdict"] == "worse"
    markdown = next((tmp_path / "data/report").glob("*.md")).read_text(encoding="utf-8")
    assert "| metric | base (95 % interval) | student (95 % interval) | teacher |" in markdown


@pytest.mark.usefixtures("no_browser")
def test_provinces_have_verdicts_of_their_own(tmp_path: Path) -> None:
    rows = eval_rows(spots=[f"景区{number}" for number in range(10)])
    for place, row in enumerate(rows):
        row["province"] = "浙江省" if place < 21 else "江苏省"
    rows.append(rows[0] | {"id": "x", "province": None})
    eval_metrics_file(tmp_path, *rows)
    data = report_json(run_stage(eval_report, tmp_path))
    assert list(data["by_province"]) == ["浙江省", "江苏省"]
    south, north = data["by_province"].values()
    assert (south["rows"], south["spots"], north["rows"], north["spots"]) == (21, 7, 9, 3)
    assert south["difference"]["char_f1"]["verdict"] == "better"
    assert north["difference"]["char_f1"]["verdict"] == "too few rows to tell"
    markdown = next((tmp_path / "data/report").glob("*.md")).read_text(encoding="utf-8")
    assert re.search(r"\| 浙江省 \| 21 \| 7 \| 0\.\d\d → 0\.\d\d ↑ \|", markdown)
    assert re.search(r"\| 江苏省 \| 9 \| 3 \| 0\.\d\d → 0\.\d\d \|", markdown)


def test_failures_are_counted_by_what_went_wrong(tmp_path: Path) -> None:
    rows = eval_rows()
    rows[0]["metrics"] |= {"contract_valid": False, "contract_key": "geo.lat"}
    rows[1]["metrics"] |= {"contract_valid": False, "contract_key": "geo.lat", "unsupported_facts": 3}
    rows[3]["metrics"] |= {"unsupported_facts": 1}
    rows[2]["metrics"] |= {"prose_valid": False, "problem": "the text goes round in circles: '山山'"}
    found = describe_evaluation(read_evaluation(eval_metrics_file(tmp_path, *rows)))["failures"]
    assert found["rows"] == 4
    assert found["contract_keys"] == {"geo.lat": 2}
    assert found["reasons"] == {
        "breaks its contract: geo.lat": 2,
        "… unsupported claims": 1,
        "… unsupported claim": 1,
        "the text goes round in circles: …": 1,
    }


def test_a_student_is_not_blamed_for_what_its_teacher_did_too(tmp_path: Path) -> None:
    rows = eval_rows()[:1]
    rows[0]["metrics"] |= {"unsupported_facts": 2, "fact_recall": 0.4, "repetition": 0.6}
    alone = read_evaluation(eval_metrics_file(tmp_path, *rows)).rows[0]
    assert alone.why_bad == ["states 40% of the facts", "2 unsupported claims", "repeats itself"]
    taught = with_teacher(rows, unsupported_facts=2, fact_recall=0.4, repetition=0.5)
    assert read_evaluation(eval_metrics_file(tmp_path, *taught)).rows[0].why_bad == []


@pytest.mark.usefixtures("no_browser")
def test_rouge_l_is_in_the_figures_and_counts_as_no_second_metric(tmp_path: Path) -> None:
    rows = eval_rows()
    for row in rows:
        for key in ("metrics", "base_metrics"):
            row[key] |= {"rouge_l": row[key]["sequence_ratio"], "length_ratio": 1.5}
    eval_metrics_file(tmp_path, *rows)
    data = report_json(run_stage(eval_report, tmp_path))
    assert data["student"]["rouge_l"] == data["student"]["sequence_ratio"]
    assert "rouge_l" not in data["difference"]
    assert data["student"]["length_ratio"] == {"mean": 1.5, "p50": 1.5, "p95": 1.5}


@pytest.mark.usefixtures("no_browser")
def test_an_evaluation_without_a_base_compares_nothing(tmp_path: Path) -> None:
    eval_metrics_file(tmp_path, *eval_rows(base=False))
    run = run_stage(eval_report, tmp_path)
    data = report_json(run)
    assert (data["base"], data["difference"]) == (None, None)
    assert "student alone (21 rows, 7 spots): char_f1 0.8" in run.result.summary


ODD_EVALUATIONS: dict[str, list[Any]] = {
    "one row": eval_rows()[:1],
    "one spot": eval_rows(spots=["故宫"]),
    "rows without spot and type": [
        {"id": str(place), "metrics": {"char_f1": 0.5, "latency_s": 1.0}} for place in range(3)
    ],
    "NaN and nothing": ['{"id": "a", "metrics": {"char_f1": NaN}}', '{"id": "b", "metrics": {}}'],
    "the same latency": [{"id": str(place), "metrics": {"latency_s": 2.0}} for place in range(4)],
    "many types": [row | {"type": f"kind {place}"} for place, row in enumerate(eval_rows())],
}


@pytest.mark.parametrize("name", ODD_EVALUATIONS)
@pytest.mark.usefixtures("no_browser")
def test_an_eval_report_is_written_over_any_metrics(name: str, tmp_path: Path) -> None:
    path = eval_metrics_file(tmp_path, *ODD_EVALUATIONS[name])
    assert report_json(run_stage(eval_report, tmp_path))["rows"] == len(ODD_EVALUATIONS[name])
    evaluation = read_evaluation(path)
    figures = describe_evaluation(evaluation)
    for narrow in (False, True):
        strict_figure(quality_figure(evaluation, figures, narrow=narrow))
        strict_figure(runtime_figure(evaluation, narrow=narrow))


def test_a_row_that_stands_twice_counts_once_and_a_torn_line_is_noted(tmp_path: Path) -> None:
    rows = eval_rows()
    path = eval_metrics_file(tmp_path, *rows, rows[0])
    path.write_bytes(path.read_bytes() + b'{"id": "x", "met')
    evaluation = read_evaluation(path)
    assert len(evaluation.rows) == 21
    assert "is torn" in evaluation.notes[0]


def test_the_worst_rows_come_first_with_the_reason(tmp_path: Path) -> None:
    rows = eval_rows()
    rows[4]["metrics"] |= {"char_f1": 0.1, "contract_valid": False, "finish_reason": "length"}
    rows[9]["metrics"] |= {"unsupported_facts": 2}
    evaluation = read_evaluation(eval_metrics_file(tmp_path, *rows))
    found = describe_evaluation(evaluation)["worst_rows"]
    assert [row["id"] for row in found] == [rows[4]["id"], rows[9]["id"]]
    assert found[0]["why"] == [
        "ended by length",
        "breaks its contract",
        "little in common with the reference",
    ]
    assert evaluation.rows[0].why_bad == []


def eval_outputs(workspace: Path, rows: list[dict[str, Any]], *, torn: bool = True) -> None:
    """The rows of `eval` to these metrics, and with `torn` what a kill left at the end."""
    texts = [
        {
            "id": row["id"],
            "messages": [{"role": "user", "content": f"介绍 {row['spot']}</script>"}],
            "reference": "故宫始建于1406年。",
            "output": "故宫始建于1420年。",
            "metrics": row["metrics"],
            "meta": {"spot": row["spot"], "eval": {"model": "data/checkpoints/tiny-lora"}},
        }
        for row in rows
    ]
    end = ['{"id": "torn'] if torn else []
    write_lines(workspace / "data/eval_outputs.jsonl", *texts, *end)


# --- the page ------------------------------------------------------------------------------------


def test_nothing_in_a_page_can_end_its_scripts() -> None:
    text = page(
        "t", [], {"a": {"data": [{"name": "</script>{{body}}"}], "layout": {}}}, "var s = '</script>';"
    )
    assert text.count("</script>") == 4
    assert "https://" not in text.replace("var s", "") and "http://" not in text


def test_the_page_works_in_a_browser_without_the_network(
    tmp_path: Path,
    browser: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "none"))  # the PNGs are not what is tested here
    rows = eval_rows()
    eval_metrics_file(tmp_path, *rows)
    eval_outputs(tmp_path, rows)
    run_stage(eval_report, tmp_path)
    train_metrics(tmp_path, *training_events())
    run_stage(train_report, tmp_path)
    pages = sorted((tmp_path / "data/report").glob("*.html"))
    assert len(pages) == 2
    looks = [Look(path, *screen) for path in pages for screen in ((1200, "light"), (360, "dark"))]
    for look, seen in zip(looks, look_at(browser, *looks), strict=True):
        assert (seen.problems, seen.charts, seen.overflow) == ([], 2, 0), look
