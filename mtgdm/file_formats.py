"""What a file is that holds no JSON lines in UTF-8, and the command that makes lines of it."""

from __future__ import annotations

import re
from pathlib import Path

from mtgdm.errors import BadRow, UserError

HEAD_BYTES = 4096
"""So much of a file tells what it is; an Excel workbook names its parts within the first kilobyte or two."""

_AS_LINES = "export it as JSON lines, one object a line, in UTF-8"
_BINARY = (
    (b"\x1f\x8b", "a gzip file", "unpack it first: gunzip {name}"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it first: zstd -d {name}"),
    (b"BZh", "a bzip2 file", "unpack it first: bunzip2 {name}"),
    (b"\xfd7zXZ", "an xz file", "unpack it first: unxz {name}"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first: 7z x {name}"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it first: unrar x {name}"),
    (b"SQLite format 3", "an SQLite database", _AS_LINES),
    (
        b"PAR1",
        "a Parquet file",
        _AS_LINES + ": datasets.load_dataset('parquet', data_files=...).to_json(...)",
    ),
    (b"ARROW1", "an Arrow file", _AS_LINES + ": datasets.Dataset.from_file(...).to_json(...)"),
    (b"\xff\xff\xff\xff", "an Arrow stream", _AS_LINES + ": datasets.Dataset.from_file(...).to_json(...)"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", _AS_LINES),
    (b"\x89HDF", "an HDF5 file", _AS_LINES),
    (b"\x80\x04", "a Python pickle", _AS_LINES),
    (b"%PDF", "a PDF file", _AS_LINES),
    (b"version https://git-lfs", "a Git LFS pointer, not the data", "git lfs pull"),
)
_OFFICE = (b"[Content_Types].xml", b"xl/", b"word/")
# A line that holds nothing but a brace may be one bad line among many; a key behind it makes it an object.
_PRETTY = re.compile(rb"(?:\{\s*\n\s*\"|\[\s*\n)")
_YAML = re.compile(r"(?:---\s*$|- |[\w.-]+:(?:\s|$))")
_PYTHON = re.compile(r"#!.*python|(?:import|from|def|class) \w|\"\"\"")
_UTF8_BOM = b"\xef\xbb\xbf"


def refuse_other_formats(path: Path, head: bytes, becomes: str) -> None:
    """UserError where a file, by its first HEAD_BYTES, holds no JSON lines; `becomes` names the file to make of it."""
    for magic, what, hint in _BINARY:
        if head.startswith(magic):
            raise UserError(f"is {what}", where=path, hint=hint.format(name=path.name))
    if head.startswith(b"PK\x03\x04"):
        if any(part in head for part in _OFFICE):
            raise UserError("is an Excel or Office file", where=path, hint=_AS_LINES)
        raise UserError("is a zip file", where=path, hint=f"unpack it first: unzip {path.name}")
    if encoding := _wide_encoding(head):
        raise UserError(
            f"is {encoding[:6].removesuffix('-')} text, not UTF-8",
            where=path,
            hint=f"save it as UTF-8: iconv -f {encoding} -t UTF-8 {path.name} > {becomes}",
        )
    start = head.removeprefix(_UTF8_BOM).lstrip()
    if _PRETTY.match(start):  # it would be one error a line
        array = start[:1] == b"["
        raise UserError(
            f"is one JSON {'array' if array else 'object over several lines'}, not one object a line",
            where=path,
            hint=to_lines(path.name, array=array, becomes=becomes),
        )


def to_lines(name: str, *, array: bool, becomes: str) -> str:
    """The command that makes lines of a JSON array, or of objects that stand over several lines."""
    becomes = f"lines-{becomes}" if becomes == name else becomes  # the shell empties its target first
    return f"turn it into lines: jq -c '{'.[]' if array else '.'}' {name} > {becomes}"


def not_utf8(path: Path, number: int, line: bytes, byte: int) -> BadRow:
    """The error of a line that is no UTF-8: that of Chinese Windows, most likely, where it can be read so."""
    try:
        is_gb = any("\u4e00" <= letter <= "\u9fff" for letter in line.decode("gb18030"))
    except UnicodeDecodeError:
        is_gb = False
    if not is_gb:
        return BadRow(path, number, f"not UTF-8 (byte {byte} of the line)", hint="save the file as UTF-8")
    return BadRow(
        path,
        number,
        f"not UTF-8 (byte {byte} of the line) but GB18030 or GBK text, by the look of it",
        hint=f"save it as UTF-8: iconv -f GB18030 -t UTF-8 {path.name} > {path.stem}-utf8{path.suffix}",
    )


def not_json(path: Path, number: int, text: str, reason: str, becomes: str) -> BadRow:
    """The error of a line that is no JSON, with what it looks like instead."""
    if number == 1 and text[:1] == "[":
        what, hint = "an array over several lines", to_lines(path.name, array=True, becomes=becomes)
    else:
        what, hint = _text_format(text, first=number == 1)
    return BadRow(path, number, f"not JSON{f' but {what}' if what else ''}: {reason}", hint=hint)


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by the byte order mark or, without one, by where the zeros of the first letters stand."""
    for mark, name in ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32")):
        if head.startswith(mark):
            return name
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    zeros = tuple(byte == 0 for byte in head[:4])
    return {
        (False, True, True, True): "UTF-32LE",
        (True, True, True, False): "UTF-32BE",
        (False, True, False, True): "UTF-16LE",
        (True, False, True, False): "UTF-16BE",
    }.get(zeros)


def _text_format(text: str, *, first: bool) -> tuple[str, str | None]:
    if text[:1] in "{[":
        bare = "\r{" in text
        return "", "its lines end in a bare carriage return: end them in \\n" if bare else None
    if not first:
        return "", None
    if text.startswith("<"):
        return "HTML or XML", "a page was saved in place of the file: fetch it anew"
    if _PYTHON.match(text):
        return "Python", _AS_LINES
    if "\t" in text:
        return "a table (TSV)", _AS_LINES
    if _YAML.match(text):
        return "YAML", _AS_LINES
    if "," in text or ";" in text:
        return "a table (CSV)", _AS_LINES
    return "", _AS_LINES
