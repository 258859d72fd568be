"""A student that thinks is judged by its answers; its thoughts stand in a key of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from mtgdm.evaluation.run import Evaluation
from mtgdm.evaluation.student import Keep, Refuse, Reply, Student
from mtgdm.evaluation.thoughts import with_thoughts
from mtgdm.rows import Row, read_rows
from mtgdm.stage import Context
from mtgdm.testing import QuietTerminal
from tests.conftest import read_rows as lines_of
from tests.conftest import write_lines
from tests.tiny_student import teacher_row

THOUGHTS, ANSWER = "先看资料。", "西湖在杭州市。"


class Thinker(Student):
    """Says the same to every row."""

    name, base_name, max_new_tokens = "thinker", "its base", 64

    def __init__(self, says: str, *, may_think: bool = True) -> None:
        self.identity, self.base_identity = {"weights": 1}, {"weights": 0}
        self.may_think = may_think
        self._says = says

    def ask(self, rows: Sequence[Row], keep: Keep, refuse: Refuse, *, base: bool = False) -> None:
        for row in rows:
            keep(row, Reply(self._says, "stop", 9, 9, 0.1))


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    context = Context(
        stage="eval",
        workspace=tmp_path,
        terminal=QuietTerminal(),
        domain="tourism",
        profile="testing",
        started=datetime.now().astimezone(),
    )
    yield context
    context.close()


def evaluated(student: Student, context: Context, *, compare: bool = False) -> dict[str, Any]:
    row = teacher_row("西湖", "test", f"<think>\n{THOUGHTS}\n</think>\n\n{ANSWER}")
    test = write_lines(context.workspace / "test.jsonl", row)
    out = context.workspace / "out.jsonl"
    Evaluation(student, [*read_rows(test)], context, out=out, test="test.jsonl", compare=compare).run()
    (found,) = lines_of(out)
    return found


def test_only_the_answer_is_held_against_the_reference(context: Context) -> None:
    row = evaluated(Thinker(f"<think>\n{THOUGHTS}\n</think>\n\n{ANSWER}"), context, compare=True)
    assert (row["output"], row["base_output"], row["reference"]) == (ANSWER, ANSWER, ANSWER)
    assert row["thoughts"] == THOUGHTS
    assert row["metrics"]["exact_match"] == row["base_metrics"]["exact_match"] == 1


def test_where_the_prompt_opened_the_thought_its_end_alone_is_in_the_text(context: Context) -> None:
    row = evaluated(Thinker(f"{THOUGHTS}\n</think>\n\n{ANSWER}"), context)
    assert (row["output"], row["thoughts"]) == (ANSWER, THOUGHTS)


def test_a_thought_that_does_not_end_is_no_answer(context: Context) -> None:
    row = evaluated(Thinker(f"<think>\n{THOUGHTS}"), context)
    assert (row["output"], row["thoughts"]) == ("", THOUGHTS)
    assert row["metrics"]["char_f1"] == 0


def test_thoughts_of_a_student_that_was_trained_to_write_none_are_its_fault(context: Context) -> None:
    row = evaluated(Thinker(f"<think>\n{THOUGHTS}\n</think>\n\n{ANSWER}", may_think=False), context)
    assert "thoughts" not in row
    assert row["output"].startswith("<think>")
    assert row["metrics"]["exact_match"] == 0


def test_the_limit_of_tokens_has_room_for_the_thoughts(tmp_path: Path) -> None:
    inside = teacher_row("甲", "test", f"<think>\n{THOUGHTS}\n</think>\n\n{ANSWER}")
    beside = teacher_row("乙", "test", ANSWER)
    beside["messages"][-1]["reasoning_content"] = THOUGHTS
    for row in read_rows(write_lines(tmp_path / "test.jsonl", inside, beside)):
        assert THOUGHTS in with_thoughts(row)
        assert ANSWER in with_thoughts(row)
