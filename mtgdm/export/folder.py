"""A package on disk: its checksums, what it was made from, whether it is still whole, and what its end would lose."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtgdm.errors import UserError
from mtgdm.manifest import sha256_of

CARD = "README.md"
CHECKSUMS = "SHA256SUMS"
PROVENANCE = "provenance.json"
LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")
"""What file managers leave in every folder that is looked at."""
_ELSEWHERE = "another --name or --out, or move it away"


def write_provenance(folder: Path, about: Mapping[str, Any]) -> None:
    """What the package was made from and how it was proved, for those who have it without its workspace."""
    text = json.dumps(about, ensure_ascii=False, indent=2) + "\n"
    (folder / PROVENANCE).write_text(text, encoding="utf-8", newline="\n")


def write_checksums(folder: Path) -> None:
    """The SHA-256 of every file, as `sha256sum -c` takes them; written last."""
    lines = [f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in files_of(folder)]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8", newline="\n")


def checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file by its name in the package, as they were written."""
    lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


@dataclass(frozen=True)
class There:
    """A package that lies in a folder: its provenance, and how its files differ from those that were written."""

    about: dict[str, Any]
    files: frozenset[str]
    missing: frozenset[str]
    changed: frozenset[str]
    added: frozenset[str]

    @property
    def by_hand(self) -> frozenset[str]:
        """What somebody wrote into it and no run can make anew: an edited card, files of their own."""
        return self.added | (self.changed & {CARD})

    @property
    def is_usable(self) -> bool:
        """Whether everything that was made is there as it was made, but for the card, which people edit."""
        return not self.missing and self.changed <= {CARD}

    def lost_to(self, kept: Collection[str], checkpoint: str) -> list[str]:
        """What would be gone with a package of `checkpoint` in its place that has the folders and files `kept`."""
        made_of = self.about.get("checkpoint", checkpoint)
        told = [f"the package of {made_of}"] if made_of != checkpoint else []
        written = self.files - self.changed - self.added
        gone = {_top(name) for name in written if _top(name).rstrip("/") not in kept}
        told += [f"{name} (not asked for now)" for name in sorted(gone)]
        told += [f"{name} (changed since it was made)" for name in sorted(self.changed)]
        return told + [f"{name} (added since it was made)" for name in sorted(self.added)]


def look(folder: Path) -> There | None:
    """The package that lies in a folder; None for no folder or an empty one.

    UserError where something else lies there, which nobody meant to be replaced.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise UserError("this is a file, and a package is a folder", where=folder, hint=_ELSEWHERE)
    there = frozenset(path.relative_to(folder).as_posix() for path in files_of(folder))
    if not there and not any(folder.iterdir()):
        return None
    try:
        about = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        about = None
    if not isinstance(about, dict) or not {"student", "fingerprint"} <= about.keys():
        raise UserError(
            f"this folder is not empty and no package of mtgdm's ({PROVENANCE} is missing): it is left as it is",
            where=folder,
            hint=_ELSEWHERE,
        )
    known = checksums(folder) if (folder / CHECKSUMS).is_file() else {}
    changed = frozenset(name for name in there & known.keys() if sha256_of(folder / name) != known[name])
    expected = {*known, CHECKSUMS}
    return There(about, there, frozenset(expected - there), changed, there - expected)


def in_words(size: int) -> str:
    """A size for readers: `0.4 kB`, `3.1 GB`."""
    for unit, of in (("GB", 1e9), ("MB", 1e6)):
        if size >= of:
            return f"{size / of:,.1f} {unit}"
    return f"{size / 1e3:,.1f} kB"


def size_of(folder: Path) -> int:
    """Bytes of all its files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def files_of(folder: Path) -> list[Path]:
    """All files of a package, but for what file managers leave."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in LITTER)


def _top(name: str) -> str:
    """A file of the package itself, or the folder in it that a file belongs to, as `adapter/`."""
    top, slash, _ = name.partition("/")
    return top + slash
