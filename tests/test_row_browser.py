"""The row browser of an eval report's page: which rows are in it, and that it works in a real browser."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtgdm.reports import page
from mtgdm.reports.evaluation import EvalRow, read_evaluation
from mtgdm.reports.evaluation_rows import VERDICTS, rows_of_page
from mtgdm.rows import row_id
from mtgdm.stages.eval_report import run as eval_report
from mtgdm.testing import run as run_stage
from tests.conftest import write_lines
from tests.pages import Look, Seen, look_at
from tests.test_charts import browser  # noqa: F401 - a fixture
from tests.test_lineage import made, state
from tests.test_reports import eval_metrics

HOSTILE = "</script><script>alert(1)</script>\u2028 & <!-- \ud800 'quoted'"


Changes = dict[int, dict[str, Any]]


def evaluated(workspace: Path, count: int = 30, **changes: Changes) -> Path:
    """Metrics and outputs of an evaluation of `count` rows; `changes` puts keys into some rows."""
    rows = [_row(place, changes) for place in range(count)]
    write_lines(workspace / "data/eval_outputs.jsonl", *(json.dumps(row) for row in rows))
    lines = [
        {"id": row["id"], **{key: row["meta"][key] for key in ("spot", "province", "type")}}
        | {key: row[key] for key in ("metrics", "base_metrics", "reference_metrics")}
        for row in rows
    ]
    return write_lines(workspace / "log/eval-20261123-110000.metrics.jsonl", *lines)


def _row(place: int, changes: dict[str, Changes]) -> dict[str, Any]:
    messages = [
        {"role": "system", "content": "你是讲解员。"},
        {"role": "user", "content": f"介绍景区{place}"},
    ]
    kind = "itinerary" if place % 3 == 0 else "general"
    likeness = 0.9 - place / 100
    row: dict[str, Any] = {
        "id": row_id(messages),
        "messages": messages,
        "reference": f"景区{place}始建于1406年，在杭州市。",
        "output": f"景区{place}始建于1420年，在杭州市。",
        "base_output": "不知道",
        "metrics": eval_metrics(likeness, kind),
        "base_metrics": eval_metrics(0.2, kind),
        "reference_metrics": {"contract_valid": True, "fact_recall": 1.0},
        "meta": {"spot": f"景区{place}", "province": "浙江省", "type": kind, "split": "test"},
    }
    for key, some in changes.items():
        found = some.get(place, {})
        row[key] = row[key] | found if isinstance(row[key], dict) else found.get("text", row[key])
    return row


# --- which rows ----------------------------------------------------------------------------------


def test_every_row_is_there_with_its_texts_and_verdicts_the_worst_first(tmp_path: Path) -> None:
    wrong: Changes = {7: {"contract_valid": False, "contract_key": "geo.lat"}, 9: {"finish_reason": "length"}}
    path = evaluated(tmp_path, metrics=wrong)
    found = rows_of_page(read_evaluation(path), tmp_path / "data/eval_outputs.jsonl")
    data = json.loads(found.json)
    assert (found.shown, found.of, found.texts, found.cut) == (30, 30, 30, False)
    first, second, third = data["rows"][:3]
    assert {first["spot"], second["spot"]} == {"景区7", "景区9"}
    assert third["why"] == []
    broken = next(row for row in data["rows"] if row["spot"] == "景区7")
    assert broken["why"] == ["breaks its contract: geo.lat"]
    assert broken["verdicts"] == ["something wrong", "contract failed", "better than base"]
    assert broken["prompt"] == [["system", 0], ["user", "介绍景区7"]]
    assert data["systems"] == ["你是讲解员。"]
    assert (broken["split"], broken["output"]) == ("test", "景区7始建于1420年，在杭州市。")
    assert set(broken["verdicts"]) <= set(VERDICTS)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"judge": {"score": 1.0}}, "judge: won"),
        ({"judge": {"score": 0.5}}, "judge: tie"),
        ({"judge": {"score": 0.0}}, "judge: lost"),
        ({"leaked": True}, "trained on"),
        ({"base": {"char_f1": 1.0}}, "worse than base"),
        ({"base": {"char_f1": 0.1}}, "better than base"),
        ({"student": {"char_f1": 0.9, "exact_match": True}}, "exact"),
        ({"student": {"char_f1": 0.9, "prose_valid": True}}, "valid"),
        ({"student": {"char_f1": 0.9, "prose_valid": False}}, "prose rules failed"),
        ({"student": {"char_f1": 0.9, "language_ok": False}}, "wrong language"),
        ({"student": {"char_f1": 0.9, "unsupported_facts": 2}}, "unsupported facts"),
        ({"student": {"char_f1": 0.9, "finish_reason": "length"}}, "cut"),
    ],
)
def test_a_row_can_be_filtered_by_what_became_of_it(change: dict[str, Any], verdict: str) -> None:
    plain = EvalRow("a", "西湖", "浙江省", "general", {"char_f1": 0.9}, {"char_f1": 0.9})
    assert not any(holds(plain) for holds in VERDICTS.values())
    assert VERDICTS[verdict](replace(plain, **change))


def test_where_there_is_no_room_the_worst_rows_stay(tmp_path: Path) -> None:
    path = evaluated(tmp_path, metrics={25: {"unsupported_facts": 4}, 3: {"fact_recall": 0.1}})
    evaluation, outputs = read_evaluation(path), tmp_path / "data/eval_outputs.jsonl"
    whole = rows_of_page(evaluation, outputs)
    found = rows_of_page(evaluation, outputs, room=len(whole.json.encode("utf-8")) // 3)
    assert found.cut and 5 < found.shown < 12
    assert json.loads(found.json)["rows"] == json.loads(whole.json)["rows"][: found.shown]


def test_rows_of_another_evaluation_have_no_texts(tmp_path: Path) -> None:
    path = evaluated(tmp_path)
    evaluated(tmp_path / "other", metrics={place: {"char_f1": 0.5} for place in range(29)})
    evaluation = read_evaluation(path)
    found = rows_of_page(evaluation, tmp_path / "other/data/eval_outputs.jsonl")
    assert (found.shown, found.texts) == (30, 1)
    assert sum("output" in row for row in json.loads(found.json)["rows"]) == 1
    assert rows_of_page(evaluation, tmp_path / "nowhere.jsonl").texts == 0


def test_a_figure_that_is_nan_takes_no_text_away(tmp_path: Path) -> None:
    path = evaluated(tmp_path, metrics={0: {"chrf": float("nan")}})
    found = rows_of_page(read_evaluation(path), tmp_path / "data/eval_outputs.jsonl")
    assert found.texts == 30
    assert "NaN" not in found.json


def test_a_bad_line_among_the_texts_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "none"))
    evaluated(tmp_path, 3)
    outputs = tmp_path / "data/eval_outputs.jsonl"
    outputs.write_bytes(outputs.read_bytes() + b'{"id": "to')
    run = run_stage(eval_report, tmp_path)
    assert any("data/eval_outputs.jsonl:4: not JSON" in line for line in run.printed)


def test_texts_come_out_of_a_page_as_they_went_in() -> None:
    value = {"text": HOSTILE, "nan": float("nan"), "<b>": 1.0}
    written = page.for_script(value)
    assert not set("<\u2028\ud800") & set(written)
    assert ascii(json.loads(written)) == ascii({"text": HOSTILE, "nan": None, "<b>": 1.0})


# --- in a browser --------------------------------------------------------------------------------

ROWS = "[...document.querySelectorAll('details.row > summary > b')].map(e => e.textContent)"
COUNT = "document.querySelector('[role=status]').textContent"


def set_(selector: str, value: str) -> str:
    """JavaScript that sets a control as a user does, and then tells how many rows are shown."""
    return f"""(async () => {{
      const control = document.querySelector({selector!r});
      control.value = {value!r};
      control.dispatchEvent(new Event(control.tagName === 'SELECT' ? 'change' : 'input'));
      await new Promise(done => setTimeout(done, 300));
      return {COUNT};
    }})()"""


def press(verdict: str) -> str:
    return f"(document.querySelector('[data-verdict={json.dumps(verdict)}]').click(), {COUNT})"


def open_first(what: str) -> str:
    """JavaScript that opens the first row and tells something of it, as `row`."""
    return f"""(async () => {{
      const row = document.querySelector('details.row');
      row.open = true;
      await new Promise(done => setTimeout(done, 200));
      return {what};
    }})()"""


def visited(
    workspace: Path, chrome: str, monkeypatch: pytest.MonkeyPatch, *asked: str, width: int = 1200
) -> Seen:
    monkeypatch.setenv("BROWSER_PATH", str(workspace / "none"))  # the PNGs are not what is tested here
    run_stage(eval_report, workspace)
    html = next((workspace / "data/report").glob("*.html"))
    (seen,) = look_at(chrome, Look(html, width, "light", asked))
    assert seen.problems == []
    return seen


def test_rows_are_filtered_sorted_searched_and_paged(
    tmp_path: Path,
    browser: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong: Changes = {7: {"contract_valid": False, "contract_key": "geo.lat"}, 9: {"finish_reason": "length"}}
    evaluated(tmp_path, metrics=wrong, output={12: {"text": "西湖ABC"}}, meta={5: {"split": "val"}})
    seen = visited(
        tmp_path,
        browser,
        monkeypatch,
        f"[{COUNT}, {ROWS}]",
        f"(document.querySelector('.pages button:last-child').click(), [{COUNT}, {ROWS}])",
        set_("[data-filter=type] select", "itinerary"),
        press("something wrong"),
        f"({press('something wrong')}, {set_('[data-filter=type] select', '')})",
        set_(".search input", "西湖abc"),
        set_(".search input", "GEO.LAT"),
        set_(".search input", "nothing holds this"),
        set_(".search input", ""),
        set_("[data-filter=sort] select", "3"),
        ROWS,
        f"(document.querySelector('[data-filter=sort] button').click(), {ROWS})",
        "(document.querySelector('[data-filter=sort] select').selectedOptions[0].textContent)",
        set_("[data-filter=split] select", "val"),
        set_("[data-filter=split] select", ""),
        set_("[data-filter=size] select", "100"),
    )
    answers = iter(seen.answers)
    count, rows = next(answers)
    assert count == "30 of 30 rows, 1 to 10 shown"
    assert set(rows[:2]) == {"景区7", "景区9"}
    count, later = next(answers)
    assert count == "30 of 30 rows, 11 to 20 shown"
    assert not set(rows) & set(later)
    assert next(answers) == "10 of 30 rows"
    assert next(answers) == "1 of 30 rows"  # 9 is an itinerary, 7 is not
    assert next(answers) == "30 of 30 rows, 1 to 10 shown"
    assert [next(answers) for _ in range(4)] == [
        "1 of 30 rows",
        "1 of 30 rows",
        "0 of 30 rows",
        "30 of 30 rows, 1 to 10 shown",
    ]
    next(answers)
    assert next(answers)[0] == "景区29"  # the lowest character F1
    assert next(answers)[0] == "景区0"
    assert next(answers) == "character F1"
    assert [next(answers) for _ in range(3)] == [
        "1 of 30 rows",
        "30 of 30 rows, 1 to 10 shown",
        "30 of 30 rows",
    ]


def test_an_open_row_shows_its_texts_with_what_differs_marked(
    tmp_path: Path,
    browser: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluated(tmp_path, 1)
    marks = "[...row.querySelectorAll('mark')].map(e => [e.className, e.textContent])"
    heads = "[...row.querySelectorAll('h3')].map(e => e.textContent)"
    texts = "[...row.querySelectorAll('pre')].map(e => e.textContent)"
    seen = visited(tmp_path, browser, monkeypatch, open_first(f"[{marks}, {heads}, {texts}, row.innerText]"))
    found, titles, written, everything = seen.answers[0]
    assert found == [["gone", "1406"], ["new", "1420"]]
    assert titles == [
        "reference (teacher)",
        "student",
        "base · too little in common to mark what differs",
        "prompt · system",
        "prompt · user",
    ]
    assert written == [
        "景区0始建于1406年，在杭州市。",
        "景区0始建于1420年，在杭州市。",
        "不知道",
        "你是讲解员。",
        "介绍景区0",
    ]
    assert "浙江省 · test" in everything


def test_hostile_texts_and_long_answers_do_the_page_no_harm(
    tmp_path: Path,
    browser: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = {0: {"text": HOSTILE}, 1: {"text": "山水" * 8000}}
    evaluated(tmp_path, 2, reference=texts, output={1: {"text": "水山" * 8000}, 0: {"text": HOSTILE + "x"}})
    long = state(f"data/{'long' * 30}.jsonl", "b")
    made(tmp_path, "eval", state("data/eval_outputs.jsonl", "d"), long)
    asked = [
        set_("[data-filter=sort] select", "1"),
        open_first("[row.querySelector('pre').textContent, document.scripts.length]"),
        "document.querySelectorAll('details').forEach(one => one.open = true)",
        "document.body.textContent.includes('What it was made from')",
    ]
    seen = visited(tmp_path, browser, monkeypatch, *asked, width=360)
    text, scripts = seen.answers[1]
    assert ascii(text) == ascii(HOSTILE)  # escaped, because pytest cannot show a lone surrogate
    assert scripts == 6
    assert seen.answers[-1] is True
    assert seen.overflow == 0
