"""A GGUF read back from the disk, key by key and tensor by tensor, beside the merged model it was made from.

The logits of a few rows do not show damage to rows of the embeddings that those do not use, or to a bias: this does.
It needs neither llama.cpp nor the memory for a model, so a file that nothing can run is compared as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader

from mtgdm.errors import UserError
from mtgdm.export.gguf import CASTS, Array, Tensor, config_of, header, parts_of, plan, row_bytes, type_for
from mtgdm.export.weights import Weights, ignore, width

LIMITS = {
    GGMLQuantizationType.Q8_0: 0.02,
    GGMLQuantizationType.Q6_K: 0.05,
    GGMLQuantizationType.Q5_K: 0.08,
    GGMLQuantizationType.Q5_1: 0.10,
    GGMLQuantizationType.Q5_0: 0.12,
    GGMLQuantizationType.Q4_K: 0.15,
}
"""How far a quantized tensor may be from its weights: the root of the mean square, as a share of that of the weights.

Weights of a normal distribution gave 0.005, 0.018, 0.036, 0.038, 0.043 and 0.071 from top to bottom; those of
Student's t with three degrees of freedom and those with outliers 50 to 100 times as large at most 0.012, 0.030,
0.047, 0.053, 0.067 and 0.092.
"""
_ROW = 2.0
"""So many times that is the limit of one row (measured with outliers: at most 0.8 times); a wrong row is 1 or more."""
_SMALL = 0.1
"""Rows that are smaller than this share of their tensor's are held to the limit as if they were not."""


@dataclass(frozen=True)
class ReadBack:
    """A file whose keys are those meant and whose weights are those of the merged model."""

    tensors: int
    equal: int
    """Tensors that are the same bit for bit, in the type of the file."""
    largest_error: float | None
    """That of the quantized tensors, as `LIMITS` has it; None where none is quantized."""

    def as_dict(self) -> dict[str, Any]:
        """For a manifest."""
        return asdict(self)

    def __str__(self) -> str:
        if self.largest_error is None:
            return f"{self.equal} tensors equal"
        return f"{self.equal} tensors equal, {self.tensors - self.equal} within {self.largest_error:.1%}"


def check(
    file: Path,
    merged: Path,
    quant: str,
    *,
    name: str,
    template: str,
    advance: Callable[[int], None] = ignore,
) -> ReadBack:
    """Compare what `gguf.convert` wrote with what it was given; UserError that names what differs.

    `advance` gets the bytes of the stored tensors that are done. Holds one tensor at a time.
    """
    config, weights = config_of(merged), Weights(merged)
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError) as error:
        raise UserError(f"this file cannot be read back: {error}", where=file) from error
    _check_keys(reader, header(None, merged, config, quant, name, template), file)
    meant = {one.name: one for one in plan(weights, config, type_for(quant, merged))}
    found = {one.name: one for one in reader.tensors}
    if differing := sorted(meant.keys() ^ found.keys()):
        raise _differs(differing[0], "is missing" if differing[0] in meant else "is not of the model", file)
    errors = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for key, one in meant.items():
            errors.append(_error(found[key], one, weights, config, threads, file))
            if one.source is not None:
                stored = weights.stored[one.source]
                advance(stored.numbers * width(stored.dtype))
    quantized = [error for error in errors if error is not None]
    return ReadBack(len(errors), len(errors) - len(quantized), max(quantized, default=None))


def _check_keys(reader: GGUFReader, writer: gguf.GGUFWriter, file: Path) -> None:
    for key, meant in writer.kv_data[0].items():
        if key not in reader.fields:
            raise _differs(key, "is missing", file)
        if not _same(reader.fields[key].contents(), meant.value):
            raise _differs(key, "is another than was meant", file)


def _same(found: Any, meant: Any) -> bool:
    if isinstance(meant, float):
        return bool(np.float32(found) == np.float32(meant))
    if isinstance(meant, list):
        return list(found) == [one.decode("utf-8") if isinstance(one, bytes) else one for one in meant]
    return bool(found == meant)


def _error(
    found: gguf.ReaderTensor,
    meant: Tensor,
    weights: Weights,
    config: Mapping[str, Any],
    threads: ThreadPoolExecutor,
    file: Path,
) -> float | None:
    """How far a tensor is from its weights; None where it holds them as they are, UserError where it is too far."""
    if tuple(found.shape[::-1]) != meant.shape:
        raise _differs(meant.name, f"has the shape {(*found.shape[::-1],)}, not {meant.shape}", file)
    kind = found.tensor_type
    limit = 0.0 if kind in CASTS else LIMITS.get(kind)
    if limit is None or (len(meant.shape) == 1 and kind != meant.type):
        raise _differs(meant.name, f"is of the type {kind.name}", file)
    data = found.data.reshape(meant.shape[0], -1).view(np.uint8)

    def squares(part: tuple[int, torch.Tensor]) -> Array:
        first, rows = part
        return _squares(data[first : first + len(rows)], rows, kind)

    errors, sizes = np.concatenate(
        list(threads.map(squares, _numbered(parts_of(meant, weights, config)))), axis=1
    )
    if not limit:
        if differing := int(np.count_nonzero(errors)):
            raise _differs(meant.name, f"has {differing:,} rows that differ", file)
        return None
    floors = np.maximum(sizes, _SMALL**2 * sizes.mean())
    far = ~(errors <= (_ROW * limit) ** 2 * floors)  # so that what is no number is far
    if far.any():
        worst = float(np.sqrt((errors[far] / floors[far]).max()))
        raise _differs(meant.name, f"has {int(far.sum()):,} rows that differ by up to {worst:.0%}", file)
    error = float(np.sqrt(errors.sum() / sizes.sum())) if sizes.any() else 0.0
    if not error <= limit:
        raise _differs(meant.name, f"differs by {error:.1%} (limit {limit:.0%})", file)
    return error


def _numbered(parts: Iterator[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """Each part with the number of its first row."""
    first = 0
    for part in parts:
        yield first, part
        first += len(part)


def _squares(data: Array, rows: torch.Tensor, kind: GGMLQuantizationType) -> Array:
    """(2, rows): the sums of the squared differences, of an exact type whether any byte differs, and of the weights."""
    if kind in CASTS:
        differing = (data != row_bytes(rows, kind)).any(axis=1)
        return np.stack([differing, differing]).astype(np.float64)
    meant = rows.float().numpy()
    difference = gguf.dequantize(data, kind) - meant
    return np.stack([np.einsum("ij,ij->i", one, one, dtype=np.float64) for one in (difference, meant)])


def _differs(what: str, how: str, file: Path) -> UserError:
    return UserError(
        f"what was written is not what was merged: {what} {how}",
        where=file,
        hint="a disk or memory at fault? no package was made, an earlier one is as it was",
    )
