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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from mtgdm.domain import BadRecord, Record
from mtgdm.errors import BadRow, UserError
from mtgdm.file_formats import HEAD_BYTES, refuse_other_formats, to_lines
from mtgdm.tourism.record import Detail, Facts, topic

EXAMPLE = '{"name":"故宫博物院","province":"北京市","text_zh":{"short_intro":"…"}}'

MAX_DEPTH = 64
"""Of nested details; more is a program gone wrong, not a collector's record."""

_READ_KEYS = frozenset(
    {"name", "province", "city", "lat", "lon", "geo", "text_zh"}
    | {"name_en", "level", "year_5a", "unesco", "types", "best_season"}
)
_NAME_KEYS = ("name", "title", "名称", "标题")
_DESCRIPTION_KEYS = {"desc", "description", "intro", "text", "content", "note", "简介", "介绍", "说明"}
_BOM = b"\xef\xbb\xbf"
_BECOMES = "spots.jsonl"


class _BadSpot(Exception):
    """Why a line is no spot, with a way out where there is one."""

    def __init__(self, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


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
                yield _record(_parse(line, path.name))
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


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


# Not strict: a raw tab or newline code inside a string is mess, not damage, and `clean` removes it.
_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse_constant)


def _record(spot: Mapping[str, Any]) -> Record:
    name = _name(spot)
    province = _text(spot, "province")
    lat, lon = _coordinates(spot)
    intro, details = _texts(spot)
    seasons = [detail["text"] for detail in details if topic(detail["label"]) == "season"]
    facts: Facts = {
        "name": name,
        "name_en": _optional_text(spot.get("name_en")),
        "province": province,
        "city": _text(spot, "city"),
        "lat": lat,
        "lon": lon,
        "level": _optional_text(spot.get("level")),
        "year_5a": _year(spot.get("year_5a")),
        "unesco": spot["unesco"] if isinstance(spot.get("unesco"), bool) else None,
        "types": _types(spot.get("types")),
        "best_season": _optional_text(spot.get("best_season")),
        "intro": intro,
        "details": details,
        "extra": _extra(spot),
    }
    if facts["best_season"] is None and seasons:
        facts["best_season"] = "；".join(seasons)
        facts["details"] = [detail for detail in details if topic(detail["label"]) != "season"]
    return Record(name=name, region=province, facts=dict(facts))


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


def _text(spot: Mapping[str, Any], key: str) -> str | None:
    value = spot.get(key)
    if value is not None and not isinstance(value, str):
        raise _BadSpot(f"'{key}' is {_kind(value)}, not text")
    return clean(value) or None if value is not None else None


def _optional_text(value: Any) -> str | None:
    return clean(value) or None if isinstance(value, str) else None


def _year(value: Any) -> int | None:
    if isinstance(value, str) and (found := re.fullmatch(r"\s*(\d{4})\s*年?\s*", value)):
        value = int(found[1])
    return value if isinstance(value, int) and not isinstance(value, bool) and 1900 <= value <= 2100 else None


def _types(value: Any) -> list[str]:
    if isinstance(value, str):
        value = re.split(r"[;；、,，/]", value)
    if not isinstance(value, list):
        return []
    return [word for item in value if isinstance(item, str) and (word := clean(item))]


def _coordinates(spot: Mapping[str, Any]) -> tuple[float | None, float | None]:
    geo = spot.get("geo")
    if geo is not None and not isinstance(geo, dict):
        raise _BadSpot(f"'geo' is {_kind(geo)}, not an object with lat and lon")
    inside = geo or {}
    lat, lon = (
        _number(key, spot.get(key) if _given(spot.get(key)) else inside.get(key)) for key in ("lat", "lon")
    )
    if lat is not None and not -90 <= lat <= 90:
        swapped = lon is not None and -90 <= lon <= 90 and -180 <= lat <= 180
        raise _BadSpot(
            f"'lat' {lat:g} is not between -90 and 90", "are lat and lon swapped?" if swapped else None
        )
    if lon is not None and not -180 <= lon <= 180:
        raise _BadSpot(f"'lon' {lon:g} is not between -180 and 180")
    if (lat is None) != (lon is None):
        raise _BadSpot("only one of 'lat' and 'lon' is given")
    return lat, lon


def _given(value: Any) -> bool:
    return value is not None and not (isinstance(value, str) and not value.strip())


def _number(key: str, value: Any) -> float | None:
    if not _given(value):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _BadSpot(f"'{key}' is {_kind(value)}, not a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _BadSpot(f"'{key}' {_shown(value)} is not a number") from None
    if not math.isfinite(number):
        raise _BadSpot(f"'{key}' {_shown(value)} is not a number")
    return number


def _texts(spot: Mapping[str, Any]) -> tuple[str | None, list[Detail]]:
    texts = spot.get("text_zh")
    if texts is None:
        return None, []
    if not isinstance(texts, dict):
        raise _BadSpot(f"'text_zh' is {_kind(texts)}, not an object with short_intro and details")
    return _text(texts, "short_intro"), list(_flat(texts.get("details"), ""))


def _flat(value: Any, label: str, depth: int = 1) -> Iterator[Detail]:
    """Nested details as labelled texts; the labels of the path are joined by a space."""
    if depth > MAX_DEPTH:
        raise _BadSpot(f"'details' is nested deeper than {MAX_DEPTH} levels")
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


def _extra(spot: Mapping[str, Any]) -> str | None:
    extra = {key: value for key, value in spot.items() if key not in _READ_KEYS}
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
