"""What comes with mtgdm: profiles and sample data, in a wheel as in a checkout."""

from __future__ import annotations

from pathlib import Path

PREFIX = "shipped:"
"""A path setting that begins so names a file of the installed package, not one of the workspace."""

_PACKAGE = Path(__file__).resolve().parent


def shipped(name: str) -> Path:
    """Where a shipped file or folder (`configs`, `data/sample/spots.jsonl`) lies on this machine."""
    in_wheel = _PACKAGE / "_shipped" / name
    return in_wheel if in_wheel.exists() else _PACKAGE.parent / name
