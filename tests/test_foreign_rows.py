"""Files of other tools become rows, and rows become files of other tools."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mtgdm.errors import BadRow, UserError
from mtgdm.foreign_rows import as_format, messages_of, read_records
from mtgdm.row_messages import NotARow
from mtgdm.stages import export_rows, import_rows
from mtgdm.testing import run
from tests.conftest import read_rows, write_lines

ASKED, ANSWER, SYSTEM = "介绍湖。", "湖在城西。\u2028又名明湖。", "只用资料。"
TALK = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWER}]
WITH_SYSTEM = [{"role": "system", "content": SYSTEM}, *TALK]

RECORDS: list[tuple[dict[str, Any], list[dict[str, str]]]] = [
    ({"messages": TALK}, TALK),
    ({"messages": json.dumps(TALK)}, TALK),
    ({"messages": [{"role": "developer", "content": SYSTEM}, *TALK]}, WITH_SYSTEM),
    ({"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWER}]}, TALK),
    ({"conversations": [{"from": "system", "value": SYSTEM}, {"from": "human", "value": ASKED},
                        {"from": "gpt", "value": ANSWER}]}, WITH_SYSTEM),
    ({"system": SYSTEM, "conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWER}]},
     WITH_SYSTEM),
    ({"conversation": TALK}, TALK),
    ({"instruction": ASKED, "input": "", "output": ANSWER}, TALK),
    ({"instruction": ASKED, "output": ANSWER, "system": SYSTEM}, WITH_SYSTEM),
    ({"prompt": ASKED, "completion": ANSWER}, TALK),
    ({"question": ASKED, "answer": ANSWER}, TALK),
    ({"input": ASKED, "output": ANSWER}, TALK),
    ({"prompt": TALK[:1], "completion": TALK[1:]}, TALK),
    ({"prompt": ASKED, "chosen": ANSWER, "rejected": "不知道。"}, TALK),
    ({"prompt": TALK[:1], "chosen": TALK, "rejected": []}, TALK),
    ({"chosen": TALK, "rejected": []}, TALK),
]  # fmt: skip


@pytest.mark.parametrize(("record", "messages"), RECORDS)
def test_a_row_of_another_tool_has_its_messages(
    record: dict[str, Any], messages: list[dict[str, str]]
) -> None:
    assert messages_of(record, Counter()) == messages


def test_an_alpaca_row_brings_its_input_and_its_history() -> None:
    record = {"instruction": "译。", "input": "湖", "output": "lake", "history": [["早。", "您好。"]]}
    contents = [message["content"] for message in messages_of(record, Counter())]
    assert contents == ["早。", "您好。", "译。\n湖", "lake"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"a": 1}, "it has `a`"),
        ({"text": "湖"}, "it has `text`"),
        ({"messages": TALK[:1]}, "ends with a turn of the user"),
        ({"messages": TALK[1:]}, "no user turn"),
        ({"conversations": [{"from": "human", "value": ASKED}, {"from": "tool", "value": "x"}]}, "tool"),
        ({"prompt": ASKED, "completion": 5}, "`content` of message 2 is a number"),
        ({"instruction": ASKED, "output": ANSWER, "history": ["x"]}, "`history`"),
    ],
)
def test_what_is_no_row_says_why(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotARow, match=reason):
        messages_of(record, Counter())


ALPACA = [{"instruction": f"介绍第{number}湖。", "input": "", "output": ANSWER} for number in range(3)]
LINES = "\n".join(json.dumps(record, ensure_ascii=False) for record in ALPACA)
FILES: dict[str, bytes] = {
    "lines.jsonl": LINES.encode(),
    "crlf.jsonl": LINES.replace("\n", "\r\n\r\n").encode("utf-8-sig"),
    "array.json": json.dumps(ALPACA).encode(),
    "pretty.json": json.dumps(ALPACA, indent=2, ensure_ascii=False).encode(),
    "objects.json": "\n".join(json.dumps(record, indent=1) for record in ALPACA).encode(),
    "utf16.jsonl": LINES.encode("utf-16"),
    "utf16-without-mark.jsonl": LINES.encode("utf-16-le"),
    "utf32.json": json.dumps(ALPACA).encode("utf-32"),
    "packed.jsonl.gz": gzip.compress(LINES.encode()),
    "packed-array.json.gz": gzip.compress(json.dumps(ALPACA, indent=1).encode("utf-16")),
    "table.csv": b"instruction,input,output\n"
    + "".join(f'{one["instruction"]},,"{one["output"]}"\n' for one in ALPACA).encode(),
    "table.jsonl": b"instruction,output\r\n"
    + "".join(f'"{one["instruction"]}","{one["output"]}"\r\n' for one in ALPACA).encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_in_any_dress_becomes_rows(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    done = run(import_rows.run, tmp_path, in_=name)
    assert done.result.counts == {"read": 3, "rows": 3, "duplicates": 0, "skipped": 0}
    made = read_rows(tmp_path / "data" / "imported.jsonl")
    assert [row["messages"][0]["content"] for row in made] == [one["instruction"] for one in ALPACA]
    assert {row["messages"][1]["content"] for row in made} == {ANSWER}


def test_parquet_goes_in_and_out_where_pyarrow_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    write_lines(tmp_path / "data" / "teacher.jsonl", {"messages": TALK})
    run(export_rows.run, tmp_path, out="rows.parquet")
    run(import_rows.run, tmp_path, in_="rows.parquet")
    assert read_rows(tmp_path / "data" / "imported.jsonl")[0]["messages"] == TALK


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "holds no rows"),
        (b"[]", "holds no rows"),
        (b'{"a": 1}\n', "rows.json:1: no messages"),
        (b"[1, 2]", "rows.json:1: not a JSON object but a number"),
        (b'[{"a": 1},\n{"b": }]', "rows.json:2: not JSON"),
        (b"\x1f\x8b\x08 broken", "cannot be read"),
        (b"\xff\x00\xff", "cannot be read"),
    ],
)
def test_a_file_that_is_none_is_one_clear_error(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        run(import_rows.run, tmp_path)
    assert reason in str(caught.value)
    assert not (tmp_path / "data" / "imported.jsonl").exists()


def test_bad_rows_are_left_out_on_request_and_duplicates_dropped(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.json", ALPACA[0], {"a": 1}, ALPACA[0], {**ALPACA[1], "source": "网"})
    with pytest.raises(BadRow, match=r"rows\.json:2: no messages"):
        run(import_rows.run, tmp_path)
    done = run(import_rows.run, tmp_path, skip_bad=True)
    assert done.result.counts == {"read": 4, "rows": 2, "duplicates": 1, "skipped": 1}
    assert any("`source` (1)" in line for line in done.printed)


# --- the other way -----------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["sharegpt", "alpaca", "openai"])
@pytest.mark.parametrize("name", ["out.jsonl", "out.json", "out.jsonl.gz", "out.json.gz"])
def test_rows_come_back_as_they_were(wanted: str, name: str, tmp_path: Path) -> None:
    longer = [*WITH_SYSTEM, {"role": "user", "content": "再说。"}, {"role": "assistant", "content": "好。"}]
    write_lines(tmp_path / "data" / "teacher.jsonl", {"messages": TALK}, {"messages": longer})
    done = run(export_rows.run, tmp_path, format=wanted, out=name)
    assert done.result.counts == {"rows": 2}
    assert len(list(read_records(tmp_path / name))) == 2
    run(import_rows.run, tmp_path, in_=name)
    assert [row["messages"] for row in read_rows(tmp_path / "data" / "imported.jsonl")] == [TALK, longer]


def test_only_the_rows_of_a_split_are_written(tmp_path: Path) -> None:
    rows = [{"messages": TALK, "meta": {"split": split}} for split in ("train", "test", "train")]
    write_lines(tmp_path / "data" / "teacher.jsonl", *rows)
    assert run(export_rows.run, tmp_path, split="train").result.counts == {"rows": 2}
    with pytest.raises(UserError, match="no row of the split 'val'"):
        run(export_rows.run, tmp_path, split="val")


def test_alpaca_holds_turns_in_exchange_alone() -> None:
    with pytest.raises(NotARow, match="in exchange"):
        as_format([TALK[0], *TALK], "alpaca")
