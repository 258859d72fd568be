"""Several processes of one run, as torchrun and `accelerate launch` start them; the first speaks and writes for all.

They say so in the environment: RANK, LOCAL_RANK and WORLD_SIZE. Light: nothing here joins the processes.
"""

from __future__ import annotations

import os


def count() -> int:
    """How many processes share the run; 1 where nobody started more."""
    return _number("WORLD_SIZE", 1) if "LOCAL_RANK" in os.environ else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return _number("RANK", 0) if count() > 1 else 0


def local_rank() -> int:
    """Which of those on this machine this is, from 0: the number of its GPU."""
    return _number("LOCAL_RANK", 0) if count() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes, prints and reports."""
    return rank() == 0


def _number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        return default
