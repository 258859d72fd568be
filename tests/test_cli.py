"""The commands that inform, and how commands end."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtgdm import __version__
from tests.conftest import CommandLine, clean_environment, spot, write_lines

README = Path(__file__).parent.parent / "README.md"
COMMANDS = {"all", "status", "plan", "doctor", "stages", "profiles", "config"}
PIPELINE = ["prompts", "teacher", "train", "report", "eval", "eval-report", "package"]
STAGES = [*PIPELINE, "export", "import", "teacher-report"]


def test_help_names_every_command_of_the_contract(mtgdm: CommandLine) -> None:
    help_ = mtgdm("--help").out
    for name in (*STAGES, *COMMANDS):
        assert re.search(rf"\b{name}\b", help_), name


def test_the_version_is_printed(mtgdm: CommandLine) -> None:
    assert mtgdm("--version").out.strip() == f"mtgdm {__version__}"


def test_stages_says_where_each_comes_from(mtgdm: CommandLine) -> None:
    listed = mtgdm("stages", "--json").json
    assert [one["stage"] for one in listed] == STAGES
    assert {one["package"] for one in listed} == {f"mtgdm {__version__}"}
    assert all(one["help"] and one["error"] is None for one in listed)


def test_plan_counts_what_is_there_and_runs_nothing(mtgdm: CommandLine) -> None:
    write_lines(mtgdm.folder / "spots.jsonl", *(spot(f"景区{n}") for n in range(5)))
    write_lines(mtgdm.folder / "configs/mine.yaml", "extends: quickstart\nprompts:\n  spots: spots.jsonl")
    first = {one["stage"]: one for one in mtgdm("plan", "--profile", "mine", "--json").json}
    assert (first["prompts"]["state"], first["prompts"]["spots"]) == ("missing", 5)
    assert not (mtgdm.folder / "data").exists()
    mtgdm("prompts", "--profile", "mine")
    then = {one["stage"]: one for one in mtgdm("plan", "--profile", "mine", "--json").json}
    assert (then["teacher"]["rows"], then["teacher"]["to_ask"]) == (15, 15)
    assert then["teacher"]["prompt_tokens_at_most"] > 15 * 100


def test_doctor_names_what_is_wrong_and_the_command_that_mends_it(mtgdm: CommandLine) -> None:
    ran = mtgdm(
        "doctor", "--profile", "ollama-32b", "--json", env={"MTGDM_TEACHER_URL": "http://127.0.0.1:9"}
    )
    assert ran.code == 1
    found = {one["what"]: one for one in ran.json}
    assert found["Python"]["state"] == "ok"
    assert found["torch"]["state"] == "ok"
    assert found["gguf"]["state"] == "ok"
    assert found["llama-cpp-python"]["state"] in ("ok", "note"), "k-quants alone need it"
    assert (found["teacher ollama"]["state"], "ollama serve" in found["teacher ollama"]["mend"]) == (
        "wrong",
        True,
    )
    assert (found["records"]["state"], "--spots" in found["records"]["mend"]) == ("wrong", True)


def test_doctor_is_content_with_the_quickstart(mtgdm: CommandLine) -> None:
    ran = mtgdm("doctor", "--profile", "quickstart", "--json")
    assert (ran.code, [one for one in ran.json if one["state"] == "wrong"]) == (0, [])


def test_config_show_has_every_stage_and_the_top(mtgdm: CommandLine) -> None:
    shown = mtgdm("config", "show", "--json").json
    assert shown["pipeline"] == PIPELINE
    assert {stage.replace("-", "_") for stage in STAGES} <= set(shown)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nothing"], 2),
        (["prompts", "--limt", "3"], 2),
        (["prompts", "--limit", "x"], 2),
        (["teacher", "--temperature", "9"], 2),
        (["train", "--device-mode", "tpu"], 2),
        (["prompts", "--profile", "no-such"], 2),
        (["config", "show", "no-such"], 2),
        (["prompts", "--spots", "none.jsonl"], 1),
        (["teacher", "--profile", "quickstart"], 1),
        (["train", "--profile", "quickstart"], 1),
        (["report"], 1),
        (["eval", "--profile", "quickstart"], 1),
        (["eval-report"], 1),
        (["package"], 1),
    ],
)
def test_a_mistake_is_said_without_a_traceback(mtgdm: CommandLine, arguments: list[str], code: int) -> None:
    ran = mtgdm(*arguments)
    assert ran.code == code, ran.err
    assert "Traceback" not in ran.err
    assert ran.err.strip()
    if code == 1:
        assert ran.err.startswith("error: "), "one line, and the hint under it"
        assert all(line.startswith("hint: ") for line in ran.err.splitlines()[1:]), ran.err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT between processes")
def test_an_interrupted_run_ends_with_130(mtgdm: CommandLine) -> None:
    write_lines(mtgdm.folder / "spots.jsonl", *(spot(f"景区{n}") for n in range(60_000)))
    process = subprocess.Popen(
        [sys.executable, "-m", "mtgdm", "prompts", "--spots", "spots.jsonl"],
        cwd=mtgdm.folder,
        env=clean_environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    while process.poll() is None and not list(mtgdm.folder.glob("data/.prompts.jsonl.tmp")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, "Traceback" in err) == (130, False), err
    assert "interrupted" in err
    assert list((mtgdm.folder / "data").iterdir()) == [], "nothing half-written stays"


def readme_commands() -> list[list[str]]:
    """Every mtgdm command of the README: in shell blocks, and in back quotes."""
    text = README.read_text(encoding="utf-8")
    shell = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split("#")[0] for block in shell for line in block.splitlines()]
    quoted = re.findall(r"`(mtgdm [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line.split() for line in (*lines, *quoted) if line.strip().startswith("mtgdm ")]


def test_every_command_of_the_readme_exists_with_its_flags(mtgdm: CommandLine) -> None:
    helps: dict[tuple[str, ...], str] = {}
    commands = readme_commands()
    assert len(commands) > 15
    for words in commands:
        place = [word.rstrip(",") for word in words[1:] if not word.startswith("-")]
        command = tuple(place[:2]) if place and place[0] == "config" else tuple(place[:1])
        if command == ("shout",):
            continue  # the plugin of the example
        if command not in helps:
            ran = mtgdm(*command, "--help")
            assert ran.code == 0, " ".join(words)
            helps[command] = ran.out
        for flag in (word for word in words if word.startswith("--")):
            assert re.search(rf"{flag}\b", helps[command]), " ".join(words)
