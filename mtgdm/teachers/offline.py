"""The offline teacher: the domain renders the answer from the row's record. No model, no network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mtgdm.teachers.seam import Backend, Completion, Options, Refused

if TYPE_CHECKING:
    from pydantic import BaseModel

    from mtgdm.domain import Message

_HINT = "make the prompts with `mtgdm prompts`, or ask a model: --backend ollama --model NAME"


class Offline(Backend):
    """Answers from a template, the same on every machine, and says so in `meta.teacher`."""

    @property
    def model(self) -> str:
        """The domain, whose template answers."""
        return self.domain.name

    @property
    def sampling(self) -> dict[str, Any]:
        """Nothing: a template does not sample."""
        return {}

    async def check(self) -> None:
        """There is always a template."""

    async def answer(
        self, messages: Sequence[Message], contract: type[BaseModel] | None, options: Options
    ) -> Completion:
        """Render the record. Takes 0 seconds, so that the finished file is the same on every machine."""
        row = options.row
        record = row.meta.get("record")
        if not isinstance(record, dict):
            raise Refused("the row carries no record to answer from (meta.record)", hint=_HINT)
        if row.type not in self.domain.types:
            raise Refused(
                f"the domain '{self.domain.name}' has no answers of the type '{row.type}'", hint=_HINT
            )
        try:
            text = self.domain.answer(record, row.type)
        except (KeyError, TypeError, ValueError) as error:  # the record is the user's data
            raise Refused(
                f"the record cannot be rendered: {type(error).__name__}: {error}", hint=_HINT
            ) from error
        return Completion(text, "stop", prompt_tokens=None, output_tokens=None, seconds=0.0)
