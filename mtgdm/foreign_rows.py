"""Files of other tools as rows, and rows as files of other tools.

ShareGPT, Alpaca, OpenAI's fine-tuning files and pairs of two texts; as JSON lines, a JSON array, objects over
several lines, CSV or Parquet; packed with gzip, in UTF-8, UTF-16 or UTF-32.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mtgdm.errors import BadRow, UserError
from mtgdm.row_messages import NotARow, kind, plain

if TYPE_CHECKING:
    from typing import BinaryIO

Format = Literal["sharegpt", "alpaca", "openai"]
Turns = list[dict[str, Any]]

_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is its beginning
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LISTS = ("conversations", "conversation", "dialogue", "dialog", "turns", "chat")
_ROLES = {
    "human": "user", "user": "user", "prompter": "user", "question": "user",
    "gpt": "assistant", "assistant": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip
_PAIRS = (
    ("prompt", "chosen"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("question", "response"),
    ("instruction", "response"),
    ("input", "output"),
)
_KNOWN = frozenset(
    {"id", "meta", "messages", "system", "instruction", "input", "output", "history", "rejected"}
    | {*_LISTS, *(key for pair in _PAIRS for key in pair)}
)


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file with the number of their line or their place in the list.

    Raises UserError where the file cannot be read, BadRow where a part of it is no object.
    """
    try:
        with path.open("rb") as file:
            head = file.read(len(_PARQUET))
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror}", where=path, hint="name it with --in FILE"
        ) from error
    if head == _PARQUET:
        found: Iterator[tuple[int, Any]] = enumerate(_parquet(path), start=1)
    else:
        found = _text_records(path, packed=head.startswith(_GZIP))
    empty = True
    for number, record in found:
        empty = False
        if not isinstance(record, dict):
            raise BadRow(path, number, f"not a JSON object but {kind(record)}")
        yield number, record
    if empty:
        raise UserError("holds no rows", where=path)


def messages_of(record: Mapping[str, Any], ignored: Counter[str]) -> Turns:
    """The messages of a row of another tool, with an answer at their end; NotARow where it has none.

    Keys that say nothing to a training are counted in `ignored`.
    """
    ignored.update(key for key in record if key not in _KNOWN)
    turns = _turns(record)
    system = record.get("system")
    if isinstance(system, str) and system.strip() and _role(turns[0]) != "system":
        turns = [{"role": "system", "content": system}, *turns]
    messages = [plain(_renamed(turn), place, ignored) for place, turn in enumerate(turns, start=1)]
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise NotARow("the row holds no user turn")
    if roles[-1] != "assistant":
        raise NotARow(f"the row ends with a turn of the {roles[-1]}, not with an answer")
    return messages


def as_format(messages: Sequence[Mapping[str, Any]], wanted: Format) -> dict[str, Any]:
    """A row's messages as the tools of the field read them; NotARow where the format cannot hold them."""
    if wanted == "openai":
        keys = ("role", "content", "weight")
        return {"messages": [{key: one[key] for key in keys if key in one} for one in messages]}
    if wanted == "sharegpt":
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        turns = [{"from": names[one["role"]], "value": one["content"]} for one in messages]
        return {"conversations": turns}
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    spoken = messages[1:] if messages[0]["role"] == "system" else messages
    roles = [one["role"] for one in spoken]
    if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        raise NotARow("Alpaca holds turns of user and assistant in exchange alone")
    pairs = [[spoken[place]["content"], spoken[place + 1]["content"]] for place in range(0, len(spoken), 2)]
    asked, answer = pairs.pop()
    return {"instruction": asked, "input": "", "output": answer, "system": system, "history": pairs}


def write_records(records: Iterable[Mapping[str, Any]], file: BinaryIO, name: str) -> None:
    """Write a file as its name says: `.json` is one array, all else lines; `.gz` is packed, `.parquet` a table."""
    if name.endswith(".parquet"):
        pyarrow = _pyarrow()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), file)
        return
    if name.endswith(".gz"):
        # Without a time in its head the same rows give the same file.
        with gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as packed:
            _write_text(records, packed, array=name.endswith(".json.gz"))
    else:
        _write_text(records, file, array=name.endswith(".json"))


def _write_text(records: Iterable[Mapping[str, Any]], file: Any, *, array: bool) -> None:
    before = "[\n" if array else ""
    for record in records:
        file.write((before + json.dumps(record, ensure_ascii=False)).encode("utf-8", "replace"))
        before = ",\n" if array else "\n"
    file.write(b"\n]\n" if array and before != "[\n" else b"[]\n" if array else b"\n" if before else b"")


# --- reading -----------------------------------------------------------------------------------


@contextmanager
def _text(path: Path, *, packed: bool) -> Iterator[io.TextIOWrapper]:
    """A file as text, whatever its encoding; lines end at `\\n` alone, for U+2028 may stand in a string."""
    with path.open("rb") as file:
        stream: Any = gzip.GzipFile(fileobj=file) if packed else file
        buffered = io.BufferedReader(stream)
        with io.TextIOWrapper(buffered, encoding=_encoding(buffered.peek(4)[:4]), newline="\n") as text:
            yield text


def _encoding(head: bytes) -> str:
    for mark, encoding in _BOMS:
        if head.startswith(mark):
            return encoding
    # Without a mark: JSON begins with a bracket, whose other byte is 0.
    return "utf-16-le" if head[1:2] == b"\0" else "utf-16-be" if head[:1] == b"\0" else "utf-8"


def _text_records(path: Path, *, packed: bool) -> Iterator[tuple[int, Any]]:
    name = path.name.removesuffix(".gz")
    number = 0
    try:
        with _text(path, packed=packed) as text:
            if name.endswith((".csv", ".tsv")):
                yield from enumerate(
                    csv.DictReader(text, delimiter="\t" if name.endswith(".tsv") else ","), start=2
                )
                return
            for number, line in enumerate(text, start=1):
                if not line.strip():
                    continue
                if number == 1 and _is_header(line):
                    yield from enumerate(csv.DictReader(itertools.chain((line,), text)), start=2)
                    return
                if line.lstrip()[0] == "[" or not _is_whole(line):
                    yield from _joined(path, number, line + text.read())
                    return
                yield number, json.loads(line)
    except (UnicodeError, EOFError, gzip.BadGzipFile) as error:
        raise BadRow(path, number + 1, f"cannot be read: {error}") from error


def _is_header(line: str) -> bool:
    """Whether a first line is that of a CSV file, whatever the file is called."""
    names = {name.strip(' "\r\n') for name in line.split(",")}
    return line[0] not in "{[" and len(names & _KNOWN) > 1


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _joined(path: Path, line_number: int, text: str) -> Iterator[tuple[int, Any]]:
    """The objects of an array, or of objects that stand over several lines."""
    decoder = json.JSONDecoder()
    place = number = 0
    while text[place:].strip():
        place += len(text[place:]) - len(text[place:].lstrip())
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            line = line_number + text.count("\n", 0, getattr(error, "pos", place))
            raise BadRow(path, line, f"not JSON: {getattr(error, 'msg', error)}") from error
        for one in value if isinstance(value, list) else [value]:
            number += 1
            yield number, one


def _parquet(path: Path) -> Iterator[Any]:
    pyarrow = _pyarrow()
    with pyarrow.parquet.ParquetFile(path) as table:
        for batch in table.iter_batches():
            yield from batch.to_pylist()


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("Parquet files are read with pyarrow", hint="pip install 'mtgdm[parquet]'") from error
    return pyarrow


# --- turns -------------------------------------------------------------------------------------


def _turns(record: Mapping[str, Any]) -> Turns:
    for key in ("messages", *_LISTS):
        turns = record.get(key)
        if isinstance(turns, str) and turns.lstrip().startswith("["):
            try:
                turns = json.loads(turns)
            except ValueError as error:
                raise NotARow(f"`{key}` is a list written as text that is not JSON: {error}") from error
        if isinstance(turns, list) and turns:
            return turns
    if isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str):
        return _alpaca(record)
    for asked, answer in _PAIRS:
        if record.get(asked) and record.get(answer):
            return [*_said("user", record[asked]), *_said("assistant", record[answer], after=record[asked])]
    if isinstance(record.get("chosen"), list) and record["chosen"]:
        return list(record["chosen"])
    keys = ", ".join(f"`{key}`" for key in list(record)[:6])
    raise NotARow(f"no messages, conversations, instruction or pair of texts; it has {keys or 'nothing'}")


def _alpaca(record: Mapping[str, Any]) -> Turns:
    turns: Turns = []
    for pair in record.get("history") or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise NotARow("`history` is no list of pairs of a question and its answer")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = "\n".join(part for part in (record["instruction"], record.get("input") or "") if part.strip())
    return [*turns, {"role": "user", "content": asked}, {"role": "assistant", "content": record["output"]}]


def _said(role: str, said: Any, after: Any = None) -> Turns:
    """A text as a turn; turns as they are, without those that stood before them already."""
    if not isinstance(said, list):
        return [{"role": role, "content": said}]
    before = len(after) if isinstance(after, list) and said[: len(after)] == after else 0
    return list(said[before:])


def _role(turn: Any) -> str:
    return str(_renamed(turn).get("role")) if isinstance(turn, dict) else ""


def _renamed(turn: Any) -> Any:
    """A turn of ShareGPT with OpenAI's keys and roles."""
    if not isinstance(turn, dict):
        return turn
    renamed = dict(turn)
    for new, old in (("role", "from"), ("content", "value")):
        if new not in renamed and old in renamed:
            renamed[new] = renamed.pop(old)
    role = renamed.get("role")
    if isinstance(role, str):
        renamed["role"] = _ROLES.get(role.lower(), role)
    return renamed
