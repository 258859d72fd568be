"""A full disk is one line, whichever library met it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from mtgdm.errors import UserError
from mtgdm.export.disk import full_as_os_error, told_if_full

FULL = {
    "Python": OSError(errno.ENOSPC, "No space left on device"),
    "tokenizers": Exception("No space left on device (os error 28)"),
    "tokenizers on Windows": Exception("There is not enough space on the disk. (os error 112)"),
    "numpy": OSError("4096 requested and 1024 written"),
}


@pytest.mark.parametrize("library", FULL)
def test_a_full_disk_is_told_with_the_need(library: str, tmp_path: Path) -> None:
    with (
        pytest.raises(
            UserError, match=r"guide: the disk is full: the package takes about 15\.0 GB .* are free"
        ),
        told_if_full(tmp_path / "guide", 15e9),
        full_as_os_error(tmp_path / "guide" / "file"),
    ):
        raise FULL[library]


@pytest.mark.parametrize("error", [Exception("tokenizers is at a loss"), OSError(errno.EIO, "bad disk")])
def test_another_error_stays_what_it_is(error: Exception, tmp_path: Path) -> None:
    with (
        pytest.raises(type(error)) as caught,
        told_if_full(tmp_path, 15e9),
        full_as_os_error(tmp_path / "file"),
    ):
        raise error
    assert caught.value is error
