"""The contract of a teacher backend, which enters through the entry-point group `mtgdm.teachers`.

A backend asks one question and says what came back. Retries, concurrency, timeouts, repair and
validation stand above it in `mtgdm.teachers.loop`, so that every backend has them. What goes wrong is
said with one of three errors:

    Retryable       it can pass: a lost connection, a busy server, half a body
    Refused         it cannot, for this one question: the server will not take it
    Unavailable     it cannot, for every question: no server, no such model, no key; the run stops
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import BeforeValidator, Field

from mtgdm.errors import UserError
from mtgdm.manifest import settings_digest, without_password
from mtgdm.stage import Flag, Runtime, StageConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic import BaseModel

    from mtgdm.domain import Domain, Message
    from mtgdm.rows import Row

GROUP = "mtgdm.teachers"
"""The entry-point group of backends: `named(GROUP, name, "teacher backend")` gives the class."""


class Retryable(Exception):
    """A failure that can pass."""

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float | None = None,
        another_seed: bool = False,
        overloaded: bool = False,
        lost: bool = False,
    ) -> None:
        """What happened, and what it asks for.

        another_seed: the same question would only fail the same way again
        overloaded: the teacher has too much to do (429, 503): fewer questions in flight
        lost: the teacher was not reached: where there are several, the others are asked
        """
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.another_seed = another_seed
        self.overloaded = overloaded
        self.lost = lost


class Refused(Exception):
    """A failure that belongs to this question and would come again."""

    def __init__(self, message: str, *, hint: str | None = None, setting: bool = False) -> None:
        """`setting`: another setting, which the hint names, would make the server take the question."""
        super().__init__(message)
        self.hint = hint
        self.setting = setting


class Unavailable(UserError):
    """The teacher cannot be asked at all; the hint says how that is mended."""


def _json_object(given: Any) -> Any:
    """A mapping as flags and environment variables give it: as JSON."""
    if not isinstance(given, str):
        return given
    if not given.strip():
        return {}
    try:
        value = json.loads(given)
    except ValueError as error:
        raise ValueError(f"this is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("this is no JSON object")
    return value


JsonObject = Annotated[dict[str, Any], BeforeValidator(_json_object)]
"""A mapping in a profile, JSON on the command line."""


class TeacherSettings(StageConfig):
    """How a teacher is asked; the settings of the teacher stage that backends read."""

    backend: str = "offline"
    """Who answers: ollama, openai (vLLM and the like), transformers, offline (a template, no model), or a plugin."""
    model: str | None = None
    """The teacher's model, as the server calls it (qwen2.5:32b-instruct-q4_K_M), or a Hub id or folder."""
    url: Annotated[list[str], Runtime(), Flag(also=("ollama_url",))] = Field(
        ["http://localhost:11434"], min_length=1
    )
    """Where the teacher's server listens; several addresses share the work, a dead one is left aside."""
    api_key_env: Annotated[str, Runtime()] = "OPENAI_API_KEY"
    """The environment variable that holds the key of an OpenAI-compatible server, where it wants one."""
    ollama_num_gpu: Annotated[int, Runtime()] = Field(999, ge=-1)
    """Layers Ollama puts on the GPU: 999 is all, 0 none, -1 as Ollama sees fit."""
    device_mode: Annotated[Literal["cuda0", "auto", "cpu"], Runtime()] = "auto"
    """Where a transformers teacher runs: the first GPU, all there are (else the CPU), or the CPU."""
    load_in_4bit: bool = False
    """Load a transformers teacher in 4-bit NF4: a quarter of the memory, slightly other answers."""
    num_ctx: Annotated[int, Runtime()] = Field(0, ge=0)
    """Context in tokens; 0 sizes it from the longest prompt and the answer."""
    temperature: float = Field(0.3, ge=0, le=2)
    """Sampling temperature; 0 always takes the likeliest token."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Share of the probability mass that is sampled from."""
    max_tokens: Annotated[int, Runtime()] = Field(3072, ge=1)
    """Longest answer in tokens; one that is cut there is never kept."""
    seed: int = Field(42, ge=0)
    """Seed of the sampling."""
    extra_body: Annotated[JsonObject, Flag(json=True)] = Field(default_factory=dict)
    """More keys for each request, as JSON: {"chat_template_kwargs": {"enable_thinking": false}}."""
    stream: Annotated[bool, Runtime()] = True
    """Read answers of a server as they are written; without it a loop or a stall is seen only at the end."""
    timeout_s: Annotated[float, Runtime(), Flag(also=("timeout",))] = Field(120.0, gt=0)
    """How long a server may write nothing once an answer has begun."""
    first_token_timeout_s: Annotated[float, Runtime()] = Field(600.0, gt=0)
    """How long the first token may take: the server may queue the request, or load its model first."""
    deadline_s: Annotated[float, Runtime(), Flag(also=("deadline",))] = Field(0.0, ge=0)
    """How long one answer may take in all; 0 sets no limit."""
    concurrency: Annotated[int, Runtime()] = Field(4, ge=1)
    """Questions in flight at once, at most: fewer while the teacher says that it has too much to do."""
    retries: Annotated[int, Runtime()] = Field(6, ge=0)
    """How often a failure that can pass is tried again, with growing pauses."""


class Watch(Protocol):
    """Sees an answer while it is written, and may have it stopped."""

    def heard(self, text: str) -> bool:
        """One more piece of the answer; True where it is to be stopped."""
        ...

    def thought(self, text: str) -> bool:
        """One more piece of the model's thoughts, which are no part of the answer."""
        ...

    def alive(self) -> None:
        """Something was heard just now: the silence is over."""
        ...


class Unwatched:
    """Looks at nothing and stops nothing."""

    def heard(self, text: str) -> bool:
        """Go on."""
        return False

    def thought(self, text: str) -> bool:
        """Go on."""
        return False

    def alive(self) -> None:
        """Nobody waits for it."""


@dataclass(frozen=True)
class Options:
    """What one call is made with; `row` is the prompt row the messages come from.

    A backend that reads an answer as it is written hands each piece to `watch`, and ends the request where
    that says so: the Completion then holds the text so far, with the finish reason `stopped`.
    """

    temperature: float
    top_p: float
    seed: int
    max_tokens: int
    row: Row
    watch: Watch = field(default_factory=Unwatched, compare=False)


@dataclass(frozen=True)
class Completion:
    """What a teacher said. Token counts are None where the backend has none to give."""

    text: str
    finish_reason: str
    """`stop` where the answer came to its own end, `length` where it was cut, `stopped` where the watch had it
    stopped, `repetition` where the server gave up on a loop; others as the server says, see `finish.py`."""
    prompt_tokens: int | None
    output_tokens: int | None
    seconds: float
    adjusted: str = ""
    """How it was asked for otherwise than the settings say, as the server would not take that: `without seed`."""


class Backend(ABC):
    """A teacher: used as an async context manager, asked by several tasks at once."""

    has_url: ClassVar[bool] = False
    """Whether it is reached over `settings.url`: then one backend is made for each address."""
    timed: ClassVar[bool] = True
    """Whether an answer is given up that does not come in time; work in this process is not."""
    parallel_hint: ClassVar[str] = ""
    """How its server is made to write `{slots}` answers at once."""
    holds_to_schema: bool = False
    """Whether a JSON answer is held to its contract while it is written; a server may turn out not to."""

    def __init__(self, settings: TeacherSettings, domain: Domain) -> None:
        """Keep the settings, open nothing; SettingError where one is missing.

        `num_ctx` is sized by now, and `url` holds the one address that this backend asks.
        """
        self.settings = settings
        self.domain = domain
        self.tell: Callable[[str], None] = lambda text: None
        """Called with what the user should know of how the teacher had to be asked, each once."""

    @property
    def adjustments(self) -> list[str]:
        """How its server had to be asked otherwise than the settings say: `without seed`."""
        return []

    @property
    def model(self) -> str:
        """What answers, as rows name it."""
        return self.settings.model or ""

    @property
    def place(self) -> str:
        """What is asked, as messages name it: the address without a name and a password, or the backend."""
        return without_password(self.settings.url[0]) if self.has_url else self.settings.backend

    @property
    def sampling(self) -> dict[str, Any]:
        """What changes an answer beside the backend and the model."""
        found: dict[str, Any] = {
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "seed": self.settings.seed,
        }
        if self.settings.extra_body:
            found["extra_body"] = self.settings.extra_body
        return found

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over everything that changes an answer.

        `max_tokens` is not in it: a cut answer is never kept, so a kept one does not depend on the limit,
        and a larger limit may finish what a smaller one left over.
        """
        said = {"backend": self.settings.backend, "model": self.model, **self.sampling}
        return settings_digest(said)[:16]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @abstractmethod
    async def check(self) -> None:
        """Raise Unavailable where nothing could be asked now, Retryable where the server is only busy."""

    @abstractmethod
    async def answer(
        self, messages: Sequence[Message], contract: type[BaseModel] | None, options: Options
    ) -> Completion:
        """Ask once. `contract` is the model of a JSON answer, None where prose is wanted."""
