"""What stands around an answer is taken off; what stands inside it is named, and never kept."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from mtgdm import plugins
from mtgdm.domain import answer_problem
from mtgdm.errors import UserError
from mtgdm.rows import row_id
from mtgdm.stages import teacher
from mtgdm.teachers.cleaning import cleaned, markup
from mtgdm.testing import run
from mtgdm.tourism import Tourism
from tests.conftest import read_rows, write_lines
from tests.ollama_server import OllamaServer, Question
from tests.teacher_domain import find, right_answer, run_teacher, write_prompts

PROSE = "湖在城西，见 `a` 与 [1]。\n\n| 季 | 景 |\n|---|---|\n| 春 | 花 |\n\nThe lake lies west; 1 < 2."
OBJECT = '{"name":"湖","steps":["一","```","a [2] <b>"]}'

AROUND_ANY = [
    "\ufeff{}\u200b",
    "\u200b\ufeff {}\u2060\n",
    "{}\x00",
    "{}<|im_end|>",
    "{}<|endoftext|>",
    "{}<|eot_id|>\n",
    "{}<|end|>",
    "{}<|END_OF_TURN_TOKEN|>",
    "{} <｜end▁of▁sentence｜>",
    "{}</s>",
    "<s>{}</s>",
    "<s> [INST]{}[/INST]",
    "{}<end_of_turn>",
    "{}<turn|>",
    "{}[|endofturn|]",
    "{}<end_of_utterance>",
    "{}<unused7><pad><pad><pad>",
    "{}<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>assistant\n{}<|im_end|>",
    "<start_of_turn>model\n{}<end_of_turn>\n<start_of_turn>user",
    "<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>",
    "<｜Assistant｜>{}<｜end▁of▁sentence｜>",
    "<|channel|>final<|message|>{}<|return|>",
    "<think>\nx\n</think>\n{}<|im_end|>\ufeff",
    "```\n{}\n```",
    "~~~\n{}\n~~~",
    "```json\n{}```",
    "`````markdown\n{}\n`````\n",
    "```markdown\n<think>x</think>\n{}\n```",
    "<think>x</think>\n```text\r\n{}\r\n```<|im_end|>",
    "```markdown\n{}",
    "assistant\n\n{}",
    "{}\nassistant",
    "{}<|im_",
    "{}<|eot_id",
    "{}</s",
]
AROUND_JSON = [
    "```json{}```",
    "```JSON\r\n{}\r\n```\r\n",
    "~~~json\n{}\n~~~",
    "以下是JSON：\n```json\n{}\n```",
    "Here it is:\n\n```json\n{}\n```\nI hope this helps.",
    "JSON: {}",
    "analysisMind the {{braces}}.assistantfinal{}",
]
AROUND_PROSE = [
    "```markdown\n{}\n```",
    "```中文\n{}\n```",
    "```md\n{}```",
    "{}\n```",
    "以下是讲解：\n\n```markdown\n{}\n```",
]


@pytest.mark.parametrize("around", AROUND_ANY + AROUND_PROSE)
def test_what_stands_around_prose_is_taken_off(around: str) -> None:
    assert cleaned(around.format(PROSE), is_json=False) == PROSE


@pytest.mark.parametrize("around", AROUND_ANY + AROUND_JSON)
def test_what_stands_around_a_json_answer_is_taken_off(around: str) -> None:
    assert cleaned(around.format(OBJECT), is_json=True) == OBJECT


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        "```python\nprint(1)\n```",
        "用 `x` 与\n```\ncode\n```\n结束。",
        "```\na\n```\n中\n```\nb\n```",
        "先看：\n```\na\n```",
        "```a``` and ```b```",
        "<p>湖</p>",
        "《湖》【注】（a）「b」",
        "1 < 2 > 0，a<b|c>d",
        "f <| g |> h",
        "Use `~~~`.",
        "- [x] done [^1]",
        "a <|im_end|> b",
        "a <think>b</think> c",
        "This is our model",
        "Ask the user",
        "model trains run",
        "assistant: a lake",
    ],
)
def test_prose_that_only_looks_wrapped_is_left_as_it_is(text: str) -> None:
    assert cleaned(text, is_json=False) == text


@pytest.mark.parametrize(
    "text", ['{"a":1}{"b":2}', '{"a":1', '{"a":1}}', '{"a":"<|im_end|>"}', "[1,2]", "no JSON"]
)
def test_what_is_not_one_object_is_left_to_the_contract(text: str) -> None:
    assert cleaned(text, is_json=True) == text


def test_a_fence_around_broken_json_is_taken_off_before_it_is_shown_again() -> None:
    assert cleaned('```json\n{"a":1\n```', is_json=True) == '{"a":1'


def test_a_thought_that_never_ends_is_no_answer() -> None:
    assert cleaned("<think>x<|im_end|>", is_json=False) == ""
    assert cleaned(f"[THINK]{OBJECT}", is_json=True) == ""


@pytest.mark.parametrize("text", ["<|a|>" * 20_000 + "x", "```\n" * 20_000, "[INST]" * 20_000 + "x"])
def test_a_loop_of_markup_takes_no_time(text: str) -> None:
    started = time.process_time()
    cleaned(text, is_json=False)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("湖。<|im_end|>山。", "im_end"),
        ("湖</s>山", "s"),
        ("湖[INST]山", "INST"),
        ("湖<end_of_turn>山", "end_of_turn"),
        ("湖<｜User｜>山", "User"),
        ("湖<0xE6>山", "0xE6"),
        ("湖<unk>", "unk"),
        ("湖<think>山", "think"),
        ("湖<|eot_id|><|im_end|>山", "eot_id"),
        ("`<|im_end|>`", "im_end"),
        ("`<think>` 是标签", None),
        (PROSE, None),
        (OBJECT, None),
        ("f <| g |> h", None),
        ("| a | <b> | [1] | [注] |", None),
        ("<s1> <start> <end>", None),
    ],
)
def test_markup_inside_an_answer_is_named_without_being_written(text: str, name: str | None) -> None:
    assert markup(text) == name


def test_offline_answers_are_left_as_they_are(sample_answers: list[tuple[str, str]]) -> None:
    for kind, text in sample_answers:
        assert cleaned(text, is_json=Tourism().contract(kind) is not None) == text
        assert markup(text) is None
        assert answer_problem(Tourism(), kind, text) is None


@pytest.fixture
def sample_answers() -> list[tuple[str, str]]:
    domain = Tourism()
    path = Path(__file__).parents[1] / "data" / "sample" / "spots.jsonl"
    records = list(domain.read(path, lambda bad: pytest.fail(str(bad))))
    return [(kind, domain.answer(record.facts, kind)) for record in records for kind in domain.types]


# --- through the stage -------------------------------------------------------------------------


@pytest.fixture
def gardens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "find", find)


@pytest.mark.parametrize(
    "around",
    ["```markdown\n{}\n```", "<thought>x</thought>\n{}", "analysisx.assistantfinal{}", "{}<|im_end|>"],
)
def test_a_wrapped_answer_is_kept_bare_at_the_first_try(tmp_path: Path, gardens: None, around: str) -> None:
    write_prompts(tmp_path, 2)
    with OllamaServer(lambda question: around.format(right_answer(question))) as server:
        run_teacher(tmp_path, backend="ollama", model="teacher:7b", url=server.url)
        assert len(server.questions) == 4
    assert answers(tmp_path) == CARDS


def leaking(question: Question) -> str:
    return right_answer(question).replace("园", "园<|im_end|>")


def test_a_control_token_inside_an_answer_is_asked_away(tmp_path: Path, gardens: None) -> None:
    write_prompts(tmp_path, 2)

    def once(question: Question) -> str:
        return (right_answer if "An earlier answer" in question.text else leaking)(question)

    with OllamaServer(once) as server:
        run_teacher(tmp_path, backend="ollama", model="teacher:7b", url=server.url)
        corrections = [text for text in server.asked if "inside the answer: 'im_end'" in text]
    rows = read_rows(tmp_path / "data" / "teacher.jsonl")
    assert [row["meta"]["teacher"]["repaired"] for row in rows] == [True] * 4
    assert len(corrections) == 4
    assert not any("<|im_end|>" in text for text in corrections)


def test_a_control_token_that_stays_is_put_aside(tmp_path: Path, gardens: None) -> None:
    write_prompts(tmp_path, 2)
    with OllamaServer(
        lambda question: (leaking if "第0园" in question.body["messages"][1]["content"] else right_answer)(
            question
        )
    ) as server:
        done = run_teacher(tmp_path, backend="ollama", model="teacher:7b", url=server.url)
    assert done.result.counts == done.result.counts | {"kept": 2, "rejected": 2}
    assert "<|" not in (tmp_path / "data" / "teacher.jsonl").read_text(encoding="utf-8")
    rejected = read_rows(tmp_path / "data" / "teacher.rejected.jsonl")
    assert all("markup of a chat template" in row["rejected"]["reason"] for row in rejected)


# --- one form of JSON --------------------------------------------------------------------------


def spaced(question: Question) -> str:
    """A model that writes a space behind each colon; this server has sorted the keys, as Ollama does."""
    return right_answer(question).replace('":', '": ')


def answers(workspace: Path) -> list[str]:
    return [row["messages"][-1]["content"] for row in read_rows(workspace / "data" / "teacher.jsonl")]


CARDS = [
    '{"name":"第0园","year":1100}',
    "第0园建于1100年。",
    '{"name":"第1园","year":1101}',
    "第1园建于1101年。",
]


def test_json_answers_are_kept_in_one_form_whatever_the_server_did_to_them(
    tmp_path: Path, gardens: None
) -> None:
    write_prompts(tmp_path, 2)
    with OllamaServer(spaced) as server:
        run_teacher(tmp_path, backend="ollama", model="teacher:7b", url=server.url)
    assert answers(tmp_path) == CARDS


def test_answers_of_earlier_runs_are_brought_into_the_form_without_being_asked_again(
    tmp_path: Path, gardens: None
) -> None:
    write_prompts(tmp_path, 2)
    with OllamaServer(spaced) as server:
        settings = {"backend": "ollama", "model": "teacher:7b", "url": server.url}
        run_teacher(tmp_path, json_form="as_answered", **settings)
        assert answers(tmp_path)[0] == '{"name": "第0园", "year": 1100}'
        write_prompts(tmp_path, 3)
        asked = len(server.questions)
        done = run_teacher(tmp_path, **settings)
        assert len(server.questions) == asked + 2
        assert answers(tmp_path)[:4] == CARDS
        assert any(
            "2 answers of earlier runs were brought into one JSON form" in line for line in done.printed
        )
        kept = (tmp_path / "data" / "teacher.jsonl").read_bytes()
        again = run_teacher(tmp_path, **settings)
        assert len(server.questions) == asked + 2
    assert not any("one JSON form" in line for line in again.printed)
    assert (tmp_path / "data" / "teacher.jsonl").read_bytes() == kept


def test_answers_can_be_kept_as_they_came(tmp_path: Path, gardens: None) -> None:
    write_prompts(tmp_path, 1)
    with OllamaServer(spaced) as server:
        settings = {"backend": "ollama", "model": "teacher:7b", "url": server.url}
        run_teacher(tmp_path, **settings)
        compact = (tmp_path / "data" / "teacher.jsonl").read_bytes()
        run_teacher(tmp_path, json_form="as_answered", **settings)
    assert (tmp_path / "data" / "teacher.jsonl").read_bytes() == compact


def test_an_answer_that_was_cut_at_its_bound_is_asked_again_and_then_put_aside(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "介绍湖。"}]
    meta = {"spot": "湖", "province": None, "type": "itinerary", "split": "train"}
    write_lines(
        tmp_path / "data" / "prompts.jsonl", {"id": row_id(messages), "messages": messages, "meta": meta}
    )
    lists = {"steps": [], "photo_spots": [], "tips": ["".join(map(chr, range(0x4E00, 0x4E00 + 400)))]}
    names = {"name": "湖", "route_name": "环湖", "total_duration": "未知"}
    whole = {**names, **lists, "guide_text": "湖在城西。"}
    with OllamaServer(lambda question: json.dumps(whole, ensure_ascii=False)) as server:
        with pytest.raises(UserError, match="no answer was kept"):
            run(teacher.run, tmp_path, backend="ollama", model="teacher:7b", url=server.url)
        assert len(server.questions) == 2
        assert "cut at its bound of 400 characters" in server.asked[1]
    (row,) = read_rows(tmp_path / "data" / "teacher.rejected.jsonl")
    assert row["rejected"]["reason"] == "tips.0: the text was cut at its bound of 400 characters: be brief"
