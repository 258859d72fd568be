"""Reading the collector's files: one JSON object a line, as messy as the web it came from.

Lines end at the byte b"\\n" alone: U+2028 and its like may stand inside a string. A line is never
held longer than it takes to read it, so the memory does not grow with the file.
"""

from __future__ import annotations

import html
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mtgdm.domain import BadRecord, Record
from mtgdm.errors import BadRow, UserError
from mtgdm.file_formats import HEAD_BYTES, refuse_other_formats, to_lines
from mtgdm.tourism.coordinates import read_coordinates
from mtgdm.tourism.record import Detail, Facts, topic

EXAMPLE = '{"name":"故宫博物院","province":"北京市","text_zh":{"short_intro":"…"}}'

MAX_DEPTH = 64
"""Of nested details; more is a program gone wrong, not a collector's record."""

LONGEST_NUMBER = 4000
"""Digits; a longer number is kept as text."""

_READ_KEYS = frozenset(
    {"name", "province", "city", "lat", "lon", "geo", "text_zh"}
    | {"name_en", "level", "year_5a", "unesco", "types", "best_season"}
)
_NAME_KEYS = ("name", "title", "名称", "标题")
_DESCRIPTION_KEYS = {"desc", "description", "intro", "text", "content", "note", "简介", "介绍", "说明"}
_WORD_KEYS = ("name", "text", "zh", "content", "value", "名称", "title")
_SENTENCE_END = re.compile("[。！？.!?…][”’」』）)]*$")
_BOM = b"\xef\xbb\xbf"
_BECOMES = "spots.jsonl"


class _BadSpot(Exception):
    """Why a line is no spot, with a way out where there is one."""

    def __init__(self, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


class _TooDeepError(ValueError):
    """Details that no collector has written."""


def read(path: Path, on_bad: BadRecord) -> Iterator[Record]:
    """The spots of a file in its order; a bad line goes to `on_bad`, a bad file raises UserError."""
    if path.is_dir():
        raise UserError(
            "is a folder, not a file of spots",
            where=path,
            hint=f"name the file, for example {path / 'spots.jsonl'}",
        )
    if not path.exists():
        raise UserError(
            "no such file",
            where=path,
            hint="--spots names the collector's file of spots, one JSON object a line",
        )
    try:
        stream = path.open("rb")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=path) from error
    with stream:
        refuse_other_formats(path, stream.peek(HEAD_BYTES)[:HEAD_BYTES], _BECOMES)
        seen = False
        for number, line in enumerate(stream, start=1):
            line = line.removeprefix(_BOM)  # on any line: files are joined with cat
            if not line.strip():
                continue
            seen = True
            try:
                spot = _Spot(_parse(line, path.name))
                unread = tuple(BadRow(path, number, reason) for reason in spot.unread)
                yield Record(spot.name, spot.facts["province"], dict(spot.facts), unread)
            except _BadSpot as bad:
                on_bad(BadRow(path, number, bad.reason, hint=bad.hint))
            except RecursionError:
                on_bad(BadRow(path, number, "nested too deep to be read"))
    if not seen:
        raise UserError("holds no records", where=path, hint=f"each line is one spot: {EXAMPLE}")


def _parse(line: bytes, file_name: str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = (
            "save the file as UTF-8"
            if b"\x00" not in line
            else "is this a text file? spots are UTF-8 JSON lines"
        )
        raise _BadSpot(f"not UTF-8 at byte {error.start + 1}", hint) from None
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated"):
            raise _BadSpot(f"the line is cut short: {error.msg} at character {error.pos + 1}") from None
        bare = "lines end in a bare carriage return; end them in \\n" if "\r{" in text else None
        raise _BadSpot(f"not JSON: {error.msg} at character {error.pos + 1}", bare) from None
    except ValueError as error:
        raise _BadSpot(f"not JSON: {str(error).split(':')[0]}") from None
    if isinstance(value, list):
        raise _BadSpot("a JSON array, not an object", to_lines(file_name, array=True, becomes=_BECOMES))
    if not isinstance(value, dict):
        raise _BadSpot(f"{_kind(value)}, not an object", f"each line is one spot: {EXAMPLE}")
    return value


def _whole(digits: str) -> int | str:
    # Python refuses more than 4,300 digits; no number of a spot has them.
    return int(digits) if len(digits) <= LONGEST_NUMBER else digits


def _finite(digits: str) -> float | str:
    number = float(digits)
    return number if math.isfinite(number) else digits


# Not strict: a raw tab or newline code inside a string is mess, not damage, and `clean` removes it. NaN is what
# many programs write for a number that they do not know.
_DECODER = json.JSONDecoder(
    strict=False, parse_constant=lambda name: None, parse_int=_whole, parse_float=_finite
)


_Value = TypeVar("_Value")


class _Spot:
    """One record: its name, its facts, and the optional fields that could not be read."""

    def __init__(self, spot: Mapping[str, Any]) -> None:
        self._spot = spot
        self.unread: list[str] = []
        self.name = _name(spot)
        self.facts = self._facts()

    def _facts(self) -> Facts:
        spot = self._spot
        coordinates = read_coordinates(spot)
        if coordinates.problem is not None:
            self.unread.append(coordinates.problem)
        lat, lon = coordinates.pair or (None, None)
        intro, details = self._texts()
        seasons = [detail["text"] for detail in details if topic(detail["label"]) == "season"]
        facts: Facts = {
            "name": self.name,
            "name_en": self._words("name_en"),
            "province": self._words("province"),
            "city": self._words("city"),
            "lat": lat,
            "lon": lon,
            "level": self._words("level"),
            "year_5a": self._read("year_5a", _year),
            "unesco": self._read("unesco", _yes_or_no),
            "types": self._read("types", _types) or [],
            "best_season": self._words("best_season"),
            "intro": intro,
            "details": details,
            "extra": _extra(spot, coordinates.keys if coordinates.pair else frozenset()),
        }
        if facts["best_season"] is None and seasons:
            facts["best_season"] = "；".join(seasons)
            facts["details"] = [detail for detail in details if topic(detail["label"]) != "season"]
        return facts

    def _words(self, key: str, values: Mapping[str, Any] | None = None) -> str | None:
        return self._read(key, _words, values)

    def _read(
        self, key: str, read: Callable[[Any], _Value | None], values: Mapping[str, Any] | None = None
    ) -> _Value | None:
        """An optional field; what is there and cannot be read is noted and left out."""
        value = (self._spot if values is None else values).get(key)
        if value is None or value in ("", [], {}):
            return None
        found = read(value)
        if found is None and not (isinstance(value, str) and not clean(value)):
            self.unread.append(f"'{key}' is {_kind(value)} that cannot be read: {_shown(value)}")
        return found

    def _texts(self) -> tuple[str | None, list[Detail]]:
        texts = self._spot.get("text_zh")
        if not isinstance(texts, Mapping):
            return self._words("text_zh"), []
        try:
            details = list(_flat(texts.get("details"), ""))
        except _TooDeepError as deep:
            self.unread.append(str(deep))
            details = []
        return self._words("short_intro", texts), details


def _name(spot: Mapping[str, Any]) -> str:
    if "name" not in spot:
        raise _BadSpot("no key 'name'")
    value = spot["name"]
    if not isinstance(value, str):
        raise _BadSpot(f"'name' is {_kind(value)}, not text")
    name = clean(value)
    if not name:
        raise _BadSpot("'name' is blank")
    return name


def _words(value: Any) -> str | None:
    """A text, the texts of a list as one, or the one text of an object that carries its words."""
    if isinstance(value, Mapping):
        value = next((value[key] for key in _WORD_KEYS if isinstance(value.get(key), str)), None)
    if isinstance(value, list):
        if not all(isinstance(one, str) for one in value):
            return None
        texts = [text for one in value if (text := clean(one))]
        # Sentences follow one another; names are listed.
        return ("" if all(_SENTENCE_END.search(text) for text in texts) else "、").join(texts) or None
    return clean(value) or None if isinstance(value, str) else None


def _year(value: Any) -> int | None:
    if isinstance(value, str) and (found := re.fullmatch(r"\s*(\d{4})\s*年?\s*", value)):
        value = int(found[1])
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 1900 <= value <= 2100 else None


def _yes_or_no(value: Any) -> bool | None:
    words = {
        "true": True,
        "yes": True,
        "是": True,
        "1": True,
        "false": False,
        "no": False,
        "否": False,
        "0": False,
    }
    return value if isinstance(value, bool) else words.get(str(value).strip().lower())


def _types(value: Any) -> list[str] | None:
    if isinstance(value, str):
        value = re.split(r"[;；、,，/]", value)
    if not isinstance(value, list):
        return None
    return [word for item in value if isinstance(item, str) and (word := clean(item))]


def _flat(value: Any, label: str, depth: int = 1) -> Iterator[Detail]:
    """Nested details as labelled texts; the labels of the path are joined by a space."""
    if depth > MAX_DEPTH:
        raise _TooDeepError(f"'details' is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{label} {clean(key)}".strip(), depth + 1)
    elif isinstance(value, list):
        for inner in value:
            flat = _named if isinstance(inner, dict) else _flat
            yield from flat(inner, label, depth + 1)
    elif value is not None:
        text = clean(value) if isinstance(value, str) else _scalar(value)
        if text:
            yield {"label": label or "详情", "text": text}


def _named(item: Mapping[str, Any], label: str, depth: int) -> Iterator[Detail]:
    """An item of a list of objects: its name joins the label, its description needs none of its own."""
    key = next((key for key in _NAME_KEYS if isinstance(item.get(key), str) and clean(item[key])), None)
    if key is None:
        yield from _flat(item, label, depth)
        return
    rest = {inner_key: value for inner_key, value in item.items() if inner_key != key}
    described = False
    for inner_key, value in rest.items():
        inner_label = "" if inner_key.lower() in _DESCRIPTION_KEYS else clean(inner_key)
        for detail in _flat(value, f"{label} {clean(item[key])} {inner_label}".strip(), depth + 1):
            described = True
            yield detail
    if not described:
        yield {"label": label or "详情", "text": clean(item[key])}


def _scalar(value: float | bool) -> str:
    if isinstance(value, bool):
        return "是" if value else "否"
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def _extra(spot: Mapping[str, Any], read: frozenset[str]) -> str | None:
    extra = {key: value for key, value in spot.items() if key not in _READ_KEYS | read}
    texts = spot.get("text_zh")
    if isinstance(texts, dict) and (
        more := {k: v for k, v in texts.items() if k not in ("short_intro", "details")}
    ):
        extra["text_zh"] = more
    if not extra:
        return None
    return _without_surrogates(json.dumps(extra, ensure_ascii=False, separators=(",", ":")))


_TAG = re.compile(r"</?[a-zA-Z][a-zA-Z0-9]*(?:\s[^<>]*)?/?>|<!--.*?-->", re.DOTALL)
_BREAKING_TAG = re.compile(r"</?(?:br|p|div|li|ul|ol|tr|td|h[1-6])\b[^<>]*>", re.IGNORECASE)
_HIDDEN = re.compile(r"<(script|style)\b[^<>]*>.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_SPACE = re.compile("[ \t\n\r\f\v\x85\xa0\u3000]+")
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\u200b\u2060\u00ad]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def clean(text: str) -> str:
    """Text as a reader sees it: entities and tags resolved, control characters gone, NFC, one line.

    U+2028 and U+2029 stay; a lone surrogate becomes U+FFFD, because UTF-8 cannot hold it.
    """
    if "&" in text:
        text = html.unescape(html.unescape(text))  # twice: collectors escape what was escaped already
    if "<" in text:
        text = _TAG.sub("", _BREAKING_TAG.sub(" ", _HIDDEN.sub("", text)))
    text = _INVISIBLE.sub("", _SPACE.sub(" ", text))
    return unicodedata.normalize("NFC", _without_surrogates(text)).strip()


def _without_surrogates(text: str) -> str:
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number"}
    return names[type(value)]


def _shown(value: Any) -> str:
    shown = repr(value) if isinstance(value, str) else str(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
