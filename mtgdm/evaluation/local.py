"""A student in this process: an adapter over its base, a merged model, or any other, generated with PyTorch."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mtgdm.checkpoints import model_state
from mtgdm.errors import UserError
from mtgdm.evaluation.student import Keep, Refuse, Reply, Student, answer_limit, prompt_ids
from mtgdm.evaluation.training import Training

if TYPE_CHECKING:
    from mtgdm.rows import Row
    from mtgdm.student.chat import Chat
    from mtgdm.student.generation import Answer


class Weights:
    """Where a student's weights lie, and those of its base; everything that can be told without loading them.

    `shown` is the name under which rows and messages have it: the path in the workspace, or as it was given.
    """

    def __init__(self, name: str, base_model: str | None, workspace: Path) -> None:
        from mtgdm.student import base

        self.source = base.locate(name, workspace)
        path = Path(self.source)
        inside = path.is_absolute() and path.is_relative_to(workspace)
        self.shown = path.relative_to(workspace).as_posix() if inside else name
        base.check_folder(self.source)
        self.is_adapter = base.is_adapter(self.source)
        if path.is_dir() and not self.is_adapter and not (path / "config.json").is_file():
            raise UserError("no model lies in this folder", where=path, hint=_inside(path))
        self.training = Training.of(path)
        named_by_hand = base_model is not None
        if self.is_adapter:
            named = base.adapter_config(self.source).get("base_model_name_or_path")
            if self.training is not None and not named_by_hand:
                self.training.check_base(named)
            base_model = base_model or base.base_of(self.source)
        self.base_model = base_model
        self.base_source = (
            None if base_model is None else self._base(base_model, workspace, named_by_hand=named_by_hand)
        )
        if self.training is not None and self.is_adapter and not named_by_hand:
            other = "; --base-model FOLDER takes another all the same"
            self.training.check_base_state(self.base_states, otherwise=other)

    def _base(self, base_model: str, workspace: Path, *, named_by_hand: bool) -> str:
        from mtgdm.student import base

        try:
            source = base.locate(base_model, workspace)
        except UserError as error:
            raise UserError(
                f"the base model of {self.shown} is not there: {base_model}",
                where=error.where,
                hint="put it back, or say where it lies now: --base-model FOLDER",
            ) from error
        known = {} if self.training is None else self.training.base_state
        if known and "hub" not in known and not named_by_hand and not Path(source).is_dir():
            raise UserError(
                f"the base model of {self.shown} is not there: {base_model} was a folder in its training",
                where=self.source,
                hint="put it back, or say where it lies now: --base-model FOLDER",
            )
        base.check_folder(source)
        return source

    @property
    def borrows_tokenizer(self) -> bool:
        """Whether it is an adapter that speaks as its base does, for want of a tokenizer of its own."""
        from mtgdm.student.adapter_files import has_tokenizer

        return self.is_adapter and not has_tokenizer(Path(self.source))

    @property
    def states(self) -> dict[str, Any]:
        """What tells one state of the student from another: the contents of its files, and its base's."""
        own = model_state(self.source)
        return {**own, "base": self.base_states} if self.is_adapter else own

    @property
    def base_states(self) -> dict[str, Any]:
        """The same of its base."""
        return {} if self.base_source is None else model_state(self.base_source)


def _inside(folder: Path) -> str:
    """Where a model may be meant that lies below a folder, as in what `mtgdm package` makes."""
    found = [name for name in ("merged", "adapter") if (folder / name).is_dir()]
    if found:
        return " or ".join(f"--model {folder / name}" for name in found)
    return "a model folder holds config.json, an adapter's adapter_config.json"


class Local(Student):
    """Greedy, in left-padded batches of like length."""

    def __init__(
        self,
        name: str,
        rows: Sequence[Row],
        *,
        workspace: Path,
        base_model: str | None = None,
        device_mode: Literal["cuda0", "auto", "cpu"] = "auto",
        load_in_4bit: bool = False,
        batch: int = 0,
        max_new_tokens: int = 0,
        references: Sequence[str] = (),
    ) -> None:
        """`batch` 0 takes what fits into memory, `max_new_tokens` 0 what the references need."""
        from mtgdm.student import base, generation

        self.weights = Weights(name, base_model, workspace)
        self.name, self.base_name = self.weights.shown, self.weights.base_model
        self._given = name
        self._workspace = workspace
        self._placement = base.place(device_mode)
        self._load_in_4bit = load_in_4bit
        self._batch = batch
        with _base_errors(self.name) if self.weights.borrows_tokenizer else _other_flags():
            self._chat = generation.load_chat(
                self.weights.source, name, workspace, base_source=self.weights.base_source
            )
        if self.weights.training is not None:
            self.weights.training.check_chat(self._chat)
            self.may_think = self.weights.training.thoughts
        self._prompts = {row.id: prompt_ids(self._chat, row) for row in rows}
        self.max_new_tokens = max_new_tokens or answer_limit(self._chat, references)
        self._model: Any = None
        self.identity = {
            "weights": self.weights.states,
            "template": self._chat.fingerprint,
            "load_in_4bit": load_in_4bit,
        }
        self.base_identity = self.weights.base_states

    def ask(self, rows: Sequence[Row], keep: Keep, refuse: Refuse, *, base: bool = False) -> None:
        """Load what is asked, and generate batch by batch."""
        from mtgdm.student import generation

        if base and not self.weights.is_adapter:
            self._ask_named_base(rows, keep, refuse)
            return
        if self._model is None:
            self._model = self._load()
        if base:
            with self._model.disable_adapter():
                self._ask(self._model, self._chat, self._prompts, rows, keep, refuse)
            return
        self._model = generation.merged(self._model)
        self._ask(self._model, self._chat, self._prompts, rows, keep, refuse)

    def _ask_named_base(self, rows: Sequence[Row], keep: Keep, refuse: Refuse) -> None:
        """Ask a base that is a model of its own, in its own tokens and by its own template."""
        import torch

        from mtgdm.student import generation

        source, name = self.weights.base_source, self.weights.base_model
        assert source is not None and name is not None
        with _base_errors(self.name):
            chat = generation.load_chat(source, name, self._workspace)
            model = generation.load(
                source, name, self._placement, workspace=self._workspace, load_in_4bit=self._load_in_4bit
            )
        self._ask(model, chat, {row.id: prompt_ids(chat, row) for row in rows}, rows, keep, refuse)
        # Its memory is given back before the student is loaded.
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _ask(
        self,
        model: Any,
        chat: Chat,
        prompts: Mapping[str, list[int]],
        rows: Sequence[Row],
        keep: Keep,
        refuse: Refuse,
    ) -> None:
        from mtgdm.student import generation

        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        asked, near_the_end = [], []
        for row in rows:
            length = len(prompts[row.id])
            if context is not None and length >= context:
                refuse(row, f"the prompt has {length} tokens, and the model's context holds {context}")
            elif context is not None and length + self.max_new_tokens > context:
                near_the_end.append((row, context - length))
            else:
                asked.append(row)

        def answer(some: Sequence[Row], batch: int, limit: int) -> None:
            found = generation.answers(
                model, chat, [prompts[row.id] for row in some], batch=batch, max_new_tokens=limit
            )
            for places in found:
                for place, answer in places:
                    keep(some[place], _reply(answer))

        answer(asked, self._batch, self.max_new_tokens)
        # Past its context a model has no positions, or none that it knows: each row has room of its own here.
        for row, room in near_the_end:
            answer([row], 1, room)

    def _load(self) -> Any:
        from mtgdm.student import adapter_files, base, generation

        weights = self.weights
        if not weights.is_adapter:
            with _other_flags():
                return generation.load(
                    weights.source,
                    self._given,
                    self._placement,
                    workspace=self._workspace,
                    load_in_4bit=self._load_in_4bit,
                )
        assert weights.base_source is not None and weights.base_model is not None
        with _base_errors(self.name):
            model: Any = base.load_model(
                weights.base_source, weights.base_model, self._placement, load_in_4bit=self._load_in_4bit
            )
        tokens, known = len(self._chat.tokenizer), model.get_input_embeddings().num_embeddings
        if tokens > adapter_files.vocabulary(Path(weights.source), known):
            raise UserError(
                f"the student's tokenizer has {tokens:,} tokens, its base {weights.base_model} knows {known:,}",
                where=weights.source,
                hint="this is not the base it was trained on; --base-model names another",
            )
        return generation.ready(generation.with_adapter(model, weights.source, weights.base_model))


def _reply(answer: Answer) -> Reply:
    return Reply(
        answer.text,
        answer.finish_reason,
        answer.prompt_tokens,
        answer.output_tokens,
        answer.latency_s,
        answer.batch_rows,
    )


@contextmanager
def _base_errors(name: str) -> Iterator[None]:
    """Say whose base model it is that cannot be used, and how another one is named."""
    try:
        yield
    except UserError as error:
        if isinstance(error.__cause__, RuntimeError):  # out of memory: it is there, and has a hint of its own
            raise
        raise UserError(
            f"the base model of {name} cannot be used: {error.message}",
            where=error.where,
            hint="put it back, or say where it lies now: --base-model FOLDER",
        ) from error


@contextmanager
def _other_flags() -> Iterator[None]:
    """What names the model is called otherwise here than in training."""
    try:
        yield
    except UserError as error:
        hint = error.hint and error.hint.replace("--student-base", "--model")
        raise UserError(error.message, where=error.where, hint=hint) from error
