"""`mtgdm prompts`: records in, three prompts a spot out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mtgdm.rows import row_id, split_of
from tests.conftest import CommandLine, clean_environment, read_rows, spot, write_lines


def prompts(mtgdm: CommandLine, *arguments: str) -> list[dict[str, object]]:
    ran = mtgdm("prompts", "--spots", "spots.jsonl", *arguments)
    assert ran.code == 0, ran.err
    return read_rows(mtgdm.folder / "data/prompts.jsonl")


def test_each_spot_gets_three_prompts_in_its_split(mtgdm: CommandLine) -> None:
    write_lines(mtgdm.folder / "spots.jsonl", spot("西湖"), spot("灵隐寺"))
    rows = prompts(mtgdm)
    assert [(row["meta"]["spot"], row["meta"]["type"]) for row in rows] == [  # type: ignore[index]
        (name, kind) for name in ("西湖", "灵隐寺") for kind in ("general", "itinerary", "bilingual")
    ]
    for row in rows:
        meta, messages = row["meta"], row["messages"]
        assert list(row) == ["id", "messages", "meta"]
        assert [message["role"] for message in messages] == ["system", "user"]  # type: ignore[attr-defined]
        assert row["id"] == row_id(messages)  # type: ignore[arg-type]
        assert meta["split"] == split_of(meta["spot"])  # type: ignore[index]
        assert meta["province"] == "浙江省"  # type: ignore[index]


def test_the_rows_are_the_same_on_every_run_and_adding_a_record_moves_none(mtgdm: CommandLine) -> None:
    spots = [spot(f"景区{n}") for n in range(20)]
    write_lines(mtgdm.folder / "spots.jsonl", *spots)
    first = prompts(mtgdm)
    assert prompts(mtgdm) == first
    write_lines(mtgdm.folder / "spots.jsonl", spot("新来的"), *spots)
    assert prompts(mtgdm)[3:] == first


def test_exact_duplicates_are_dropped_and_counted(mtgdm: CommandLine) -> None:
    write_lines(mtgdm.folder / "spots.jsonl", spot("西湖"), spot("西湖"), spot("西湖", province="广东省"))
    ran = mtgdm("prompts", "--spots", "spots.jsonl")
    assert "3 exact duplicates dropped" in ran.out
    rows = read_rows(mtgdm.folder / "data/prompts.jsonl")
    assert len(rows) == 6
    assert len({row["meta"]["split"] for row in rows}) == 1, "one name, one split"


def test_names_that_may_be_one_spot_in_two_splits_are_reported(mtgdm: CommandLine) -> None:
    names = [f"第{number:02}山{ending}" for number in range(20) for ending in ("", "风景名胜区")]
    apart = [name for name in names[::2] if split_of(name) != split_of(f"{name}风景名胜区")]
    write_lines(mtgdm.folder / "spots.jsonl", *(spot(name) for name in names))
    ran = mtgdm("prompts", "--spots", "spots.jsonl")
    assert apart
    assert f"{len(apart)} pairs of spots have names that begin alike" in ran.err
    assert f"{apart[0]} ({split_of(apart[0])}) and {apart[0]}风景名胜区" in ran.err


def test_a_bad_line_stops_the_run_before_anything_is_written(mtgdm: CommandLine) -> None:
    write_lines(mtgdm.folder / "spots.jsonl", spot("西湖"))
    before = prompts(mtgdm)
    write_lines(mtgdm.folder / "spots.jsonl", spot("西湖"), spot("灵隐寺"), '{"name": ')
    ran = mtgdm("prompts", "--spots", "spots.jsonl")
    assert ran.code == 1
    assert ran.err.splitlines()[0].startswith("error: ")
    assert "spots.jsonl:3: " in ran.err.splitlines()[0]
    assert "--skip-bad" in ran.err
    assert read_rows(mtgdm.folder / "data/prompts.jsonl") == before
    assert (mtgdm.folder / "data/prompts.jsonl.manifest.json").exists()


def test_skip_bad_writes_the_rest_and_counts(mtgdm: CommandLine) -> None:
    write_lines(mtgdm.folder / "spots.jsonl", *(["{"] * 7), spot("西湖"))
    ran = mtgdm("prompts", "--spots", "spots.jsonl", "--skip-bad")
    assert ran.code == 0
    assert "7 bad lines skipped" in ran.out
    assert ran.err.count("skipped ") == 5
    assert "and 2 more bad lines" in ran.err
    (log,) = (mtgdm.folder / "log").glob("prompts-*.log")
    assert log.read_text(encoding="utf-8").count("spots.jsonl:") == 7
    assert len(read_rows(mtgdm.folder / "data/prompts.jsonl")) == 3


def test_limit_takes_the_first_spots(mtgdm: CommandLine) -> None:
    write_lines(
        mtgdm.folder / "spots.jsonl", *(spot(f"景区{n}") for n in range(9)), "{ broken beyond the limit"
    )
    assert len(prompts(mtgdm, "--limit", "4")) == 12


@pytest.mark.parametrize("text", ["", "\n\n", "\ufeff"])
def test_a_file_without_records_is_an_error(mtgdm: CommandLine, text: str) -> None:
    (mtgdm.folder / "spots.jsonl").write_text(text, encoding="utf-8")
    ran = mtgdm("prompts", "--spots", "spots.jsonl")
    assert ran.code == 1
    assert "spots.jsonl" in ran.err
    assert not (mtgdm.folder / "data/prompts.jsonl").exists()


def test_ratios_that_leave_nothing_to_train_on_are_refused(mtgdm: CommandLine) -> None:
    write_lines(mtgdm.folder / "spots.jsonl", spot("西湖"))
    assert mtgdm("prompts", "--spots", "spots.jsonl", "--val-ratio", "0.5", "--test-ratio", "0.5").code == 2
    assert mtgdm("prompts", "--spots", "spots.jsonl", "--val-ratio", "1.5").code == 2


def test_an_output_that_is_a_folder_is_said_plainly(mtgdm: CommandLine, tmp_path: Path) -> None:
    write_lines(mtgdm.folder / "spots.jsonl", spot("西湖"))
    (tmp_path / "data/prompts.jsonl").mkdir(parents=True)
    ran = mtgdm("prompts", "--spots", "spots.jsonl")
    assert (ran.code, "folder" in ran.err, "Traceback" in ran.err) == (1, True, False)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory is read from /proc")
def test_a_large_file_is_read_in_constant_memory(mtgdm: CommandLine) -> None:
    text = "湖" * 3000
    with (mtgdm.folder / "spots.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for number in range(4000):
            file.write(
                f'{{"name": "景区{number}", "text_zh": {{"short_intro": "{text}", "details": null}}}}\n'
            )
    script = (
        "import sys\nfrom pathlib import Path\nfrom mtgdm.cli import main\n"
        "sys.argv = ['mtgdm', 'prompts', '--spots', 'spots.jsonl']\n"
        "try:\n    main()\nfinally:\n"
        "    print(Path('/proc/self/status').read_text(), file=sys.stderr)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=mtgdm.folder,
        env=clean_environment(),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    peak_mib = int(ended.stderr.split("VmHWM:")[1].split()[0]) / 1024
    assert (mtgdm.folder / "spots.jsonl").stat().st_size > 36_000_000
    assert peak_mib < 120
