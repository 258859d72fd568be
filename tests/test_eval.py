"""Evaluation: held-out rows alone, batches that change nothing, and runs that go on where they were."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mtgdm import rows
from mtgdm.errors import UserError
from mtgdm.rows import Row
from mtgdm.scoring.row import score
from mtgdm.stages.eval import run as evaluate
from mtgdm.stages.train import run as train
from mtgdm.student.noise import quiet
from mtgdm.terminal import counted
from mtgdm.testing import StageRun
from mtgdm.testing import run as run_stage
from tests.conftest import read_rows, spot, write_lines
from tests.tiny_student import make_base, teacher_file, teacher_row

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

METRICS = {
    "prompt_tokens",
    "output_tokens",
    "latency_s",
    "batch_rows",
    "tokens_per_s",
    "finish_reason",
    "char_f1",
    "sequence_ratio",
    "exact_match",
    "rouge_l",
    "chrf",
    "length_ratio",
    "repetition",
    "contract_valid",
    "contract_key",
    "prose_valid",
    "language_ok",
    "problem",
    "fact_recall",
    "unsupported_facts",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a base, rows and a student that has learnt something."""
    workspace = tmp_path_factory.mktemp("made")
    make_base(workspace / "base", hidden=64)
    teacher_file(workspace)
    run_stage(
        train,
        workspace,
        student_base="base",
        device_mode="cpu",
        max_steps=120,
        batch=4,
        grad_accum=1,
        lr=2e-2,
        eval_steps=40,
    )
    return workspace


@pytest.fixture
def workspace(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "data", tmp_path / "data")
    shutil.copytree(made / "base", tmp_path / "base")
    return tmp_path


def evaluated(workspace: Path, **settings: Any) -> StageRun:
    return run_stage(evaluate, workspace, **{"device_mode": "cpu", "max_new_tokens": 24, **settings})


def outputs(workspace: Path) -> list[dict[str, Any]]:
    return read_rows(workspace / "data" / "eval_outputs.jsonl")


def metrics_lines(workspace: Path) -> list[dict[str, Any]]:
    newest = sorted(
        (workspace / "log").glob("eval-*.metrics.jsonl"), key=lambda path: path.stat().st_mtime_ns
    )[-1]
    return read_rows(newest)


# --- what comes out ------------------------------------------------------------------------------


def test_the_held_out_rows_are_answered_in_order_with_their_metrics(workspace: Path) -> None:
    ran = evaluated(workspace, compare_base=True)
    found = outputs(workspace)
    assert [row["meta"]["spot"] for row in found] == [f"test景区{number}" for number in range(4)]
    for row in found:
        assert list(row) == [
            "id", "messages", "reference", "output", "base_output",
            "metrics", "base_metrics", "reference_metrics", "meta",
        ]  # fmt: skip
        assert row["messages"][-1]["role"] == "user"
        assert set(row["metrics"]) == set(row["base_metrics"]) == METRICS
        assert row["output"] != row["base_output"]
    assert [(line["id"], line["metrics"], line["base_metrics"]) for line in metrics_lines(workspace)] == [
        (row["id"], row["metrics"], row["base_metrics"]) for row in sorted(found, key=_asked_first)
    ]
    assert "4 test rows of 4 spots: char-F1" in ran.result.summary and "(base " in ran.result.summary
    assert not list((workspace / "data").glob("eval_outputs.base*"))
    assert ran.manifests[0].counts["rows"] == 4


def _asked_first(row: dict[str, Any]) -> int:
    return -int(row["metrics"]["prompt_tokens"])


def test_the_student_learnt_to_say_more_like_the_teacher_than_its_base(workspace: Path) -> None:
    counts = evaluated(workspace, compare_base=True).manifests[0].counts
    assert counts["student"]["char_f1"] > counts["base"]["char_f1"] + 0.05


def test_the_base_is_answered_as_if_it_stood_alone(workspace: Path) -> None:
    evaluated(workspace, compare_base=True)
    beside = {row["id"]: row["base_output"] for row in outputs(workspace)}
    evaluated(workspace, model="base", out="data/alone.jsonl", allow_leak=True)
    alone = {row["id"]: row["output"] for row in read_rows(workspace / "data" / "alone.jsonl")}
    assert beside == alone


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_batches_change_no_answer(workspace: Path, batch: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    evaluated(workspace, batch=batch)
    with quiet():
        from peft import PeftModel

        from mtgdm.student.base import load_tokenizer
        from mtgdm.student.chat import Chat

        folder = str(workspace / "data" / "checkpoints" / "base-lora")
        chat = Chat(load_tokenizer(folder, "student"), "student")
        base = AutoModelForCausalLM.from_pretrained(workspace / "base", dtype=torch.float32)
        student = PeftModel.from_pretrained(base, folder).eval()
        for row in outputs(workspace):
            ids = chat.prompt(row["messages"])
            for _ in range(24):  # no cache, no batch, no merge: the plainest way to write
                with torch.no_grad():
                    token = int(student(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
                ids.append(token)
                if token == chat.end_of_turn:
                    break
            written = ids[len(chat.prompt(row["messages"])) :]
            assert row["output"] == chat.tokenizer.decode(written, skip_special_tokens=True)
            stopped = written[-1] == chat.end_of_turn
            assert row["metrics"]["finish_reason"] == ("stop" if stopped else "length")
            assert row["metrics"]["output_tokens"] == len(written)


def test_an_answer_ends_at_the_end_of_its_turn() -> None:
    with quiet():
        from mtgdm.student.chat import Chat
        from mtgdm.student.generation import answer_of
        from mtgdm.student.tiny import build_tokenizer

        chat = Chat(build_tokenizer(), "student")
    end = chat.end_of_turn
    ids = chat.tokens("西湖")
    stopped = answer_of(chat, [*ids, end, chat.pad, chat.pad], [end], 9, 0.5)
    assert (stopped.text, stopped.finish_reason, stopped.output_tokens) == ("西湖", "stop", len(ids) + 1)
    cut = answer_of(chat, ids, [end], 9, 0.5)
    assert (cut.text, cut.finish_reason, cut.output_tokens) == ("西湖", "length", len(ids))


def test_the_length_allowed_follows_the_longest_reference(workspace: Path) -> None:
    evaluated(workspace, max_new_tokens=0, model="base", allow_leak=True)
    cut = [
        row["metrics"]["output_tokens"]
        for row in outputs(workspace)
        if row["metrics"]["finish_reason"] == "length"
    ]
    longest = max(len(row["reference"]) for row in outputs(workspace))
    assert cut and len(set(cut)) == 1 and longest <= cut[0] <= 1.25 * longest + 33


def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from mtgdm.student import generation

    asked: list[int] = []
    before = generation._batch

    def tight(model: Any, chat: Any, prompts: Any, max_new_tokens: int) -> Any:
        asked.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return before(model, chat, prompts, max_new_tokens)

    monkeypatch.setattr(generation, "_batch", tight)
    evaluated(workspace)
    assert asked == [4, 2, 1, 1, 1, 1]
    assert len(outputs(workspace)) == 4

    def none(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generation, "_batch", none)
    with pytest.raises(UserError, match="out of memory with a single row"):
        evaluated(workspace, overwrite=True)


# --- which rows ----------------------------------------------------------------------------------


def test_spots_the_student_was_trained_on_are_refused_with_their_number(workspace: Path) -> None:
    with pytest.raises(UserError, match=r"trained on 10 of these spots \(10 of 10 rows\)") as caught:
        evaluated(workspace, split="train")
    assert "--allow-leak" in str(caught.value.hint)
    assert not (workspace / "data" / "eval_outputs.jsonl").exists()
    ran = evaluated(workspace, split="train", allow_leak=True)
    assert any("10 of 10 rows are about spots" in line for line in ran.warnings)
    assert ran.manifests[0].counts["leaked"] == 10


def test_a_spot_written_in_another_way_is_a_leak_all_the_same(workspace: Path) -> None:
    write_lines(workspace / "data" / "other.jsonl", teacher_row(" Ｔrain景区3", "test"))
    with pytest.raises(UserError, match="trained on 1 of these spots"):
        evaluated(workspace, test="data/other.jsonl")


def test_a_row_that_was_trained_on_is_a_leak_whoever_says_what_it_is_about(workspace: Path) -> None:
    found = read_rows(workspace / "data" / "teacher.jsonl")
    row = next(one for one in found if one["meta"]["split"] == "train")
    write_lines(workspace / "data" / "other.jsonl", {"messages": row["messages"]})
    with pytest.raises(UserError, match=r"trained on 1 of these spots \(1 of 1 row\)"):
        evaluated(workspace, test="data/other.jsonl", split="all")


def test_another_checkpoint_named_beside_takes_no_leak_away(workspace: Path) -> None:
    other = workspace / "other"
    other.mkdir()
    (other / "training.json").write_text('{"train_spots": []}', encoding="utf-8")
    with pytest.raises(UserError, match="trained on 10 of these spots"):
        evaluated(workspace, split="train", trained_on="other")


def test_a_spot_is_known_whatever_stands_in_its_name_unseen(workspace: Path) -> None:
    write_lines(workspace / "data" / "other.jsonl", teacher_row("train\u200b景区3", "test"))
    with pytest.raises(UserError, match="trained on 1 of these spots"):
        evaluated(workspace, test="data/other.jsonl")


def test_rows_that_name_no_spot_are_told(workspace: Path) -> None:
    messages = teacher_row("新景区", "test")["messages"]
    write_lines(workspace / "data" / "other.jsonl", {"messages": messages})
    ran = evaluated(workspace, test="data/other.jsonl", split="all")
    assert any(line.startswith("1 row that name") for line in ran.warnings)


def test_a_file_without_rows_of_the_split_is_refused(workspace: Path) -> None:
    write_lines(workspace / "data" / "other.jsonl", teacher_row("西湖", "train"))
    with pytest.raises(UserError, match="no row is in the split `test`"):
        evaluated(workspace, test="data/other.jsonl")


def test_the_limit_takes_the_first_rows_and_the_next_run_the_rest(workspace: Path) -> None:
    evaluated(workspace, limit=2)
    first = outputs(workspace)
    assert [row["meta"]["spot"] for row in first] == ["test景区0", "test景区1"]
    ran = evaluated(workspace)
    assert "2 of 4 rows are there already" in ran.printed
    assert outputs(workspace)[:2] == first
    assert len(metrics_lines(workspace)) == 4


# --- going on ------------------------------------------------------------------------------------


def test_an_interrupted_run_asks_only_what_is_missing(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtgdm.student import generation

    evaluated(workspace, compare_base=True, batch=1)
    whole = outputs(workspace)
    (workspace / "data" / "eval_outputs.jsonl").unlink()
    before = generation._batch
    asked: list[int] = []

    def stops(model: Any, chat: Any, prompts: Any, max_new_tokens: int) -> Any:
        asked.append(len(prompts))
        if len(asked) == 7:  # four rows of the base, two of the student
            raise KeyboardInterrupt
        return before(model, chat, prompts, max_new_tokens)

    monkeypatch.setattr(generation, "_batch", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluated(workspace, compare_base=True, batch=1)
    with (workspace / "data" / "eval_outputs.jsonl").open("ab") as file:
        file.write(b'{"id": "0123456789')  # what a kill leaves of a line
    config = evaluate.config().resolved(workspace)
    assert config.finished() == (2, 4)

    asked.clear()
    ran = evaluated(workspace, compare_base=True, batch=1)
    assert len(asked) == 2  # the base's answers were there
    assert "2 of 4 rows are there already" in ran.printed
    assert [_without_time(row) for row in outputs(workspace)] == [_without_time(row) for row in whole]
    assert {line["id"] for line in metrics_lines(workspace)} == {row["id"] for row in whole}


def _without_time(row: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in row.items() if key not in ("metrics", "base_metrics")}
    return kept | {"char_f1": row["metrics"]["char_f1"], "base": row["base_metrics"]["char_f1"]}


def test_other_settings_on_the_same_file_are_refused_with_two_ways_out(workspace: Path) -> None:
    evaluated(workspace)
    before = outputs(workspace)
    with pytest.raises(UserError, match=r"asked now is .* at most 8 tokens") as caught:
        evaluated(workspace, max_new_tokens=8)
    assert "--overwrite" in str(caught.value.hint) and "--out" in str(caught.value.hint)
    assert outputs(workspace) == before
    evaluated(workspace, max_new_tokens=8, overwrite=True)
    assert all(row["metrics"]["output_tokens"] <= 8 for row in outputs(workspace))


def test_answers_of_a_checkpoint_that_was_trained_again_are_replaced(workspace: Path) -> None:
    evaluated(workspace)
    run_stage(
        train,
        workspace,
        student_base="base",
        device_mode="cpu",
        max_steps=2,
        batch=4,
        lr=1e-3,
        overwrite=True,
    )
    ran = evaluated(workspace)
    assert any("its 4 answers will be replaced" in line for line in ran.printed)
    assert len({row["meta"]["eval"]["fingerprint"] for row in outputs(workspace)}) == 1


def test_a_reference_or_a_record_that_changed_scores_the_same_answer_anew(workspace: Path) -> None:
    evaluated(workspace)
    path = workspace / "data" / "teacher.jsonl"
    found = read_rows(path)
    found[-1]["messages"][-1]["content"] = "另一个答案。"
    found[-2]["meta"]["province"] = "湖北"
    write_lines(path, *found[:-3], *found[-2:])
    before = {row["id"]: row["output"] for row in outputs(workspace)}
    ran = evaluated(workspace)
    assert "dropped: 1 answer to rows that data/teacher.jsonl no longer holds" in ran.printed
    assert "3 of 3 rows are there already" in ran.printed
    now = outputs(workspace)
    assert {row["id"]: row["output"] for row in now}.items() <= before.items()
    assert now[-1]["reference"] == "另一个答案。" and now[-2]["meta"]["province"] == "湖北"
    assert now[-1]["metrics"]["length_ratio"] == len("".join(now[-1]["output"].split())) / 6
    assert [line["province"] for line in metrics_lines(workspace)].count("湖北") == 1


def test_a_reference_that_utf8_cannot_hold_changes_nothing_from_run_to_run(workspace: Path) -> None:
    path = workspace / "data" / "teacher.jsonl"
    found = read_rows(path)
    text = json.dumps(found[-1], ensure_ascii=True).replace("\\u666f", "\\ud800", 1)
    lines = [rows.encode(row) for row in found[:-1]]
    path.write_bytes(b"".join(lines) + text.encode("ascii") + b"\n")
    evaluated(workspace)
    written = (workspace / "data" / "eval_outputs.jsonl").stat().st_mtime_ns
    evaluated(workspace)
    assert len(outputs(workspace)) == 4
    assert (workspace / "data" / "eval_outputs.jsonl").stat().st_mtime_ns == written


def test_another_test_file_never_takes_the_answers_of_the_first(workspace: Path) -> None:
    evaluated(workspace)
    before = outputs(workspace)
    found = read_rows(workspace / "data" / "teacher.jsonl")
    other = workspace / "data" / "other.jsonl"
    write_lines(other, *found[:-3])
    for limit in (0, 1):
        with pytest.raises(UserError, match=r"3 answers here to rows of data/teacher.jsonl") as caught:
            evaluated(workspace, test="data/other.jsonl", limit=limit)
        assert "--out" in str(caught.value.hint)
        assert outputs(workspace) == before
    write_lines(other, *found)  # the same rows in a file of another name
    assert "4 of 4 rows are there already" in evaluated(workspace, test="data/other.jsonl").printed


def test_rows_that_are_no_evaluation_are_never_overwritten(workspace: Path) -> None:
    teacher = workspace / "data" / "teacher.jsonl"
    prompts = workspace / "data" / "prompts.jsonl"
    prompts.write_bytes(teacher.read_bytes()[:-9])  # the last line torn: it stays so too
    before = prompts.read_bytes()
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"prompts.jsonl:1: this is no row of an evaluation"):
            evaluated(workspace, out="data/prompts.jsonl", overwrite=overwrite)
    assert prompts.read_bytes() == before
    strange = workspace / "data" / "strange.jsonl"
    strange.write_text('{"id": "1", "output": "x", "metrics": {}, "meta": {"eval": 3}}\n', encoding="utf-8")
    with pytest.raises(UserError, match="of another tool"):
        evaluated(workspace, out="data/strange.jsonl")
    for text in ("my notes", "my notes\n", "[1, 2, 3]"):
        strange.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"strange.jsonl:1: this is no row of an evaluation"):
            evaluated(workspace, out="data/strange.jsonl", overwrite=True)
        assert strange.read_text(encoding="utf-8") == text


def test_a_run_that_cannot_ask_leaves_the_answers_that_are_there(workspace: Path) -> None:
    """Whatever is to be replaced goes when the first new answer is there, and not before."""
    evaluated(workspace)
    folder, before = workspace / "data", outputs(workspace)
    made = (folder / "eval_outputs.jsonl.manifest.json").read_bytes()
    (workspace / "base").rename(workspace / "away")
    with pytest.raises(UserError, match="is not there"):
        evaluated(workspace)
    make_base(workspace / "small")
    with pytest.raises(UserError, match="does not fit its base"):
        evaluated(workspace, base_model="small", overwrite=True)
    assert outputs(workspace) == before
    assert (folder / "eval_outputs.jsonl.manifest.json").read_bytes() == made
    assert not [path for path in folder.iterdir() if path.name.endswith(".old")]
    # A kill before the first new answer leaves them aside: the next run brings them back.
    (folder / "eval_outputs.jsonl").rename(folder / ".eval_outputs.jsonl.old")
    (workspace / "away").rename(workspace / "base")
    assert "4 of 4 rows are there already" in evaluated(workspace).printed


def test_a_file_that_bears_the_name_of_the_bases_answers_is_left_alone(workspace: Path) -> None:
    test = workspace / "data" / "t.base.jsonl"
    test.write_bytes((workspace / "data" / "teacher.jsonl").read_bytes())
    evaluated(workspace, test="data/t.base.jsonl", out="data/t.jsonl", compare_base=True)
    assert test.is_file()
    journal = workspace / "data" / ".t.jsonl.base"
    journal.write_text('{"mine": 1}\n', encoding="utf-8")
    with pytest.raises(UserError, match="this is no answer of a base"):
        evaluated(workspace, test="data/t.base.jsonl", out="data/t.jsonl", compare_base=True)


def test_answers_of_the_base_wait_whatever_else_is_asked_meanwhile(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtgdm.evaluation import local

    asked: list[tuple[bool, int]] = []
    whole = local.Local.ask

    def ask(self: Any, rows_: Any, keep: Any, refuse: Any, *, base: bool = False) -> None:
        asked.append((base, len(rows_)))
        if not base and len(rows_) == 4:
            raise KeyboardInterrupt
        whole(self, rows_, keep, refuse, base=base)

    monkeypatch.setattr(local.Local, "ask", ask)
    with pytest.raises(KeyboardInterrupt):
        evaluated(workspace, compare_base=True)
    evaluated(workspace, compare_base=True, limit=1)
    evaluated(workspace, model="base", out="data/other.jsonl", allow_leak=True, limit=1)
    evaluated(workspace, compare_base=True)
    assert asked == [(True, 4), (False, 4), (False, 1), (False, 1), (False, 3)]
    assert not [path for path in (workspace / "data").iterdir() if path.name.endswith(".base")]


def test_another_end_of_turn_or_tokenizer_is_another_student(workspace: Path) -> None:
    evaluated(workspace, base_model="base")
    path = workspace / "base" / "generation_config.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(value | {"eos_token_id": [0, 1, 2, 3]}), encoding="utf-8")
    ran = evaluated(workspace, base_model="base")
    assert any("its 4 answers will be replaced" in line for line in ran.printed)


def test_a_base_that_moved_is_the_same_base(workspace: Path) -> None:
    evaluated(workspace, compare_base=True)
    (workspace / "base").rename(workspace / "moved")
    ran = evaluated(workspace, compare_base=True, base_model="moved")
    assert "4 of 4 rows are there already" in ran.printed


def test_a_damaged_line_says_what_to_do_and_overwriting_passes_it(workspace: Path) -> None:
    evaluated(workspace)
    path = workspace / "data" / "eval_outputs.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b'{"id": broken}\n', *lines[2:]]))
    with pytest.raises(UserError, match=r"eval_outputs.jsonl:2: not JSON") as caught:
        evaluated(workspace)
    assert "delete the line" in str(caught.value.hint)
    evaluated(workspace, overwrite=True)
    assert len(outputs(workspace)) == 4


def test_a_renamed_test_file_is_known_by_its_rows_under_a_limit_too(workspace: Path) -> None:
    evaluated(workspace)
    (workspace / "data" / "teacher.jsonl").rename(workspace / "data" / "renamed.jsonl")
    evaluated(workspace, test="data/renamed.jsonl", limit=1)
    assert len(outputs(workspace)) == 4


def test_answers_cut_under_another_limit_are_asked_again_and_the_others_stay(workspace: Path) -> None:
    """The limit follows the references: a longer one raises it for all."""
    evaluated(workspace, max_new_tokens=0)
    cut = {row["id"] for row in outputs(workspace) if row["metrics"]["finish_reason"] == "length"}
    path = workspace / "data" / "teacher.jsonl"
    found = read_rows(path)
    found[-1]["messages"][-1]["content"] = "很长。" * 60
    write_lines(path, *found)
    ran = evaluated(workspace, max_new_tokens=0)
    assert cut
    assert f"asked again: {counted(len(cut), 'row')}, under another limit of tokens" in ran.printed
    together = {row["id"]: row["output"] for row in outputs(workspace)}
    evaluated(workspace, max_new_tokens=0, overwrite=True)
    assert together == {row["id"]: row["output"] for row in outputs(workspace)}


def test_the_limit_of_tokens_is_that_of_all_rows_when_some_are_asked(workspace: Path) -> None:
    path = workspace / "data" / "teacher.jsonl"
    found = read_rows(path)
    found[-1]["messages"][-1]["content"] = "很长。" * 60
    write_lines(path, *found)
    evaluated(workspace, max_new_tokens=0, limit=1)
    evaluated(workspace, max_new_tokens=0)
    assert len({row["meta"]["eval"]["max_new_tokens"] for row in outputs(workspace)}) == 1


def test_another_base_under_the_same_name_is_refused_or_named_by_hand(workspace: Path) -> None:
    evaluated(workspace, base_model="base")
    make_base(workspace / "base", hidden=64, seed=1)
    with pytest.raises(UserError, match="holds other weights than the one") as caught:
        evaluated(workspace)
    assert "--base-model" in str(caught.value.hint)
    with pytest.raises(UserError, match="would replace all its 4 answers"):
        evaluated(workspace, base_model="base", limit=2)
    ran = evaluated(workspace, base_model="base")
    assert any("trained again, or another base" in line for line in ran.printed)


def test_a_model_that_was_only_touched_keeps_its_answers(workspace: Path) -> None:
    merged = merge(workspace)
    evaluated(workspace, model=str(merged), allow_leak=True)
    os.utime(merged / "config.json", (1, 1))
    for file in merged.glob("*.safetensors"):
        os.utime(file, (1, 1))
    ran = evaluated(workspace, model=str(merged), allow_leak=True)
    assert "4 of 4 rows are there already" in ran.printed


# --- models --------------------------------------------------------------------------------------


def merge(workspace: Path) -> Path:
    """The student with the adapter added into its weights."""
    with quiet():
        from mtgdm.student import base, generation

        folder = workspace / "data" / "checkpoints" / "base-lora"
        student = generation.load(
            str(folder), "student", base.place("cpu"), workspace=workspace, load_in_4bit=False
        )
        whole: Any = generation.merged(student)
        whole.save_pretrained(workspace / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / name, workspace / "merged" / name)
    return workspace / "merged"


def test_a_merged_model_answers_as_its_adapter_does(workspace: Path) -> None:
    evaluated(workspace)
    merge(workspace)
    ran = evaluated(workspace, model="merged", out="data/merged.jsonl")
    assert any("has no training.json" in line for line in ran.warnings)
    assert [row["output"] for row in read_rows(workspace / "data" / "merged.jsonl")] == [
        row["output"] for row in outputs(workspace)
    ]


def test_a_student_that_is_no_adapter_is_compared_with_the_base_that_is_named(workspace: Path) -> None:
    evaluated(workspace, compare_base=True)
    merge(workspace)
    alone = evaluated(workspace, model="merged", out="data/alone.jsonl", compare_base=True)
    assert any("names no base model, so it is evaluated alone" in line for line in alone.warnings)
    assert "base_output" not in read_rows(workspace / "data" / "alone.jsonl")[0]
    evaluated(workspace, model="merged", base_model="base", out="data/merged.jsonl", compare_base=True)
    found = read_rows(workspace / "data" / "merged.jsonl")
    assert [(row["output"], row["base_output"]) for row in found] == [
        (row["output"], row["base_output"]) for row in outputs(workspace)
    ]


def test_a_student_in_4_bit_answers_on_a_cpu(workspace: Path) -> None:
    pytest.importorskip("bitsandbytes")
    evaluated(workspace, load_in_4bit=True, compare_base=True)
    assert len(outputs(workspace)) == 4


def test_models_that_cannot_be_used_are_one_line(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such model folder"):
        evaluated(workspace, model="./nowhere")
    folder = workspace / "data" / "checkpoints" / "base-lora"
    (folder / "adapter_model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\n", encoding="utf-8"
    )
    with pytest.raises(UserError, match="Git-LFS pointer"):
        evaluated(workspace)
    shutil.rmtree(workspace / "data" / "checkpoints")
    with pytest.raises(UserError, match="there is no finished checkpoint") as caught:
        evaluated(workspace)
    assert "mtgdm train" in str(caught.value.hint)


def test_what_is_wrong_with_an_adapter_is_said(workspace: Path) -> None:
    checkpoint = workspace / "data" / "checkpoints" / "base-lora"
    config = checkpoint / "adapter_config.json"
    weights = checkpoint / "adapter_model.safetensors"
    known, whole = config.read_text(encoding="utf-8"), weights.read_bytes()
    value = json.loads(known)
    for text, message in (
        ("[]", "holds no JSON object but list"),
        (
            json.dumps({key: value[key] for key in value if key != "peft_type"}),
            "no LoRA adapter: its peft_type",
        ),
        (json.dumps(value | {"r": "8"}), "its rank `r` is '8'"),
        (json.dumps(value | {"r": value["r"] + 1}), "weights have rank"),
    ):
        config.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            evaluated(workspace)
    config.write_text(known, encoding="utf-8")
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="weights cannot be read") as caught:
        evaluated(workspace)
    assert "copy the checkpoint anew" in str(caught.value.hint)
    weights.unlink()
    with pytest.raises(UserError, match="weights of the adapter are missing"):
        evaluated(workspace)


def test_a_folder_without_a_model_says_where_one_lies(workspace: Path) -> None:
    package = workspace / "data" / "export" / "student"
    (package / "merged").mkdir(parents=True)
    with pytest.raises(UserError, match="no model lies in this folder") as caught:
        evaluated(workspace, model="data/export/student")
    assert "--model" in str(caught.value.hint) and str(caught.value.hint).endswith("merged")


def test_a_base_named_by_hand_wins_over_what_the_adapter_says(workspace: Path) -> None:
    path = workspace / "data" / "checkpoints" / "base-lora" / "adapter_config.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(value | {"base_model_name_or_path": "/gone/base"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"training.json says that the base was"):
        evaluated(workspace)
    evaluated(workspace, base_model="base")
    assert len(outputs(workspace)) == 4


def test_an_answer_ends_where_the_context_of_the_model_does(workspace: Path) -> None:
    evaluated(workspace, max_new_tokens=64)
    longest = max(row["metrics"]["prompt_tokens"] for row in outputs(workspace))
    path = workspace / "base" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"max_position_embeddings": longest + 6}), encoding="utf-8")
    evaluated(workspace, max_new_tokens=64, overwrite=True)
    for row in outputs(workspace):
        assert row["metrics"]["prompt_tokens"] + row["metrics"]["output_tokens"] <= longest + 6


def test_an_adapter_of_another_base_is_one_line(workspace: Path) -> None:
    shutil.rmtree(workspace / "base")
    make_base(workspace / "base", hidden=32)
    with pytest.raises(UserError, match="does not fit its base base"):
        evaluated(workspace, base_model="base")


def test_the_base_of_an_adapter_is_looked_for_where_it_lies_now(workspace: Path) -> None:
    evaluated(workspace)
    before = [row["output"] for row in outputs(workspace)]
    (workspace / "base").rename(workspace / "elsewhere")
    with pytest.raises(UserError, match=r"base model of .* is not there: base was a folder") as caught:
        evaluated(workspace, overwrite=True)
    assert "--base-model FOLDER" in str(caught.value.hint)
    evaluated(workspace, base_model="elsewhere", overwrite=True)
    assert [row["output"] for row in outputs(workspace)] == before


def test_pointers_in_the_base_are_told_before_anything_is_asked(workspace: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\n"
    (workspace / "base" / "model.safetensors").write_text(pointer, encoding="utf-8")
    with pytest.raises(UserError, match=r"base/model\.safetensors: this is a Git-LFS pointer"):
        evaluated(workspace)
    assert not (workspace / "data" / "eval_outputs.jsonl").exists()


def test_a_named_base_is_asked_by_its_own_template(workspace: Path) -> None:
    merge(workspace)
    template = workspace / "base" / "chat_template.jinja"
    template.write_text("山" + template.read_text(encoding="utf-8"), encoding="utf-8")
    evaluated(workspace, model="merged", base_model="base", compare_base=True)
    row = outputs(workspace)[0]
    assert row["base_metrics"]["prompt_tokens"] == row["metrics"]["prompt_tokens"] + 1


def test_a_base_too_large_for_the_memory_says_so_and_is_not_missing(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(UserError, match=r"^out of memory") as caught:
        evaluated(workspace)
    assert "--load-in-4bit" in str(caught.value.hint)


def test_an_adapter_of_a_base_with_more_layers_is_one_line(workspace: Path) -> None:
    """PEFT loads what fits and says nothing of the rest: half a student."""
    with quiet():
        from mtgdm.student.tiny import build_model, build_tokenizer

        shutil.rmtree(workspace / "base")
        tokenizer = build_tokenizer()
        tokenizer.save_pretrained(workspace / "base")
        model = build_model(len(tokenizer), hidden=64, layers=1, heads=1, feed_forward=64, seed=0)
        model.save_pretrained(workspace / "base")
    with pytest.raises(UserError, match=r"does not fit its base base: it holds \d+ tensors"):
        evaluated(workspace, base_model="base")


def test_another_chat_template_than_in_training_is_refused(workspace: Path) -> None:
    template = workspace / "data" / "checkpoints" / "base-lora" / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("assistant", "helper"), encoding="utf-8")
    with pytest.raises(UserError, match="is not the one that the student was trained with") as caught:
        evaluated(workspace)
    assert "chat_template.jinja" in str(caught.value.hint)


def test_files_of_two_checkpoints_in_one_folder_are_refused(workspace: Path) -> None:
    path = workspace / "data" / "checkpoints" / "base-lora" / "adapter_config.json"
    text = path.read_text(encoding="utf-8").replace(
        '"base_model_name_or_path": "base"', '"base_model_name_or_path": "x"'
    )
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"the base was base, adapter_config\.json that it is x"):
        evaluated(workspace)


def test_a_prompt_longer_than_the_context_is_told_and_the_others_are_asked(workspace: Path) -> None:
    long = teacher_row("test景区很长", "test")
    long["messages"][1]["content"] += "山" * 5000
    long["id"] = rows.row_id(long["messages"])
    path = workspace / "data" / "teacher.jsonl"
    write_lines(path, *read_rows(path), long)
    ran = evaluated(workspace, compare_base=True)
    assert len(outputs(workspace)) == 4
    assert any("1 of 5 rows could not be asked: base: the prompt has" in line for line in ran.warnings)
    assert ran.manifests[0].counts["refused"] == 1


def test_as_many_rows_at_once_as_memory_has_room_for(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    from mtgdm.student import generation

    with quiet():
        from mtgdm.student import base

        place = base.place("cpu")
        model = base.load_model(str(workspace / "base"), "base", place)
    row_bytes = 2 * 2 * 64 * 4 * 1000  # keys and values, 2 layers, 64 numbers of 4 bytes, 1000 tokens
    for rows_that_fit, taken in ((1000, generation.MOST_ON_CPU), (13, 8), (1, 1), (0, 1)):
        free = int(rows_that_fit * row_bytes / generation.FOR_THE_CACHE)
        memory = type("Memory", (), {"available": free})
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        assert generation.fitting(model, 1000) == taken


def test_the_same_student_over_a_teacher_backend_says_and_scores_the_same(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)  # where a teacher looks for a base that lies in a folder
    evaluated(workspace)
    folder = str(workspace / "data" / "checkpoints" / "base-lora")
    evaluated(workspace, backend="transformers", model=folder, out="data/served.jsonl")
    texts = {"latency_s", "tokens_per_s", "batch_rows"}
    for here, there in zip(outputs(workspace), read_rows(workspace / "data" / "served.jsonl"), strict=True):
        assert here["output"] == there["output"]
        assert {k: v for k, v in here["metrics"].items() if k not in texts} == {
            k: v for k, v in there["metrics"].items() if k not in texts
        }


# --- failures ------------------------------------------------------------------------------------


def test_failures_lie_beside_the_answers_with_the_reason_the_worst_first(workspace: Path) -> None:
    from mtgdm.scoring.failures import badness

    ran = evaluated(workspace, model="base", allow_leak=True, max_new_tokens=4)
    found = read_rows(workspace / "data" / "eval_failures.jsonl")
    assert {row["id"] for row in found} == {row["id"] for row in outputs(workspace)}
    for row in found:
        assert list(row)[:2] == ["id", "why"]
        assert "ended by length" in row["why"]
        assert row["reference"] and row["messages"] and "output" in row
    order = [badness(row["metrics"]) for row in found]
    assert order == sorted(order, reverse=True)
    assert any("4 of 4 answers with something wrong: data/eval_failures.jsonl" in p for p in ran.printed)
    assert ran.manifests[1].counts["failures"] == 4


# --- metrics -------------------------------------------------------------------------------------


@pytest.fixture
def general(tmp_path: Path) -> Row:
    """A row of the tourism domain with the offline teacher's answer."""
    from mtgdm.tourism import Tourism

    domain = Tourism()
    path = write_lines(tmp_path / "spots.jsonl", spot("西湖风景名胜区"))
    record = next(iter(domain.read(path, lambda bad: pytest.fail(str(bad)))))
    prompt = next(iter(domain.prompts(record)))
    messages = [*prompt.messages, {"role": "assistant", "content": domain.answer(record.facts, prompt.type)}]
    about = {"spot": record.name, "type": prompt.type, "split": "test", "record": record.facts}
    return Row(rows.row_id(messages), messages, about, path, 1)


def test_the_teachers_own_answer_scores_full_marks(general: Row) -> None:
    from mtgdm.tourism import Tourism

    assert general.answer is not None
    found = score(Tourism(), general, general.answer, {})
    assert (found["char_f1"], found["exact_match"], found["contract_valid"]) == (1, True, True)
    assert (found["fact_recall"], found["unsupported_facts"]) == (1, 0)


def test_broken_and_invented_answers_are_counted(general: Row) -> None:
    from mtgdm.tourism import Tourism

    assert general.answer is not None
    broken = score(Tourism(), general, general.answer[:-1], {})
    assert broken["contract_valid"] is False and broken["exact_match"] is False
    invented = score(Tourism(), general, general.answer.replace("1089", "1723"), {})
    assert invented["unsupported_facts"] >= 1 and invented["fact_recall"] < 1


def test_the_key_that_breaks_the_contract_is_named(general: Row) -> None:
    import json

    from mtgdm.tourism import Tourism

    value = json.loads(general.answer or "")
    broken = {
        "geo.lat": value | {"geo": value["geo"] | {"lat": 123.0}},
        "attractions[].name": value
        | {"attractions": [dict.fromkeys(("type", "desc", "lat", "lon")) | {"name": 7}]},
        "myths": {key: one for key, one in value.items() if key != "myths"},
        "more": value | {"more": 1},
        "not an object": [value],
    }
    for key, answer in broken.items():
        found = score(Tourism(), general, json.dumps(answer, ensure_ascii=False), {})
        assert (found["contract_valid"], found["contract_key"]) == (False, key)
    assert score(Tourism(), general, "{", {})["contract_key"] == "not JSON"
    assert score(Tourism(), general, "", {})["problem"] == "the answer is empty"


def test_a_bilingual_answer_is_checked_for_its_languages(general: Row) -> None:
    from mtgdm.scoring.row import reference_score
    from mtgdm.tourism import Tourism

    domain = Tourism()
    whole = domain.answer(general.meta["record"], "bilingual")
    messages = [*general.prompt, {"role": "assistant", "content": whole}]
    row = Row("x", messages, {**general.meta, "type": "bilingual"}, general.path, 1)
    right = score(domain, row, whole, {})
    assert (right["language_ok"], right["prose_valid"], right["contract_valid"]) == (True, True, None)
    chinese = score(
        domain, row, "西湖在杭州市，历史悠久，四季皆宜，乘公交前往，建议提前预约，春天最好。" * 2, {}
    )
    assert (chinese["language_ok"], chinese["problem"]) == (False, "there is no English")
    teacher = reference_score(domain, row)
    assert (teacher["language_ok"], teacher["prose_valid"], teacher["unsupported_facts"]) == (True, True, 0)
    assert "char_f1" not in teacher


def test_json_in_another_language_than_asked_for_is_told(general: Row) -> None:
    from mtgdm.tourism import Tourism

    assert score(Tourism(), general, general.answer or "", {})["language_ok"] is True
    english = '{"name": "' + "the lake in the west of the town " * 10 + '"}'
    assert score(Tourism(), general, english, {})["language_ok"] is False


def test_prose_has_no_contract_and_a_row_without_a_record_no_facts(general: Row) -> None:
    from mtgdm.tourism import Tourism

    prose = Row("x", general.messages, {**general.meta, "type": "bilingual"}, general.path, 1)
    assert score(Tourism(), prose, "西湖。", {})["contract_valid"] is None
    foreign = Row("x", general.messages, {}, general.path, 1)
    found = score(Tourism(), foreign, "西湖。", {})
    assert (found["contract_valid"], found["fact_recall"], found["unsupported_facts"]) == (None, None, None)
