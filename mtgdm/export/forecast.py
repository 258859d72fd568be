"""What making a package will take in time and memory, for `mtgdm plan`: reckoned from sizes and measured paces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtgdm.estimates import Expected
from mtgdm.export import build, engines, gguf, parity, quantize
from mtgdm.export.parity import Need
from mtgdm.export.trained import Trained

_CONVERTED_PER_S = 25e6
"""Weights that a core merges with their proof, or encodes and reads back, in a second."""
_TRAINED_PER_S, _FILE_PER_S = 80e9, 40e9
"""Multiplications and additions of a core: of the trained model in float32, and of a file, by either engine."""
_WIDENED_PER_S, _DECODED_PER_S = 150e6, 60e6
"""Weights a second of the trained model that is loaded in float32, and of a file that transformers reads."""
_BYTES_PER_S = 10e9
"""Of weights that a core reads from memory for each token that is written."""
_RANGE = (0.5, 2.0)
"""The paces are those of a Xeon of 2023 with AVX-512 and a real model of 0.5 billion weights; other machines differ."""
_BYTES_A_NUMBER = 12
"""Of the largest tensor as it is stored, widened, cast and checked."""
_LIBRARIES = 700 * 2**20
_MIB = 2**20


def forecast(student: Trained, quants: Sequence[str]) -> dict[str, Any]:
    """Hours and memory of conversion and proof, and how the proof will be done."""
    rows = build.proof_rows(student.rows)
    longest = max((len(student.chat.prompt(row.prompt)) for row in rows), default=0) + parity.ANSWER_TOKENS
    need = Need(student.parameters, student.config, len(rows), longest)
    sizes = [gguf.gguf_bytes(student.parameters, quant) for quant in quants]
    return {
        "conversion": {
            "hours": _hours(_conversion_s(student.parameters, len(quants))),
            "mib_of_memory": _mib(_BYTES_A_NUMBER * need.largest_layer),
        },
        "proof": _proof(need, sizes, student.config),
    }


def _proof(need: Need, sizes: Sequence[int], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the proof will be done; nothing of time and memory where it will not be, or its rows are not there yet."""
    if need.rows == 0:
        return None
    if reason := parity.not_provable(max(sizes), need, config):
        return {"unproved": reason}
    whole = parity.place_of_whole(need) is not None
    most = max(need.whole if whole else need.layered, *(need.of_file(size) for size in sizes))
    return {
        "hours": _hours(_proof_s(need, len(sizes), whole)),
        "mib_of_memory": _mib(most),
        "layer_by_layer": None if whole else "the model does not fit in float32: no greedy answers",
    }


def _conversion_s(parameters: int, files: int) -> float:
    return parameters * (1 + files) / _CONVERTED_PER_S / engines.cores()


def _proof_s(need: Need, files: int, whole: bool) -> float:
    """The trained model is loaded, reads and writes; each file is loaded and reads."""
    operations = 2 * need.parameters * need.rows * need.longest
    written = parity.ANSWER_TOKENS * 4 * need.parameters / _BYTES_PER_S if whole else 0.0
    trained = (operations / _TRAINED_PER_S + written) / engines.cores() + need.parameters / _WIDENED_PER_S
    loaded = 0.0 if quantize.is_installed() else need.parameters / _DECODED_PER_S
    return trained + files * (operations / _FILE_PER_S / engines.cores() + loaded)


def _hours(seconds: float) -> Expected:
    return Expected(seconds, *(seconds * factor for factor in _RANGE)).times(1 / 3600)


def _mib(size: int) -> int:
    return round((_LIBRARIES + size) / _MIB)
