"""The contract of a stage plugin: one pydantic Config and one `run(config, context)`.

    class ShoutConfig(StageConfig):
        word: str = "hello"
        '''What to shout.'''

    @stage
    def run(config: ShoutConfig, context: Context):
        '''Shout a word.'''
        context.print(config.word.upper())

From the Config alone come the flags, the YAML section, the environment variables, the JSON Schema and
the completion. Mark path settings with `Input` and `Output`, and mtgdm keeps the manifests, knows when
the stage is stale, and runs it inside `mtgdm all` only when there is something to do.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import logging
import textwrap
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, model_validator

from mtgdm import processes
from mtgdm.errors import SettingError
from mtgdm.estimates import Expected
from mtgdm.plugins import named
from mtgdm.rows import is_manifest
from mtgdm.shipped import PREFIX, shipped

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from mtgdm.domain import Domain
    from mtgdm.terminal import Progress, Terminal

__all__ = [
    "Context",
    "Expected",
    "Flag",
    "Input",
    "Output",
    "Result",
    "Runtime",
    "Stage",
    "StageConfig",
    "stage",
]


TIMESTAMP = "%Y%m%d-%H%M%S"
"""A moment in the names of files: sorted by name they are sorted by time."""


@dataclass(frozen=True)
class Input:
    """Marks a path setting whose content the result depends on.

    `newest` picks the last file of a folder by glob; with `optional` a file that is not there is no input.
    """

    newest: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class Output:
    """Marks a path setting the stage writes; `newest` says how the files are called inside a folder."""

    newest: str | None = None


@dataclass(frozen=True)
class Runtime:
    """Marks a setting that changes how a stage runs but not what it makes: another value is not stale."""


@dataclass(frozen=True)
class Flag:
    """More about a setting on the command line: other names for the flag, or none at all.

    `json`: a mapping, which a flag and an environment variable give as JSON; others only a profile can hold.
    """

    also: tuple[str, ...] = ()
    hidden: bool = False
    json: bool = False


class StageConfig(BaseModel):
    """Settings of a stage. Subclass it with typed, documented fields; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        validate_by_name=True,
        validate_by_alias=True,
        protected_namespaces=(),
        defer_build=True,  # `--help` looks at the fields alone; the validator is built when settings are read
    )

    several_processes: ClassVar[bool] = False
    """Whether torchrun or `accelerate launch` may start the stage more than once; see `mtgdm.processes`."""

    @model_validator(mode="before")
    @classmethod
    def _split_lists(cls, values: Any) -> Any:
        """Let a list be given as `a,b`, as flags and environment variables do."""
        if not isinstance(values, dict):
            return values
        split = dict(values)
        for name, info in cls.model_fields.items():
            for key in (name, info.alias):
                if key in split and isinstance(split[key], str) and is_list(info.annotation):
                    split[key] = [part.strip() for part in split[key].split(",") if part.strip()]
        return split

    @classmethod
    def descriptions(cls) -> dict[str, str]:
        """What the docstring under each field says, by field name.

        Pydantic's `use_attribute_docstrings` reads the source of every class as it is made, a tenth of
        the time of `mtgdm --help`, which shows none of it: here it is read when it is asked for.
        """
        found: dict[str, str] = {}
        for kind in reversed(cls.__mro__):
            if issubclass(kind, StageConfig) and kind is not StageConfig:
                found.update(_attribute_docstrings(kind))
        described = {name: info.description for name, info in cls.model_fields.items() if info.description}
        return found | described

    def resolved(self, workspace: Path) -> Self:
        """The same settings with every path absolute: under the workspace, or where mtgdm ships it."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return self.model_copy(update={name: _absolute(value, workspace) for name, value in values.items()})

    def inputs(self) -> list[Path]:
        """The files and folders the result is made from; those not marked with `Input` are added here."""
        return list(self._marked(Input))

    def outputs(self) -> list[Path]:
        """The files and folders the stage writes."""
        return list(self._marked(Output))

    def finished(self) -> tuple[int, int] | None:
        """What an interrupted run has done, as (done, all), where the stage can tell."""
        return None

    def estimate(self) -> dict[str, Any]:
        """What a run would have to do, for `mtgdm plan`: counts by name, from the inputs that are there.

        What is only expected is an `Expected`, with its range; see `mtgdm.estimates` for how names are shown.
        """
        return {}

    def probe(self, count: int, context: Context) -> dict[str, Any]:
        """The same after trying `count` items, for `mtgdm plan --probe N`; nothing of it stays on disk."""
        return self.estimate()

    def _marked(self, kind: type[Input] | type[Output]) -> Iterator[Path]:
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            for mark in info.metadata:
                if not isinstance(mark, kind) or not isinstance(value, Path):
                    continue
                path = newest(value, mark.newest) if mark.newest else value
                if path.exists() or not getattr(mark, "optional", False):
                    yield path


@dataclass(frozen=True)
class Result:
    """What a run has to say: counts for the manifest, a line for the end, and outputs named by time."""

    counts: dict[str, Any] = field(default_factory=dict)
    summary: str = ""
    outputs: list[Path] | None = None
    """Where the files written differ from `config.outputs()` (reports carry a timestamp)."""


ConfigT = TypeVar("ConfigT", bound=StageConfig)


@dataclass
class Stage(Generic[ConfigT]):
    """A function with its Config; callable like the function itself."""

    function: Callable[[ConfigT, Context], Result | None]
    config: type[ConfigT]
    name: str = ""
    package: str = ""

    @property
    def help(self) -> str:
        """The docstring of the function, which is the help of the command."""
        return inspect.getdoc(self.function) or ""

    @property
    def section(self) -> str:
        """The stage's name in YAML keys and environment variables: `eval-report` is `eval_report`."""
        return self.name.replace("-", "_")

    def __call__(self, config: ConfigT, context: Context) -> Result | None:
        """Run the stage."""
        return self.function(config, context)


def stage(function: Callable[[ConfigT, Context], Result | None]) -> Stage[ConfigT]:
    """Make a stage of `run(config: SomeConfig, context: Context)`."""
    parameters = list(inspect.signature(function).parameters)
    hints = typing.get_type_hints(function, localns={"Context": Context})
    config = hints.get(parameters[0]) if parameters else None
    if len(parameters) != 2 or not (isinstance(config, type) and issubclass(config, StageConfig)):
        raise TypeError(f"{function.__qualname__} must be run(config: SomeStageConfig, context: Context)")
    return Stage(function, cast(type[ConfigT], config))


class Context:
    """What a stage may touch beside its settings: the workspace, the terminal, its log, its domain."""

    def __init__(
        self,
        *,
        stage: str,
        workspace: Path,
        terminal: Terminal,
        domain: str,
        profile: str,
        started: datetime,
        may_replace: bool = False,
    ) -> None:
        self.stage = stage
        self.workspace = workspace
        self.terminal = terminal
        self.domain_name = domain
        self.profile = profile
        self.started = started
        self.may_replace = may_replace
        """Whether a finished output may give way to one of other settings: `mtgdm all` says so of what it made."""

    @property
    def timestamp(self) -> str:
        """When the run began, as in file names: `20261123-143000`."""
        return self.started.strftime(TIMESTAMP)

    @cached_property
    def domain(self) -> Domain:
        """The domain the profile names."""
        domain: Domain = named("mtgdm.domains", self.domain_name, "domain")()
        return domain

    def log_path(self, suffix: str) -> Path:
        """A file of this run under `log/`: `log_path(".metrics.jsonl")`; the folder is made."""
        folder = self.workspace / "log"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{self.stage}-{self.timestamp}{suffix}"

    @cached_property
    def log(self) -> logging.Logger:
        """The run's log file, made at the first use; the first of several processes keeps it."""
        logger = logging.Logger(f"mtgdm.{self.stage}", logging.DEBUG)
        if not processes.is_first():
            logger.addHandler(logging.NullHandler())
            return logger
        handler = _LogFile(self.log_path(".log"), self.terminal.warn)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        return logger

    def print(self, text: str) -> None:
        """A line for the user."""
        self.terminal.print(text)

    def warn(self, text: str) -> None:
        """A line the user should read, on the terminal and in the log."""
        self.terminal.warn(text)
        self.log.warning(text)

    def progress(self, total: int | None, unit: str, *, done: int = 0) -> AbstractContextManager[Progress]:
        """A progress bar: `with context.progress(600, "rows") as bar: bar.advance()`."""
        return self.terminal.progress(self.stage, total, unit, done=done)

    def close(self) -> None:
        """Close the log, where one was opened."""
        if "log" in self.__dict__:
            for handler in self.log.handlers:
                handler.close()


class _LogFile(logging.Handler):
    """A file of log lines that stops no run: where it cannot be written, a warning says so once."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        super().__init__()
        self._path = path
        self._warn = warn
        self._file = path.open("ab", buffering=0)  # nothing is left to be written when it is closed
        self._failed = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._file.closed:
                # `logging.config.dictConfig`, which some libraries call as they start, closes every handler there is.
                self._file = self._path.open("ab", buffering=0)
            self._file.write(f"{self.format(record)}\n".encode("utf-8", "backslashreplace"))
        except OSError as error:
            if not self._failed:
                self._failed = True
                self._warn(f"{self._path}: the log cannot be written, the run goes on: {error.strerror}")

    def close(self) -> None:
        self._file.close()
        super().close()


def _attribute_docstrings(kind: type[Any]) -> Iterator[tuple[str, str]]:
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):  # a class made in a shell has no source
        return
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    for field_, text in itertools.pairwise(definition.body):
        if (
            isinstance(field_, ast.AnnAssign)
            and isinstance(field_.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        ):
            yield field_.target.id, inspect.cleandoc(text.value.value)


def newest(folder: Path, pattern: str) -> Path:
    """The last file of a folder by name that matches (names carry timestamps), or the pattern's own path."""
    found = sorted(path for path in folder.glob(pattern) if not is_manifest(path)) if folder.is_dir() else []
    return found[-1] if found else folder / pattern


def marks(info: FieldInfo, kind: type[Any]) -> list[Any]:
    """The marks of one kind on a field."""
    return [mark for mark in info.metadata if isinstance(mark, kind)]


def key_of(name: str, info: FieldInfo) -> str:
    """A field's name for users: `in_` with the alias `in` is `in`."""
    return info.alias or name


def plain_type(annotation: Any) -> Any:
    """An annotation without `| None`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(annotation) if member is not types.NoneType]
        return members[0] if len(members) == 1 else annotation
    return annotation


def is_list(annotation: Any) -> bool:
    """Whether a setting holds a list, which flags take as `a,b`."""
    return typing.get_origin(plain_type(annotation)) in (list, tuple)


def _absolute(value: Any, workspace: Path) -> Any:
    """A path, or a list of them, made absolute; any other value as it is."""
    if isinstance(value, list | tuple):
        return type(value)(_absolute(one, workspace) for one in value)
    if not isinstance(value, Path):
        return value
    text = value.as_posix()
    if text.startswith(PREFIX):
        return shipped(text.removeprefix(PREFIX))
    return workspace / expanded(value)


def expanded(path: Path, *, where: str | None = None) -> Path:
    """A path with `~` as the folder it stands for; SettingError where it names nobody."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise SettingError(f"{path.parts[0]} is no user of this machine: {path}", where=where) from error
