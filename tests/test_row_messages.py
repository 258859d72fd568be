"""Messages as other tools write them: kept, brought into one form, counted, or refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtgdm import remarks, rows
from mtgdm.errors import BadRow
from mtgdm.testing import QuietTerminal
from tests.conftest import CommandLine, write_lines

ASK = {"role": "user", "content": "灵隐寺建于哪年？"}
ANSWER = {"role": "assistant", "content": "建于326年。"}


def answer(**more: Any) -> dict[str, Any]:
    return {**ANSWER, **more}


def read(folder: Path, *messages: Any, **beside: Any) -> rows.Row:
    path = write_lines(folder / "theirs.jsonl", {"messages": list(messages), **beside})
    return next(rows.read_rows(path))


def refusal(folder: Path, *messages: Any, **beside: Any) -> str:
    with pytest.raises(BadRow) as caught:
        read(folder, *messages, **beside)
    assert caught.value.where == f"{folder / 'theirs.jsonl'}:1"
    return f"{caught.value.reason} | {caught.value.hint}"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (["user"], "a list"),
        ({"a": 1}, "an object"),
        (7, "a number"),
        (None, "null"),
        (True, "true"),
        ("bot", "'bot'"),
    ],
)
def test_a_role_of_any_other_kind_is_named(tmp_path: Path, value: Any, found: str) -> None:
    assert f"the `role` of message 2 is {found}, not one of" in refusal(
        tmp_path, ASK, {"role": value, "content": "x"}
    )


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "null"),
        (3.5, "a number"),
        ({"text": "x"}, "an object"),
        (False, "false"),
        ([], "an empty list"),
    ],
)
def test_a_content_that_is_no_text_is_named(tmp_path: Path, value: Any, found: str) -> None:
    assert f"`content` of message 1 is {found}" in refusal(
        tmp_path, {"role": "user", "content": value}, ANSWER
    )


@pytest.mark.parametrize("message", ["x", 4, None, ["user", "x"]])
def test_a_message_that_is_no_object_is_named(tmp_path: Path, message: Any) -> None:
    assert "message 1 is" in refusal(tmp_path, message, ANSWER)
    assert "message 2 has no `content`" in refusal(tmp_path, ASK, {"role": "assistant"})


@pytest.mark.parametrize("identity", [5, ["a"], {"a": 1}, 1e308, "自己的", None, False])
def test_an_id_of_any_kind_is_taken_and_replaced(tmp_path: Path, identity: Any) -> None:
    row = read(tmp_path, ASK, ANSWER, id=identity, meta={"spot": [1], "type": {}, "split": 3})
    assert row.id == rows.row_id([ASK])
    assert row.rest == ({} if identity is None else {"given_id": identity})
    assert (row.spot, row.type) == (None, None)
    assert row.split in ("train", "val", "test")


@pytest.mark.parametrize(
    ("meta", "found"), [([1], "a list"), ("x", "a text"), (2, "a number"), (True, "true")]
)
def test_a_meta_of_another_kind_is_named(tmp_path: Path, meta: Any, found: str) -> None:
    assert f"`meta` is no object but {found}" in refusal(tmp_path, ASK, ANSWER, meta=meta)


def test_a_weight_is_kept_and_changes_no_id(tmp_path: Path) -> None:
    row = read(tmp_path, ASK, answer(weight=0), ASK, answer(weight=1.0))
    assert [message.get("weight") for message in row.messages] == [None, 0, None, 1]
    assert row.id == rows.row_id([ASK, ANSWER, ASK])


@pytest.mark.parametrize("weight", [2, 0.5, -1, "0", True, [0], 10**400])
def test_any_other_weight_is_refused(tmp_path: Path, weight: Any) -> None:
    assert "`weight` of message 2" in refusal(tmp_path, ASK, answer(weight=weight))


@pytest.mark.parametrize("key", ["train", "training", "loss"])
def test_a_message_that_another_tool_would_not_train_has_weight_0(tmp_path: Path, key: str) -> None:
    assert read(tmp_path, ASK, answer(**{key: False})).messages[1] == answer(weight=0)
    assert read(tmp_path, ASK, answer(**{key: True})).messages[1] == ANSWER
    assert "contradict" in refusal(tmp_path, ASK, answer(**{key: False, "weight": 1}))
    assert "not true or false" in refusal(tmp_path, ASK, answer(**{key: "no"}))


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_is_kept_under_one_name(tmp_path: Path, key: str) -> None:
    row = read(tmp_path, ASK, answer(**{key: "看年份。"}))
    assert row.messages[1] == answer(reasoning_content="看年份。")
    assert row.answer == ANSWER["content"]
    assert read(tmp_path, ASK, answer(**{key: "  \n"})).messages[1] == ANSWER
    assert "not a text" in refusal(tmp_path, ASK, answer(**{key: [{"text": "x"}]}))
    assert "assistant's alone" in refusal(tmp_path, {**ASK, key: "x"}, ANSWER)


def test_two_different_thoughts_are_refused_and_the_same_twice_is_one(tmp_path: Path) -> None:
    assert read(tmp_path, ASK, answer(reasoning="a", thinking="a")).messages[1]["reasoning_content"] == "a"
    assert "two different thoughts" in refusal(tmp_path, ASK, answer(reasoning="a", thinking="b"))


@pytest.mark.parametrize(
    "extra",
    [
        {"tool_calls": [{"type": "function"}]},
        {"function_call": {"name": "f"}},
        {"tool_call_id": "call_1"},
        {"audio": {"id": "a"}},
        {"train_detail": [{"begin_offset": 0}]},
    ],
)
def test_what_is_not_trained_here_is_refused_with_the_way_out(tmp_path: Path, extra: dict[str, Any]) -> None:
    said = refusal(tmp_path, ASK, answer(**extra))
    assert f"message 2 has `{next(iter(extra))}`" in said
    assert "leave such rows out" in said


@pytest.mark.parametrize("role", ["tool", "function"])
def test_a_tool_turn_is_refused(tmp_path: Path, role: str) -> None:
    assert f"message 3 has the role `{role}`" in refusal(
        tmp_path, ASK, ANSWER, {"role": role, "content": "晴"}, ANSWER
    )


@pytest.mark.parametrize("key", ["tools", "functions", "images", "system"])
def test_keys_beside_the_messages_that_would_change_them_are_refused(tmp_path: Path, key: str) -> None:
    assert f"the row has `{key}`" in refusal(tmp_path, ASK, ANSWER, **{key: ["x"]})
    assert read(tmp_path, ASK, ANSWER, **{key: []}).messages == [ASK, ANSWER]
    assert read(tmp_path, ASK, ANSWER, **{key: None}).messages == [ASK, ANSWER]


def test_the_null_keys_of_a_dump_of_openai_are_ignored(tmp_path: Path) -> None:
    empty = {
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [],
        "name": "",
    }
    listener = QuietTerminal()
    with remarks.heard_by(listener):
        assert read(tmp_path, ASK, answer(**empty, weight=None)).messages == [ASK, ANSWER]
    assert listener.warnings == []


def test_developer_is_the_system_and_parts_of_text_are_one_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "建于"}, {"type": "text", "text": "哪年？"}]
    row = read(
        tmp_path, {"role": "developer", "content": "简短。"}, {"role": "user", "content": parts}, ANSWER
    )
    assert row.messages[:2] == [
        {"role": "system", "content": "简短。"},
        {"role": "user", "content": "建于哪年？"},
    ]
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    assert "no text ('image_url')" in refusal(tmp_path, {"role": "user", "content": picture}, ANSWER)


def test_keys_that_mean_nothing_are_counted_and_told_once(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "theirs.jsonl",
        *({"messages": [{**ASK, "name": "Li"}, answer(model="m")]} for _ in range(3)),
    )
    listener = QuietTerminal()
    with remarks.heard_by(listener):
        assert [row.messages for row in rows.read_rows(path)] == 3 * [[ASK, ANSWER]]
        list(rows.read_rows(path))
    assert listener.warnings == ["theirs.jsonl: keys of messages that are not read: `model` (3), `name` (3)"]


@pytest.mark.parametrize(
    ("row", "what", "hint"),
    [
        (
            {"conversations": [{"from": "human", "value": "x"}]},
            "ShareGPT",
            "jq -c '{messages: [.conversations[]",
        ),
        (
            {"conversations": [ASK, ANSWER]},
            "they stand under `conversations`",
            "jq -c '.messages = .conversations",
        ),
        ({"instruction": "x", "input": "", "output": "y"}, "Alpaca", "jq -c '{messages: ["),
        ({"prompt": "x", "completion": "y"}, "`prompt` and `completion`", "content: .prompt}"),
        ({"prompt": [ASK], "completion": [ANSWER]}, "`prompt` and `completion`", ".prompt + .completion"),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "preference", "the chosen one"),
        ({"question": "x", "answer": "y"}, "`question` and `answer`", "content: .question}"),
        ({"text": "running text"}, "plain `text`", "None"),
        ({"custom_id": "1", "body": {"messages": [ASK]}}, "batch API", ".body.messages"),
        ({"name": "西湖", "text_zh": {}}, "a spot record", "mtgdm prompts --spots"),
        ({"messages": json.dumps([ASK, ANSWER])}, "a list written as text", "fromjson"),
        ({"messages": {"0": ASK}}, "`messages` is an object", "None"),
        ({"messages": [{"from": "human", "value": "x"}]}, "ShareGPT", ".messages[]"),
        ({"a": 1, "b": 2}, "the row has `a`, `b`", "None"),
    ],
)
def test_a_row_of_another_tool_is_named_with_the_way_out(
    tmp_path: Path, row: dict[str, Any], what: str, hint: str
) -> None:
    path = write_lines(tmp_path / "theirs.jsonl", row)
    with pytest.raises(BadRow) as caught:
        list(rows.read_rows(path))
    assert what in caught.value.reason
    assert hint in str(caught.value.hint)


def test_a_training_tells_of_keys_it_does_not_read(mtgdm: CommandLine) -> None:
    write_lines(
        mtgdm.folder / "theirs.jsonl",
        {"messages": [{**ASK, "name": "Li"}, ANSWER], "meta": {"split": "train"}},
    )
    ran = mtgdm("train", "--in", "theirs.jsonl", "--student-base", "mtgdm-tiny", "--preview")
    assert ran.code == 0, ran.err
    assert "theirs.jsonl: keys of messages that are not read: `name` (1)" in ran.out + ran.err
