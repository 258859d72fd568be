"""Prompts to answers: ask the teacher, keep what is valid, put the rest aside with its reason."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from mtgdm.errors import UserError
from mtgdm.plugins import named
from mtgdm.stage import Context, Input, Output, Result, Runtime, stage
from mtgdm.teachers.seam import GROUP, TeacherSettings

if TYPE_CHECKING:
    from mtgdm.teachers.judgement import Judge
    from mtgdm.teachers.ledger import FactSums, Ledger, Prompts, Settled
    from mtgdm.teachers.loop import Outcome
    from mtgdm.teachers.probe import Work
    from mtgdm.teachers.seam import Backend

SHOWN_REASONS = 3
"""So many reasons of rejection are shown; the rejected file has them all."""


class TeacherConfig(TeacherSettings):
    """Settings of `mtgdm teacher`."""

    in_: Annotated[Path, Input()] = Field(Path("data/prompts.jsonl"), alias="in")
    """The prompts."""
    out: Annotated[Path, Output()] = Path("data/teacher.jsonl")
    """Where the answers go; rejected rows go beside it, to FILE.rejected.jsonl."""
    limit: int = Field(0, ge=0)
    """Only the first N prompts; 0 takes all. A later run without it goes on."""
    overwrite: Annotated[bool, Runtime()] = False
    """Start anew, instead of going on with what is there."""
    resume: Annotated[bool, Runtime()] = False
    """Accepted for old scripts: a run always goes on with what is there."""
    resume_verify: Annotated[bool, Runtime()] = False
    """First read the whole output and compare it with the prompts, row by row."""
    retry_rejected: Annotated[bool, Runtime()] = False
    """Ask again for the rows an earlier run rejected."""
    min_fact_recall: float = Field(0.0, ge=0, le=1)
    """Reject answers that tell less than this share of their record's facts; 0 keeps them all."""
    max_unsupported: int | None = Field(None, ge=0)
    """Reject answers with more claims than this that their record does not support; by default none is rejected."""
    samples: int = Field(1, ge=1, le=64)
    """Answers a prompt; the one that passes best is kept, the others go to FILE.samples.jsonl."""
    json_form: Literal["compact", "as_answered"] = "compact"
    """How JSON answers are kept: keys in the contract's order and no white space, or as the model wrote them."""
    strict: bool = False
    """End with exit code 1 when any row is rejected."""

    def outputs(self) -> list[Path]:
        """The kept rows; the rejected ones and the samples not chosen, where there are any."""
        from mtgdm.teachers.ledger import rejected_path
        from mtgdm.teachers.samples import samples_path

        others = (rejected_path(self.out), samples_path(self.out))
        return [self.out, *(path for path in others if path.exists())]

    def finished(self) -> tuple[int, int] | None:
        """Rows done of rows, by counting lines."""
        from mtgdm.teachers.ledger import count_lines, rejected_path

        total = count_lines(self.in_)
        if self.limit:
            total = min(total, self.limit)
        if not total:
            return None
        return min(total, count_lines(self.out) + count_lines(rejected_path(self.out))), total

    def estimate(self) -> dict[str, Any]:
        """Rows to ask and the tokens of their prompts; tokens and hours of the answers from rows that are there."""
        from mtgdm.teachers.probe import estimated
        from mtgdm.teachers.samples import times

        work = self._work()
        return times(estimated(work, self, self.out), self.samples) if work else {}

    def probe(self, count: int, context: Context) -> dict[str, Any]:
        """The same from `count` rows that are asked now; their answers are thrown away."""
        from mtgdm.teachers.probe import probed
        from mtgdm.teachers.samples import times

        work = self._work()
        if work is None or not work.to_ask:
            return self.estimate()
        return times(probed(work, self, self.judge(context), count, context), self.samples)

    def judge(self, context: Context) -> Judge:
        """What decides over each answer."""
        from mtgdm.teachers.judgement import Judge

        return Judge(
            context.domain,
            min_fact_recall=self.min_fact_recall,
            max_unsupported=self.max_unsupported,
            json_form=self.json_form,
        )

    def _work(self) -> Work | None:
        from mtgdm.teachers.ledger import count_lines
        from mtgdm.teachers.probe import Work

        if not count_lines(self.in_):
            return None
        return Work.found(
            self.in_,
            self.out,
            limit=self.limit,
            overwrite=self.overwrite,
            retry_rejected=self.retry_rejected,
        )


@stage
def run(config: TeacherConfig, context: Context) -> Result:
    """Ask the teacher: prompts in, valid answers out; the rest is put aside with its reason."""
    from mtgdm.teachers.endpoints import backends

    teacher: type[Backend] = named(GROUP, config.backend, "teacher backend")
    if not config.in_.exists():
        raise UserError(
            "there is no such file",
            where=config.in_,
            hint="make it with `mtgdm prompts`, or name yours with --in",
        )
    from mtgdm.teachers.ledger import Ledger, Prompts
    from mtgdm.teachers.tokens import context_size, prompt_at_most

    prompts = Prompts.scan(config.in_, config.limit, prompt_at_most)
    settings: TeacherSettings = config
    if not config.num_ctx:
        sized = context_size(prompts.longest_tokens, config.max_tokens)
        settings = config.model_copy(update={"num_ctx": sized})
    if config.samples > 1:
        from mtgdm.teachers.samples import sampling

        teacher = sampling(teacher, settings, config.samples)
    asked = backends(teacher, settings, context.domain)
    backend = asked[0]
    judge = config.judge(context)
    with Ledger(config.out, backend.fingerprint, overwrite=config.overwrite) as ledger:
        if config.resume_verify and not config.overwrite and config.out.exists():
            ledger.verify(prompts)
        reasons = _ask(config, context, prompts, asked, judge, ledger)
        settled = ledger.settle(prompts, judge)
    adjusted = {one.place: one.adjustments for one in asked if one.adjustments}
    return _report(config, context, prompts, backend, ledger, settled, reasons, adjusted)


def _ask(
    config: TeacherConfig,
    context: Context,
    prompts: Prompts,
    asked: list[Backend],
    judge: Judge,
    ledger: Ledger,
) -> Counter[str]:
    """Ask for every row that is not done; returns the reasons of the rows rejected now."""
    done = prompts.among(ledger.kept_ids)
    if not config.retry_rejected:
        done |= prompts.among(ledger.rejected_ids)
    reasons: Counter[str] = Counter()
    if done.all():
        context.print(f"all {prompts.asked:,} rows were done before: nothing is asked")
        return reasons

    import asyncio

    from mtgdm.teachers.loop import Loop
    from mtgdm.teachers.samples import Samples, each_sampled

    kept = rejected = again = 0
    backend, log = asked[0], context.log
    log.info(
        "%s %s, fingerprint %s, num_ctx %d: %d prompts, %d done",
        config.backend,
        backend.model,
        backend.fingerprint,
        backend.settings.num_ctx,
        prompts.asked,
        done.sum(),
    )
    with (
        context.progress(prompts.asked, "rows", done=int(done.sum())) as bar,
        Samples(config.samples, config.out, judge, overwrite=config.overwrite) as samples,
    ):

        def record(one: Outcome) -> None:
            nonlocal kept, rejected
            log.info("%s", _line(one))
            outcome = samples.settled(one)
            if outcome is None:
                return
            if outcome.reason is None:
                ledger.keep(_kept(outcome, backend, judge))
                kept += 1
            else:
                ledger.reject(_rejected(outcome, backend))
                rejected += 1
                reasons[_printable(re.sub(r"\d+", "…", outcome.reason))] += 1
            bar.advance()
            bar.note(told())

        def say(text: str) -> None:
            nonlocal again
            again += 1
            log.info("%s", _printable(text))
            bar.note(told())

        def told() -> str:
            return f"{kept:,} kept, {rejected:,} rejected" + (f" · {again:,} asked again" if again else "")

        loop = Loop(
            asked,
            backend.settings,
            judge,
            answered_before=bool(ledger.kept_ids),
            say=say,
            warn=lambda text: context.warn(_printable(text)),
        )
        bar.live = loop.notes
        rows = prompts.rows(~done)
        asyncio.run(loop.run(each_sampled(rows, config.samples) if config.samples > 1 else rows, record))
    return reasons


# --- rows ----------------------------------------------------------------------------------------


def _kept(outcome: Outcome, backend: Backend, judge: Judge) -> dict[str, Any]:
    from mtgdm.teachers.judgement import facts_json

    row, completion = outcome.row, outcome.completion
    assert completion is not None
    # The fingerprint stands first: a resume finds it without parsing the row.
    teacher = {
        "fingerprint": backend.fingerprint,
        "backend": backend.settings.backend,
        "model": backend.model,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "output_tokens": completion.output_tokens,
        "seconds": completion.seconds,
        "attempts": outcome.attempts,
        "repaired": outcome.repaired,
        **({"adjusted": completion.adjusted} if completion.adjusted else {}),
        "facts": facts_json(outcome.facts),
    }
    return {
        "id": row.id,
        "messages": [*row.prompt, {"role": "assistant", "content": judge.kept_text(row, outcome.text)}],
        "meta": {**row.meta, "teacher": teacher},
        **row.rest,
    }


def _rejected(outcome: Outcome, backend: Backend) -> dict[str, Any]:
    from mtgdm.teachers.ledger import rejected_row

    completion = outcome.completion
    return rejected_row(
        outcome.row,
        outcome.reason or "",
        completion.text if completion else "",
        fingerprint=backend.fingerprint,
        finish_reason=completion.finish_reason if completion else None,
        attempts=outcome.attempts,
    )


def _line(outcome: Outcome) -> str:
    """A row in the log: how it ended, how long it took, what it cost."""
    parts = [outcome.row.id, outcome.row.type or "-"]
    parts.append("kept" if outcome.reason is None else f"rejected: {outcome.reason}")
    completion = outcome.completion
    if completion is not None:
        parts.append(f"{completion.seconds:.2f} s")
        if completion.prompt_tokens is not None or completion.output_tokens is not None:
            parts.append(f"{completion.prompt_tokens or 0}+{completion.output_tokens or 0} tokens")
        if completion.output_tokens and completion.seconds:
            parts.append(f"{completion.output_tokens / completion.seconds:.1f} tokens/s")
        parts.append(completion.finish_reason)
    parts.append(f"attempts {outcome.attempts}" + (", repaired" if outcome.repaired else ""))
    return _printable(" · ".join(parts))


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


# --- the end -------------------------------------------------------------------------------------


def _report(
    config: TeacherConfig,
    context: Context,
    prompts: Prompts,
    backend: Backend,
    ledger: Ledger,
    settled: Settled,
    reasons: Counter[str],
    adjusted: dict[str, list[str]],
) -> Result:
    answered = prompts.among(ledger.kept_ids)
    kept = int(answered.sum())
    rejected = int((prompts.among(ledger.rejected_ids) & ~answered).sum())
    if kept + rejected != prompts.asked:
        raise UserError("the prompts changed while they were asked", where=config.in_, hint="start again")
    _say_what_was_settled(context, prompts, ledger, settled)
    for reason, count in reasons.most_common(SHOWN_REASONS):
        context.print(f"rejected {count:,} × {reason}")
    if settled.facts:
        context.terminal.table(
            ["type", "#rows", "#fact recall", "#unsupported claims"],
            [
                [kind or "-", *_means(settled.facts[kind])]
                for kind in dict.fromkeys((*context.domain.types, *settled.facts))
                if kind in settled.facts
            ],
            title="answers against their records",
        )
    teacher = backend.settings.backend + (f" {backend.model}" if backend.model else "")
    summary = f"{prompts.asked:,} asked = {kept:,} kept + {rejected:,} rejected · {teacher}"
    hint = f"the reasons stand in {ledger.rejected}; ask again with --retry-rejected"
    if not kept:
        raise UserError(f"no answer was kept: {summary}", hint=hint)
    if rejected and config.strict:
        raise UserError(f"--strict: {summary}", hint=hint)
    return Result(
        counts={
            "asked": prompts.asked,
            "kept": kept,
            "rejected": rejected,
            "duplicates": prompts.duplicates,
            "stale": settled.moved,
            **({"adjusted": adjusted} if adjusted else {}),
        },
        summary=summary,
    )


def _say_what_was_settled(context: Context, prompts: Prompts, ledger: Ledger, settled: Settled) -> None:
    if prompts.duplicates:
        context.print(f"{prompts.duplicates:,} exact duplicates among the prompts, each asked once")
    if settled.moved:
        context.warn(
            f"{settled.moved:,} answers whose prompt is gone were moved to {ledger.stale}: "
            "the student must not learn from them"
        )
    if settled.dropped:
        context.warn(f"{settled.dropped:,} rejected rows whose prompt is gone were dropped")
    if settled.put_aside:
        context.warn(
            f"{settled.put_aside:,} answers kept earlier do not pass the fact thresholds of this run and were put aside"
        )
    if settled.refreshed:
        context.print(
            f"{settled.refreshed:,} answers took over the changed meta (split, record) of their prompts"
        )
    if settled.compacted:
        context.print(
            f"{settled.compacted:,} answers of earlier runs were brought into one JSON form; "
            "`json_form: as_answered` leaves them as they came"
        )


def _means(facts: FactSums) -> list[str]:
    recall = "-" if facts.recall is None else f"{facts.recall:.3f}"
    return [f"{facts.rows:,}", recall, f"{facts.unsupported:,}"]
