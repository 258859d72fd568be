"""Running stages: who may write, manifests, staleness, and `all`."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mtgdm import __version__, manifest, processes, remarks, rows
from mtgdm.errors import MtgdmError, SettingError, UserError
from mtgdm.manifest import Manifest
from mtgdm.profiles import Profile, Settings, Sourced, settings_for
from mtgdm.stage import Context, Result, Stage, StageConfig

if TYPE_CHECKING:
    from filelock import BaseFileLock

    from mtgdm.registry import Registry
    from mtgdm.terminal import Terminal

_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)

State = Literal["done", "stale", "partial", "missing", "no output"]


@dataclass(frozen=True)
class Condition:
    """How a stage stands: its state, why, and the manifests of its outputs."""

    state: State
    why: str = ""
    manifests: tuple[Manifest, ...] = ()
    outputs: tuple[Path, ...] = ()


# --- one stage -----------------------------------------------------------------------------------


def run_stage(
    stage: Stage[Any], settings: Settings, profile: Profile, terminal: Terminal, *, may_replace: bool = False
) -> Result:
    """Run one stage and write the manifest of each output, last of all.

    Of several processes the first does so; the others run the stage's function and leave the files to it.
    `may_replace`: a finished output of other settings may give way, see `Context`.
    """
    config = settings.config.resolved(profile.workspace)
    if processes.count() > 1 and not config.several_processes:
        raise UserError(
            f"{stage.name} runs in one process, and {processes.count()} were started",
            hint=f"without torchrun or accelerate launch: mtgdm {stage.name}",
        )
    if not processes.is_first():
        context = _context(stage, profile, terminal, may_replace)
        return stage(config, context) or Result()
    _refuse_same_path(config.inputs(), config.outputs(), profile.workspace)
    with _writing(config.outputs()):
        return _run(stage, config, settings, profile, _context(stage, profile, terminal, may_replace))


def _run(
    stage: Stage[Any], config: StageConfig, settings: Settings, profile: Profile, context: Context
) -> Result:
    workspace = profile.workspace
    started = context.started
    before = _known(config.inputs(), config.outputs())
    inputs = [manifest.state(path, workspace, before) for path in config.inputs() if path.exists()]
    for output in config.outputs():
        _make_folder(output.parent)
    context.log.info("mtgdm %s %s, profile %s", __version__, stage.name, profile.name)
    for key, setting in settings.values.items():
        context.log.info("%s = %s (%s)", key, setting.value, setting.source)
    try:
        with remarks.heard_by(context):
            result = stage(config, context) or Result()
        context.log.info("done: %s %s", result.summary, json.dumps(result.counts, ensure_ascii=False))
    except MtgdmError as error:
        context.log.error("stopped: %s", error)
        raise
    except KeyboardInterrupt:
        context.warn("interrupted: what was finished is on disk, the same command goes on from there")
        raise
    finally:
        context.close()
    finished = datetime.now().astimezone()
    outputs = result.outputs if result.outputs is not None else config.outputs()
    for output in outputs:
        if not output.exists():
            continue
        manifest.write(
            Manifest(
                stage=stage.name,
                output=manifest.state(output, workspace),
                inputs=inputs,
                settings=settings.values,
                profile=profile.name,
                domain=profile.domain,
                counts=result.counts,
                summary=result.summary,
                versions=manifest.versions(),
                started=started,
                finished=finished,
                seconds=round((finished - started).total_seconds(), 3),
            ),
            output,
        )
    return result


def _context(stage: Stage[Any], profile: Profile, terminal: Terminal, may_replace: bool) -> Context:
    return Context(
        stage=stage.name,
        workspace=profile.workspace,
        terminal=terminal,
        domain=profile.domain,
        profile=profile.name,
        started=datetime.now().astimezone(),
        may_replace=may_replace,
    )


def _refuse_same_path(inputs: Sequence[Path], outputs: Sequence[Path], workspace: Path) -> None:
    read = {path.resolve() for path in inputs}
    for path in outputs:
        if path.resolve() in read:
            raise SettingError(
                f"{manifest.relative(path, workspace)} would be read and written at once",
                hint="name another file with --out",
            )


# --- who may write -------------------------------------------------------------------------------


@contextmanager
def locked(workspace: Path, command: str) -> Iterator[None]:
    """Hold the workspace; a second run is refused. The lock dies with the process, however it ends.

    The first process of a run holds it for the others.
    """
    if not processes.is_first():
        yield
        return
    folder = workspace / ".mtgdm"
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / "running.json"
    lock = _acquired(folder / "lock")
    if lock is None:
        raise UserError(
            f"another mtgdm run is at work in this workspace{_holder(holder)}",
            where=workspace,
            hint="wait for it, stop it, or give this run another `workspace:`",
        )
    try:
        with rows.replace(holder) as file:
            file.write(json.dumps({"pid": os.getpid(), "command": command}).encode("utf-8"))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


@contextmanager
def _writing(outputs: Sequence[Path]) -> Iterator[None]:
    """Hold what a run writes, wherever it lies: a run in another workspace may have been given the same file.

    Outputs named by time (`train-report-*.json`) are nobody else's. What a killed run leaves behind,
    `.NAME.lock`, holds nobody up: the lock was its process's, not the file's.
    """
    with ExitStack() as held:
        for output in sorted({path.resolve() for path in outputs if "*" not in path.name}):
            _make_folder(output.parent)
            path = output.with_name(f".{output.name}.lock")
            try:
                lock = _acquired(path)
            except OSError as error:
                if error.errno not in _NOT_ALLOWED:
                    raise
                raise UserError("nothing may be written in this folder", where=output.parent) from error
            if lock is None:
                raise UserError(
                    "another mtgdm run is writing here",
                    where=output,
                    hint="wait for it, stop it, or write to another place",
                )
            held.callback(lock.release)
            if os.name != "nt":  # Windows has no name to take from an open file; filelock takes it afterwards
                held.callback(path.unlink, missing_ok=True)
        yield


def _make_folder(folder: Path) -> None:
    """The folder of an output; UserError where there can be none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        at = next((place for place in (folder, *folder.parents) if place.is_file()), None)
        why = f"{at.name} is a file" if at is not None else error.strerror
        raise UserError(
            f"no folder can be made here: {why}",
            where=folder,
            hint="name another place for what this stage writes, with --out or in the profile",
        ) from error


def _acquired(path: Path) -> BaseFileLock | None:
    """A lock of the system's, which ends with its process; None where another process has it."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def _holder(path: Path) -> str:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return f" (process {value['pid']}: {value['command']})"


# --- staleness -----------------------------------------------------------------------------------


def condition(stage: Stage[Any], settings: Settings, profile: Profile) -> Condition:
    """Whether a stage's outputs are there, whole, and made from what is there now."""
    workspace = profile.workspace
    config = settings.config.resolved(workspace)
    outputs = config.outputs()
    if not outputs:
        return Condition("no output", "runs every time")
    found = [manifest.read(output) for output in outputs]
    present = tuple(one for one in found if one is not None)
    if len(present) < len(outputs) or not all(output.exists() for output in outputs):
        finished = config.finished()
        begun = any(output.exists() and one is None for output, one in zip(outputs, found, strict=True))
        if finished is not None and finished[0] > 0:
            return Condition("partial", f"{finished[0]:,} of {finished[1]:,}", present, tuple(outputs))
        return Condition("partial" if begun else "missing", "", present, tuple(outputs))
    why = _changed(present[0], settings, profile) or _inputs_changed(present[0], config.inputs(), workspace)
    return Condition("stale" if why else "done", why, present, tuple(outputs))


def _changed(made: Manifest, settings: Settings, profile: Profile) -> str:
    if made.domain != profile.domain:
        return f"domain changed: {made.domain} → {profile.domain}"
    for key, value in settings.shaping().items():
        if key in made.settings and made.settings[key].value != value:
            return f"{key} changed: {made.settings[key].value} → {value}"
    return ""


def _inputs_changed(made: Manifest, inputs: Sequence[Path], workspace: Path) -> str:
    for path in inputs:
        if not path.exists():
            return f"{manifest.relative(path, workspace)} is not there"
    now = [manifest.state(path, workspace, made.inputs) for path in inputs]
    for state in now:
        if state.sha256 not in {earlier.sha256 for earlier in made.inputs}:
            return f"{state.path} changed"
    if len(now) != len(made.inputs):
        return "it was made from other inputs"
    return ""


def _known(inputs: Sequence[Path], outputs: Sequence[Path]) -> list[manifest.FileState]:
    """File states that manifests speak of, which save hashing what has not changed since.

    An input is known to the run that made it, and to an earlier run of this stage.
    """
    made = [one.output for path in inputs if (one := manifest.read(path))]
    read = [state for path in outputs if (one := manifest.read(path)) for state in one.inputs]
    return made + read


# --- all -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One stage of a pipeline with its settings."""

    stage: Stage[Any]
    settings: Settings


def steps(registry: Registry, profile: Profile) -> list[Step]:
    """The profile's pipeline with every setting checked, before anything runs."""
    found: list[Step] = []
    for name in profile.pipeline:
        try:
            stage = registry.stage(name)
        except SettingError as error:
            where = profile.top["pipeline"].source if "pipeline" in profile.top else None
            raise SettingError(error.message, hint=error.hint, where=where) from error
        if any(step.stage is stage for step in found):
            raise SettingError(f"the stage '{name}' stands twice", where=profile.top["pipeline"].source)
        found.append(Step(stage, settings_for(stage, profile, {})))
    return found


def conditions(chain: Sequence[Step], profile: Profile) -> list[Condition]:
    """The condition of every step; what depends on an output that is not done is stale with it."""
    found: list[Condition] = []
    unfinished: dict[Path, str] = {}
    for step in chain:
        own = condition(step.stage, step.settings, profile)
        if own.state == "done":
            inputs = step.settings.config.resolved(profile.workspace).inputs()
            waits = sorted({unfinished[path] for path in inputs if path in unfinished})
            if waits:
                own = Condition("stale", f"{' and '.join(waits)} comes first", own.manifests, own.outputs)
        if own.state not in ("done", "no output"):
            unfinished.update(dict.fromkeys(own.outputs, step.stage.name))
        found.append(own)
    return found


def run_all(
    chain: Sequence[Step], profile: Profile, terminal: Terminal, *, force: bool = False
) -> dict[str, str]:
    """Run what is not up to date, in order; returns what each stage had to say, skipped ones too.

    With `force` every stage runs, and those that would resume start anew.
    """
    said: dict[str, str] = {}
    ran = 0
    with terminal.progress_view():
        for number, step in enumerate(chain, start=1):
            name = step.stage.name
            place = f"[{number}/{len(chain)}] {name}"
            own = False
            if not force:
                now = condition(step.stage, step.settings, profile)
                if now.state == "done":
                    said[name] = now.manifests[0].summary
                    continue
                own = _is_own(now, profile)
                if now.state != "missing":
                    place += f" ({now.state}{': ' + now.why if now.why else ''})"
            terminal.print(place, style="bold")
            settings = _overwriting(step, profile) if force else step.settings
            result = run_stage(step.stage, settings, profile, terminal, may_replace=own)
            if result.summary:
                terminal.print(f"      {result.summary}")
            said[name] = result.summary
            ran += 1
    if ran == 0:
        terminal.print(f"everything is up to date: {', '.join(said)}")
    return said


def _is_own(now: Condition, profile: Profile) -> bool:
    """Whether all that a stage wrote was made by this profile, and nobody changed it since."""
    return bool(now.manifests) and all(
        made.profile == profile.name
        and manifest.state(output, profile.workspace, [made.output]).sha256 == made.output.sha256
        for made, output in zip(now.manifests, now.outputs, strict=False)
        if output.exists()
    )


def _overwriting(step: Step, profile: Profile) -> Settings:
    if "overwrite" not in type(step.settings.config).model_fields:
        return step.settings
    flags: Mapping[str, Sourced] = {"overwrite": Sourced(True, "--force")}
    return settings_for(step.stage, profile, flags)
