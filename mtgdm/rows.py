"""Rows on disk: read with `file:line` errors, appended crash-safely, replaced atomically."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from json.encoder import encode_basestring
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Self, cast

from mtgdm import file_formats, remarks, row_messages
from mtgdm.errors import BadRow, UserError
from mtgdm.row_messages import ROLES, NotARow

if TYPE_CHECKING:
    from mtgdm.row_ids import Block, IdList

Split = Literal["train", "val", "test"]

SPLIT_SEED = 42
"""Seed of the split hash where nobody names another: rows without a split get theirs from it."""
VAL_RATIO = 0.1
TEST_RATIO = 0.1

FSYNC_INTERVAL_S = 1.0
_NO_ROOM = "make room on the disk, or write elsewhere; then run the same command again"
_ID_LENGTH = 24
_OUR_FORM = re.compile(rb'\{"id": "([0-9a-f]{24})".*\}', re.DOTALL)
_MANIFEST = ".manifest.json"
_BOM = b"\xef\xbb\xbf"
_WHITE = b" \t\r\n"
_BECOMES = "rows.jsonl"
_encoded = json.JSONEncoder(ensure_ascii=False).encode
"""Made once: `json.dumps` with settings of its own makes an encoder at every call."""


# --- identity ------------------------------------------------------------------------------------


def row_id(messages: Sequence[dict[str, Any]]) -> str:
    """24 hex digits of the SHA-256 over role and content of the messages, a last assistant turn left out."""
    prompt = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    # As JSON without spaces, put together here because an encoder takes five times as long.
    turns = [f"[{encode_basestring(m['role'])},{encode_basestring(m['content'])}]" for m in prompt]
    return hashlib.sha256(_utf8(f"[{','.join(turns)}]")).hexdigest()[:_ID_LENGTH]


def split_of(
    name: str, *, seed: int = SPLIT_SEED, val_ratio: float = VAL_RATIO, test_ratio: float = TEST_RATIO
) -> Split:
    """The split of a spot by a stable hash of its name and the seed.

    The name alone decides, so that a spot written twice (with and without its province, say) cannot
    stand in two splits, and adding records moves nothing. `test` is the lowest part of the hash range:
    another `val_ratio` never moves a spot into or out of `test`.
    """
    key = "".join(unicodedata.normalize("NFKC", name).split()).casefold()
    digest = hashlib.sha256(f"{seed}\n{key}".encode("utf-8", "surrogatepass")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < test_ratio:
        return "test"
    return "val" if place < test_ratio + val_ratio else "train"


@dataclass(frozen=True)
class Row:
    """One row of a prompt, teacher or eval file, with the place it came from."""

    id: str
    messages: list[dict[str, Any]]
    """Each with `role` and `content`; an answer may have `weight` (0: not trained) and `reasoning_content`."""
    meta: dict[str, Any]
    path: Path
    line: int
    rest: dict[str, Any] = field(default_factory=dict)
    """Keys of the row beside `id`, `messages` and `meta`."""

    @cached_property
    def prompt(self) -> list[dict[str, Any]]:
        """The messages without a last assistant turn."""
        return self.messages if self.answer is None else self.messages[:-1]

    @property
    def answer(self) -> str | None:
        """The last assistant turn, or None where the row is a prompt."""
        last = self.messages[-1]
        return str(last["content"]) if last["role"] == "assistant" else None

    @property
    def type(self) -> str | None:
        """The prompt type; None in rows of other tools, which have no answer contract."""
        value = self.meta.get("type")
        return value if isinstance(value, str) else None

    @property
    def spot(self) -> str | None:
        """The name of the spot the row is about."""
        value = self.meta.get("spot")
        return value if isinstance(value, str) else None

    @property
    def split(self) -> Split:
        """The split the row carries, else the one its spot (or, without a spot, its id) hashes to."""
        value = self.meta.get("split")
        if value in ("train", "val", "test"):
            return cast(Split, value)
        return split_of(self.spot or self.id)

    def bad(self, reason: str, *, hint: str | None = None) -> BadRow:
        """An error that points at this row."""
        return BadRow(self.path, self.line, reason, hint=hint)


# --- reading -------------------------------------------------------------------------------------


def read_lines(path: Path, numbers: Iterable[int] | None = None) -> Iterator[tuple[int, bytes]]:
    """The lines that hold something, with their numbers; split at `\\n` alone, BOM and `\\r` removed.

    `numbers`, ascending, takes these lines alone.
    """
    with _open(path) as file:
        yield from _full_lines(file, numbers)


def _full_lines(file: BinaryIO, numbers: Iterable[int] | None) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(file, start=1) if numbers is None else _picked(file, numbers):
        stripped = _stripped(number, line)
        if stripped:
            yield number, stripped


def _picked(file: BinaryIO, numbers: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    before = 0
    for number in numbers:
        yield number, next(islice(file, number - before - 1, None), b"")
        before = number


def _stripped(number: int, line: bytes) -> bytes:
    return (line.removeprefix(_BOM) if number == 1 else line).strip(_WHITE)


def read_blocks(path: Path) -> Iterator[Block]:
    """The lines that hold something, with the ids of their rows, many at once.

    A line that begins and ends as ours do is not parsed: its id is taken as it stands there.
    """
    from mtgdm import row_ids

    with _open(path) as file:
        _refuse_other_formats(path, file)
        for block in row_ids.read_blocks(file):
            for place in (~block.ours).nonzero()[0].tolist():
                number, line = block.line(place)
                stripped = _stripped(number, line)
                start = block.spans[place, 0] + line.find(stripped)
                block.spans[place] = start, start + len(stripped)
                if stripped:
                    block.ids[place] = bytes.fromhex(_line_id(path, number, stripped))
            yield block if block.ours.all() else block.filled()


def parse_object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """One line as a JSON object, or BadRow with the reason."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise file_formats.not_utf8(path, number, line, error.start) from error
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos}"
        raise file_formats.not_json(path, number, error.doc, reason, _BECOMES) from error
    except ValueError as error:
        raise BadRow(path, number, "a number of more digits than Python reads") from error
    except RecursionError as error:
        raise BadRow(path, number, "nested too deeply") from error
    if isinstance(value, list):
        hint = file_formats.to_lines(path.name, array=True, becomes=_BECOMES)
        raise BadRow(path, number, "not a JSON object but an array", hint=hint)
    if not isinstance(value, dict):
        raise BadRow(path, number, f"not a JSON object but {row_messages.kind(value)}")
    return value


def read_rows(
    path: Path, *, answered: bool | None = None, numbers: Iterable[int] | None = None
) -> Iterator[Row]:
    """The rows of a file, one at a time; `numbers`, ascending, takes those of these lines alone.

    `answered=True` demands that each row ends with the assistant's answer, False that none does,
    None takes both. Files of the original pipeline (no `id`) are accepted: the id is computed.
    Raises BadRow with `file:line`, or UserError where there is no such file or it holds no JSON lines. Keys of
    messages that mean nothing here are counted, and told once the file is read.
    """
    ignored: Counter[str] = Counter()
    try:
        with _open(path) as file:
            _refuse_other_formats(path, file)
            for number, line in _full_lines(file, numbers):
                row = _row(path, number, parse_object(path, number, line), ignored)
                if answered is True and row.answer is None:
                    raise row.bad(
                        "the row has no answer",
                        hint="is this the prompts file? answers come from `mtgdm teacher`",
                    )
                if answered is False and row.answer is not None:
                    raise row.bad(
                        "the row already has an answer",
                        hint="is this a teacher file? prompts come from `mtgdm prompts`",
                    )
                yield row
    finally:
        _tell_ignored(path, ignored)


def _tell_ignored(path: Path, ignored: Counter[str]) -> None:
    if ignored:
        keys = ", ".join(f"`{key}` ({count:,})" for key, count in sorted(ignored.items()))
        remarks.warn(f"{path.name}: keys of messages that are not read: {keys}")


def _row(path: Path, number: int, value: dict[str, Any], ignored: Counter[str]) -> Row:
    meta = value.pop("meta", None)
    given = value.pop("id", None)
    try:
        messages = _messages(path, value, ignored)
        if value:
            row_messages.check_beside(value)
    except NotARow as reason:
        raise BadRow(path, number, reason.reason, hint=reason.hint) from reason
    if meta is None:
        meta = {}
    if not isinstance(meta, dict):
        raise BadRow(path, number, f"`meta` is no object but {row_messages.kind(meta)}")
    identity = row_id(messages)
    if given is not None and given != identity:
        value["given_id"] = given  # another tool's, which may stand for other messages too
    return Row(identity, messages, meta, path, number, value)


def _messages(path: Path, value: dict[str, Any], ignored: Counter[str]) -> list[dict[str, Any]]:
    """The messages of a row, those with more than role and content brought into one form; raises NotARow."""
    found = value.pop("messages", None)
    if not isinstance(found, list) or not found:
        raise row_messages.no_messages(value, found, path.name)
    asked = False
    for place, message in enumerate(found):
        # Most rows hold nothing else, and a million of them are read: the rest is looked at apart.
        if not (
            isinstance(message, dict)
            and len(message) == 2
            and message.get("role") in ROLES
            and isinstance(message.get("content"), str)
        ):
            found[place] = message = row_messages.plain(message, place + 1, ignored)
        asked = asked or message["role"] == "user"
    if not asked:
        raise NotARow("`messages` holds no user turn")
    return found


def _refuse_other_formats(path: Path, file: BinaryIO) -> None:
    if file.seekable():
        file_formats.refuse_other_formats(path, file.read(file_formats.HEAD_BYTES), _BECOMES)
        file.seek(0)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise UserError("there is no such file", where=path) from error
    except IsADirectoryError as error:
        raise UserError("this is a folder, not a file", where=path) from error
    except PermissionError as error:
        reason = "this is a folder, not a file" if path.is_dir() else "the file may not be read"
        raise UserError(reason, where=path) from error


# --- writing -------------------------------------------------------------------------------------


def encode(value: dict[str, Any]) -> bytes:
    """One row as a line of UTF-8; a lone surrogate, which UTF-8 cannot hold, becomes U+FFFD.

    UserError where something in it is nested more deeply than Python writes, which is less than it reads.
    """
    try:
        return _utf8(_encoded(value)) + b"\n"
    except RecursionError as error:
        raise UserError(f"the row {value.get('id')} is nested too deeply to be written") from error


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")


def manifest_path(output: Path) -> Path:
    """Where the manifest of an output lies; it is written last, so its presence means complete."""
    return output.with_name(output.name + _MANIFEST)


def is_manifest(path: Path) -> bool:
    """Whether a file is the manifest of another."""
    return path.name.endswith(_MANIFEST)


@contextmanager
def replace(path: Path) -> Iterator[BinaryIO]:
    """A file to write beside `path` that takes its place, whole, when the block ends without an error."""
    place = _writable(path)
    beside = place.with_name(f".{place.name}.tmp")  # what a kill leaves is overwritten by the next run
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        manifest_path(path).unlink(missing_ok=True)
        beside.replace(place)
    except OSError as error:
        if error.filename is not None:
            raise
        raise UserError(f"cannot be written: {error.strerror}", where=path, hint=_NO_ROOM) from error
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(place.parent)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """A folder to fill beside `path` that takes its place, whole, when the block ends without an error.

    A folder cannot be renamed over another: between two renames a kill can leave the old one aside, as
    `.<name>.old`, but never a mixture. The next run puts it back and clears away what is half-made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside, aside = (path.with_name(f".{path.name}.{ending}") for ending in ("tmp", "old"))
    if aside.exists() and not path.exists():
        aside.rename(path)
    for left in (beside, aside):
        if left.exists():
            shutil.rmtree(left)
    beside.mkdir()
    try:
        yield beside
        manifest_path(path).unlink(missing_ok=True)
        if path.exists():
            path.rename(aside)
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    sync_folder(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _writable(path: Path) -> Path:
    """Where a file really lies, with its folder made; UserError where it is no place for a file."""
    path = path.resolve()  # a link stays a link, to a bigger disk perhaps
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise UserError("this is a folder, not a file", where=path)
    if path.exists() and not path.is_file():
        raise UserError("this is a device or a pipe, not a file", where=path)
    return path


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder durable; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Journal:
    """A file of rows that grows as answers come and survives a kill at any moment.

    Each row is one unbuffered write; a thread makes the file durable once a second. Opening repairs
    what a kill left: a torn last line is cut off (or completed where only the newline is missing).
    `ids` are the rows that are there, an IdSet. The manifest of the file goes away with the first append, for
    the file is no longer what the manifest speaks of.
    """

    def __init__(
        self, path: Path, *, inspect: Callable[[int, bytes], None] | None = None, known: bytes = b""
    ) -> None:
        """Open for appending.

        `inspect` sees the lines that are already there, with their numbers. Where `known` is given, it is
        what stands once in a line that need not be seen, and a block of such lines is passed over.
        """
        from mtgdm.row_ids import IdSet

        self.path = path
        self.ids = IdSet()
        self._inspect = inspect
        self._known = known
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._unsynced = False
        self._failure: UserError | None = None
        self._appended = False

    def __enter__(self) -> Self:
        _writable(self.path)
        if self.path.exists():
            self._repair_tail()
            self._scan()
        self._file = self.path.open("ab", buffering=0)
        self._syncer = threading.Thread(
            target=self._sync_regularly, name=f"fsync {self.path.name}", daemon=True
        )
        self._syncer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._syncer.join()
        try:
            self._sync()
        finally:
            self._file.close()

    def append(self, row: dict[str, Any]) -> None:
        """Write one row; its first key must be its `row_id`, which the next start reads without parsing."""
        if next(iter(row)) != "id":
            raise ValueError("the first key of a journal row is its id")
        if self._failure is not None:
            raise self._failure
        line = encode(row)
        with self._lock:
            if not self._appended:
                manifest_path(self.path).unlink(missing_ok=True)
                self._appended = True
            written = 0
            try:
                while written < len(line):
                    written += self._file.write(line[written:]) or 0
            except OSError as error:
                # Behind half a row another would be lost with it.
                self._failure = UserError(
                    f"cannot be written: {error.strerror}", where=self.path, hint=_NO_ROOM
                )
                raise
            self._unsynced = True
            self.ids.add(row["id"])

    def _repair_tail(self) -> None:
        with self.path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            end = size
            while end > 0:
                start = max(0, end - 65536)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    end = start + newline + 1
                    break
                end = start
            if end == size:
                return
            file.seek(end)
            tail = file.read()
            try:
                whole = isinstance(json.loads(tail.decode("utf-8")), dict)
            except (ValueError, RecursionError):
                whole = False
            if whole:
                file.write(b"\n")
            elif not tail.strip() or tail[:1] in (b"{", b"\0"):
                file.truncate(end)
            # Other text is no torn row: the file is another's, and reading it says so.

    def _scan(self) -> None:
        from mtgdm.row_ids import IdSet

        keys = bytearray()
        for block in read_blocks(self.path):
            keys += block.ids.tobytes()
            if self._known and block.data.count(self._known) == len(block):
                continue
            if self._inspect is not None:
                for number, line in block.lines():
                    self._inspect(number, line)
        self.ids = IdSet(keys)

    def _sync_regularly(self) -> None:
        while not self._closing.wait(FSYNC_INTERVAL_S):
            try:
                self._sync()
            except UserError:
                return  # kept: the next append raises it

    def _sync(self) -> None:
        with self._lock:
            if not self._unsynced:
                return
            self._unsynced = False
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._failure = UserError(
                f"cannot be made durable: {error.strerror}", where=self.path, hint=_NO_ROOM
            )
            raise self._failure from error


def _line_id(path: Path, number: int, line: bytes) -> str:
    """The id of a row from the first bytes of its line; lines of another form are parsed."""
    if ours := _OUR_FORM.fullmatch(line):
        return ours[1].decode("ascii")
    return _row(path, number, parse_object(path, number, line), Counter()).id


def put_in_order(path: Path, ids: IdList | Iterable[str]) -> None:
    """Rewrite a journal in the order of `ids`, atomically; rows of other ids keep their order at the end.

    Where an id stands on several lines the last one counts. A file already in order is left alone.
    """
    from mtgdm.row_ids import IdList, as_ids, lines_in_order

    keys = bytearray()
    for block in read_blocks(path):
        keys += block.ids.tobytes()
    lines = lines_in_order(as_ids(keys), ids if isinstance(ids, IdList) else IdList.of(ids))
    if lines is None:
        return
    starts = array("Q")
    for block in read_blocks(path):
        starts.extend((block.offset + block.spans[:, 0]).tolist())
    # The source is closed before the replacement takes its place: Windows renames over no open file.
    with replace(path) as target, path.open("rb") as source:
        for line in lines:
            source.seek(starts[line])
            target.write(source.readline().strip(_WHITE) + b"\n")
