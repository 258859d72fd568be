"""Provenance: what an output was made from. Written last, so its presence means complete."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mtgdm import __version__
from mtgdm.errors import UserError
from mtgdm.rows import manifest_path, replace

_WATCHED = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "tokenizers",
    "httpx",
    "pydantic",
    "plotly",
    "kaleido",
)


class FileState(BaseModel):
    """A file or folder as it was: sha256, size and time of the last change.

    A folder's sha256 is taken over the names and digests of its files; `checkpoint-*` folders, which
    come and go while training, are left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    path: str
    sha256: str
    bytes: int
    modified_ns: int


class SettingValue(BaseModel):
    """One setting and where it came from: `default`, `ollama-32b.yaml:9`, `MTGDM_TEACHER_URL`, `--url`."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    value: Any
    source: str


class Manifest(BaseModel):
    """Everything that led to one output."""

    model_config = ConfigDict(defer_build=True)  # a newer mtgdm may have written more

    stage: str
    output: FileState
    inputs: list[FileState]
    settings: dict[str, SettingValue]
    profile: str
    domain: str
    counts: dict[str, Any]
    summary: str
    versions: dict[str, str]
    started: datetime
    finished: datetime
    seconds: float


def write(manifest: Manifest, output: Path) -> None:
    """Put the manifest beside its output."""
    with replace(manifest_path(output)) as file:
        text = json.dumps(manifest.model_dump(mode="json"), ensure_ascii=False, indent=2)
        file.write(text.encode("utf-8", "backslashreplace") + b"\n")  # a path may hold bytes that are no text


def read(output: Path) -> Manifest | None:
    """The manifest of an output, or None where there is none that can be read."""
    path = manifest_path(output)
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def state(path: Path, workspace: Path, known: Iterable[FileState] = ()) -> FileState:
    """What a file or folder is now; the digest is taken from `known` where size and time have not changed."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError("a pipe or a device cannot be read twice: save it to a file first", where=path)
    name = relative(path, workspace)
    files = _files(path)
    stats = [file.stat() for file in files]
    size = sum(stat.st_size for stat in stats)
    modified_ns = max((stat.st_mtime_ns for stat in stats), default=0)
    for earlier in known:
        if (earlier.path, earlier.bytes, earlier.modified_ns) == (name, size, modified_ns):
            return earlier
    return FileState(path=name, sha256=_digest(path, files), bytes=size, modified_ns=modified_ns)


def relative(path: Path, workspace: Path) -> str:
    """The path as it is written into files: under the workspace where it lies there, with `/`."""
    return (path.relative_to(workspace) if path.is_relative_to(workspace) else path).as_posix()


def versions() -> dict[str, str]:
    """mtgdm, Python, the platform and the libraries that shape results, where installed."""
    found = {"mtgdm": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in _WATCHED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def without_password(value: Any) -> Any:
    """A setting without the name and the password that an address in it may carry."""
    if isinstance(value, list):
        return [without_password(one) for one in value]
    return re.sub(r"(?<=://)[^/@]*@", "", value) if isinstance(value, str) else value


def settings_digest(settings: Mapping[str, Any]) -> str:
    """One hash over settings, the same for the same values."""
    text = json.dumps(settings, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith("checkpoint-") for part in file.relative_to(path).parts)
    )


def _digest(path: Path, files: list[Path]) -> str:
    if files == [path]:
        return sha256_of(path)
    lines = "".join(f"{sha256_of(file)}  {file.relative_to(path).as_posix()}\n" for file in files)
    return hashlib.sha256(lines.encode("utf-8")).hexdigest()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
