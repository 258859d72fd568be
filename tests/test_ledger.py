"""What a run finds on disk: prompts read once, answers looked at by blocks, ids in a few bytes each."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from mtgdm import manifest, rows
from mtgdm.errors import BadRow, UserError
from mtgdm.row_ids import IdSet
from mtgdm.stages import prompts as prompts_stage
from mtgdm.teachers.judgement import Judge
from mtgdm.teachers.ledger import LONGEST_PROMPT, Ledger, Prompts
from mtgdm.teachers.tokens import prompt_at_most
from mtgdm.testing import run as run_stage
from tests import teacher_domain
from tests.conftest import read_rows, spot, write_lines
from tests.teacher_domain import Gardens, prompt_rows, run_teacher

OURS = "0123456789abcdef"


def made_by_the_stage(workspace: Path, names: Iterable[str] = ("西湖", "灵隐寺", "雷峰塔")) -> Path:
    """A prompts file with its manifest."""
    write_lines(workspace / "spots.jsonl", *map(spot, names))
    run_stage(prompts_stage.run, workspace, spots=str(workspace / "spots.jsonl"))
    return workspace / "data" / "prompts.jsonl"


def scan(path: Path, limit: int = 0) -> Prompts:
    return Prompts.scan(path, limit, prompt_at_most)


def never(messages: list[dict[str, str]]) -> int:
    raise AssertionError("a prompt was parsed")


def held(identities: Iterable[str]) -> IdSet:
    found = IdSet()
    for identity in identities:
        found.add(identity)
    return found


def answered(row: dict[str, Any], fingerprint: str | None = OURS) -> dict[str, Any]:
    teacher = {"teacher": {"fingerprint": fingerprint}} if fingerprint else {}
    messages = [*row["messages"], {"role": "assistant", "content": "好。"}]
    return {"id": row["id"], "messages": messages, "meta": {**row["meta"], **teacher}}


# --- prompts -------------------------------------------------------------------------------------


def test_prompts_that_mtgdm_wrote_are_known_without_parsing(tmp_path: Path) -> None:
    path = made_by_the_stage(tmp_path)
    parsed = [row for row in rows.read_rows(path)]
    known = Prompts.scan(path, 0, never)
    assert list(known.ids) == [row.id for row in parsed]
    assert known.lines.tolist() == [row.line for row in parsed]
    assert known.longest_tokens == max(prompt_at_most(row.prompt) for row in parsed)
    rows.manifest_path(path).unlink()
    read = scan(path)
    assert (list(read.ids), read.lines, read.longest_tokens) == (
        list(known.ids),
        known.lines,
        known.longest_tokens,
    )


def test_prompts_edited_since_are_parsed_line_by_line(tmp_path: Path) -> None:
    path = made_by_the_stage(tmp_path)
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(first.replace("西湖".encode(), "东湖".encode(), 1) + b"\n" + rest)
    changed = json.loads(first.replace("西湖".encode(), "东湖".encode(), 1))
    found = scan(path)
    assert found.ids.place(rows.row_id(changed["messages"])) == 0
    assert changed["id"] not in found.ids, "an id in an edited file is not believed"
    path.write_bytes(b'{"id": "' + b"0" * 24 + b'", "messages": 7}\n' + rest)
    with pytest.raises(BadRow, match="`messages` is a number"):
        scan(path)


def test_prompts_only_touched_since_are_known_all_the_same(tmp_path: Path) -> None:
    path = made_by_the_stage(tmp_path)
    os.utime(path, ns=(1, 1))
    assert Prompts.scan(path, 0, never).asked == 9


def test_another_stage_s_manifest_says_nothing_about_prompts(tmp_path: Path) -> None:
    path = made_by_the_stage(tmp_path)
    made = manifest.read(path)
    assert made is not None
    counts = {key: value for key, value in made.counts.items() if key != LONGEST_PROMPT}
    manifest.write(made.model_copy(update={"counts": counts}), path)
    with pytest.raises(AssertionError, match="was parsed"):
        Prompts.scan(path, 0, never)


@pytest.mark.parametrize("known", [True, False])
def test_a_limit_is_sized_by_its_own_prompts(tmp_path: Path, known: bool) -> None:
    path = made_by_the_stage(tmp_path, ["西湖", "很长很长很长的景区名称" * 20])
    if not known:
        rows.manifest_path(path).unlink()
    first = [prompt_at_most(row.prompt) for row in rows.read_rows(path)][:3]
    found = scan(path, limit=3)
    assert (found.asked, found.longest_tokens, len(found.ids)) == (3, max(first), 6)
    for limit in (100, 10**30):
        assert scan(path, limit=limit).longest_tokens > max(first)


def test_duplicates_and_blank_lines_move_no_prompt(tmp_path: Path) -> None:
    first, second, third = prompt_rows(3, types=["note"])
    path = write_lines(tmp_path / "prompts.jsonl", first, "", second, first, "  ", second, third)
    found = scan(path)
    assert (found.asked, found.duplicates, found.lines.tolist()) == (3, 2, [1, 3, 7])
    wanted = ~found.among(held([second["id"]]))
    assert [(row.id, row.line) for row in found.rows(wanted)] == [(first["id"], 1), (third["id"], 7)]


def test_prompts_that_are_not_wanted_are_not_parsed(tmp_path: Path) -> None:
    written = prompt_rows(4, types=["note"])
    path = write_lines(tmp_path / "prompts.jsonl", *written)
    found = scan(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    write_lines(path, "no row", *lines[1:3], "no row")
    wanted = found.among(held(row["id"] for row in written[1:3]))
    assert [row.id for row in found.rows(wanted)] == [row["id"] for row in written[1:3]]


def test_prompts_that_change_while_they_are_asked_stop_the_run(tmp_path: Path) -> None:
    written = prompt_rows(3, types=["note"])
    path = write_lines(tmp_path / "prompts.jsonl", *written)
    found = scan(path)
    write_lines(path, *written[1:])
    with pytest.raises(UserError, match="the prompts changed"):
        list(found.rows(~found.among(IdSet())))


# --- answers -------------------------------------------------------------------------------------


def test_one_foreign_answer_among_ours_is_named_by_its_line(tmp_path: Path) -> None:
    written = prompt_rows(50, types=["note"])
    lines = [answered(row, "f" * 16 if number == 36 else OURS) for number, row in enumerate(written)]
    out = write_lines(tmp_path / "teacher.jsonl", *lines)
    with pytest.raises(UserError, match="another teacher") as caught, Ledger(out, OURS):
        pass
    assert caught.value.where == f"{out}:37"


def test_answers_without_a_fingerprint_are_taken_among_ours(tmp_path: Path) -> None:
    written = prompt_rows(50, types=["note"])
    lines = [answered(row, None if number % 7 else OURS) for number, row in enumerate(written)]
    for line in lines[1::2]:
        del line["id"]
    out = write_lines(tmp_path / "teacher.jsonl", *lines)
    with Ledger(out, OURS) as ledger:
        assert ledger.kept_ids == {row["id"] for row in written}


def test_answers_in_any_order_are_settled_into_that_of_the_prompts(tmp_path: Path) -> None:
    written = prompt_rows(30, types=["note"])
    prompts = scan(write_lines(tmp_path / "prompts.jsonl", *written))
    kept = [answered(row) for row in written if row is not written[4]]
    out = write_lines(tmp_path / "teacher.jsonl", *kept[::-1], kept[0])
    with Ledger(out, OURS) as ledger:
        settled = ledger.settle(prompts, Judge(Gardens()))
    assert read_rows(out) == kept
    assert (settled.moved, settled.refreshed) == (0, 0)


def test_a_row_on_disk_costs_some_fifty_bytes_of_memory(tmp_path: Path) -> None:
    written = prompt_rows(10_000, types=["note"])
    path = write_lines(tmp_path / "prompts.jsonl", *written)
    out = write_lines(tmp_path / "teacher.jsonl", *map(answered, written))
    tracemalloc.start()
    try:
        prompts = scan(path)
        with Ledger(out, OURS) as ledger:
            assert prompts.among(ledger.kept_ids).all()
            taken, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            ledger.settle(prompts, Judge(Gardens()))
            _, settling = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / len(written) < 64
    assert (settling - taken - 4 * 2**20) / len(written) < 64, "what a block takes aside"


def test_the_prompts_of_a_run_are_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtgdm.plugins.find", teacher_domain.find)
    written = prompt_rows(3)
    path = write_lines(tmp_path / "data" / "prompts.jsonl", *written)
    first = run_teacher(tmp_path).manifests[0]
    made = first.model_copy(update={"stage": "prompts", "output": first.inputs[0]})
    manifest.write(made, path)
    for output in (tmp_path / "data").glob("teacher*"):
        output.unlink()
    hashed: list[Path] = []
    digest = manifest.sha256_of

    def counted(of: Path) -> str:
        hashed.append(of)
        return digest(of)

    monkeypatch.setattr(manifest, "sha256_of", counted)
    assert run_teacher(tmp_path).manifests[0].inputs == first.inputs
    assert path not in hashed
