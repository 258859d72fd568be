"""The teacher in this process: a model folder or a model of the Hugging Face Hub, asked in batches.

What waits is answered as one batch by one thread, so that progress and Ctrl-C go on meanwhile. A row's
answer does not depend on its batch, see `mtgdm.student.sampling`.
"""

from __future__ import annotations

import asyncio
import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mtgdm.errors import SettingError, UserError
from mtgdm.student.installed import TRAINING, require
from mtgdm.teachers.seam import Backend, Completion, Options, Refused, Unavailable

if TYPE_CHECKING:
    from pydantic import BaseModel

    from mtgdm.domain import Domain, Message
    from mtgdm.student.chat import Chat
    from mtgdm.student.generation import Answer, Batches
    from mtgdm.student.sampling import Sampling
    from mtgdm.teachers.seam import TeacherSettings

GATHERING_S = 0.01
"""A batch that is not full starts after so long without a new question."""
TOKEN_S = 1.0
"""So long the end of a run waits for the thread, which looks up at every token, before it breaks it off."""
CLOSING_S = 10.0
"""So long it waits then: Python breaks off between two steps, never within one of PyTorch's."""
_SAVE_MEMORY = "--load-in-4bit, a smaller --max-tokens, or a smaller model"


@dataclass(eq=False)
class _Question:
    """What one caller waits for."""

    messages: Sequence[Message]
    options: Options
    answer: asyncio.Future[Completion]
    answered: bool = False
    """The thread has handed the answer over, though the caller may not have been told yet."""

    @property
    def over(self) -> bool:
        """Whether no more tokens are wanted: it is answered, or its caller has gone."""
        return self.answered or self.answer.done()


@dataclass(frozen=True)
class _Loaded:
    """The model and what is known of it."""

    model: Any
    context: int | None
    """The most tokens of prompt and answer together, where the model says so."""
    batches: Batches


class Transformers(Backend):
    """Generates with PyTorch, up to `concurrency` rows in a batch; halved where memory runs out."""

    timed: ClassVar[bool] = False

    def __init__(self, settings: TeacherSettings, domain: Domain) -> None:
        super().__init__(settings, domain)
        if not settings.model:
            raise SettingError(
                f"the teacher backend {settings.backend} needs a model", hint="--model FOLDER, or a Hub id"
            )
        self._chat: Chat | None = None
        self._loaded: _Loaded | None = None
        self._waiting: list[_Question] = []
        self._running: list[_Question] = []

    @property
    def sampling(self) -> dict[str, Any]:
        """What changes an answer; weights in 4-bit give slightly others."""
        return {**super().sampling, "load_in_4bit": self.settings.load_in_4bit}

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._worker = _Worker()
        self._dispatcher = asyncio.create_task(self._dispatch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dispatcher.cancel()
        await asyncio.wait([self._dispatcher])
        for question in (*self._waiting, *self._running):
            question.answer.cancel()
        await self._worker.close()

    async def check(self) -> None:
        """Read the configuration and the tokenizer; the weights are loaded at the first question."""
        await self._worker.do(self._read)

    async def answer(
        self, messages: Sequence[Message], contract: type[BaseModel] | None, options: Options
    ) -> Completion:
        """Wait for a place in a batch and for the answer; its seconds are those in the batch."""
        question = _Question(messages, options, self._loop.create_future())
        self._waiting.append(question)
        self._arrived.set()
        return await question.answer

    # --- in the event loop -----------------------------------------------------------------------

    async def _dispatch(self) -> None:
        while True:
            await self._arrived.wait()
            await self._gather()
            self._running, self._waiting = self._waiting, []
            self._arrived.clear()
            round_ = self._worker.do(partial(self._answer_all, self._running))
            try:
                await asyncio.wait([round_])
            finally:
                round_.cancel()  # the thread may outlive the event loop
            failed = round_.exception()
            for question in self._running:
                if failed is not None and not question.answer.done():
                    question.answer.set_exception(failed)

    async def _gather(self) -> None:
        """Wait until the batch is full or nobody joins any more."""
        seen = 0
        while seen < len(self._waiting) < self.settings.concurrency:
            seen = len(self._waiting)
            await asyncio.sleep(GATHERING_S)

    def _settle(self, question: _Question, result: Completion | Refused) -> None:
        if question.answer.done():
            return
        if isinstance(result, Completion):
            question.answer.set_result(result)
        else:
            question.answer.set_exception(result)

    # --- in the thread ---------------------------------------------------------------------------

    def _read(self) -> Chat:
        if self._chat is None:
            with _unavailable():
                require(*TRAINING, *(["bitsandbytes"] if self.settings.load_in_4bit else []))
                from mtgdm.student.noise import quiet

                with quiet():
                    from mtgdm.student import base, generation

                    base.place(self.settings.device_mode)
                    source = base.locate(self.model, Path.cwd())
                    self._chat = generation.load_chat(source, self.model, Path.cwd())
        return self._chat

    def _load(self) -> _Loaded:
        if self._loaded is None:
            from mtgdm.student import base, generation

            with _unavailable():
                model = generation.load(
                    base.locate(self.model, Path.cwd()),
                    self.model,
                    base.place(self.settings.device_mode),
                    workspace=Path.cwd(),
                    load_in_4bit=self.settings.load_in_4bit,
                )
            about = model.config.get_text_config()
            self._loaded = _Loaded(
                generation.merged(model),
                getattr(about, "max_position_embeddings", None),
                generation.Batches(self.settings.concurrency),
            )
        return self._loaded

    def _answer_all(self, questions: Sequence[_Question]) -> None:
        chat = self._read()
        from mtgdm.student.noise import quiet

        with quiet():
            loaded = self._load()
            asked = [
                (question, prompt)
                for question in questions
                if not question.over and (prompt := self._prompt(question, chat, loaded)) is not None
            ]
            prompts = [prompt for _, prompt in asked]
            for _ in loaded.batches.run(
                prompts, lambda places: self._batch(chat, loaded, [asked[place] for place in places])
            ):
                pass

    def _prompt(self, question: _Question, chat: Chat, loaded: _Loaded) -> list[int] | None:
        """The tokens of a question; one that cannot be asked is refused."""
        from mtgdm.student.chat import ChatProblem

        try:
            prompt = chat.prompt(question.messages)
        except ChatProblem as problem:
            self._hand_over(question, Refused(problem.message, hint=problem.hint))
            return None
        if loaded.context is not None and len(prompt) >= loaded.context:
            words = f"the prompt has {len(prompt)} tokens, and the model's context holds {loaded.context}"
            self._hand_over(question, Refused(words, hint="ask a model with a longer context"))
            return None
        return prompt

    def _batch(self, chat: Chat, loaded: _Loaded, asked: Sequence[tuple[_Question, list[int]]]) -> None:
        from mtgdm.student import base
        from mtgdm.student.sampling import sample

        asked = [one for one in asked if not one[0].over]
        if not asked:
            return
        prompts = [prompt for _, prompt in asked]
        how = [_sampling(question.options, len(prompt), loaded.context) for question, prompt in asked]
        try:
            sample(
                loaded.model,
                chat,
                prompts,
                how,
                wanted=lambda place: not asked[place][0].over,
                hand_over=lambda place, answer: self._hand_over(asked[place][0], _completion(answer)),
            )
        except RuntimeError as error:
            if len(asked) > 1 or not base.is_out_of_memory(error):
                raise
            refused = Refused("out of memory with this row alone", hint=_SAVE_MEMORY)
            self._hand_over(asked[0][0], refused)

    def _hand_over(self, question: _Question, result: Completion | Refused) -> None:
        question.answered = True
        self._loop.call_soon_threadsafe(self._settle, question, result)


def _sampling(options: Options, prompt_tokens: int, context: int | None) -> Sampling:
    from mtgdm.student.sampling import Sampling

    room = options.max_tokens if context is None else min(options.max_tokens, context - prompt_tokens)
    return Sampling(options.temperature, options.top_p, f"{options.seed} {options.row.id}", room)


def _completion(answer: Answer) -> Completion:
    return Completion(
        answer.text,
        answer.finish_reason,
        answer.prompt_tokens,
        answer.output_tokens,
        round(answer.latency_s, 6),
    )


@contextmanager
def _unavailable() -> Iterator[None]:
    """What is wrong with the model stops the run; its flag is called otherwise here than in training."""
    try:
        yield
    except UserError as error:
        hint = error.hint and error.hint.replace("--student-base", "--model")
        if isinstance(error.__cause__, RuntimeError):
            from mtgdm.student.base import is_out_of_memory

            hint = _SAVE_MEMORY if is_out_of_memory(error.__cause__) else hint
        raise Unavailable(error.message, hint=hint, where=error.where) from error


class _BrokenOff(BaseException):
    """Raised in the thread where the run ends while it loads a model, which never looks up by itself."""


class _Worker:
    """One thread for all that takes long; unlike an executor's, it does not keep the process from ending."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="mtgdm-teacher", daemon=True)
        self._thread.start()

    def do(self, job: Callable[[], Any]) -> asyncio.Future[Any]:
        """What the job returns or raises, once it has been done after those before it."""
        done: Future[Any] = Future()
        self._jobs.put((job, done))
        return asyncio.wrap_future(done)

    async def close(self) -> None:
        """End the thread: Python aborts where one is inside PyTorch as the process ends."""
        self._jobs.put(None)
        if not await self._ended(TOKEN_S):
            thread = ctypes.c_ulong(self._thread.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_BrokenOff))
            await self._ended(CLOSING_S)

    async def _ended(self, longest_s: float) -> bool:
        until = time.monotonic() + longest_s
        while self._thread.is_alive() and time.monotonic() < until:
            await asyncio.sleep(GATHERING_S)
        return not self._thread.is_alive()

    def _work(self) -> None:
        with suppress(_BrokenOff):
            while (waiting := self._jobs.get()) is not None:
                job, done = waiting
                if not done.set_running_or_notify_cancel():
                    continue
                try:
                    result = job()
                except BaseException as error:  # noqa: BLE001 - whoever waits for the job raises it
                    done.set_exception(error)
                else:
                    done.set_result(result)
