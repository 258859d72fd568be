"""A stranger's stage: installed for real, it is a command like ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CommandLine, Ran, clean_environment, spot, write_lines

SHOUT = '''
from typing import Annotated, Literal
from pathlib import Path
from mtgdm.stage import Context, Input, Output, Result, StageConfig, stage

class ShoutConfig(StageConfig):
    word: str = "hello"
    """What to shout."""
    tone: Literal["loud", "louder"] = "loud"
    """How to shout it."""
    words: list[str] = []
    """More to shout."""

@stage
def run(config: ShoutConfig, context: Context):
    """Shout a word."""
    context.print(" ".join([config.word, *config.words]).upper() + ("!" if config.tone == "loud" else "!!"))

class CountConfig(StageConfig):
    in_: Annotated[Path, Input()] = Path("data/prompts.jsonl")
    out: Annotated[Path, Output()] = Path("data/count.txt")

@stage
def count(config: CountConfig, context: Context):
    """Count the prompts."""
    from mtgdm.rows import read_rows, replace
    rows = sum(1 for _ in read_rows(config.in_))
    with replace(config.out) as file:
        file.write(str(rows).encode())
    return Result(counts={"rows": rows}, summary=f"{rows} counted")
'''
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "shout-plugin"
version = "1.2"
[project.entry-points."mtgdm.stages"]
shout = "shout_plugin:run"
count = "shout_plugin:count"
broken = "shout_plugin.missing:run"
status = "shout_plugin:run"
plain = "shout_plugin:SHOUT_TEXT"
leaves = "shout_leaves:run"
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin built and installed by pip into a folder of its own."""
    source = tmp_path_factory.mktemp("source")
    (source / "shout_plugin.py").write_text(f"{SHOUT}\nSHOUT_TEXT = 'x'\n", encoding="utf-8")
    (source / "shout_leaves.py").write_text("import sys\nsys.exit(3)\n", encoding="utf-8")
    (source / "pyproject.toml").write_text(
        PROJECT + '[tool.hatch.build.targets.wheel]\nonly-include = ["shout_plugin.py", "shout_leaves.py"]\n',
        encoding="utf-8",
    )
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*pip, "--target", target, source], check=True, capture_output=True)
    return target


@pytest.fixture
def with_plugin(installed: Path, tmp_path: Path) -> CommandLine:
    class WithPlugin(CommandLine):
        def __call__(self, *arguments: str | Path, env: dict[str, str] | None = None) -> Ran:
            return super().__call__(*arguments, env={"PYTHONPATH": str(installed)} | (env or {}))

    return WithPlugin(tmp_path)


def test_it_stands_in_the_help_and_takes_its_flags(with_plugin: CommandLine) -> None:
    assert "Shout a word." in with_plugin("--help").out
    help_ = with_plugin("shout", "--help").out
    assert "What to shout." in help_
    assert "loud|louder" in help_
    assert with_plugin("shout", "--word", "你好", "--words", "a,b").out == "你好 A B!\n"
    assert with_plugin("shout", "--tone", "quiet").code == 2


def test_it_takes_its_section_and_its_environment(with_plugin: CommandLine) -> None:
    write_lines(with_plugin.folder / "configs/mine.yaml", "shout:\n  word: from the profile\n  words: [x]")
    assert with_plugin("shout", "--profile", "mine").out == "FROM THE PROFILE X!\n"
    assert with_plugin("shout", "--profile", "mine", env={"MTGDM_SHOUT_WORD": "env"}).out == "ENV X!\n"
    assert '"shout"' in with_plugin("config", "schema").out


def test_it_runs_inside_all_and_is_skipped_when_up_to_date(with_plugin: CommandLine) -> None:
    write_lines(with_plugin.folder / "spots.jsonl", spot("西湖"), spot("灵隐寺"))
    write_lines(
        with_plugin.folder / "configs/mine.yaml",
        "pipeline: [prompts, shout, count]\nprompts:\n  spots: spots.jsonl",
    )
    first = with_plugin("all", "--profile", "mine")
    assert (first.code, "HELLO!" in first.out, "6 counted" in first.out) == (0, True, True), first.err
    second = with_plugin("status", "--profile", "mine", "--json").json
    assert [(one["stage"], one["state"]) for one in second] == [
        ("prompts", "done"),
        ("shout", "no output"),
        ("count", "done"),
    ]
    write_lines(with_plugin.folder / "spots.jsonl", spot("西湖"))
    assert "3 counted" in with_plugin("all", "--profile", "mine").out


def test_a_broken_one_is_a_warning_line_and_the_rest_works(with_plugin: CommandLine) -> None:
    ran = with_plugin("shout")
    assert (ran.code, ran.out) == (0, "HELLO!\n")
    warnings = [line for line in ran.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 4
    assert any("'leaves' of shout-plugin" in line and "SystemExit" in line for line in warnings)
    assert any("'broken' of shout-plugin" in line and "ModuleNotFoundError" in line for line in warnings)
    assert any("'status' is a command of mtgdm itself" in line for line in warnings)
    assert any(
        "'plain' of shout-plugin" in line and "not a function under @stage" in line for line in warnings
    )
    listed = {one["stage"]: one for one in with_plugin("stages", "--json").json}
    assert listed["shout"]["package"] == "shout-plugin 1.2"
    assert "ModuleNotFoundError" in listed["broken"]["error"]


BASH = shutil.which("bash")


@pytest.mark.skipif(BASH is None or os.name == "nt", reason="needs bash")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("mtgdm tea", {"teacher", "teacher-report"}),
        ("mtgdm sho", {"shout"}),
        ("mtgdm shout --wor", {"--word", "--words"}),
        ("mtgdm shout --tone ", {"loud", "louder"}),
        ("mtgdm prompts --profile quick", {"quickstart"}),
        ("mtgdm all --from eval", {"eval", "eval-report"}),
        ("mtgdm config show pro", {"prompts"}),
        ("mtgdm config sch", {"schema"}),
    ],
)
def test_a_real_bash_completes(installed: Path, tmp_path: Path, line: str, offered: set[str]) -> None:
    words = line.split(" ")
    script = f"""
        eval "$(_MTGDM_COMPLETE=source_bash mtgdm)"
        COMP_WORDS=({" ".join(f"'{word}'" for word in words)}); COMP_CWORD={len(words) - 1}
        $(complete -p mtgdm | sed 's/.*-F \\([^ ]*\\).*/\\1/') mtgdm
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        [str(BASH), "--norc", "-c", script],
        cwd=tmp_path,
        env=clean_environment() | {"PATH": path, "PYTHONPATH": str(installed)},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert ended.stderr == "", "nothing may land in the user's prompt"
    assert set(ended.stdout.split()) == offered
