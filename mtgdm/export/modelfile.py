"""What Ollama has to know of a student beside its GGUF: template, stop token, context, sampling, system text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

SPARE = 4
"""The context is a quarter longer than the longest row: as much longer as `mtgdm eval` lets an answer grow."""
_STEP = 256
_EDGE = '"""'
_GREEDY = {"temperature": 0, "repeat_penalty": 1}
"""As `mtgdm eval` asks: the likeliest token, and no repeated one punished, which JSON is full of."""


_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_NAME = re.compile(
    rf"(?:(?:[A-Za-z0-9_][A-Za-z0-9_.:-]{{0,349}}/)?[A-Za-z0-9_][A-Za-z0-9_-]{{0,79}}/)?{_PART}(?::{_PART})?"
)
"""HOST/NAMESPACE/MODEL:TAG, of which all but the model may be left out."""


@dataclass(frozen=True)
class Modelfile:
    """The Modelfile of a package, and the same as a request to Ollama's API."""

    gguf: str
    """The file, as it is called beside the Modelfile."""
    template: str | None
    """In Go's template language; None leaves it to the Jinja template inside the GGUF."""
    stop: str
    num_ctx: int
    system: str | None = None
    """The text that all rows of the training began with, for chats that bring none."""
    licence: str | None = None
    remarks: tuple[str, ...] = ()
    template_of_old: str | None = None
    """For an Ollama of before 2026, which runs no Jinja: as near to the training as Go's language comes."""

    @property
    def parameters(self) -> dict[str, Any]:
        """The PARAMETER lines, as the API takes them."""
        return {**_GREEDY, "num_ctx": self.num_ctx, "stop": [self.stop]}

    def text(self) -> str:
        """The file."""
        return "\n".join(self._lines()) + "\n"

    def request(self) -> dict[str, Any]:
        """The same for `POST /api/create`, less the model's name and its file."""
        told = {"template": self.template, "system": self.system, "license": self.licence}
        return {
            "parameters": self.parameters,
            **{key: text for key, text in told.items() if text is not None},
        }

    def _lines(self) -> Iterator[str]:
        for remark in self.remarks:
            yield f"# {remark}"
        yield f"FROM ./{self.gguf}"
        if self.template is not None:
            yield f"TEMPLATE {_EDGE}{self.template}{_EDGE}"
        if self.template_of_old is not None:
            yield "# For an Ollama of before 2026, which cannot run the template inside the GGUF, uncomment this:"
            yield from (f"# {line}" for line in f"TEMPLATE {_EDGE}{self.template_of_old}{_EDGE}".split("\n"))
        for key, value in self.parameters.items():
            for one in value if isinstance(value, list) else [value]:
                yield f'PARAMETER {key} "{one}"' if isinstance(one, str) else f"PARAMETER {key} {one}"
        if self.system is not None:
            yield f"SYSTEM {_EDGE}{self.system}{_EDGE}"
        if self.licence is not None:
            yield f"LICENSE {_EDGE}{self.licence}{_EDGE}"


def can_be_quoted(text: str) -> bool:
    """Whether a Modelfile can hold this text: its three quotation marks know no escape."""
    return _EDGE not in text and not text.endswith('"')


def is_ollama_name(text: str) -> bool:
    """Whether Ollama takes this as the name of a model."""
    return _NAME.fullmatch(text) is not None


def context_length(longest_row: int, base_config: Mapping[str, Any]) -> int:
    """Tokens of context for rows of this length, and never more than the base was made for."""
    wanted = -(-(longest_row + longest_row // SPARE) // _STEP) * _STEP
    return min(wanted, int(base_config.get("max_position_embeddings") or wanted))
