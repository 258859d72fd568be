"""What a report says of where its figures come from."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from mtgdm import manifest
from mtgdm.manifest import FileState, Manifest, SettingValue
from mtgdm.reports import lineage, markdown, page


def state(path: str, digest: str) -> FileState:
    return FileState(path=path, sha256=digest * 64, bytes=1234, modified_ns=0)


def made(workspace: Path, stage: str, output: FileState, *inputs: FileState) -> Manifest:
    """A manifest beside its output, with a setting from a flag and one at its default."""
    one = Manifest(
        stage=stage,
        output=output,
        inputs=list(inputs),
        settings={
            "epochs": SettingValue(value=3, source="--epochs"),
            "lr": SettingValue(value=1e-4, source="default"),
        },
        profile="mine",
        domain="tourism",
        counts={},
        summary="12 rows of <b>西湖</b>",
        versions={"mtgdm": "0.1.0"},
        started=datetime(2026, 11, 23, 10, tzinfo=UTC),
        finished=datetime(2026, 11, 23, 11, tzinfo=UTC),
        seconds=3600.0,
    )
    (workspace / output.path).parent.mkdir(parents=True, exist_ok=True)
    manifest.write(one, workspace / output.path)
    return one


def test_the_way_goes_back_to_the_records_and_no_stage_stands_twice(tmp_path: Path) -> None:
    spots, teacher, student = (
        state("spots.jsonl", "a"),
        state("data/teacher.jsonl", "b"),
        state("data/lora", "c"),
    )
    made(tmp_path, "teacher", teacher, spots)
    made(tmp_path, "train", student, teacher)
    made(tmp_path, "eval", state("data/eval_outputs.jsonl", "d"), teacher, student)
    found = lineage.trace(tmp_path / "data/eval_outputs.jsonl", tmp_path)
    assert [one.stage for one in found] == ["eval", "teacher", "train"]
    assert lineage.changed(found) == set()
    assert lineage.trace(tmp_path / "spots.jsonl", tmp_path) == []


def test_an_input_that_was_made_anew_is_marked(tmp_path: Path) -> None:
    made(tmp_path, "teacher", state("data/teacher.jsonl", "f"))
    made(tmp_path, "eval", state("data/eval_outputs.jsonl", "d"), state("data/teacher.jsonl", "b"))
    found = lineage.trace(tmp_path / "data/eval_outputs.jsonl", tmp_path)
    assert lineage.changed(found) == {("data/teacher.jsonl", "b" * 64)}
    html = page.lineage(found)
    assert html.count("made anew since") == 1


def test_a_page_tells_inputs_settings_and_versions(tmp_path: Path) -> None:
    html = page.lineage([made(tmp_path, "eval", state("out.jsonl", "d"), state("in.jsonl", "e"))])
    for text in ("in.jsonl", "e" * 12, "epochs", "--epochs", "1 settings at their default", "mtgdm 0.1.0"):
        assert text in html
    assert "&lt;b&gt;西湖" in html
    assert page.lineage([]) == ""


def test_markdown_tells_the_same_in_a_table(tmp_path: Path) -> None:
    one = made(tmp_path, "eval", state("out.jsonl", "d"), state("in|put.jsonl", "e"))
    lines = lineage.in_markdown([one])
    assert lines[-2] == ("| eval | mine | 2026-11-23 10:00 | `in\\|put.jsonl` eeeeeeeeeeee | `epochs=3` |")
    assert lineage.in_markdown([]) == []


def test_nothing_from_data_is_markup() -> None:
    from markdown_it import MarkdownIt

    name = "<b>*钟*山</b> | [a](http://x) `c` ~~d~~ $e$ &amp; _f_\n# g"
    html = MarkdownIt("gfm-like", {"linkify": False}).render(
        "\n".join(markdown.table(["spot", "#n"], [(markdown.escape(name), "1")]))
    )
    for tag in ("<b>", "<em>", "<a ", "<code>", "<s>", "<h1>"):
        assert tag not in html
    assert html.count("<td") == 2
    assert "&lt;b&gt;*钟*山&lt;/b&gt; | [a](http://x)" in html
    assert markdown.code("a`b") == "``a`b``"
    assert markdown.code("`") == "`` ` ``"
