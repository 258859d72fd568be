"""Installed stages: ours and strangers', through one door."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from mtgdm.errors import SettingError, nearest
from mtgdm.plugins import Plugin, load, package_of, survey
from mtgdm.profiles import PIPELINE
from mtgdm.stage import Stage

GROUP = "mtgdm.stages"
RESERVED = frozenset({"all", "status", "plan", "doctor", "stages", "profiles", "config"})
"""Commands of mtgdm itself, which no stage may be called."""


@dataclass
class Registry:
    """The stages that load, in the order of the pipeline, and the ones that do not, with the reason."""

    stages: dict[str, Stage[Any]] = field(default_factory=dict)
    plugins: dict[str, Plugin] = field(default_factory=dict)
    broken: list[Plugin] = field(default_factory=list)

    @property
    def sections(self) -> list[str]:
        """The keys of the stages' sections in a profile."""
        return [stage.section for stage in self.stages.values()] + [
            plugin.name.replace("-", "_") for plugin in self.broken
        ]

    def stage(self, name: str) -> Stage[Any]:
        """The stage of a name; SettingError with the nearest one."""
        key = name.replace("_", "-")
        if key not in self.stages:
            for plugin in self.broken:
                if plugin.name == key:
                    raise SettingError(f"the stage '{key}' of {plugin.package} does not load: {plugin.error}")
            raise SettingError(f"there is no stage '{name}'", hint=nearest(key, self.stages))
        return self.stages[key]


def discover() -> Registry:
    """Load every stage that an installed package registers."""
    registry = Registry()
    points, shadowed = survey(GROUP)
    for name in sorted(points, key=_place):
        plugin = load(points[name])
        problem = plugin.error or _problem(name, plugin.value)
        if problem is not None:
            registry.broken.append(Plugin(name, plugin.package, plugin.version, plugin.target, error=problem))
            continue
        stage: Stage[Any] = plugin.value
        stage.name, stage.package = name, plugin.package
        registry.stages[name] = stage
        registry.plugins[name] = plugin
    for point in shadowed:
        package, version = package_of(point)
        taken = f"another package, {package_of(points[point.name])[0]}, has a stage of this name"
        registry.broken.append(Plugin(point.name, package, version, point.value, error=taken))
    return registry


def _place(name: str) -> tuple[int, str]:
    return (PIPELINE.index(name) if name in PIPELINE else len(PIPELINE), name)


def _problem(name: str, value: Any) -> str | None:
    if not isinstance(value, Stage):
        return f"the entry point names {type(value).__name__}, not a function under @stage"
    if name in RESERVED:
        return f"'{name}' is a command of mtgdm itself"
    if "profile" in value.config.model_fields or "verbose" in value.config.model_fields:
        return "a setting may not be called `profile` or `verbose`: every command has these flags"
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        return "a stage's name is made of a-z, 0-9 and -"
    return None
