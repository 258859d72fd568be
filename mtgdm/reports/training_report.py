"""The train report: what `training_health` found, told as JSON, Markdown, page and charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mtgdm.charts.style import Figure
from mtgdm.manifest import Manifest
from mtgdm.reports import lineage, markdown, page
from mtgdm.reports.publish import Report
from mtgdm.reports.training_comparison import compared, comparison_figure
from mtgdm.reports.training_figures import loss_figure, optimizer_figure
from mtgdm.reports.training_health import describe
from mtgdm.reports.training_run import TrainingRun
from mtgdm.reports.values import brief, clock, share, shown
from mtgdm.terminal import counted

TONES = {
    "healthy": "good",
    "over-fitting": "warn",
    "under-fitting": "warn",
    "still improving": "info",
    "diverged": "bad",
}
QUESTIONS = {
    "loss": ("Does it learn, and does what it learns hold elsewhere?", "Loss on train and on val rows."),
    "optim": ("Does it run smoothly?", "Learning rate, gradients and speed at each logged step."),
    "compare": (
        "Which run is the better one?",
        "Loss of all runs; a star is the best evaluation of its run.",
    ),
}
COMPARED = ("run", "verdict", "#best eval loss", "#at step", "#final train loss", "#tokens/s", "#time")


def training_report(
    run: TrainingRun,
    others: Sequence[TrainingRun] = (),
    *,
    source: str,
    when: str,
    manifests: Sequence[Manifest] = (),
) -> Report:
    """The report of a run, beside `others` where there are any.

    `source` is how its metrics file is called, `when` the time of the report; `manifests` tell what the
    checkpoint was made from.
    """
    figures = [describe(one) for one in (run, *others)]
    comparison = compared([run, *others], figures) if others else None
    data = {
        "kind": "train",
        "created": when,
        "metrics_file": source,
        **figures[0],
        "comparison": comparison,
        "lineage": [one.model_dump(mode="json") for one in manifests],
    }
    charts: dict[str, Figure] = {"loss": loss_figure(run), "optim": optimizer_figure(run)}
    if others:
        charts["compare"] = comparison_figure([run, *others])
    title = f"Train report · {when}"
    return Report(
        title=title,
        data=data,
        markdown=lambda links: _markdown(title, data, links, manifests),
        body=_body(data, manifests),
        charts=charts,
    )


def headline(data: Mapping[str, Any]) -> str:
    """The run in one line."""
    return f"{data['verdict']}: {_outcome(data)}"


def key_figures(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures that matter: label, value, and what stands under it."""
    loss, evaluation = data["loss"], data["eval"]
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
                known = math.isfinite(point["loss"])
                what = f"perplexity {brief(point['perplexity'])}" if known else "no finite number"
                figures.append(
                    (f"{name} eval loss", shown(point["loss"], 3), f"{what} at step {point['step']:,}")
                )
    figures += [
        ("steps", f"{data['steps']['last']:,}", _planned(data)),
        ("time", clock(data["seconds"]), _speed(data["tokens_per_s"]["overall"])),
        ("seconds a step", brief(data["step_seconds"]["p50"]), _drift(data)),
        ("gradient norm", brief(data["gradient_norm"]["p50"]), _gradient_note(data["gradient_norm"])),
        ("learning rate", brief(data["learning_rate"]["max"]), _schedule(data["learning_rate"])),
    ]
    memory = data["peak_memory_mib"]
    return [*figures, ("peak memory", f"{brief(memory)} MiB", "")] if math.isfinite(memory) else figures


def comparison_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """A row of `COMPARED` for each run; none where there is only one."""
    comparison = data["comparison"]
    return [
        [
            run["name"],
            run["verdict"],
            shown((run["best_eval"] or {}).get("loss"), 3),
            f"{run['best_eval']['step']:,}" if run["best_eval"] else "–",
            shown(run["final_train_loss"], 3),
            brief(run["tokens_per_s"]),
            clock(run["seconds"]),
        ]
        for run in (comparison["runs"] if comparison else ())
    ]


def differing_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """A row for each setting that differs: its name, then its value in each run."""
    comparison = data["comparison"]
    settings = comparison["settings"] if comparison else {}
    return [
        [key, *("–" if value is None else _plain(value) for value in each)] for key, each in settings.items()
    ]


# --- Markdown ------------------------------------------------------------------------------------


def _markdown(
    title: str, data: Mapping[str, Any], links: Mapping[str, str], manifests: Sequence[Manifest]
) -> str:
    lines = [f"# {title}", "", f"**{markdown.escape(headline(data))}**", ""]
    lines += [f"- {markdown.escape(reason)}" for reason in data["reasons"]]
    figures = [[markdown.escape(cell) for cell in row] for row in key_figures(data)]
    lines += ["", *markdown.table(["", "#", ""], figures)]
    lines += _comparison_markdown(data)
    for name, link in links.items():
        question, lead = QUESTIONS[name]
        lines += ["", f"## {question}", "", lead, "", f"![{question}]({link})"]
    run = [(markdown.escape(key), markdown.code(value)) for key, value in _run_facts(data)]
    run += [(markdown.code(key), markdown.code(value)) for key, value in _settings(data)]
    if run:
        lines += ["", "## The run", "", *markdown.table(["", ""], run)]
    lines += _notes(data)
    lines += ["", *lineage.in_markdown(manifests), f"Made from {markdown.code(data['metrics_file'])}.", ""]
    return "\n".join(lines)


def _comparison_markdown(data: Mapping[str, Any]) -> list[str]:
    if not data["comparison"]:
        return []
    rows = [[markdown.escape(cell) for cell in row] for row in comparison_rows(data)]
    names = [markdown.escape(run["name"]) for run in data["comparison"]["runs"]]
    settings = [
        [markdown.code(key), *(markdown.code(value) for value in each)] for key, *each in differing_rows(data)
    ]
    lines = ["", "## The runs", "", *markdown.table(COMPARED, rows), ""]
    if not settings:
        return [*lines, "No setting differs between them."]
    return [*lines, "Settings that differ:", "", *markdown.table(["setting", *names], settings)]


def _notes(data: Mapping[str, Any]) -> list[str]:
    notes = [f"- {markdown.escape(note)}" for note in data["notes"]]
    warnings = ["", "The log warns:", "", *(f"    {line}" for line in data["warnings"])]
    return (
        ["", "## Notes", "", *notes, *(warnings if data["warnings"] else [])]
        if notes or data["warnings"]
        else []
    )


# --- the page ------------------------------------------------------------------------------------


def _body(data: Mapping[str, Any], manifests: Sequence[Manifest]) -> list[str]:
    verdict, base = data["verdict"], data["run"].get("base_model")
    kicker = f"mtgdm train report · {data['created']}" + (f" · {base}" if base else "")
    pill = (verdict, TONES.get(verdict, ""))
    body = [
        page.header(kicker, _sentence(_outcome(data)), pill=pill, lines=data["reasons"]),
        page.cards(key_figures(data)),
    ]
    if data["comparison"]:
        body += [page.chart("compare", *QUESTIONS["compare"]), _comparison_section(data)]
    body += [page.chart(name, *QUESTIONS[name]) for name in ("loss", "optim")]
    body += [_run_section(data), page.lineage(manifests)]
    notes = [*data["notes"], *data["warnings"]]
    if notes:
        items = "".join(f"<li>{page.escape(note)}</li>" for note in notes)
        body.append(page.section("Notes", "", f"<ul>{items}</ul>"))
    body.append(f"<footer>Made from <code>{page.escape(data['metrics_file'])}</code>.</footer>")
    return body


def _comparison_section(data: Mapping[str, Any]) -> str:
    rows = [
        [page.escape(name), page.tagged(verdict, TONES.get(verdict, "")), *map(page.escape, cells)]
        for name, verdict, *cells in comparison_rows(data)
    ]
    names = [run["name"] for run in data["comparison"]["runs"]]
    settings = [[f"<code>{page.escape(cell)}</code>" for cell in row] for row in differing_rows(data)]
    differ = page.table(["setting that differs", *names], settings)
    same = '<p class="soft">No setting differs between them.</p>'
    return page.section("The runs", "", page.table(COMPARED, rows), differ if settings else same)


def _run_section(data: Mapping[str, Any]) -> str:
    run, settings = _run_facts(data), _settings(data)
    if not run:
        return ""
    content = [page.table(["what", "value"], _coded(run))]
    if settings:
        summary = f"{len(settings)} settings"
        content.append(page.details(summary, page.table(["setting", "value"], _coded(settings))))
    return page.section("The run", "", *content)


def _coded(facts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(page.escape(key), f"<code>{page.escape(value)}</code>") for key, value in facts]


# --- words ---------------------------------------------------------------------------------------


def _outcome(data: Mapping[str, Any]) -> str:
    """Where the run came out, without the verdict."""
    steps = counted(data["steps"]["last"], "step")
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


def _settings(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings = data["run"].get("settings")
    return [(key, _plain(value)) for key, value in settings.items()] if isinstance(settings, dict) else []


def _planned(data: Mapping[str, Any]) -> str:
    total = data["steps"]["total"]
    of = f"of {total:,} planned" if total else "logged"
    return of if data["complete"] else f"{of}; the run did not end"


def _speed(tokens_per_s: float) -> str:
    return f"{brief(tokens_per_s)} tokens a second" if math.isfinite(tokens_per_s) else ""


def _schedule(rate: Mapping[str, Any]) -> str:
    if rate["max_step"] is None:
        return "not logged"
    return f"most at step {rate['max_step']:,}, {brief(rate['final'])} at the end"


def _gradient_note(gradients: Mapping[str, Any]) -> str:
    if gradients["max_step"] is None:
        return "no finite number" if gradients["not_finite"] else "not logged"
    spikes = gradients["spikes"]
    tail = f", {spikes:,} spike{'' if spikes == 1 else 's'}" if spikes else ""
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
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(one)}" for key, one in value.items())
    return value if isinstance(value, str) else str(value)


def _less(reduction: float) -> str:
    if not math.isfinite(reduction):
        return ""
    return f"{reduction:.0%} less" if reduction >= 0 else f"{-reduction:.0%} more"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
