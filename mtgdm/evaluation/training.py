"""What a student was trained on, from the training.json of its checkpoint, and the leaks that it tells of."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtgdm.checkpoints import normalises
from mtgdm.errors import UserError

if TYPE_CHECKING:
    from mtgdm.rows import Row
    from mtgdm.student.chat import Chat

FILE = "training.json"


@dataclass(frozen=True)
class Training:
    """The part of training.json that an evaluation rests on."""

    path: Path
    base_model: str | None
    template_fingerprint: str | None
    spots: frozenset[str]
    ids: frozenset[str]
    """Of the rows trained on: all, or in a checkpoint of an earlier mtgdm those without a spot."""

    base_state: Mapping[str, str]
    """`checkpoints.model_state` of the base; empty where an earlier mtgdm wrote the file."""
    answer_start: str | None = None
    """What the chat template wrote before each answer; None where an earlier mtgdm wrote the file."""
    thoughts: bool = False
    """Whether the student writes its thoughts before an answer."""

    @classmethod
    def of(cls, folder: Path) -> Training | None:
        """That of a checkpoint's folder, or None where it has none."""
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                path,
                _text(value.get("base_model")),
                _text(value.get("template_fingerprint")),
                frozenset(map(_spot_key, value["train_spots"])),
                frozenset(value.get("train_ids") or value.get("train_ids_without_spot", ())),
                dict(value.get("base_state") or {}),
                _text(value.get("answer_start")),
                value.get("thoughts") is True,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"this file is not what `mtgdm train` writes ({type(error).__name__}: {error})", where=path
            ) from error

    @property
    def normalises(self) -> bool:
        """Whether the student's tokenizer brings a text into NFC, which llama.cpp leaves to who asks it."""
        return normalises(self.path.parent)

    def leaked(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that were trained on, or are about a spot that was."""
        return [
            row
            for row in rows
            if row.id in self.ids or (row.spot is not None and _spot_key(row.spot) in self.spots)
        ]

    def check_chat(self, chat: Chat) -> None:
        """UserError where the student would be asked by another chat template than it was trained with."""
        if self.template_fingerprint not in (None, *chat.fingerprints):
            raise UserError(
                f"the chat template is not the one that the student was trained with (fingerprint "
                f"{chat.fingerprint}, in training {self.template_fingerprint}): its answers would not be its own",
                where=self.path.parent,
                hint="put back the chat_template.jinja and tokenizer_config.json of the training, or train again",
            )
        if self.answer_start not in (None, chat.answer_start):
            raise UserError(
                f"an answer would begin after {chat.answer_start!r}, and began after {self.answer_start!r} in the "
                "training",
                where=self.path.parent,
                hint="put back the tokenizer files of the training, or train again",
            )

    def check_base(self, named: str | None) -> None:
        """UserError where the adapter names another base than the training had."""
        if None not in (named, self.base_model) and named != self.base_model:
            raise UserError(
                f"training.json says that the base was {self.base_model}, adapter_config.json that it is {named}",
                where=self.path.parent,
                hint="files of two checkpoints lie in one folder: copy the checkpoint anew",
            )

    def check_base_state(self, state: Mapping[str, str], *, otherwise: str = "") -> None:
        """UserError where a base's folder holds other weights than the base of the training did.

        Its config may have been rewritten; one side from the Hub and the other from a folder are not compared.
        `otherwise` is another way out, for the hint.
        """
        had, has = _weights(self.base_state), _weights(state)
        if had and has and had != has:
            raise UserError(
                f"the base {self.base_model} holds other weights than the one that the student was trained on",
                where=self.path.parent,
                hint=f"put the base of the training back{otherwise}",
            )


def _weights(state: Mapping[str, str]) -> list[str]:
    return sorted(digest for name, digest in state.items() if name.endswith((".safetensors", ".bin")))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _spot_key(spot: str) -> str:
    """A spot however it is written: width, white space and what has no width at all do not count."""
    shown = (one for one in unicodedata.normalize("NFKC", spot) if unicodedata.category(one) != "Cf")
    return "".join("".join(shown).split()).casefold()
