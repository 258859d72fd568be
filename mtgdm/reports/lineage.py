"""What a result was made from: the manifests beside it and beside its inputs, back to the records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mtgdm import manifest
from mtgdm.manifest import Manifest
from mtgdm.reports import markdown

SHORT = 12
"""So many digits of a sha256 tell files apart."""


def trace(output: Path, workspace: Path) -> list[Manifest]:
    """The manifests of an output, of its inputs, and of theirs, the latest first; what has none ends the way."""
    found: dict[Path, Manifest] = {}
    waiting = [output]
    while waiting:
        path = waiting.pop(0)
        made = None if path in found else manifest.read(path)
        if made is not None:
            found[path] = made
            waiting += [workspace / state.path for state in made.inputs]
    return sorted(found.values(), key=lambda made: made.started.timestamp(), reverse=True)


def changed(manifests: Iterable[Manifest]) -> set[tuple[str, str]]:
    """Inputs, as (path, sha256), that were made anew after they were read: what is there now is another."""
    manifests = list(manifests)
    now = {one.output.path: one.output.sha256 for one in manifests}
    read = {(state.path, state.sha256) for one in manifests for state in one.inputs}
    return {(path, digest) for path, digest in read if now.get(path, digest) != digest}


def chosen_settings(made: Manifest) -> Mapping[str, manifest.SettingValue]:
    """The settings of a run that somebody chose, those at their default left out."""
    return {key: setting for key, setting in made.settings.items() if setting.source != "default"}


def in_markdown(manifests: Sequence[Manifest]) -> list[str]:
    """The same as a section of Markdown; nothing where there is no manifest."""
    if not manifests:
        return []
    rows = [
        (
            markdown.escape(one.stage),
            markdown.escape(one.profile),
            f"{one.started:%Y-%m-%d %H:%M}",
            "<br>".join(f"{markdown.code(state.path)} {state.sha256[:SHORT]}" for state in one.inputs),
            ", ".join(
                markdown.code(f"{key}={setting.value}") for key, setting in chosen_settings(one).items()
            ),
        )
        for one in manifests
    ]
    columns = ["stage", "profile", "begun", "made from (sha256)", "settings chosen"]
    return ["## What it was made from", "", *markdown.table(columns, rows), ""]
