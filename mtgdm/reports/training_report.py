"""The train report: what `training_run` found, told as JSON, Markdown, page and charts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mtgdm.reports import page
from mtgdm.reports.publish import Report
from mtgdm.reports.training_figures import loss_figure, optimizer_figure
from mtgdm.reports.training_run import TrainingRun, describe
from mtgdm.reports.values import brief, clock, share, shown

TONES = {"healthy": "good", "over-fitting": "warn", "still improving": "info", "diverged": "bad"}
QUESTIONS = {
    "loss": ("Does it learn, and does what it learns hold elsewhere?", "Loss on train and on val rows."),
    "optim": ("Does it run smoothly?", "Learning rate, gradients and speed at each logged step."),
}


def training_report(run: TrainingRun, *, source: str, when: str) -> Report:
    """The report of one run; `source` is how its metrics file is called, `when` the time of the report."""
    data = {"kind": "train", "created": when, "metrics_file": source, **describe(run)}
    title = f"Train report · {when}"
    return Report(
        title=title,
        data=data,
        markdown=lambda links: _markdown(title, data, links),
        body=_body(data, source, when),
        charts={"loss": loss_figure(run), "optim": optimizer_figure(run)},
    )


def headline(data: Mapping[str, Any]) -> str:
    """The run in one line."""
    return f"{data['verdict']}: {_outcome(data)}"


def key_figures(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures that matter: label, value, and what stands under it."""
    loss, evaluation, steps = data["loss"], data["eval"], data["steps"]
    total = steps["total"]
    figures = [
        (
            "train loss",
            f"{shown(loss['first'])} → {shown(loss['final'], 3)}",
            _less(loss["reduction"]),
        ),
    ]
    if evaluation:
        for name in ("best", "final"):
            point = evaluation[name]
            if point:
                under = f"perplexity {brief(point['perplexity'])} at step {point['step']:,}"
                figures.append((f"{name} eval loss", shown(point["loss"], 3), under))
    of = f"of {total:,} planned" if isinstance(total, int) else "logged"
    figures += [
        ("steps", f"{steps['last']:,}", of if data["complete"] else f"{of}; the run did not end"),
        ("time", clock(data["seconds"]), f"{brief(data['tokens_per_s']['p50'])} tokens a second"),
        (
            "seconds a step",
            brief(data["step_seconds"]["p50"]),
            _drift(data),
        ),
        ("gradient norm", brief(data["gradient_norm"]["p50"]), _gradient_note(data["gradient_norm"])),
        (
            "learning rate",
            brief(data["learning_rate"]["max"]),
            f"{brief(data['learning_rate']['final'])} at the end",
        ),
    ]
    memory = brief(data["peak_memory_mib"])
    return [*figures, ("peak memory", f"{memory} MiB", "")] if memory != "–" else figures


def _markdown(title: str, data: Mapping[str, Any], links: Mapping[str, str]) -> str:
    lines = [f"# {title}", "", f"**{headline(data)}**", ""]
    lines += [f"- {reason}" for reason in data["reasons"]]
    lines += ["", "| | | |", "|---|---:|---|"]
    lines += [f"| {label} | {value} | {under} |" for label, value, under in key_figures(data)]
    for name, link in links.items():
        question, lead = QUESTIONS[name]
        lines += ["", f"## {question}", "", lead, "", f"![{question}]({link})"]
    run = [*_run_facts(data), *((f"`{key}`", value) for key, value in _settings(data))]
    if run:
        lines += ["", "## The run", "", "| | |", "|---|---|"]
        lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in run]
    lines += _notes(data)
    lines += ["", f"Made from `{data['metrics_file']}`.", ""]
    return "\n".join(lines)


def _body(data: Mapping[str, Any], source: str, when: str) -> list[str]:
    verdict = data["verdict"]
    kicker = f"mtgdm train report · {when} · {data['run'].get('base_model', 'unknown base')}"
    body = [
        page.header(
            kicker, _sentence(_outcome(data)), pill=(verdict, TONES.get(verdict, "")), lines=data["reasons"]
        ),
        page.cards(key_figures(data)),
    ]
    body += [page.chart(name, *text) for name, text in QUESTIONS.items()]
    run, settings = _run_facts(data), _settings(data)
    if run:
        content = [page.table(["what", "value"], _coded(run))]
        if settings:
            summary = f"{len(settings)} settings"
            content.append(page.details(summary, page.table(["setting", "value"], _coded(settings))))
        body.append(page.section("The run", "", *content))
    notes = [*data["notes"], *data["warnings"]]
    if notes:
        items = "".join(f"<li>{page.escape(note)}</li>" for note in notes)
        body.append(page.section("Notes", "", f"<ul>{items}</ul>"))
    body.append(f"<footer>Made from <code>{page.escape(source)}</code>.</footer>")
    return body


def _outcome(data: Mapping[str, Any]) -> str:
    """Where the run came out, without the verdict."""
    steps = f"{data['steps']['last']:,} steps"
    best = (data["eval"] or {}).get("best")
    if best:
        return (
            f"best eval loss {best['loss']:.3f} (perplexity {brief(best['perplexity'])}) "
            f"at step {best['step']:,} of {steps}"
        )
    return f"{steps}, final train loss {shown(data['loss']['final'], 3)}"


def _run_facts(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run said of itself at its start and its end."""
    start = {key: value for key, value in data["run"].items() if key != "settings"}
    end = {f"end: {key}": value for key, value in (data["end"] or {}).items()}
    return [(key.replace("_", " "), _plain(value)) for key, value in {**start, **end}.items()]


def _coded(facts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(page.escape(key), f"<code>{page.escape(value)}</code>") for key, value in facts]


def _settings(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings = data["run"].get("settings")
    return [(key, _plain(value)) for key, value in settings.items()] if isinstance(settings, dict) else []


def _notes(data: Mapping[str, Any]) -> list[str]:
    notes = [f"- {note}" for note in data["notes"]]
    warnings = ["", "The log warns:", "", "```", *data["warnings"], "```"] if data["warnings"] else []
    return ["", "## Notes", "", *notes, *warnings] if notes or warnings else []


def _gradient_note(gradients: Mapping[str, Any]) -> str:
    if gradients["max_step"] is None:
        return "not logged"
    spikes = gradients["spikes"]
    tail = f", {spikes} spike{'' if spikes == 1 else 's'}" if spikes else ""
    return f"most {brief(gradients['max'])} at step {gradients['max_step']:,}{tail}"


def _drift(data: Mapping[str, Any]) -> str:
    drift = data["step_seconds"]["drift"]
    return f"drift {share(drift)}" if math.isfinite(drift) else ""


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else str(value)


def _less(reduction: float) -> str:
    if not math.isfinite(reduction):
        return ""
    return f"{reduction:.0%} less" if reduction >= 0 else f"{-reduction:.0%} more"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
