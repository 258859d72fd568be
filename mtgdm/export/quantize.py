"""K-quants, which llama.cpp alone can make: its own quantizer through llama-cpp-python."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gguf import LlamaFileType

from mtgdm.errors import UserError
from mtgdm.export import disk

INSTALL = 'pip install "mtgdm[llama]"'

FILE_TYPES = {
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
    "q5_k_m": LlamaFileType.MOSTLY_Q5_K_M,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
}
_LOWEST_ERROR = 4
"""The level of an error in llama.cpp's log; what goes on behind it is 5."""


def is_installed() -> bool:
    """Whether llama.cpp is at hand."""
    return find_spec("llama_cpp") is not None


def require() -> None:
    """UserError with the command that installs it."""
    if not is_installed():
        raise UserError(
            "llama-cpp-python is not installed, and this type of GGUF needs it",
            hint=f"{INSTALL} (a C compiler builds it in minutes), or --quantize q8_0",
        )


def quantize(source: Path, out: Path, quant: str) -> None:
    """Make a k-quant of a GGUF in 16 or 32 bits; UserError with what llama.cpp said where it fails."""
    require()
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = FILE_TYPES[quant].value
    options.nthread = 0  # as many as the machine has
    with log() as said:
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(options))
    if code != 0 and disk.is_full(out):
        raise disk.no_space(out)
    if code != 0:
        out.unlink(missing_ok=True)
        reason = said[-1] if said else f"code {code}"
        raise UserError(f"llama.cpp could not quantize to {quant}: {reason}", where=source)


@contextmanager
def log() -> Iterator[list[str]]:
    """Keep llama.cpp silent inside the block and collect what it says of errors."""
    import llama_cpp

    said: list[str] = []

    def hear(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        if level == _LOWEST_ERROR and text.strip():
            said.append(text.decode("utf-8", "replace").strip())

    callback = llama_cpp.llama_log_callback(hear)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield said
    finally:
        # A callback that Python has thrown away must not be called again.
        llama_cpp.llama_log_set(_silent(), ctypes.c_void_p(0))


@cache
def _silent() -> Any:
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)
