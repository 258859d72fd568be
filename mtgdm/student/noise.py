"""What the libraries say unasked: switched off, so that a user reads mtgdm's lines alone."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOUD = ("transformers", "peft", "accelerate", "bitsandbytes", "torch", "huggingface_hub")


@contextmanager
def quiet() -> Iterator[None]:
    """Drop the warnings and bars of the libraries inside the block; errors still come through.

    bitsandbytes complains of a missing CPU kernel at import, peft and transformers of names that
    they themselves use: nothing of it can be acted on by who runs mtgdm.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Imported before the levels are set: the libraries set their own at import.
        from transformers.utils import logging as transformers_logging

        bars = transformers_logging.is_progress_bar_enabled()
        levels = {name: logging.getLogger(name).level for name in _LOUD}
        for name in _LOUD:
            logging.getLogger(name).setLevel(logging.ERROR)
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            if bars:
                transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
