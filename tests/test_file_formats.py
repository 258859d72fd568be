"""Files that hold no JSON lines: each is named for what it is, with the command that makes lines of it."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path

import pytest

from mtgdm import rows
from mtgdm.errors import UserError

ROW = {
    "messages": [
        {"role": "user", "content": "断桥在哪里？"},
        {"role": "assistant", "content": "在西湖。"},
    ]
}
LINE = json.dumps(ROW, ensure_ascii=False) + "\n"


def zipped(name: str) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr(name, LINE)
    return held.getvalue()


@pytest.mark.parametrize(
    ("data", "what", "hint"),
    [
        (gzip.compress(LINE.encode()), "gzip", "gunzip mine.jsonl"),
        (zipped("mine.jsonl"), "zip", "unzip mine.jsonl"),
        (zipped("[Content_Types].xml"), "Excel", "export it"),
        (b"\x28\xb5\x2f\xfd\x24", "zstd", "zstd -d"),
        (b"PAR1\x15\x04", "Parquet", "load_dataset('parquet'"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS", "git lfs pull"),
        (LINE.encode("utf-16"), "UTF-16", "iconv -f UTF-16 -t"),
        (LINE.encode("utf-16-le"), "UTF-16", "iconv -f UTF-16LE"),
        (LINE.encode("utf-16-be"), "UTF-16", "iconv -f UTF-16BE"),
        (LINE.encode("utf-32"), "UTF-32", "iconv -f UTF-32 -t"),
        (LINE.encode("utf-32-le"), "UTF-32", "iconv -f UTF-32LE"),
        (LINE.encode("utf-32-be"), "UTF-32", "iconv -f UTF-32BE"),
        (LINE.encode("gb18030"), "GB18030", "iconv -f GB18030"),
        (json.dumps([ROW, ROW]).encode(), "an array", "jq -c '.[]' mine.jsonl > rows.jsonl"),
        (json.dumps([ROW, ROW], indent=2).encode(), "one JSON array", "jq -c '.[]'"),
        (b"[" + LINE.encode() + b"," + LINE.encode() + b"]", "an array", "jq -c '.[]'"),
        (json.dumps(ROW, indent=2).encode(), "over several lines", "jq -c '.'"),
        (b"question,answer\nx,y\n", "CSV", "JSON lines"),
        (b"question\tanswer\nx\ty\n", "TSV", "JSON lines"),
        (b"- messages:\n  - role: user\n", "YAML", "JSON lines"),
        (b"import json\nprint(1)\n", "Python", "JSON lines"),
        (b"<!DOCTYPE html>\n<html></html>\n", "HTML", "fetch it anew"),
        (b'"caf\xe9"\n', "not UTF-8 (byte 4", "save the file as UTF-8"),
    ],
)
def test_another_format_is_named_with_the_way_out(tmp_path: Path, data: bytes, what: str, hint: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(data)
    for read in (rows.read_rows, rows.read_blocks):
        with pytest.raises(UserError) as caught:
            list(read(path))
        assert what in caught.value.message
        assert hint in str(caught.value.hint)
        assert str(caught.value.where).startswith(str(path))


def test_json_lines_are_taken_with_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + LINE.replace("\n", "\r\n").encode() * 2)
    assert [row.line for row in rows.read_rows(path)] == [1, 2]


def test_a_line_that_is_no_json_is_named_after_good_ones(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(LINE + "x, y\n", encoding="utf-8")
    with pytest.raises(UserError, match="not JSON: Expecting value") as caught:
        list(rows.read_rows(path))
    assert caught.value.where == f"{path}:2"
