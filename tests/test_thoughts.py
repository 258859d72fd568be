"""Thoughts of every family of models are told apart from the answer; what only looks like one is not."""

from __future__ import annotations

import time

import pytest

from mtgdm.thoughts import split_thoughts, thought_tag

PROSE = "湖在城西。The lake lies west of the town."
OBJECT = '{"name":"湖","steps":["一","二"]}'


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("<think>", "</think>"),
        ("<think>\n", "\n</think>\n\n"),
        ("<Thinking>", "</Thinking>"),
        ("<thought>", "</thought>"),
        ("<thoughts>", "</thoughts >"),
        ("<reasoning>", "</reasoning>"),
        ("<reflection>", "</reflection>"),
        ("<思考>", "</思考>"),
        ("<think>", "</thinking>"),
        ("&lt;think&gt;", "&lt;/think&gt;"),
        ("<|startofthought|>", "<|endofthought|>"),
        ("<inner_monologue>", "</inner_monologue>"),
        ("<seed:think>", "</seed:think>"),
        ("<mm:think>", "</mm:think>"),
        ('<think time="3">', "</think>"),
        ('<details type="reasoning" done="true">', "</details>"),
        ("[THINK]", "[/THINK]"),
        ("◁think▷", "◁/think▷"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|inner_prefix|>", "<|inner_suffix|>"),
        ("<|think|>", "<|end|><|begin|>assistant<|content|>"),
        ("<|channel>thought\n", "<channel|>"),
        ("<unused94>thought\n", "<unused95>"),
        ("Here is my thought process:", "Here is my response:"),
        ("Thinking...\n", "\n...done thinking.\n\n"),
        ("<s><think>", "</think>"),
        ("<|im_start|>assistant\n<think>", "</think>"),
        ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
        ("analysis", "assistantfinal"),
        ("assistantanalysis", "assistantfinal"),
    ],
)
@pytest.mark.parametrize("answer", [PROSE, OBJECT])
def test_a_thought_before_the_answer_is_split_off(opening: str, closing: str, answer: str) -> None:
    thought = "We think 先看资料 a < b {x}"
    assert split_thoughts(f"{opening}{thought}{closing}{answer}") == (thought, answer)
    assert split_thoughts(f"\n {opening}{thought}{closing}\n\n{answer}\n") == (thought, answer)


@pytest.mark.parametrize(
    "closing",
    ["</think>", "</thinking>", "[/THINK]", "◁/think▷", "<|END_THINKING|>", "<unused95>", "<channel|>"],
)
def test_a_thought_that_the_prompt_opened_ends_with_its_closing(closing: str) -> None:
    assert split_thoughts(f"想一想\n{closing}\n{PROSE}") == ("想一想", PROSE)
    assert split_thoughts(f"想一想\n{closing}") == ("想一想", "")


@pytest.mark.parametrize(
    "text",
    [
        "<think>x",
        "<thought>x",
        "[THINK]x",
        "◁think▷x",
        "<unused94>thought x",
        "<|channel|>analysis<|message|>x",
        "<|channel>thought x",
        "analysisWe need x",
    ],
)
def test_a_thought_that_never_ends_leaves_no_answer(text: str) -> None:
    thoughts, answer = split_thoughts(text)
    assert answer == ""
    assert thoughts.endswith("x")


@pytest.mark.parametrize(
    ("text", "thoughts", "answer"),
    [
        (f"<reasoning>x</reasoning>\n<reflection>y</reflection>\n{PROSE}", "x\n\ny", PROSE),
        (f"<thinking>x<reflection>y</reflection></thinking>{PROSE}", "x<reflection>y</reflection>", PROSE),
        (f"<think>a<think>b</think>c</think>{PROSE}", "a<think>b</think>c", PROSE),
        (f"<think>never write <think> again</think>{PROSE}", "never write <think> again", PROSE),
        (f"<think>x</think>y</think>{PROSE}", "x\n\ny", PROSE),
        (f"<think>\n\n</think>\n\n{PROSE}", "", PROSE),
        (f"<think/>{PROSE}", "", PROSE),
        (f"<think>x</think><answer>{PROSE}</answer>", "x", PROSE),
        (f"<think>x</think><answer>{PROSE}", "x", PROSE),
        (f"<|begin_of_thought|>x<|end_of_thought|><|begin_of_solution|>{PROSE}<|end_of_solution|>", "x", PROSE),
        (f"<|START_THINKING|>x<|END_THINKING|><|START_RESPONSE|>{PROSE}<|END_RESPONSE|>", "x", PROSE),
        (f"<answer>{PROSE}</answer>", "", PROSE),
        (f"assistantfinal{PROSE}", "", PROSE),
        (f"analysisxassistantcommentaryyassistantfinal json{OBJECT}", "xassistantcommentaryy", OBJECT),
        (f"<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>commentary<|message|>y<|end|>"
         f"<|start|>assistant<|channel|>final <|constrain|>json<|message|>{OBJECT}<|return|>", "x\n\ny", OBJECT),
    ],
)  # fmt: skip
def test_several_thoughts_and_the_wrapper_of_the_answer_are_taken_apart(
    text: str, thoughts: str, answer: str
) -> None:
    assert split_thoughts(text) == (thoughts, answer)


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        OBJECT,
        f"  {PROSE}\n",
        "",
        "<p>湖</p>",
        "a < b, c > d",
        "[1] 见 [2]",
        "analysis of the lake",
        "analysis\n湖在城西。",
        "Thinking... of a lake",
        "Here is my response: 湖",
        "a <think> b",
        "a <think>b</think> c",
        "A model writes `<think>` and `</think>`.",
        "<answer>a</answer> b",
        "<|im_start|>assistant\n湖",
        "final answer: 湖",
        "【思考】湖在城西。",
    ],
)
def test_a_text_without_thoughts_before_it_is_left_as_it_is(text: str) -> None:
    assert split_thoughts(text) == ("", text)


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("a <think>b</think> c", "<think>"),
        ("湖。</think>", "</think>"),
        ("湖[THINK]x[/THINK]", "[THINK]"),
        ("湖◁think▷", "◁think▷"),
        ("Write `<think>` or ```\n</think>\n```.", None),
        ("<p>湖</p> [1] a < b", None),
        (PROSE, None),
    ],
)
def test_a_tag_inside_an_answer_is_found(text: str, tag: str | None) -> None:
    assert thought_tag(text) == tag


@pytest.mark.parametrize(
    "text",
    ["<think>" * 3000, "<think>" * 3000 + "</think>" * 2000, "analysisassistantfinal" * 5000, "<a>" * 30000],
)
def test_a_loop_of_tags_takes_no_time(text: str) -> None:
    started = time.process_time()
    split_thoughts(text)
    assert time.process_time() - started < 5
