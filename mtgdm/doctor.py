"""What is installed and reachable, and the command that mends what is not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import BaseModel

from mtgdm.errors import MtgdmError
from mtgdm.plugins import named
from mtgdm.profiles import Profile, settings_for

if TYPE_CHECKING:
    from mtgdm.registry import Registry
    from mtgdm.teachers.seam import Backend

_TRAINING = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "gguf")
_FREE_GIB = 10


class Finding(BaseModel):
    """One thing that was looked at; `mend` is a command, empty where nothing is to be done."""

    state: Literal["ok", "note", "wrong"]
    what: str
    found: str
    mend: str = ""


def examine(profile: Profile, registry: Registry) -> list[Finding]:
    """Look at Python, the libraries, the GPU, the browser, fonts, disk, plugins and what the profile names."""
    return [
        Finding(state="ok", what="Python", found=sys.version.split()[0]),
        *_libraries(),
        *_llama(),
        *_gpu(),
        *_browser(),
        *_fonts(),
        *_disk(profile),
        *_plugins(registry),
        *_spots(profile, registry),
        *_teacher(profile, registry),
        *_ollama(profile, registry),
    ]


def _libraries() -> Iterator[Finding]:
    missing = []
    for name in _TRAINING:
        try:
            yield Finding(state="ok", what=name, found=metadata.version(name))
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        yield Finding(
            state="wrong",
            what="training",
            found=f"not installed: {', '.join(missing)}",
            mend='pip install "mtgdm[train]"',
        )


def _llama() -> Iterator[Finding]:
    """GGUF is written without llama.cpp, but its k-quants are not, nor is every GGUF proved."""
    try:
        yield Finding(state="ok", what="llama-cpp-python", found=metadata.version("llama-cpp-python"))
    except metadata.PackageNotFoundError:
        yield Finding(
            state="note",
            what="llama-cpp-python",
            found="none: no q4_k_m, q5_k_m and q6_k, and some GGUF files stay unproved",
            mend='pip install "mtgdm[llama]", which needs a C compiler and cmake',
        )


def _gpu() -> Iterator[Finding]:
    try:
        import torch
    except ModuleNotFoundError:
        return
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            memory_gib = properties.total_memory / 2**30
            yield Finding(state="ok", what=f"GPU {number}", found=f"{properties.name}, {memory_gib:.0f} GiB")
    elif torch.version.cuda is None:
        yield Finding(
            state="note",
            what="GPU",
            found="this torch is built for the CPU alone",
            mend="https://pytorch.org/get-started/locally names the command for your GPU",
        )
    else:
        yield Finding(state="note", what="GPU", found="none that torch can use", mend="nvidia-smi")


def _browser() -> Iterator[Finding]:
    from mtgdm.charts.export import find_browser, install_hint

    found = find_browser()
    if found is None:
        yield Finding(
            state="note", what="browser", found="none: reports come without PNG charts", mend=install_hint()
        )
    else:
        yield Finding(state="ok", what="browser", found=str(found))


def _fonts() -> Iterator[Finding]:
    if not sys.platform.startswith("linux"):
        return  # Windows and macOS bring Chinese fonts
    listing = shutil.which("fc-list")
    listed = subprocess.run([listing, ":lang=zh"], capture_output=True, check=False) if listing else None
    if listed is not None and listed.stdout.strip():
        yield Finding(state="ok", what="Chinese font", found="there is one")
    else:
        yield Finding(
            state="note",
            what="Chinese font",
            found="none: charts would show empty boxes",
            mend="sudo apt-get install fonts-noto-cjk",
        )


def _disk(profile: Profile) -> Iterator[Finding]:
    folder = profile.workspace
    while not folder.exists():
        folder = folder.parent
    free_gib = shutil.disk_usage(folder).free / 2**30
    state: Literal["ok", "note"] = "ok" if free_gib >= _FREE_GIB else "note"
    yield Finding(state=state, what="disk", found=f"{free_gib:.0f} GiB free for {profile.workspace}")


def _plugins(registry: Registry) -> Iterator[Finding]:
    for plugin in registry.broken:
        yield Finding(
            state="wrong",
            what=f"stage {plugin.name}",
            found=plugin.error or "",
            mend=f"pip install --upgrade {plugin.package}",
        )


def _spots(profile: Profile, registry: Registry) -> Iterator[Finding]:
    if "prompts" not in registry.stages:
        return
    for path in (
        settings_for(registry.stage("prompts"), profile, {}).config.resolved(profile.workspace).inputs()
    ):
        if path.is_file():
            yield Finding(state="ok", what="records", found=str(path))
        else:
            yield Finding(
                state="wrong",
                what="records",
                found=f"there is no {path}",
                mend="mtgdm prompts --spots FILE, or `spots:` in the profile's section prompts",
            )


def _teacher(profile: Profile, registry: Registry) -> Iterator[Finding]:
    if "teacher" not in registry.stages:
        return
    from mtgdm.teachers.endpoints import backends

    config = settings_for(registry.stage("teacher"), profile, {}).config
    name: str = getattr(config, "backend", "")
    try:
        domain = named("mtgdm.domains", profile.domain, "domain")()
        found = backends(named("mtgdm.teachers", name, "teacher backend"), cast(Any, config), domain)
    except MtgdmError as error:
        yield Finding(state="wrong", what=f"teacher {name}", found=str(error), mend=error.hint or "")
        return
    for backend in found:
        what = f"teacher {name}" + (f" at {backend.place}" if len(found) > 1 else "")
        yield _checked(what, backend)


def _ollama(profile: Profile, registry: Registry) -> Iterator[Finding]:
    """The server that `package` makes the student in, where the profile names a model for it."""
    if "package" not in registry.stages:
        return
    config: Any = settings_for(registry.stage("package"), profile, {}).config
    if not config.ollama_create:
        return
    from mtgdm.export.ollama import OllamaServer

    what = "Ollama for package"
    try:
        with OllamaServer(config.url) as server:
            yield Finding(state="ok", what=what, found=f"{server.check()} at {config.url}")
    except MtgdmError as error:
        yield Finding(state="wrong", what=what, found=str(error), mend=error.hint or "")


def _checked(what: str, backend: Backend) -> Finding:
    import asyncio

    from mtgdm.teachers.seam import Refused, Retryable

    async def check() -> None:
        async with backend:
            await backend.check()

    try:
        asyncio.run(check())
    except MtgdmError as error:
        return Finding(state="wrong", what=what, found=str(error), mend=error.hint or "")
    except (Retryable, Refused) as error:
        return Finding(state="wrong", what=what, found=str(error), mend="mtgdm doctor, in a while")
    return Finding(state="ok", what=what, found=backend.model or "ready")
