"""What a package is made of: the checkpoint with its base, its chat template and the rows it is proved on."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

import torch
import yaml
from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache
from transformers import AutoModelForCausalLM, PretrainedConfig

from mtgdm import rows
from mtgdm.checkpoints import normalises
from mtgdm.domain import Message
from mtgdm.errors import UserError
from mtgdm.evaluation.training import Training
from mtgdm.export.lineage import told
from mtgdm.export.merge import dtype_of
from mtgdm.export.modelfile import Modelfile, can_be_quoted, context_length
from mtgdm.export.turns import NotOfTurns, Turns, turns_of
from mtgdm.rows import Row
from mtgdm.student.adapter_files import has_tokenizer, vocabulary, weights_file
from mtgdm.student.base import (
    TINY,
    adapter_config,
    base_of,
    check_folder,
    load_config,
    load_tokenizer,
    locate,
    tokenizer_folder,
    writes_thoughts,
)
from mtgdm.student.chat import Chat
from mtgdm.student.generation import check_adapter

_LICENCE_KEYS = ("license", "license_name", "license_link")
_ASK_TIMEOUT_S = 5.0
_WHERE_NOW = "put it back, or say where it lies now: --base-model FOLDER"


_COMPARED_ROWS = 3
_CHATS = (
    [("system", "你是讲解员。"), ("user", "西湖在哪里？")],
    [("user", "西湖在哪里？")],
    [("user", "西湖在哪里？"), ("assistant", "在杭州市。"), ("user", "再说一遍")],
    [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
    [
        ("system", " \n你是讲解员。 \n"),
        ("user", "\n 再说一遍 \n"),
        ("assistant", "\n\n 在。 \n"),
        ("user", "  好 \n"),
    ],
)
_WITH_THOUGHTS: list[Message] = [
    {"role": "user", "content": "1"},
    {"role": "assistant", "content": "<think>\n2\n</think>\n\n3"},
    {"role": "user", "content": "4"},
]


def read_training(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint knows of its training; UserError where its files are not whole or not those of then."""
    if not (checkpoint / "adapter_config.json").is_file():
        raise UserError("this is no finished checkpoint: adapter_config.json is missing", where=checkpoint)
    check_folder(str(checkpoint))
    named = adapter_config(str(checkpoint)).get("base_model_name_or_path")
    check_adapter(str(checkpoint))
    known = Training.of(checkpoint)
    if known is None:
        return {"base_model": base_of(str(checkpoint))}
    known.check_base(named)
    training: dict[str, Any] = json.loads(known.path.read_text(encoding="utf-8"))
    return training


@dataclass(frozen=True)
class Trained:
    """A finished checkpoint and what belongs to it; weights are not loaded."""

    checkpoint: Path
    base_model: str
    """The base as the training named it."""
    source: str
    """The base's folder or Hub id."""
    training: Mapping[str, Any]
    rows: Sequence[Row]
    """Answered rows of the split `val`, or of `train` where there is none."""
    split: Literal["val", "train"]
    """Which of the two."""
    system: str | None
    """The text that every row of the training began with, if it was one."""

    @classmethod
    def of(
        cls,
        checkpoint: Path,
        training: Mapping[str, Any],
        answered: Path,
        workspace: Path,
        *,
        base: str | None = None,
    ) -> Trained:
        """Read what there is; `answered` need not be there, `base` is where the base lies now."""
        check_folder(str(checkpoint))
        base_model = str(training["base_model"])
        source = locate(base, workspace) if base is not None else _source(base_model, training, workspace)
        found: dict[str, list[Row]] = {"train": [], "val": [], "test": []}
        for row in rows.read_rows(answered, answered=True) if answered.is_file() else ():
            found[row.split].append(row)
        split: Literal["val", "train"] = "val" if found["val"] else "train"
        return cls(
            checkpoint, base_model, source, training, found[split], split, _shared_system(found["train"])
        )

    @cached_property
    def chat(self) -> Chat:
        """The tokenizer and the template of the training."""
        folder = self.tokenizer_folder
        name = self.checkpoint.name if folder == self.checkpoint else self.base_model
        return Chat(load_tokenizer(str(folder), name), name, thoughts=writes_thoughts(str(self.checkpoint)))

    @cached_property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer of the training lies: with the adapter, or with its base where it has none."""
        if has_tokenizer(self.checkpoint):
            return self.checkpoint
        return tokenizer_folder(self.source, self.base_model)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The base's config.json."""
        config: dict[str, Any] = self._config.to_dict()
        return config

    @cached_property
    def _config(self) -> PretrainedConfig:
        config = self._base_config()
        known = getattr(config, "vocab_size", None)
        if known is not None and weights_file(self.checkpoint).is_file():
            config.vocab_size = vocabulary(self.checkpoint, known)
        return config

    def _base_config(self) -> PretrainedConfig:
        if Path(self.source).is_dir():
            return load_config(self.source, self.base_model)
        try:
            return load_config(self.source, self.source)
        except UserError as error:
            raise UserError(error.message, where=error.where, hint=_WHERE_NOW) from error

    @cached_property
    def parameters(self) -> int:
        """How many weights the base has, counted without loading one."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(deepcopy(self._config))  # type: ignore[no-untyped-call]
        return sum(value.numel() for value in model.parameters())

    def merged_bytes(self, dtype: str) -> int:
        """How large the merged model will be; `auto` takes the numbers that the base is stored in."""
        number = dtype_of(self.source, self.base_model, dtype)
        return self.parameters * number.itemsize

    @property
    def tokenizer_bytes(self) -> int:
        """How large the tokenizer is, of which a small student mostly consists."""
        path = self.tokenizer_folder / "tokenizer.json"
        return path.stat().st_size if path.is_file() else 0

    @property
    def is_on_hub(self) -> bool:
        """Whether the base of the training came from the Hub; of an earlier mtgdm, whether it lies in no folder."""
        state = self.training.get("base_state")
        return "hub" in state if state else not Path(self.source).is_dir()

    @property
    def base_name(self) -> str:
        """The base as others may know it: its Hub id, or the name of its folder without the way to it."""
        if self.is_on_hub:
            return str((self.training.get("base_state") or {}).get("hub", self.source))
        return PureWindowsPath(self.base_model).name or Path(self.source).resolve().name

    @property
    def training_to_tell(self) -> dict[str, Any]:
        """training.json without the places of this machine that it names."""
        shown = {**self.training, "base_model": self.base_name}
        if isinstance(settings := self.training.get("settings"), Mapping):
            shown["settings"] = {
                key: told(value) if isinstance(value, str) else value for key, value in settings.items()
            }
            if "student_base" in settings:
                shown["settings"]["student_base"] = self.base_name
        return shown

    @cached_property
    def revision(self) -> str | None:
        """The commit of the base on the Hub, where it comes from there."""
        if Path(self.source).is_dir():
            return None
        path = try_to_load_from_cache(self.source, "config.json")
        return Path(path).parent.name if isinstance(path, str) else None

    @cached_property
    def normalises(self) -> bool:
        """Whether the tokenizer brings text into NFC."""
        return normalises(self.tokenizer_folder)

    @cached_property
    def turns(self) -> Turns | NotOfTurns:
        """The chat template taken apart, or why it cannot be."""
        prompts = [
            [{"role": one["role"], "content": one["content"]} for one in row.prompt] for row in self.rows
        ]
        if self.chat.thoughts:  # a chat may send them back, and the template may take them off
            prompts.append(_WITH_THOUGHTS)
        bos = self.chat.tokenizer.bos_token
        try:
            return turns_of(self.chat.render, bos=bos if isinstance(bos, str) else "", prompts=prompts)
        except NotOfTurns as reason:
            return reason

    @cached_property
    def template(self) -> str:
        """The chat template that goes into a GGUF: it writes what the training wrote, and offers nothing else.

        An engine reads from a template that it offers tools or a switch for thoughts, and asks by what it has read.
        """
        return self.chat.template if isinstance(self.turns, NotOfTurns) else self.turns.jinja()

    def modelfile(self, gguf: str, licence: Mapping[str, str]) -> Modelfile:
        """What Ollama has to know, for a GGUF of this name."""
        remarks = []
        template = template_of_old = None
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
            elif self.turns.trims:
                template, template_of_old = None, template
                remarks.append(
                    "No TEMPLATE, for the training took away white space around texts, and a TEMPLATE cannot. Ollama "
                    "takes the template inside the GGUF, which does."
                )
        system = self.system
        if system is not None and not can_be_quoted(system):
            system = None
            remarks.append(
                "No SYSTEM, for a Modelfile cannot hold the quotation marks of the training's own."
            )
        named = " ".join(licence.values()) or None
        if named is not None and not can_be_quoted(named):
            named = None
            remarks.append("No LICENSE, for a Modelfile cannot hold its quotation marks; the card names it.")
        longest = int(self.training.get("max_len") or context_length(1 << 30, self.config))
        stop = self.chat.tokenizer.convert_ids_to_tokens([self.chat.end_of_turn])[0]
        return Modelfile(
            gguf,
            template,
            stop,
            context_length(longest, self.config),
            system,
            named,
            tuple(remarks),
            template_of_old,
        )

    @cached_property
    def licence(self) -> dict[str, str]:
        """What the base's own card says of its licence; empty where it is not at hand."""
        if self.base_model == TINY:
            return {"license": "mit"}
        if Path(self.source).is_dir():
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
    def chats_to_compare(self) -> list[list[Message]]:
        """Chats whose rendering by a server is held against the training's: real prompts, and every order of turns."""
        real = [row.prompt for row in self.rows[:_COMPARED_ROWS]]
        return [*real, *([{"role": role, "content": text} for role, text in chat] for chat in _CHATS)]

    @property
    def _adds_bos(self) -> bool:
        return list(self.chat.tokenizer("").input_ids) == [self.chat.tokenizer.bos_token_id]


def _source(base_model: str, training: Mapping[str, Any], workspace: Path) -> str:
    """Where the base lay in the training; UserError where that was a folder which is gone."""
    where = None
    try:
        source = locate(base_model, workspace)
        if "hub" in (training.get("base_state") or {"hub": source}) or Path(source).is_dir():
            return source
    except UserError as error:
        where = error.where
    raise UserError(f"the base of the training is not there: {base_model}", where=where, hint=_WHERE_NOW)


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
