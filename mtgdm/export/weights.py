"""The tensors of a model folder one at a time, and shards written as they come: nothing holds a whole model."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from mtgdm.errors import UserError

SHARD_BYTES = 4 * 2**30
"""The size of a shard; a larger tensor has one of its own."""

INDEX = "model.safetensors.index.json"

_SINGLE = "model.safetensors"
_MADE_ONCE = "make safetensors of them once: from_pretrained(..., dtype='auto').save_pretrained(FOLDER)"
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def ignore(_: int) -> None:
    """Progress that nobody looks at."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: F32, F16, BF16, ..."""

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)


class Weights:
    """The tensors of a folder's safetensors files, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: tuple[Path, Any] | None = None

    @cached_property
    def stored(self) -> dict[str, Stored]:
        """Every tensor in the order in which the files hold them; UserError where they are no safetensors."""
        found: dict[str, Stored] = {}
        for path in self._files():
            for name, about in _header(path).items():
                found[name] = Stored(path, tuple(about["shape"]), about["dtype"])
        return found

    @property
    def main_dtype(self) -> torch.dtype | None:
        """The dtype that most bytes of the weights are in; None where they are in none that a merge writes."""
        taken: Counter[torch.dtype] = Counter()
        for stored in self.stored.values():
            if is_float(stored.dtype):
                taken[_DTYPES[stored.dtype]] += stored.numbers * width(stored.dtype)
        return max(taken, key=lambda dtype: taken[dtype], default=None)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as it is stored."""
        tensor: torch.Tensor = self._file(name).get_tensor(name)
        return tensor

    def _file(self, name: str) -> Any:
        path = self.stored[name].file
        if self._open is None or self._open[0] != path:
            # One file at a time: what is mapped of the others would count as memory in use.
            self._open = (path, safe_open(path, "pt"))
        return self._open[1]

    def _files(self) -> list[Path]:
        index = self.folder / INDEX
        if index.is_file():
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            paths = sorted({self.folder / name for name in named})
        else:
            paths = [self.folder / _SINGLE]
        if missing := next((path for path in paths if not path.is_file()), None):
            raise UserError(
                "this file of the model is missing",
                where=missing,
                hint=None if index.is_file() else f"weights stored as pytorch_model.bin: {_MADE_ONCE}",
            )
        return paths


def _header(path: Path) -> dict[str, Any]:
    """The table of a safetensors file; UserError where it is cut or none."""
    try:
        with safe_open(path, "pt"):  # checks that the data is as long as the table says
            pass
        with path.open("rb") as file:
            header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (SafetensorError, ValueError) as error:
        raise UserError(f"this file of the model cannot be read: {error}", where=path) from error
    header.pop("__metadata__", None)
    return header


# --- writing -------------------------------------------------------------------------------------


def is_float(dtype: str) -> bool:
    """Whether a stored dtype is one of weights, which a merge may cast."""
    return dtype in _DTYPES


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every weight is a number; ten times as fast as to ask each, for the extremes keep what is none."""
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def named_dtype(dtype: torch.dtype) -> str:
    """How safetensors calls a dtype of weights."""
    return _NAMES[dtype]


def width(dtype: str) -> int:
    """Bytes of one number of a dtype that `is_float`."""
    return _DTYPES[dtype].itemsize


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        return prod(self.shape) * width(self.dtype)


def write_shards(
    plan: Sequence[Planned],
    make: Callable[[str], torch.Tensor],
    folder: Path,
    *,
    advance: Callable[[int], None],
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write the planned tensors, each made when its turn comes; the number of files.

    `make` gives a tensor of the planned shape and dtype. `advance` gets the bytes written.
    """
    shards = list(_shards(plan, shard_bytes))
    names = [_shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            _write_header(file, shard)
            for one in shard:
                data = make(one.name)
                assert tuple(data.shape) == one.shape, one.name
                assert _NAMES[data.dtype] == one.dtype, one.name
                file.write(data.contiguous().view(torch.uint8).flatten().numpy().data)
                advance(one.bytes)
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        _write_index(folder, dict(zip(names, shards, strict=True)))
    return len(shards)


def _shards(plan: Sequence[Planned], shard_bytes: int) -> Iterator[list[Planned]]:
    shard: list[Planned] = []
    for one in plan:
        if shard and sum(other.bytes for other in shard) + one.bytes > shard_bytes:
            yield shard
            shard = []
        shard.append(one)
    yield shard


def _shard_name(number: int, count: int) -> str:
    return _SINGLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _write_header(file: BinaryIO, shard: Sequence[Planned]) -> None:
    """The table in front of the data: its length in eight bytes, then JSON padded to a multiple of eight."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for one in shard:
        table[one.name] = {
            "dtype": one.dtype,
            "shape": list(one.shape),
            "data_offsets": [place, place + one.bytes],
        }
        place += one.bytes
    text = json.dumps(table, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _write_index(folder: Path, shards: Mapping[str, Sequence[Planned]]) -> None:
    weight_map = {one.name: name for name, shard in shards.items() for one in shard}
    total = sum(one.bytes for shard in shards.values() for one in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8", newline="\n")
