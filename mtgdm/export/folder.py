"""A package on disk: its checksums, what it was made from, and whether it is still whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHECKSUMS = "SHA256SUMS"
PROVENANCE = "provenance.json"


def write_provenance(folder: Path, about: Mapping[str, Any]) -> None:
    """What the package was made from and how it was proved, for those who have it without its workspace."""
    text = json.dumps(about, ensure_ascii=False, indent=2) + "\n"
    (folder / PROVENANCE).write_text(text, encoding="utf-8", newline="\n")


def write_checksums(folder: Path) -> None:
    """The SHA-256 of every file, as `sha256sum -c` takes them; written last."""
    lines = [
        f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8", newline="\n")


def checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file by its name in the package, as they were written."""
    lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def provenance(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """That of a package which was made from the same, and of which no file is missing or another; else None."""
    try:
        about: dict[str, Any] = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        if about.get("fingerprint") != fingerprint:
            return None
        known = checksums(folder)
        whole = all(_sha256(folder / name) == digest for name, digest in known.items())
    except (OSError, ValueError):
        return None
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return about if whole and there == {*known, CHECKSUMS} else None


def in_words(size: int) -> str:
    """A size for readers: `0.4 kB`, `3.1 GB`."""
    for unit, of in (("GB", 1e9), ("MB", 1e6)):
        if size >= of:
            return f"{size / of:,.1f} {unit}"
    return f"{size / 1e3:,.1f} kB"


def size_of(folder: Path) -> int:
    """Bytes of all its files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
