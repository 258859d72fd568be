"""What a package is made of: the checkpoint with its base, its chat template and the rows it is proved on."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache
from jinja2.exceptions import TemplateError
from transformers import AutoModelForCausalLM

from mtgdm import rows
from mtgdm.domain import Message
from mtgdm.export.modelfile import Modelfile, can_be_quoted, context_length
from mtgdm.export.turns import NotOfTurns, Turns, turns_of
from mtgdm.rows import Row
from mtgdm.student.base import TINY, check_folder, load_config, load_tokenizer, locate
from mtgdm.student.chat import Chat

_LICENCE_KEYS = ("license", "license_name", "license_link")
_MARKS = "generation %}"
_ASK_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Trained:
    """A finished checkpoint and what belongs to it; weights are not loaded."""

    checkpoint: Path
    base_model: str
    source: str
    """The base's folder or Hub id."""
    training: Mapping[str, Any]
    rows: Sequence[Row]
    """Answered rows of the split `val`, or of `train` where there is none."""
    system: str | None
    """The text that every row of the training began with, if it was one."""

    @classmethod
    def of(cls, checkpoint: Path, training: Mapping[str, Any], answered: Path, workspace: Path) -> Trained:
        """Read what there is; `answered` need not be there."""
        check_folder(str(checkpoint))
        base_model = str(training["base_model"])
        found: dict[str, list[Row]] = {"train": [], "val": [], "test": []}
        for row in rows.read_rows(answered, answered=True) if answered.is_file() else ():
            found[row.split].append(row)
        return cls(
            checkpoint,
            base_model,
            locate(base_model, workspace),
            training,
            found["val"] or found["train"],
            _shared_system(found["train"]),
        )

    @cached_property
    def chat(self) -> Chat:
        """The tokenizer and the template of the training."""
        return Chat(load_tokenizer(str(self.checkpoint), self.checkpoint.name), self.checkpoint.name)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The base's config.json."""
        config: dict[str, Any] = load_config(self.source, self.base_model).to_dict()
        return config

    @cached_property
    def parameters(self) -> int:
        """How many weights the base has, counted without loading one."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                load_config(self.source, self.base_model)
            )
        return sum(value.numel() for value in model.parameters())

    def merged_bytes(self, dtype: str) -> int:
        """How large the merged model will be; `auto` takes the numbers that the base is stored in."""
        stored = load_config(self.source, self.base_model).dtype if dtype == "auto" else getattr(torch, dtype)
        number = stored if isinstance(stored, torch.dtype) else torch.bfloat16
        return self.parameters * number.itemsize

    @property
    def tokenizer_bytes(self) -> int:
        """How large the tokenizer is, of which a small student mostly consists."""
        path = self.checkpoint / "tokenizer.json"
        return path.stat().st_size if path.is_file() else 0

    @property
    def is_on_hub(self) -> bool:
        """Whether the base is known by its Hub id rather than by a folder."""
        return not Path(self.source).is_dir()

    @cached_property
    def revision(self) -> str | None:
        """The commit of the base on the Hub, where it comes from there."""
        if not self.is_on_hub:
            return None
        path = try_to_load_from_cache(self.source, "config.json")
        return Path(path).parent.name if isinstance(path, str) else None

    @cached_property
    def normalises(self) -> bool:
        """Whether the tokenizer brings text into NFC."""
        text = (self.checkpoint / "tokenizer.json").read_text(encoding="utf-8")
        return "NFC" in json.dumps(json.loads(text).get("normalizer"))

    @cached_property
    def turns(self) -> Turns | NotOfTurns:
        """The chat template taken apart, or why it cannot be."""
        prompts = [row.prompt for row in self.rows]
        bos = self.chat.tokenizer.bos_token
        template = str(self.chat.tokenizer.chat_template)
        try:
            return turns_of(template, self._render, bos=bos if isinstance(bos, str) else "", prompts=prompts)
        except NotOfTurns as reason:
            return reason
        except TemplateError as error:
            return NotOfTurns(f"it refuses a chat that others take ({error})")

    @cached_property
    def template(self) -> str:
        """The chat template that goes into a GGUF: it writes what the training wrote, asked by servers as they ask.

        That of the training itself, but where servers would render it otherwise: they pass no `enable_thinking`,
        and know no generation marks.
        """
        template = str(self.chat.tokenizer.chat_template)
        if isinstance(self.turns, NotOfTurns):
            return template
        probe: list[Message] = [{"role": "user", "content": "1"}]
        as_asked = self.chat.tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True)
        if as_asked == self._render(probe, True) and _MARKS not in template:
            return template
        return self.turns.jinja()

    def modelfile(self, gguf: str, licence: Mapping[str, str]) -> Modelfile:
        """What Ollama has to know, for a GGUF of this name."""
        remarks = []
        template = None
        if isinstance(self.turns, NotOfTurns):
            remarks.append(
                f"No TEMPLATE, for the chat template of the training cannot be written as one: {self.turns.message}. "
                "Ollama takes the one inside the GGUF."
            )
        else:
            # Ollama's engine puts BOS in front by itself where the GGUF says so.
            template = self.turns.go(start=not self._adds_bos)
            if not can_be_quoted(template):
                template = None
                remarks.append("No TEMPLATE, for a Modelfile cannot hold its quotation marks.")
            if self.turns.trims:
                remarks.append("Send texts without white space around them: the training took it away.")
        system = self.system
        if system is not None and not can_be_quoted(system):
            system = None
            remarks.append(
                "No SYSTEM, for a Modelfile cannot hold the quotation marks of the training's own."
            )
        longest = int(self.training.get("max_len") or context_length(1 << 30, self.config))
        stop = self.chat.tokenizer.convert_ids_to_tokens([self.chat.end_of_turn])[0]
        return Modelfile(
            gguf,
            template,
            stop,
            context_length(longest, self.config),
            system,
            " ".join(licence.values()) or None,
            tuple(remarks),
        )

    @cached_property
    def licence(self) -> dict[str, str]:
        """What the base's own card says of its licence; empty where it is not at hand."""
        if self.base_model == TINY:
            return {"license": "mit"}
        if not self.is_on_hub:
            path = Path(self.source) / "README.md"
        else:
            try:
                path = Path(hf_hub_download(self.source, "README.md", etag_timeout=_ASK_TIMEOUT_S))
            except (errors.HTTPError, OSError):  # type: ignore[attr-defined]  # that of the HTTP library it uses
                return {}
        front = _front_matter(path)
        return {key: str(front[key]) for key in _LICENCE_KEYS if front.get(key)}

    @property
    def question(self) -> list[Message]:
        """What a served student is asked first: a row, in the form that its tokenizer would bring it into."""
        asked = self.rows[0].prompt if self.rows else [{"role": "user", "content": "?"}]
        if not self.normalises:
            return asked
        return [{**one, "content": unicodedata.normalize("NFC", one["content"])} for one in asked]

    @property
    def _adds_bos(self) -> bool:
        return list(self.chat.tokenizer("").input_ids) == [self.chat.tokenizer.bos_token_id]

    def _render(self, messages: Sequence[Message], ask: bool) -> str:
        return str(
            self.chat.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=ask, enable_thinking=False
            )
        )


def _shared_system(trained: Sequence[Row]) -> str | None:
    texts = {row.messages[0]["content"] if row.messages[0]["role"] == "system" else None for row in trained}
    return texts.pop() if len(texts) == 1 else None


def _front_matter(path: Path) -> dict[str, Any]:
    """The YAML between the first two lines of three dashes."""
    try:
        head, _, _ = path.read_text(encoding="utf-8").removeprefix("---\n").partition("\n---")
        front = yaml.safe_load(head)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return front if isinstance(front, dict) else {}
