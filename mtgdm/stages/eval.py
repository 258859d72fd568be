"""The student, and with --compare-base its base model, on spots it has never seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field

from mtgdm import manifest, rows
from mtgdm.checkpoints import chosen_checkpoint, newest_checkpoint
from mtgdm.errors import BadRow, SettingError, UserError
from mtgdm.rows import Row
from mtgdm.stage import Context, Flag, Input, Output, Result, Runtime, StageConfig, stage
from mtgdm.teachers.seam import JsonObject
from mtgdm.terminal import counted

if TYPE_CHECKING:
    from mtgdm.evaluation.pairwise import PairwiseJudge
    from mtgdm.evaluation.run import Evaluated
    from mtgdm.evaluation.student import Student
    from mtgdm.evaluation.training import Training
    from mtgdm.teachers.seam import TeacherSettings

IN_THIS_PROCESS = ("local", "vllm")
SHOWN_REASONS = 3
"""So many reasons for rows that could not be asked are shown; the log has them all."""


class EvalConfig(StageConfig):
    """Settings of `mtgdm eval`."""

    backend: str = "local"
    """Where the student runs: local (here), vllm (here, in vLLM), or a server of a teacher backend: ollama, openai."""
    model: str | None = None
    """The student: a checkpoint (by default the newest), a model folder, a Hub id, or what the server calls it."""
    base_model: str | None = None
    """The base, where a checkpoint does not say where it lies; what a merged or served student is compared with."""
    test: Annotated[Path, Input()] = Path("data/teacher.jsonl")
    """Rows with the teacher's answers, which are the reference."""
    split: Literal["train", "val", "test", "all"] = "test"
    """Which rows of the file are asked; all takes every one, of a file that was made for testing."""
    out: Annotated[Path, Output()] = Path("data/eval_outputs.jsonl")
    """Where the answers and their metrics go; the worst go beside it too, to eval_failures.jsonl."""
    compare_base: bool = False
    """Ask the base model too, the same rows; the shipped profiles do."""
    constrained: bool = False
    """Hold JSON answers to the schema of their contract while they are written; servers and vllm can."""
    allow_leak: bool = False
    """Ask rows whose spot the student was trained on."""
    trained_on: Path | None = None
    """The checkpoint that a merged or served student was made from, which knows the spots it was trained on."""
    prompt_check: Annotated[bool, Runtime()] = True
    """Stop where a server renders the first prompt otherwise than the training did; needs --trained-on."""
    limit: int = Field(0, ge=0)
    """Only the first N rows; 0 asks all."""
    overwrite: Annotated[bool, Runtime()] = False
    """Start anew instead of going on."""
    log_every: Annotated[int, Runtime()] = Field(10, ge=1)
    """A line in the log every so many rows."""
    device_mode: Literal["cuda0", "auto", "cpu"] = "auto"
    """First GPU, what there is, or the CPU."""
    load_in_4bit: bool = False
    """Hold the base in 4-bit NF4."""
    max_new_tokens: int = Field(0, ge=0)
    """Most tokens of an answer; 0 allows a quarter more than the longest reference has."""
    batch: Annotated[int, Runtime()] = Field(0, ge=0)
    """Rows generated at once; 0 takes what fits into memory. Halved where memory runs out."""
    url: Annotated[list[str], Runtime(), Flag(also=("ollama_url",))] = Field(
        ["http://localhost:11434"], min_length=1
    )
    """Where the student's server listens; several addresses share the work."""
    api_key_env: Annotated[str, Runtime()] = "OPENAI_API_KEY"
    """The environment variable that holds the key of an OpenAI-compatible server, where it wants one."""
    ollama_num_gpu: Annotated[int, Runtime()] = Field(999, ge=-1)
    """Layers Ollama puts on the GPU: 999 is all, 0 none, -1 as Ollama sees fit."""
    num_ctx: Annotated[int, Runtime()] = Field(0, ge=0)
    """Context of the server in tokens; 0 sizes it from the longest prompt and the answer."""
    extra_body: Annotated[JsonObject, Flag(json=True)] = Field(default_factory=dict)
    """More keys for each request to a server, as JSON: {"chat_template_kwargs": {"enable_thinking": false}}."""
    stream: Annotated[bool, Runtime()] = True
    """Read answers of a server as they are written."""
    timeout_s: Annotated[float, Runtime(), Flag(also=("timeout",))] = Field(120.0, gt=0)
    """How long a server may write nothing once an answer has begun."""
    first_token_timeout_s: Annotated[float, Runtime()] = Field(600.0, gt=0)
    """How long the first token of a server may take: it may queue the request, or load its model first."""
    deadline_s: Annotated[float, Runtime(), Flag(also=("deadline",))] = Field(0.0, ge=0)
    """How long one answer of a server may take in all; 0 sets no limit."""
    concurrency: Annotated[int, Runtime()] = Field(4, ge=1)
    """Questions in flight at a server, at most."""
    retries: Annotated[int, Runtime()] = Field(6, ge=0)
    """How often a server's failure that can pass is tried again."""
    judge_model: str | None = None
    """A model that says of each pair of answers which is better; by default none is asked."""
    judge_backend: str = "ollama"
    """Where the judge runs: ollama, openai, or another teacher backend."""
    judge_extra_body: Annotated[JsonObject, Flag(json=True)] = Field(default_factory=dict)
    """More keys for each request to the judge, as JSON."""
    judge_url: Annotated[list[str], Runtime()] = Field(["http://localhost:11434"], min_length=1)
    """Where the judge's server listens."""
    checkpoints: Annotated[Path, Flag(hidden=True)] = Path("data/checkpoints")
    """Where the newest checkpoint is looked for."""

    def resolved(self, workspace: Path) -> Self:
        """The same settings with every path absolute, a model folder of the workspace too."""
        absolute = super().resolved(workspace)
        if not self._here or self.model is None or not (workspace / self.model).is_dir():
            return absolute
        return absolute.model_copy(update={"model": str(workspace / self.model)})

    def inputs(self) -> list[Path]:
        """The rows and, where it is a folder, the student."""
        inputs = super().inputs()
        if self.trained_on is not None:
            inputs.append(self.trained_on)
        if not self._here:
            return inputs
        if self.model is None:
            return [*inputs, newest_checkpoint(self.checkpoints) or self.checkpoints]
        folder = Path(self.model)
        return [*inputs, *([folder] if folder.is_dir() else [])]

    def outputs(self) -> list[Path]:
        """The answers, and the failures among them."""
        from mtgdm.evaluation.failures import failures_path

        return [self.out, failures_path(self.out)]

    def finished(self) -> tuple[int, int] | None:
        """Rows answered and to answer of an interrupted run."""
        if not self.out.is_file() or not self.test.is_file():
            return None
        wanted = {row.id for row in islice(_selected(self), self.limit or None)}
        done: set[str] = set()
        with suppress(BadRow):  # a kill cut the last line off; the next run mends it
            done.update(row.id for row in rows.read_rows(self.out))
        return len(done & wanted), len(wanted)

    @property
    def _here(self) -> bool:
        return self.backend in IN_THIS_PROCESS


@stage
def run(config: EvalConfig, context: Context) -> Result:
    """Evaluate the student on held-out spots, beside its base with --compare-base; resumes."""
    with _environment(config):
        in_split = _in_split(config, context)
        wanted = in_split[: config.limit or None]
        if config.split != "all" and not any("split" in row.meta for row in wanted):
            context.print(
                f"the rows carry no split: asked are the {len(wanted):,} whose spot falls into `{config.split}`; "
                "--split all asks every row"
            )
        name = _name(config)
        from mtgdm.evaluation.thoughts import with_thoughts

        # Of all rows of the split: the first --limit of them are asked under the limit of tokens that all are.
        references = [with_thoughts(row) for row in in_split]
        student = _student(name, wanted, references, config, context)
        leaked = _refuse_leak(name, wanted, config, context)
        compare = config.compare_base and student.base_name is not None
        if config.compare_base and not compare:
            context.warn(
                f"{student.name} names no base model, so it is evaluated alone; --base-model NAME compares it"
            )
        known = [row.id for row in in_split]
        return _evaluated(student, wanted, known, leaked, compare, config, context)


def _evaluated(
    student: Student,
    wanted: list[Row],
    known: Sequence[str],
    leaked: set[str],
    compare: bool,
    config: EvalConfig,
    context: Context,
) -> Result:
    from mtgdm.evaluation.failures import failures_path, write_failures
    from mtgdm.evaluation.run import Evaluation

    judge = _judge(config, context) if config.judge_model is not None else None
    evaluation = Evaluation(
        student,
        wanted,
        context,
        out=config.out,
        test=manifest.relative(config.test, context.workspace),
        known=known,
        compare=compare,
        settings=[config.split, compare, _base_by_name(compare, config), config.max_new_tokens],
        about=_about(student, compare, config),
        leaked=leaked,
        partial=bool(config.limit),
        overwrite=config.overwrite,
        log_every=config.log_every,
    )
    found = evaluation.run()
    for remark in student.remarks():
        context.warn(remark)
    failures = failures_path(config.out)
    bad = write_failures(failures, found.rows)
    _tell_refused(found.refused, wanted, context)
    if bad:
        place = manifest.relative(failures, context.workspace)
        context.print(
            f"{bad:,} of {counted(len(found.rows), 'answer')} with something wrong: {place}, the worst first"
        )
    if judge is not None:
        evaluation.add_verdicts(found, _judged(judge, found, context), by=judge.name)
    return Result(
        counts={
            "rows": len(found.rows),
            "refused": len(found.refused),
            "leaked": len(leaked),
            "failures": bad,
            "student": _rounded(found.student),
            "base": _rounded(found.base) or None,
        },
        summary=_summary(wanted, config.split, found),
    )


def _environment(config: EvalConfig) -> AbstractContextManager[None]:
    """What a student in this process needs; a server needs nothing of it."""
    if config.backend not in IN_THIS_PROCESS:
        return nullcontext()
    from mtgdm.student.installed import TRAINING, require

    require(*TRAINING, *(["bitsandbytes"] if config.load_in_4bit else []))
    from mtgdm.student.noise import quiet

    return quiet()


# --- rows ----------------------------------------------------------------------------------------


def _in_split(config: EvalConfig, context: Context) -> list[Row]:
    """The rows of the split, each prompt once; UserError where there are none."""
    if not config.test.exists():
        raise UserError(
            "there is no such file",
            where=config.test,
            hint="`mtgdm teacher` writes data/teacher.jsonl; --test names another file of answered rows",
        )
    counts: Counter[str] = Counter()
    found = list(_selected(config, counts))
    if not counts:
        raise UserError("the file holds no rows", where=config.test)
    if not found:
        raise UserError(
            f"no row is in the split `{config.split}`",
            where=config.test,
            hint="--split names another split; --split all asks every row",
        )
    if repeated := counts["asked"] - len(found):
        context.warn(
            f"{counted(repeated, 'row')} with a prompt that stands in the file before: the first alone is asked"
        )
    return found


def _selected(config: EvalConfig, counts: Counter[str] | None = None) -> Iterator[Row]:
    """The rows of the split, each id once; `counts` learns how many were `read`, and would be `asked`."""
    seen: set[str] = set()
    counts = Counter() if counts is None else counts
    for row in rows.read_rows(config.test, answered=True):
        counts["read"] += 1
        if config.split not in (row.split, "all"):
            continue
        counts["asked"] += 1
        if row.id not in seen:
            seen.add(row.id)
            yield row


def _trainings(name: str, config: EvalConfig) -> list[Training]:
    """What is known of the training: from the checkpoint itself, and from the one that --trained-on names."""
    from mtgdm.evaluation.training import Training

    named = config.trained_on
    given = Training.of(named) if named is not None else None
    if named is not None and given is None:
        raise UserError(
            "this folder has no training.json, so it is no checkpoint of `mtgdm train`"
            if named.is_dir()
            else "there is no such folder",
            where=named,
            hint="--trained-on names the checkpoint that the student was made from",
        )
    own = Training.of(Path(name)) if config.backend in IN_THIS_PROCESS else None
    return [one for one in (own, given) if one is not None]


def _refuse_leak(name: str, wanted: Sequence[Row], config: EvalConfig, context: Context) -> set[str]:
    """The ids of rows about what the student was trained on; without --allow-leak there may be none."""
    trainings = _trainings(name, config)
    if not trainings:
        context.warn(
            f"whether {_shown(name, context)} was trained on these spots cannot be told: it has no training.json; "
            "--trained-on CHECKPOINT tells it"
        )
        return set()
    if unnamed := sum(row.spot is None for row in wanted):
        context.warn(
            f"{counted(unnamed, 'row')} that name no spot: only whether the very prompt was trained on can be told"
        )
    found = {row.id for training in trainings for row in training.leaked(wanted)}
    leaked = [row for row in wanted if row.id in found]
    if leaked and not config.allow_leak:
        spots = len({row.spot or row.id for row in leaked})
        raise UserError(
            f"the student was trained on {spots:,} of these spots ({len(leaked):,} of "
            f"{counted(len(wanted), 'row')}): its answers would say nothing about spots it does not know",
            where=config.test,
            hint="--split test asks held-out spots; --allow-leak evaluates all the same",
        )
    if leaked:
        context.warn(f"{len(leaked):,} of {len(wanted):,} rows are about spots the student was trained on")
    return {row.id for row in leaked}


# --- who is asked --------------------------------------------------------------------------------


def _name(config: EvalConfig) -> str:
    if config.backend in IN_THIS_PROCESS:
        return chosen_checkpoint(config.model, config.checkpoints)
    return config.model or config.backend


def _shown(name: str, context: Context) -> str:
    """A folder as a user knows it."""
    return manifest.relative(Path(name), context.workspace) if Path(name).is_absolute() else name


def _student(
    name: str, wanted: Sequence[Row], references: Sequence[str], config: EvalConfig, context: Context
) -> Student:
    if config.backend == "local":
        if config.constrained:
            raise SettingError(
                "a student in this process cannot be held to a schema",
                hint="--backend ollama, openai or vllm can; or leave out --constrained",
            )
        from mtgdm.evaluation.local import Local

        return Local(
            name,
            wanted,
            workspace=context.workspace,
            base_model=config.base_model,
            device_mode=config.device_mode,
            load_in_4bit=config.load_in_4bit,
            batch=config.batch,
            max_new_tokens=config.max_new_tokens,
            references=references,
        )
    if config.backend == "vllm":
        from mtgdm.evaluation.vllm_engine import Vllm

        return Vllm(
            name,
            wanted,
            context.domain,
            workspace=context.workspace,
            base_model=config.base_model,
            load_in_4bit=config.load_in_4bit,
            constrained=config.constrained,
            max_new_tokens=config.max_new_tokens,
            references=references,
        )
    from mtgdm.evaluation.served import Served, answer_limit
    from mtgdm.evaluation.training import Training

    limit = config.max_new_tokens or answer_limit(references)
    trained = Training.of(config.trained_on) if config.trained_on is not None else None
    if trained is not None and config.prompt_check and wanted:
        _check_first_prompt(wanted[0], trained, config, context)
    return Served(
        _server(config, config.backend, config.model, config.url, limit, config.extra_body),
        wanted,
        context.domain,
        base_model=config.base_model,
        constrained=config.constrained,
        normalise=trained is not None and trained.normalises,
        may_think=trained is None or trained.thoughts,
        say=context.log.info,
        warn=context.warn,
    )


def _check_first_prompt(row: Row, trained: Training, config: EvalConfig, context: Context) -> None:
    """UserError where a server asks the student otherwise than it was trained, as far as a server shows that."""
    from mtgdm.student.installed import TRAINING, missing

    if config.backend not in ("ollama", "openai") or not config.model or missing(*TRAINING):
        return
    from mtgdm.student.noise import quiet

    with quiet():
        from mtgdm.evaluation import served_prompt
        from mtgdm.student.generation import load_chat

        try:
            chat = load_chat(str(trained.path.parent), trained.path.parent.name, context.workspace)
        except UserError as error:
            context.print(f"the server's prompts are not compared with the training's: {error}")
            return
        trained.check_chat(chat)
        shown = served_prompt.check(
            chat,
            row.prompt,
            backend=config.backend,
            url=config.url[0],
            model=config.model,
            api_key_env=config.api_key_env,
            normalise=trained.normalises,
        )
    context.print(
        "the server renders the first prompt as the training did"
        if shown
        else "the server does not show the prompts it renders: whether they are the training's is not known"
    )


def _server(
    config: EvalConfig,
    backend: str,
    model: str | None,
    url: list[str],
    max_tokens: int,
    extra_body: dict[str, Any],
) -> TeacherSettings:
    """How a server is asked: always for the likeliest token, so that a run can be repeated."""
    from mtgdm.teachers.seam import TeacherSettings

    return TeacherSettings(
        backend=backend,
        model=model,
        url=url,
        api_key_env=config.api_key_env,
        ollama_num_gpu=config.ollama_num_gpu,
        device_mode=config.device_mode,
        load_in_4bit=config.load_in_4bit,
        num_ctx=config.num_ctx,
        temperature=0,
        top_p=1,
        max_tokens=max_tokens,
        extra_body=extra_body,
        stream=config.stream,
        timeout_s=config.timeout_s,
        first_token_timeout_s=config.first_token_timeout_s,
        deadline_s=config.deadline_s,
        concurrency=config.concurrency,
        retries=config.retries,
    )


def _base_by_name(compare: bool, config: EvalConfig) -> str | None:
    """The base as a server calls it; one in this process is known by its weights, wherever they lie."""
    return config.base_model if compare and not config._here else None


def _about(student: Student, compare: bool, config: EvalConfig) -> str:
    """What an answer hangs on beside the student, in words."""
    settings = ", beside its base" if compare else ""
    if named := _base_by_name(compare, config):
        settings = f", beside {named}"
    four_bit = ", in 4-bit" if config.load_in_4bit else ""
    held = ", held to its schema" if config.constrained else ""
    size = f", at most {config.max_new_tokens} tokens" if config.max_new_tokens else ""
    return f" on {config.split}{settings}{four_bit}{held}{size}"


def _judge(config: EvalConfig, context: Context) -> PairwiseJudge:
    """The judge, which is there: it is asked last, and hours of answers come before that."""
    from mtgdm.evaluation.pairwise import MAX_TOKENS, PairwiseJudge, cache_path

    settings = _server(
        config,
        config.judge_backend,
        config.judge_model,
        config.judge_url,
        MAX_TOKENS,
        config.judge_extra_body,
    )
    judge = PairwiseJudge(settings, context, cache_path(config.out))
    judge.check()
    return judge


def _judged(judge: PairwiseJudge, found: Evaluated, context: Context) -> dict[str, dict[str, Any]]:
    """The verdicts of the judge, and what they come to in one line."""
    judged = judge.judge(found.rows)
    scores = Counter(one["score"] for one in judged.values())
    context.print(
        f"{judge.name} on {len(judged):,} pairs, each in both orders: {scores[1.0]:,} won, {scores[0.5]:,} ties, "
        f"{scores[0.0]:,} lost"
    )
    return judged


# --- the end -------------------------------------------------------------------------------------


def _tell_refused(refused: Mapping[str, str], wanted: Sequence[Row], context: Context) -> None:
    for why, count in Counter(refused.values()).most_common(SHOWN_REASONS):
        context.warn(f"{count:,} of {len(wanted):,} rows could not be asked: {why}")
    if len(refused) == len(wanted):
        raise UserError("no row could be asked", hint="the log names the reason of each")
    if refused:
        context.warn("these rows are in no figure; the next run asks them again")


def _rounded(means: Mapping[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in means.items()}


def _summary(wanted: Sequence[Row], split: str, found: Evaluated) -> str:
    from mtgdm.evaluation.run import SHOWN

    spots = len({row.spot for row in wanted if row.spot is not None})
    parts = [
        f"{SHOWN[key]} {value:.2f}" + (f" (base {found.base[key]:.2f})" if key in found.base else "")
        for key, value in found.student.items()
    ]
    about = f" of {counted(spots, 'spot')}" if spots else ""
    return f"{counted(len(found.rows), f'{split} row')}{about}: {', '.join(parts)}"
