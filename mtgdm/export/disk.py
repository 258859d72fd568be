"""A full disk, whoever met it first, told as one line: what the package takes and what is free."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtgdm.errors import UserError
from mtgdm.export.folder import in_words

_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_BY_OTHER_NAMES = re.compile(r"\(os error (28|112|122)\)|^\d+ requested and \d+ written$")
"""What tokenizers raises as a bare Exception (112 on Windows), and numpy as an OSError without a number."""
_NEARLY_NOTHING = 2**20


@contextmanager
def told_if_full(out: Path, room: float) -> Iterator[None]:
    """UserError where the disk of `out` fills up inside the block, with the bytes that were reckoned for the whole."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(
            f"the disk is full: the package takes about {in_words(round(room))} while it is made, and "
            f"{in_words(free(out))} are free",
            where=out,
            hint="make room, write elsewhere with --out, or make less: --formats gguf, one --quantize",
        ) from error


@contextmanager
def full_as_os_error(path: Path) -> Iterator[None]:
    """The OSError of a full disk in place of what some libraries make of it."""
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) is not None or not _BY_OTHER_NAMES.search(str(error)):
            raise
        raise no_space(path) from error


def is_full(path: Path) -> bool:
    """Whether a disk has no room for anything, which is what a library's silence about a failed write can mean."""
    return free(path) < _NEARLY_NOTHING


def no_space(path: Path) -> OSError:
    """As Python itself would raise it for that file."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def free(path: Path) -> int:
    """Bytes free on the disk where a file or folder lies or will lie."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
