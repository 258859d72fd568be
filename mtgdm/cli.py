"""The command line: a command a stage, built from its Config, and the commands of mtgdm itself."""

from __future__ import annotations

import inspect
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from mtgdm import __version__, interrupts, processes
from mtgdm.errors import MtgdmError, UserError
from mtgdm.profiles import (
    Profile,
    Sourced,
    check_environment,
    check_section,
    describe,
    load_profile,
    profile_files,
    settings_for,
)
from mtgdm.registry import Registry, discover
from mtgdm.stage import Context, Flag, Stage, is_list, key_of, marks, plain_type

if TYPE_CHECKING:
    from mtgdm.pipeline import Step
    from mtgdm.terminal import Terminal

app = typer.Typer(
    name="mtgdm",
    help="Distil a strong teacher model into a small local student.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(
    help="Settings: every value with its source; JSON Schemas of profiles and reports.", no_args_is_help=True
)
app.add_typer(config_app, name="config", rich_help_panel="Settings")

_EXTRAS = {
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "safetensors",
    "jinja2",
    "tokenizers",
}
FIRST_TOLD_S = 5.0
"""So long another process than the first waits before it tells an error: torchrun looks ten times a second."""
_FIRST_PROFILE, _FIRST_REAL_PROFILE = "quickstart", "qwen2.5-0.5b"
"""What newcomers run first, and next."""
_COMPLETING = "_MTGDM_COMPLETE"
"""Set by the shell while it asks for completions, where a warning would land in the user's prompt."""
_ARGUMENTS = "_TYPER_COMPLETE_ARGS"
"""Where zsh, fish and PowerShell put the words to complete; bash has COMP_WORDS."""


@cache
def _terminal() -> Terminal:
    """The terminal, made when there is something to say: help does without it."""
    from mtgdm.terminal import Terminal

    return Terminal(silent=not processes.is_first())


@cache
def _registry() -> Registry:
    return discover()


# --- what the options complete -------------------------------------------------------------------


def _complete_profile(incomplete: str) -> Iterator[tuple[str, str]]:
    for name, path in profile_files().items():
        if name.startswith(incomplete):
            yield name, describe(path)


def _complete_stage(incomplete: str) -> Iterator[tuple[str, str]]:
    for name, stage in _registry().stages.items():
        if name.startswith(incomplete):
            yield name, _first_line(stage.help)


def _be_verbose(wanted: bool) -> None:
    if wanted:
        _terminal().verbose = True


ProfileOption = Annotated[
    str,
    typer.Option(
        "--profile", "-p", metavar="NAME|FILE.yaml", help="The profile.", autocompletion=_complete_profile
    ),
]
VerboseOption = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        callback=_be_verbose,
        help="Show every setting with its source, and where errors come from.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mtgdm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit."),
    ] = False,
    verbose: VerboseOption = False,
) -> None:
    """Options of every command; their callbacks have done what they ask for."""


# --- a command a stage ---------------------------------------------------------------------------


def _add_stages(registry: Registry) -> None:
    """Put the stages before mtgdm's own commands, and say which do not load."""
    own = list(app.registered_commands)
    app.registered_commands.clear()
    named = {
        *sys.argv[1:],
        *os.environ.get("COMP_WORDS", "").split(),
        *os.environ.get(_ARGUMENTS, "").split(),
    }
    for stage in registry.stages.values():
        _add_stage(stage, with_options=stage.name in named)
    app.registered_commands.extend(own)
    if _COMPLETING not in os.environ:
        for plugin in registry.broken:
            _terminal().warn(f"the stage '{plugin.name}' of {plugin.package} does not load: {plugin.error}")


def _add_stage(stage: Stage[Any], *, with_options: bool) -> None:
    """Register the command of a stage, its options built from its Config where the command line names it."""
    parameters = [
        inspect.Parameter(
            "profile", inspect.Parameter.KEYWORD_ONLY, annotation=ProfileOption, default="default"
        ),
        inspect.Parameter("verbose", inspect.Parameter.KEYWORD_ONLY, annotation=VerboseOption, default=False),
    ]
    flags: dict[str, str] = {}
    descriptions = stage.config.descriptions() if with_options else {}
    for name, info in stage.config.model_fields.items() if with_options else ():
        key = key_of(name, info)
        flag = marks(info, Flag)
        as_json = any(mark.json for mark in flag)
        kind = str if as_json else _flag_type(info.annotation)
        if kind is None or any(mark.hidden for mark in flag):
            continue
        option = f"--{key.replace('_', '-')}"
        others = [f"--{other.replace('_', '-')}" for mark in flag for other in mark.also]
        declared = [f"{option}/--no-{option[2:]}"] if kind is bool else [option, *others]
        default = info.get_default(call_default_factory=True, validated_data={})
        parameters.append(
            inspect.Parameter(
                f"{name}_",
                inspect.Parameter.KEYWORD_ONLY,
                annotation=Annotated[
                    kind | None,
                    typer.Option(
                        *declared,
                        help=descriptions.get(name),
                        show_default=_shown(default),
                        metavar="JSON" if as_json else "A,B,..." if is_list(info.annotation) else None,
                        rich_help_panel="Settings (flag > environment > profile > default)",
                    ),
                ],
                default=None,
            )
        )
        flags[f"{name}_"] = key

    def command(**values: Any) -> None:
        given = {
            # A list may be written `--url A,B` and `--url A --url B`.
            flags[name]: Sourced(
                ",".join(value) if isinstance(value, list) else value, f"--{flags[name].replace('_', '-')}"
            )
            for name, value in values.items()
            if name in flags and value is not None and value != []
        }
        _run_one(stage, values["profile"], given)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    ours = stage.package == "mtgdm"
    panel = "Stages" if ours else "Stages of other packages"
    app.command(stage.name, help=stage.help, rich_help_panel=panel)(command)


def _flag_type(annotation: Any) -> Any:
    """What the command line parses a setting as; None for settings that only a profile can hold."""
    kind = plain_type(annotation)
    if get_origin(kind) is Literal and all(isinstance(choice, str) for choice in get_args(kind)):
        return kind
    if kind in (bool, int, float, str, Path):
        return kind
    if get_origin(kind) is list and get_args(kind) in ((str,), (Path,)):
        return list[str]
    if is_list(annotation) or not (isinstance(kind, type) and issubclass(kind, dict | BaseModel)):
        return None if get_origin(kind) is dict else str
    return None


def _shown(default: Any) -> str | bool:
    if default is PydanticUndefined or default is None or default in ("", [], (), {}):
        return False
    if isinstance(default, bool):
        return "on" if default else "off"
    return ",".join(map(str, default)) if isinstance(default, list | tuple) else str(default)


def _run_one(stage: Stage[Any], profile_name: str, flags: dict[str, Sourced]) -> None:
    from mtgdm.pipeline import locked, run_stage

    profile = _load(profile_name)
    settings = settings_for(stage, profile, flags)
    if _terminal().verbose:
        for key, setting in settings.values.items():
            _terminal().print(f"{stage.section}.{key} = {setting.value} ({setting.source})", style="dim")
    with locked(profile.workspace, f"mtgdm {stage.name}"):
        result = run_stage(stage, settings, profile, _terminal())
    if result.summary:
        _terminal().print(f"{stage.name}: {result.summary}")


def _load(name: str) -> Profile:
    registry = _registry()
    check_environment(registry.stages.values())
    profile = load_profile(name, registry.sections)
    for stage in registry.stages.values():
        check_section(stage, profile)  # a typo in `train:` is told before days of teaching, not after
    return profile


# --- the pipeline --------------------------------------------------------------------------------


@app.command("all", rich_help_panel="Pipeline")
def run_all(
    profile: ProfileOption = "default",
    from_: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="Begin here.", autocompletion=_complete_stage),
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="STAGE", help="End here.", autocompletion=_complete_stage)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run every stage anew, up to date or not.")] = False,
    verbose: VerboseOption = False,
) -> None:
    """Run the profile's pipeline in order; what is up to date is skipped."""
    from mtgdm import pipeline

    if processes.count() > 1:
        raise UserError(
            f"`mtgdm all` runs in one process, and {processes.count()} were started",
            hint=f"run its stages one by one; with torchrun or accelerate launch only: train --profile {profile}",
        )
    loaded = _load(profile)
    chain = _cut(pipeline.steps(_registry(), loaded), from_, to)
    with pipeline.locked(loaded.workspace, "mtgdm all"):
        said = pipeline.run_all(chain, loaded, _terminal(), force=force)
    _terminal().print()
    found = list(zip(chain, pipeline.conditions(chain, loaded), strict=True))
    _terminal().table(
        ["stage", "result", "lies in"],
        [
            [step.stage.name, said[step.stage.name], ", ".join(_short(path, loaded) for path in one.outputs)]
            for step, one in found
        ],
    )
    if loaded.workspace != Path.cwd():
        _terminal().print(f"workspace: {loaded.workspace}")
    beside = (path.with_suffix(".html") for _, one in found for path in one.outputs if path.suffix == ".json")
    pages = [page for page in beside if page.is_file()]
    if pages:
        _terminal().print(f"open {_short(pages[-1], loaded)} in a browser: every answer beside its reference")
    if loaded.name == _FIRST_PROFILE:
        _terminal().print(
            f"next, a real student in a quarter of an hour: mtgdm all --profile {_FIRST_REAL_PROFILE}"
        )


def _cut(chain: list[Any], first: str | None, last: str | None) -> list[Any]:
    names = [step.stage.name for step in chain]
    for name in (first, last):
        if name is not None:
            known = _registry().stage(name).name
            if known not in names:
                raise typer.BadParameter(f"the stage '{name}' is not in this pipeline: {', '.join(names)}")
    start = names.index(_registry().stage(first).name) if first else 0
    end = names.index(_registry().stage(last).name) if last else len(names) - 1
    if end < start:
        raise typer.BadParameter(f"'{last}' comes before '{first}' in this pipeline: {', '.join(names)}")
    return chain[start : end + 1]


@app.command(rich_help_panel="Pipeline")
def status(profile: ProfileOption = "default", as_json: JsonOption = False) -> None:
    """Show each stage as done, stale (and why), partial (n of m) or missing."""
    from mtgdm import pipeline

    loaded = _load(profile)
    chain = pipeline.steps(_registry(), loaded)
    found = list(zip(chain, pipeline.conditions(chain, loaded), strict=True))
    if as_json:
        _print_json(
            [
                {
                    "stage": step.stage.name,
                    "state": one.state,
                    "why": one.why,
                    "outputs": [_short(path, loaded) for path in one.outputs],
                    "finished": one.manifests[0].finished.isoformat() if one.manifests else None,
                    "counts": one.manifests[0].counts if one.manifests else {},
                }
                for step, one in found
            ]
        )
        return
    _terminal().table(
        ["stage", "state", "why", "finished", "output"],
        [
            [
                step.stage.name,
                one.state,
                one.why,
                f"{one.manifests[0].finished:%Y-%m-%d %H:%M}" if one.manifests else "",
                ", ".join(_short(path, loaded) for path in one.outputs),
            ]
            for step, one in found
        ],
    )


@app.command(rich_help_panel="Pipeline")
def plan(
    profile: ProfileOption = "default",
    probe: Annotated[
        int | None,
        typer.Option(
            "--probe",
            metavar="N",
            min=1,
            help="Try N of what is to be done, the rows of the teacher say, to tell tokens and hours; nothing is kept.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a profile would do to the inputs that are there; nothing is run."""
    from mtgdm import estimates, pipeline

    loaded = _load(profile)
    chain = pipeline.steps(_registry(), loaded)
    found = [
        (step, one, _estimate(step, loaded, probe))
        for step, one in zip(chain, pipeline.conditions(chain, loaded), strict=True)
    ]
    if as_json:
        _print_json(
            [
                {"stage": step.stage.name, "state": one.state, "why": one.why, **estimates.as_json(estimate)}
                for step, one, estimate in found
            ]
        )
        return
    _terminal().table(
        ["stage", "state", "what it would do"],
        [
            [
                step.stage.name,
                f"{one.state}: {one.why}" if one.why else one.state,
                "nothing"
                if one.state == "done"
                else "\n".join(estimates.in_words(estimate) or _absent(step, loaded)),
            ]
            for step, one, estimate in found
        ],
    )


def _estimate(step: Step, profile: Profile, probe: int | None) -> dict[str, Any]:
    config = step.settings.config.resolved(profile.workspace)
    if probe is None:
        return config.estimate()
    context = Context(
        stage=step.stage.name,
        workspace=profile.workspace,
        terminal=_terminal(),
        domain=profile.domain,
        profile=profile.name,
        started=datetime.now().astimezone(),
    )
    return config.probe(probe, context)


def _absent(step: Step, profile: Profile) -> list[str]:
    from mtgdm.manifest import relative

    inputs = step.settings.config.resolved(profile.workspace).inputs()
    return [f"{relative(path, profile.workspace)} is not there yet" for path in inputs if not path.exists()]


# --- what is there -------------------------------------------------------------------------------


@app.command(rich_help_panel="Surroundings")
def doctor(profile: ProfileOption = "default", as_json: JsonOption = False) -> None:
    """Check what is installed and reachable, and name the command that mends what is not."""
    from mtgdm.doctor import examine

    findings = examine(_load(profile), _registry())
    if as_json:
        _print_json([finding.model_dump() for finding in findings])
    else:
        _terminal().table(
            ["", "what", "found", "mend it with"],
            [[finding.state, finding.what, finding.found, finding.mend] for finding in findings],
        )
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(1)


@app.command(rich_help_panel="Surroundings")
def stages(as_json: JsonOption = False) -> None:
    """List the installed stages and the package each comes from; a broken one with its error."""
    registry = _registry()
    found = [
        {
            "stage": name,
            "package": f"{plugin.package} {plugin.version}",
            "target": plugin.target,
            "help": _first_line(registry.stages[name].help),
            "error": None,
        }
        for name, plugin in registry.plugins.items()
    ] + [
        {
            "stage": plugin.name,
            "package": f"{plugin.package} {plugin.version}",
            "target": plugin.target,
            "help": "",
            "error": plugin.error,
        }
        for plugin in registry.broken
    ]
    if as_json:
        _print_json(found)
        return
    _terminal().table(
        ["stage", "package", "does"],
        [[one["stage"] or "", one["package"] or "", one["error"] or one["help"] or ""] for one in found],
    )


@app.command(rich_help_panel="Settings")
def profiles(as_json: JsonOption = False) -> None:
    """List the profiles that can be named, where each lies, and what it is for."""
    found = [
        {"profile": name, "path": str(path), "description": describe(path)}
        for name, path in profile_files().items()
    ]
    if as_json:
        _print_json(found)
        return
    _terminal().table(
        ["profile", "what for", "lies in"],
        [[one["profile"], one["description"], one["path"]] for one in found],
    )


@config_app.command("show")
def config_show(
    stage: Annotated[
        str | None, typer.Argument(metavar="[STAGE]", help="Only this stage.", autocompletion=_complete_stage)
    ] = None,
    profile: ProfileOption = "default",
    as_json: JsonOption = False,
) -> None:
    """Print every value and where it came from."""
    registry = _registry()
    loaded = _load(profile)
    chosen = [registry.stage(stage)] if stage else list(registry.stages.values())
    resolved = {one.section: settings_for(one, loaded, {}).values for one in chosen}
    if as_json:
        top = (
            {}
            if stage
            else {
                "domain": loaded.domain,
                "workspace": str(loaded.workspace),
                "pipeline": loaded.pipeline,
            }
        )
        sections = {
            section: {key: value.model_dump(mode="json") for key, value in values.items()}
            for section, values in resolved.items()
        }
        _print_json({**top, **sections})
        return
    if not stage:
        _terminal().print(f"domain = {loaded.domain}")
        _terminal().print(f"workspace = {loaded.workspace}")
        _terminal().print(f"pipeline = {', '.join(loaded.pipeline)}")
    _terminal().table(
        ["setting", "value", "from"],
        [
            [f"{section}.{key}", _value(setting.value), setting.source]
            for section, values in resolved.items()
            for key, setting in values.items()
        ],
    )


@config_app.command("schema")
def config_schema(
    of: Annotated[
        Literal["profile", "eval-report", "train-report", "teacher-report"],
        typer.Argument(metavar="[OF]", help="A profile, or the JSON of a report."),
    ] = "profile",
) -> None:
    """Print the JSON Schema of a profile, for an editor that checks YAML, or of a report's JSON."""
    if of != "profile":
        from mtgdm.reports.schemas import schema_path

        _terminal().json(schema_path(of).read_text(encoding="utf-8").rstrip())
        return
    from mtgdm.profiles import profile_schema

    _print_json(profile_schema(_registry().stages.values()))


# --- printing ------------------------------------------------------------------------------------


def _print_json(value: Any) -> None:
    _terminal().json(json.dumps(value, ensure_ascii=False, indent=2))


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""


def _short(path: Path, profile: Profile) -> str:
    if "*" in path.name:  # a file named by time that is not there yet
        path = path.parent
    return str(path.relative_to(profile.workspace)) if path.is_relative_to(profile.workspace) else str(path)


def _value(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- the one catch -------------------------------------------------------------------------------


def _stop(error: MtgdmError) -> NoReturn:
    if not processes.is_first():
        # What every process met is told by the first, whose end makes the launcher end this one meanwhile.
        time.sleep(FIRST_TOLD_S)
        _terminal().speak(f"process {processes.rank()}: ")
    if _terminal().verbose:
        traceback.print_exception(error)
    _terminal().error(error)
    raise SystemExit(error.exit_code)


def _say_that_it_takes_long() -> None:
    _terminal().warn("stopping: Ctrl-C again leaves at once, what is on disk stays")


def _leave() -> None:
    if _terminal.cache_info().currsize:
        _terminal().leave()


def main() -> None:
    """Run the command line; errors of the user become one line here, bugs keep their traceback."""
    interrupts.watch(_say_that_it_takes_long, _leave)
    for stream in (sys.stdout, sys.stderr):
        # A pipe on Windows, or LANG=C, must not make Chinese text an error.
        reconfigure: Callable[..., None] | None = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="replace")
    try:
        _add_stages(_registry())
        app()
    except KeyboardInterrupt:
        raise SystemExit(interrupts.EXIT_CODE) from None
    except MtgdmError as error:
        _stop(error)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _EXTRAS:
            raise
        _stop(UserError(f"{error.name} is not installed", hint='pip install "mtgdm[train]"'))
    except OSError as error:
        if error.filename is None and error.strerror is None:
            raise
        _stop(UserError(error.strerror or str(error), where=error.filename))


if __name__ == "__main__":
    main()
