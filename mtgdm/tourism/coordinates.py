"""Coordinates as collectors write them, read where there is one way to read them.

Named fields and pairs, numbers and text, decimal degrees and degrees, minutes and seconds, in Chinese and in
English. A pair whose order nobody says is read where only one order lies in China.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Axis = Literal["lat", "lon"]
Pair = tuple[float, float]
"""Latitude and longitude."""

_NAMES: dict[Axis, tuple[str, ...]] = {
    "lat": ("lat", "latitude", "纬度", "wgs84_lat", "gps_lat"),
    "lon": ("lon", "lng", "long", "longitude", "经度", "wgs84_lon", "wgs84_lng", "gps_lon", "gps_lng"),
}
_PLACES = ("geo", "coordinates", "coordinate", "coords", "coord", "gps", "坐标", "经纬度", "geometry")
_ORDERED: dict[str, tuple[Axis, Axis]] = {
    "latlng": ("lat", "lon"),
    "latlon": ("lat", "lon"),
    "lat_lng": ("lat", "lon"),
    "lat_lon": ("lat", "lon"),
    "lnglat": ("lon", "lat"),
    "lonlat": ("lon", "lat"),
    "lng_lat": ("lon", "lat"),
    "lon_lat": ("lon", "lat"),
}
_ADDRESSES = ("location", "position", "point", "地理位置", "位置")
"""Keys that hold coordinates in one file and an address in another: what cannot be read is no mistake."""

_SILENT = frozenset(
    ("", "-", "--", "/", "?", "无", "暂无", "未知", "不详", "null", "none", "n/a", "na", "undefined")
)
_CHINA: dict[Axis, tuple[float, float]] = {"lat": (3, 54), "lon": (73, 136)}
_WORLD: dict[Axis, float] = {"lat": 90, "lon": 180}
DIGITS = 6
"""To so many digits degrees with minutes are kept: a tenth of a metre."""

_MARKS = {"°": "º˚⁰度", "'": "′‵’‘´ʹ`分", '"': "″”“ʺ〞秒", "-": "−–"}
_PLAIN_MARKS = str.maketrans({mark: plain for plain, marks in _MARKS.items() for mark in marks})
_NUMBER = r"\d+(?:\.\d*)?(?:[eE][+-]?\d{1,3})?|\.\d+"
_BEFORE = r"(?:北纬|南纬|东经|西经|latitude|longitude|lat|lon|lng|[NSEW])"
_SIZE = (
    rf"(?P<sign>[+-])?\s*(?P<degrees>{_NUMBER})"
    r"(?:\s*°\s*(?:(?P<minutes>\d+(?:\.\d*)?)\s*(?:'(?!')\s*(?:(?P<seconds>\d+(?:\.\d*)?)\s*(?:\"|''))?)?)?)?"
)
# What stands before one angle cannot stand behind it too: it may be that of the next.
_ANGLE = re.compile(
    rf"(?P<before>{_BEFORE})?\s*[:：=]?\s*{_SIZE}(?(before)|(?:\s*(?P<after>[NSEW])(?![a-z]))?)",
    re.IGNORECASE,
)
LONGEST = 80
"""A longer text is no pair of coordinates."""
_BETWEEN = re.compile(r"[\s,，;；、/|()\[\]（）【】]*")
_AXES: dict[str, tuple[Axis, int]] = {
    "n": ("lat", 1), "s": ("lat", -1), "e": ("lon", 1), "w": ("lon", -1), "北纬": ("lat", 1), "南纬": ("lat", -1),
    "东经": ("lon", 1), "西经": ("lon", -1), "latitude": ("lat", 1),
    "longitude": ("lon", 1), "lat": ("lat", 1), "lon": ("lon", 1), "lng": ("lon", 1),
}  # fmt: skip


@dataclass(frozen=True)
class _Angle:
    degrees: float
    axis: Axis | None = None
    """What its own words say that it is: 北纬, E."""


@dataclass(frozen=True)
class Coordinates:
    """Where a spot lies, or why nobody can say; `keys` are those of the record that hold it."""

    pair: Pair | None = None
    problem: str | None = None
    keys: frozenset[str] = frozenset()


def read_coordinates(spot: Mapping[str, Any]) -> Coordinates:
    """The coordinates of a record, wherever they stand in it."""
    sources = list(_sources(spot))
    for source in sources:
        if (pair := source.pair()) is not None:
            return Coordinates(pair, keys=source.keys)
    told = [source for source in sources if source.certain]
    if not told:
        return Coordinates()
    return Coordinates(problem=told[0].problem(), keys=frozenset().union(*(one.keys for one in told)))


@dataclass(frozen=True)
class _Source:
    """One place in a record that may say where the spot lies."""

    keys: frozenset[str]
    lat: Any = None
    lon: Any = None
    both: Any = None
    """A pair in one value."""
    order: tuple[Axis, Axis] | None = None
    certain: bool = True
    """Whether these are meant to be coordinates."""

    def pair(self) -> Pair | None:
        """Latitude and longitude, or None where they cannot be read."""
        if _given(self.both):
            return _pair_in(self.both, self.order)
        if _given(self.lat) and _given(self.lon):
            return _named_pair(_angle(self.lat), _angle(self.lon))
        alone = self.lat if _given(self.lat) else self.lon
        return _pair_in(alone, None)

    def problem(self) -> str:
        """What is wrong with it."""
        if _given(self.both):
            name, value = min(self.keys), self.both
        elif _given(self.lat) != _given(self.lon):
            return "only one of latitude and longitude is given"
        else:
            unread = _angle(self.lat) is None or _angle(self.lon) is not None
            name, value = ("lat", self.lat) if unread else ("lon", self.lon)
            if _angle(value) is not None:
                name, value = "lat, lon", f"{self.lat}, {self.lon}"
        return f"'{name}' {_shown(value)} is no coordinate"


def _sources(spot: Mapping[str, Any]) -> Iterator[_Source]:
    """Named fields first, then the keys that hold a pair, then one field from here and one from there."""
    top = _named(spot, ())
    if top is not None:
        yield top
    inner: list[_Source] = []
    written = {str(key).lower(): str(key) for key in spot}
    for name in (*_PLACES, *_ORDERED, *_ADDRESSES):
        key = written.get(name, name)
        value = spot.get(key)
        if not _given(value):
            continue
        certain = name not in _ADDRESSES
        found = _named(value, (key,), certain=certain) if isinstance(value, Mapping) else None
        if found is not None:
            inner.append(found)
        elif isinstance(value, Mapping):
            order: tuple[Axis, Axis] | None = ("lon", "lat") if value.get("type") == "Point" else None
            both = value.get("coordinates")
            if _given(both):
                inner.append(_Source(frozenset((key,)), both=both, order=order, certain=certain))
        else:
            inner.append(_Source(frozenset((key,)), both=value, order=_ORDERED.get(name), certain=certain))
    yield from inner
    if top is not None:
        for one in inner:
            lat, lon = (top.lat if _given(top.lat) else one.lat), (top.lon if _given(top.lon) else one.lon)
            if _given(lat) and _given(lon):
                yield _Source(top.keys | one.keys, lat, lon)


def _named(values: Mapping[str, Any], where: tuple[str, ...], *, certain: bool = True) -> _Source | None:
    found: dict[Axis, Any] = {}
    keys: set[str] = set(where)
    lowered = {str(key).lower(): (key, value) for key, value in values.items()}
    for axis, names in _NAMES.items():
        for name in names:
            key, value = lowered.get(name, (name, None))
            if _given(value):
                found[axis] = value
                keys |= set() if where else {key}
                break
    if not found:
        return None
    return _Source(frozenset(keys), found.get("lat"), found.get("lon"), certain=certain)


def _given(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() not in _SILENT
    return value is not None and value != [] and value != {}


def _named_pair(lat: _Angle | None, lon: _Angle | None) -> Pair | None:
    if lat is None or lon is None:
        return None
    if lat.axis == "lon" and lon.axis == "lat":
        lat, lon = lon, lat
    elif lat.axis == "lon" or lon.axis == "lat":
        return None
    if _inside(lat.degrees, lon.degrees):
        return lat.degrees, lon.degrees
    swapped = lon.degrees, lat.degrees
    # No latitude is larger than 90: they can only be swapped.
    return swapped if abs(lat.degrees) > _WORLD["lat"] and _in_china(*swapped) else None


def _pair_in(value: Any, order: tuple[Axis, Axis] | None) -> Pair | None:
    angles = _angles(value)
    if len(angles) != 2:
        return None
    first, second = angles
    if first.axis is not None or second.axis is not None:
        order = ("lat", "lon") if first.axis == "lat" or second.axis == "lon" else ("lon", "lat")
        if first.axis == second.axis:
            return None
    straight, turned = (first.degrees, second.degrees), (second.degrees, first.degrees)
    if order is not None:
        pair = straight if order[0] == "lat" else turned
        return pair if _inside(*pair) else None
    for inside in (_in_china, _inside):
        possible = [pair for pair in (straight, turned) if inside(*pair)]
        if len(possible) == 1 or (possible and straight == turned):
            return possible[0]
        if possible:
            return None
    return None


def _inside(lat: float, lon: float) -> bool:
    # 0, 0 lies in the Atlantic: it is what a program writes that knows no coordinates.
    return abs(lat) <= _WORLD["lat"] and abs(lon) <= _WORLD["lon"] and (lat, lon) != (0, 0)


def _in_china(lat: float, lon: float) -> bool:
    return _CHINA["lat"][0] <= lat <= _CHINA["lat"][1] and _CHINA["lon"][0] <= lon <= _CHINA["lon"][1]


def _angles(value: Any) -> list[_Angle]:
    """The two angles of a pair: a list of two, or a text with two and nothing else but marks between them."""
    if isinstance(value, list):
        angles = [_angle(one) for one in value[:3]]
        return [one for one in angles[:2] if one is not None] if len(value) in (2, 3) else []
    if not isinstance(value, str) or len(value) > LONGEST:
        return []
    text = _plain(value)
    text = re.sub(r"^point\s*(?=\()", "", text, flags=re.IGNORECASE)
    found: list[_Angle] = []
    place = 0
    for match in _ANGLE.finditer(text):
        if not _BETWEEN.fullmatch(text, place, match.start()):
            return []
        angle = _of(match)
        if angle is None:
            return []
        found.append(angle)
        place = match.end()
    return found if _BETWEEN.fullmatch(text, place) else []


def _angle(value: Any) -> _Angle | None:
    """One angle in degrees, or None where it cannot be read as one."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return _Angle(float(value)) if abs(value) <= 360 and math.isfinite(value) else None
    if not isinstance(value, str) or len(value) > LONGEST:
        return None
    match = _ANGLE.fullmatch(_plain(value))
    return _of(match) if match else None


def _plain(text: str) -> str:
    named = text.replace("纬度", "lat").replace("经度", "lon")
    return unicodedata.normalize("NFKC", named.translate(_PLAIN_MARKS)).translate(_PLAIN_MARKS).strip()


def _of(match: re.Match[str]) -> _Angle | None:
    degrees = float(match["degrees"])
    minutes, seconds = (float(match[part] or 0) for part in ("minutes", "seconds"))
    if degrees > 360 or minutes >= 60 or seconds >= 60:
        return None
    if match["minutes"]:
        degrees = round(degrees + minutes / 60 + seconds / 3600, DIGITS)
    axis, sign = None, -1 if match["sign"] == "-" else 1
    for word in (match["before"], match["after"]):
        if word:
            named, direction = _AXES[word.lower()]
            if axis not in (None, named):
                return None
            axis, sign = named, sign * direction
    return _Angle(sign * degrees, axis)


def _shown(value: Any) -> str:
    shown = repr(value) if isinstance(value, str) else str(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
