"""Rows on disk: what a kill, a torn line or a strange file leaves."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mtgdm import rows
from mtgdm.errors import BadRow, UserError
from tests.conftest import read_rows, write_lines

PROMPT = [{"role": "system", "content": "你好"}, {"role": "user", "content": "西湖？"}]
ANSWERED = [*PROMPT, {"role": "assistant", "content": "在杭州。"}]


EXPECTED = "f8da1497d0160842b4c44814"


def an_id(number: int) -> str:
    return f"{number:024x}"


def test_an_id_depends_on_the_prompt_alone() -> None:
    assert rows.row_id(PROMPT) == rows.row_id(ANSWERED) == EXPECTED
    assert rows.row_id(PROMPT) == rows.row_id([dict(reversed(m.items())) for m in PROMPT])
    assert rows.row_id(PROMPT) != rows.row_id([PROMPT[0], {"role": "user", "content": "西湖！"}])


def test_a_split_hangs_on_the_name_and_the_seed() -> None:
    names = [f"景区{n}" for n in range(4000)]
    splits = [rows.split_of(name) for name in names]
    assert 0.07 < splits.count("test") / len(names) < 0.13
    assert 0.07 < splits.count("val") / len(names) < 0.13
    assert splits == [rows.split_of(f" {name[:2]} {name[2:]}") for name in names], (
        "white space does not count"
    )
    assert splits != [rows.split_of(name, seed=7) for name in names]


def test_another_val_ratio_moves_nothing_into_or_out_of_test() -> None:
    names = [f"景区{n}" for n in range(1000)]
    few = {name for name in names if rows.split_of(name, val_ratio=0.0) == "test"}
    many = {name for name in names if rows.split_of(name, val_ratio=0.5) == "test"}
    assert few == many != set()


def test_lines_end_at_newline_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"a":"一\u2028二"}\r\n\r\n  \n{"a":"三\x85"}'.encode())
    assert [(n, json.loads(line)["a"]) for n, line in rows.read_lines(path)] == [
        (1, "一\u2028二"),
        (4, "三\x85"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"meta": {}}', "`messages` is missing"),
        ('{"messages": []}', "`messages` is empty"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "the `role` of message 1 is 'robot'"),
        ('{"messages": [{"role": "user", "content": null}]}', "the `content` of message 1 is null"),
        ('{"messages": [{"role": "system", "content": "x"}]}', "no user turn"),
        ('{"messages": [{"role": "user", "content": "x"}], "meta": 3}', "`meta` is no object"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: str, reason: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"messages": PROMPT}, line)
    with pytest.raises(BadRow, match=reason) as caught:
        list(rows.read_rows(path))
    assert caught.value.where == f"{path}:2"


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"name": "\xb9\xca\xb9\xac"}\n')
    with pytest.raises(BadRow, match="not UTF-8"):
        list(rows.read_rows(path))


def test_a_missing_file_and_a_folder_are_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        list(rows.read_rows(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="folder"):
        list(rows.read_rows(tmp_path))


def test_prompts_and_answers_are_told_apart(tmp_path: Path) -> None:
    asked = write_lines(tmp_path / "asked.jsonl", {"messages": PROMPT})
    answered = write_lines(tmp_path / "answered.jsonl", {"messages": ANSWERED})
    with pytest.raises(BadRow, match="no answer"):
        list(rows.read_rows(asked, answered=True))
    with pytest.raises(BadRow, match="already has an answer"):
        list(rows.read_rows(answered, answered=False))
    (row,) = rows.read_rows(answered, answered=True)
    assert (row.answer, row.prompt, row.type) == ("在杭州。", PROMPT, None)


def test_the_id_of_another_tool_is_kept_aside_and_never_trusted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"id": "1", "messages": PROMPT})
    (row,) = rows.read_rows(path)
    assert (row.id, row.rest) == (EXPECTED, {"given_id": "1"})


def test_rows_without_a_split_get_it_from_their_spot(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "old.jsonl", *({"messages": ANSWERED, "meta": {"spot": f"景{n}"}} for n in range(50))
    )
    for row in rows.read_rows(path):
        assert row.split == rows.split_of(row.spot or "")


def test_a_lone_surrogate_can_be_written() -> None:
    line = rows.encode({"text": "a\ud800b\ud83d\ude00"})
    assert json.loads(line.decode("utf-8"))["text"] == "a\ufffdb😀"


def test_a_row_keeps_its_id_on_disk_though_a_lone_surrogate_cannot_be_written(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "西\ud800湖\ud83d\ude00"}]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(rows.encode({"id": rows.row_id(messages), "messages": messages}))
    (row,) = rows.read_rows(path)
    assert (row.id, row.rest) == (rows.row_id(messages), {})


def test_a_failed_replacement_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(RuntimeError), rows.replace(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_half_made_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".out.jsonl.tmp").write_text("half", encoding="utf-8")
    with rows.replace(tmp_path / "out.jsonl") as file:
        file.write(b"new")
    folder = tmp_path / "package"
    (tmp_path / ".package.tmp/deep").mkdir(parents=True)
    (tmp_path / ".package.old").mkdir()
    (tmp_path / ".package.old/kept").touch()
    with pytest.raises(RuntimeError), rows.replace_folder(folder):
        raise RuntimeError
    assert (folder / "kept").exists(), "killed between two renames, the old one comes back"
    with rows.replace_folder(folder) as beside:
        (beside / "new").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "package"}
    assert [path.name for path in folder.iterdir()] == ["new"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_link_stays_a_link_and_a_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out.jsonl"
    link.symlink_to(tmp_path / "disk/out.jsonl")
    with rows.replace(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert (tmp_path / "disk/out.jsonl").read_bytes() == b"new"
    with pytest.raises(UserError, match="device or a pipe"), rows.replace(Path("/dev/null")):
        pass


def test_replacing_takes_the_manifest_away_first(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    rows.manifest_path(path).write_text("{}", encoding="utf-8")
    with rows.replace(path) as file:
        file.write(b"new")
    assert list(tmp_path.iterdir()) == [path]


def test_a_journal_knows_what_is_there_and_appends(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with rows.Journal(path) as journal:
        journal.append({"id": an_id(1), "answer": "一"})
    rows.manifest_path(path).write_text("{}", encoding="utf-8")
    seen: list[int] = []
    with rows.Journal(path, inspect=lambda number, line: seen.append(number)) as journal:
        assert journal.ids == {an_id(1)}
        assert rows.manifest_path(path).exists(), "opening alone changes nothing"
        journal.append({"id": an_id(2), "answer": "二"})
        assert not rows.manifest_path(path).exists()
    assert seen == [1]
    assert [row["id"] for row in read_rows(path)] == [an_id(1), an_id(2)]


def test_lines_known_for_what_they_hold_are_not_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"".join(rows.encode({"id": an_id(n), "by": "us"}) for n in range(40_000)))
    seen: list[int] = []
    with rows.Journal(path, inspect=lambda number, line: seen.append(number), known=b'"by": "us"') as journal:
        journal.append({"id": an_id(40_000), "by": "another"})
    assert seen == []
    with rows.Journal(path, inspect=lambda number, line: seen.append(number), known=b'"by": "us"') as journal:
        assert len(journal.ids) == 40_001
    assert seen[-1] == 40_001, "the block of the other line is looked at"
    assert len(seen) < 40_001


def test_an_id_that_is_no_hash_is_not_believed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "journal.jsonl", {"id": "F" * 24, "messages": ANSWERED})
    with rows.Journal(path) as journal:
        assert journal.ids == {EXPECTED}


@pytest.mark.parametrize(
    ("tail", "kept"),
    [(b'{"id": "torn', 1), ('{"id": "x", "answer": "二'.encode()[:-1], 1), (b"\x00\x00\x00", 1)],
)
def test_a_torn_last_line_is_cut_off(tmp_path: Path, tail: bytes, kept: int) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(rows.encode({"id": an_id(1)}) + tail)
    with rows.Journal(path) as journal:
        assert journal.ids == {an_id(1)}
        journal.append({"id": an_id(2)})
    assert len(read_rows(path)) == kept + 1


def test_a_last_line_that_only_lacks_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(rows.encode({"id": an_id(1)}) + rows.encode({"id": an_id(2)})[:-1])
    with rows.Journal(path) as journal:
        assert journal.ids == {an_id(1), an_id(2)}
        journal.append({"id": an_id(3)})
    assert [row["id"] for row in read_rows(path)] == [an_id(1), an_id(2), an_id(3)]


def test_the_last_line_of_another_file_is_not_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "notes.md"
    path.write_bytes(b"# Notes\nthe last line")
    with pytest.raises(BadRow, match="not JSON"), rows.Journal(path):
        pass
    assert path.read_bytes() == b"# Notes\nthe last line"


def test_nothing_is_written_behind_half_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    with rows.Journal(path) as journal:
        journal.append({"id": an_id(1)})
        file = journal._file

        class Full(io.RawIOBase):
            def write(self, data: Any) -> int:
                if len(data) < 30:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return file.write(data[:20])

            def fileno(self) -> int:
                return file.fileno()

        monkeypatch.setattr(journal, "_file", Full())
        with pytest.raises(OSError, match="No space"):
            journal.append({"id": an_id(2)})
        monkeypatch.setattr(journal, "_file", file)
        with pytest.raises(UserError, match="No space"):
            journal.append({"id": an_id(3)})
    with rows.Journal(path) as journal:
        assert set(journal.ids) == {an_id(1)}


def test_a_torn_line_longer_than_one_read_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(rows.encode({"id": an_id(1)}) + b'{"id": "' + b"x" * 200_000)
    with rows.Journal(path) as journal:
        assert journal.ids == {an_id(1)}
    assert path.read_bytes() == rows.encode({"id": an_id(1)})


def test_rows_of_the_original_pipeline_are_known_by_their_messages(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "journal.jsonl", {"messages": ANSWERED, "meta": {"spot": "西湖"}})
    with rows.Journal(path) as journal:
        assert journal.ids == {rows.row_id(PROMPT)}


def test_a_journal_is_put_in_order_and_duplicates_end_with_the_last(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "journal.jsonl",
        {"id": an_id(3), "answer": "c"},
        {"id": an_id(1), "answer": "old"},
        {"id": an_id(9), "answer": "other"},
        {"id": an_id(1), "answer": "a"},
    )
    rows.put_in_order(path, [an_id(1), an_id(2), an_id(3)])
    assert [(row["id"], row["answer"]) for row in read_rows(path)] == [
        (an_id(1), "a"),
        (an_id(3), "c"),
        (an_id(9), "other"),
    ]
    before = path.stat().st_mtime_ns
    rows.put_in_order(path, [an_id(1), an_id(3)])
    assert path.stat().st_mtime_ns == before, "a file in order is left alone"


def test_a_file_with_a_byte_order_mark_is_put_in_order(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + rows.encode({"id": an_id(2)}) + rows.encode({"id": an_id(1)}))
    rows.put_in_order(path, [an_id(1), an_id(2)])
    assert path.read_bytes() == rows.encode({"id": an_id(1)}) + rows.encode({"id": an_id(2)})


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_journal_loses_no_row_it_has_written(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    writer = (
        "import sys, itertools; from pathlib import Path; from mtgdm.rows import Journal\n"
        "with Journal(Path(sys.argv[1])) as journal:\n"
        "    for n in itertools.count():\n"
        "        journal.append({'id': f'{n:024x}', 'text': '景' * 500}); print(n, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", writer, str(path)], stdout=subprocess.PIPE, encoding="utf-8"
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 200:
            break
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate()
    said = int((rest.splitlines() or [line])[-1])
    with rows.Journal(path) as journal:
        assert len(journal.ids) >= said + 1
    assert len(read_rows(path)) == len(journal.ids)
