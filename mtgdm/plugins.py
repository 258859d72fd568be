"""Entry points of one group, loaded one by one: a broken plugin is an error to show, not a crash."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from mtgdm.errors import MtgdmError, SettingError, nearest


@dataclass(frozen=True)
class Plugin:
    """One entry point: the object it names, or why it could not be loaded."""

    name: str
    package: str
    version: str
    target: str
    value: Any = None
    error: str | None = None


class PluginError(MtgdmError):
    """A plugin that was asked for by name does not load."""


def find(group: str) -> dict[str, metadata.EntryPoint]:
    """The entry points of a group by name, ours first where two packages give the same name."""
    return survey(group)[0]


def survey(group: str) -> tuple[dict[str, metadata.EntryPoint], list[metadata.EntryPoint]]:
    """The entry points of a group by name, and those that are never reached, for another has their name."""
    every = {(point.name, package_of(point)): point for point in metadata.entry_points(group=group)}
    chosen: dict[str, metadata.EntryPoint] = {}
    shadowed: list[metadata.EntryPoint] = []
    for point in sorted(every.values(), key=lambda point: package_of(point)[0] != "mtgdm"):
        if chosen.setdefault(point.name, point) is not point:
            shadowed.append(point)
    return chosen, shadowed


def load(point: metadata.EntryPoint) -> Plugin:
    """Load one entry point.

    Whatever a stranger's module raises while it is imported is the plugin's error, not ours: this is
    the one place where any Exception is caught, and it is shown with its type and text.
    """
    package, version = package_of(point)
    try:
        value = point.load()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a stranger's module may raise anything
        return Plugin(point.name, package, version, point.value, error=f"{type(error).__name__}: {error}")
    return Plugin(point.name, package, version, point.value, value=value)


def named(group: str, name: str, kind: str) -> Any:
    """The object that one name of a group stands for; `kind` is what a user calls it."""
    points = find(group)
    if name not in points:
        raise SettingError(f"there is no {kind} '{name}'", hint=nearest(name, points))
    plugin = load(points[name])
    if plugin.error is not None:
        raise PluginError(f"the {kind} '{name}' of {plugin.package} does not load: {plugin.error}")
    return plugin.value


def package_of(point: metadata.EntryPoint) -> tuple[str, str]:
    """Name and version of the package an entry point comes from."""
    return _name_and_version(point.dist) if point.dist is not None else ("?", "?")


@cache
def _name_and_version(package: metadata.Distribution) -> tuple[str, str]:
    # Each look at a name parses the package's METADATA, its README included.
    return package.name, package.version
