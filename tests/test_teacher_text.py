"""Bounds on tokens, and what is taken off an answer."""

from __future__ import annotations

import pytest

from mtgdm.teachers.cleaning import cleaned
from mtgdm.teachers.tokens import at_least, at_most, context_size, prompt_at_least, prompt_at_most

CHINESE = "故宫博物院位于北京市中心，始建于1406年，是明清两代的皇家宫殿。"
ENGLISH = "The Palace Museum stands in the middle of Beijing and was begun in 1406."


# Counted with the vocabulary of Qwen, as its `qwen.tiktoken` has it.
@pytest.mark.parametrize(("text", "tokens"), [(CHINESE, 22), (ENGLISH, 19)])
def test_the_bounds_hold_between_them_what_a_tokenizer_makes(text: str, tokens: int) -> None:
    assert 0.3 * tokens < at_least(text) <= tokens
    assert tokens <= at_most(text) <= 2.5 * tokens


@pytest.mark.parametrize("text", ["", "a", "\ud800", "𠮷野家", "é", "https://x.cn/?a=1&b=2", "ไทย"])
def test_any_text_has_bounds(text: str) -> None:
    assert 0 <= at_least(text) <= at_most(text) <= len(text.encode("utf-8", "surrogatepass"))


def test_a_chat_counts_its_template_in_the_upper_bound_alone() -> None:
    messages = [{"role": "user", "content": CHINESE}]
    assert prompt_at_most(messages) > at_most(CHINESE)
    assert prompt_at_least(messages) == at_least(CHINESE)


def test_the_context_holds_a_prompt_an_answer_and_its_repair() -> None:
    assert context_size(1000, 3000) == 8192
    assert context_size(1000, 10) % 1024 == 0


@pytest.mark.parametrize(
    ("text", "is_json", "left"),
    [
        ("  a \n", False, "a"),
        ("<think>x</think>a", False, "a"),
        ("\n<think>\nx\n</think>\n\na", False, "a"),
        ("x\n</think>\na", False, "a"),
        ("<think>never ends", False, ""),
        ("a <think> b", False, "a <think> b"),
        ("a <think>b</think> c", False, "a <think>b</think> c"),
        ("```json\n{}\n```", True, "{}"),
        ("```\n{}\n```", True, "{}"),
        ("```json\r\n{}\r\n```\n", True, "{}"),
        ("<think>x</think>\n```json\n{}\n```", True, "{}"),
        ("Here: ```json\n{}\n```", True, "Here: ```json\n{}\n```"),
        ("```json\n{}\n```", False, "```json\n{}\n```"),
        ('{"a": "```"}', True, '{"a": "```"}'),
    ],
)
def test_an_answer_is_left_without_thoughts_and_fence(text: str, is_json: bool, left: str) -> None:
    assert cleaned(text, is_json=is_json) == left
