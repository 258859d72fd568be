"""Whether the libraries of training and generation are installed; light, so that a stage asks first."""

from __future__ import annotations

from importlib.util import find_spec

from mtgdm.errors import UserError

TRAINING = ("torch", "transformers", "peft", "accelerate", "safetensors")
PACKAGING = (*TRAINING, "gguf")

INSTALL = 'pip install "mtgdm[train]"'


def missing(*modules: str) -> list[str]:
    """Those that are not installed."""
    return [module for module in modules if find_spec(module) is None]


def require(*modules: str) -> None:
    """UserError with the command that installs what is missing."""
    if lacking := missing(*modules):
        raise UserError(f"{' and '.join(lacking)} not installed, and this needs it", hint=INSTALL)
