"""Whether the libraries of training and generation are installed; light, so that a stage asks first."""

from __future__ import annotations

from importlib.util import find_spec

from mtgdm.errors import UserError

TRAINING = ("torch", "transformers", "peft", "accelerate", "safetensors")

_EXTRA = 'pip install "mtgdm[train]"'


def require(*modules: str) -> None:
    """UserError with the command that installs what is missing."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} not installed, and this needs it", hint=_EXTRA)
