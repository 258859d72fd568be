"""Joining the processes of one run; with one process, all of it does nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed

from mtgdm import processes
from mtgdm.errors import UserError
from mtgdm.student.base import Placement

PATIENCE = timedelta(hours=2)
"""How long a process waits for the others: the first may have a large model to fetch."""

T = TypeVar("T")


@contextmanager
def joined(placement: Placement) -> Iterator[None]:
    """Meet the other processes of the run, and part from them at the end.

    After an error they are not waited for: the launcher ends them with this one.
    """
    _refuse_half_a_launcher()
    if processes.count() == 1:
        yield
        return
    from accelerate import PartialState

    _refuse_scattered_checkpoints()
    state = PartialState(cpu=placement.on_cpu, timeout=PATIENCE)
    yield
    state.wait_for_everyone()
    torch.distributed.destroy_process_group()


def _refuse_half_a_launcher() -> None:
    """UserError where the environment speaks of several processes and does not say how they meet."""
    count = os.environ.get("WORLD_SIZE", "1")
    lacking = [
        name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    if count not in ("", "0", "1") and lacking:
        raise UserError(
            f"WORLD_SIZE is {count}, and {', '.join(lacking)} not set: no launcher started this process",
            hint="torchrun --nproc-per-node N -m mtgdm train, or unset WORLD_SIZE",
        )


def _refuse_scattered_checkpoints() -> None:
    """UserError where FSDP would leave each process's part of the adapter in a file of its own."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return
    kind = os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    if kind != "FULL_STATE_DICT":
        raise UserError(
            f"FSDP is set to save checkpoints as {kind}, from which no adapter can be taken",
            hint="fsdp_state_dict_type: FULL_STATE_DICT in the config of `accelerate launch`",
        )


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process of a machine goes through the block before its others do: it fetches what they then find."""
    if processes.count() == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState().local_main_process_first():
        yield


def wait() -> None:
    """Go on when every process has come here."""
    if processes.count() > 1:
        torch.distributed.barrier()


def from_first(value: T) -> T:
    """What the first process has, in all of them; it must be picklable."""
    if processes.count() == 1:
        return value
    shared = [value]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]
