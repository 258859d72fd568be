"""Bounds on the tokens of a text, for vocabularies that are not known."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mtgdm.teachers.tokens import (
    PromptCounts,
    at_least,
    at_most,
    context_size,
    prompt_at_least,
    prompt_at_most,
)

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


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "只用资料。"}, {"role": "user", "content": text}]


def answered(counts: PromptCounts, text: str, tokens: Callable[[int], int], prompts: int = 20) -> None:
    """So many prompts of a run, longer and longer, that the server counts whole."""
    for number in range(1, prompts + 1):
        assert counts.least(chat(text * number), tokens(number)) is None


@pytest.mark.parametrize(("text", "tokens"), [(CHINESE, 22), (ENGLISH, 19)])
def test_a_prompt_cut_to_half_stands_out_among_the_others(text: str, tokens: int) -> None:
    counts = PromptCounts()
    assert counts.least(chat(text * 30), tokens * 15) is None  # the bound for every vocabulary is loose
    answered(counts, text, lambda number: number * tokens)

    least = counts.least(chat(text * 30), tokens * 15)

    assert least is not None
    assert tokens * 15 < least < tokens * 30
    assert counts.least(chat(text * 30), tokens * 30) is None


@pytest.mark.parametrize("share", [0.55, 1.0, 3.0], ids=["a large vocabulary", "Qwen's", "a poor one"])
def test_what_is_cut_is_measured_by_the_vocabulary_at_hand(share: float) -> None:
    counts = PromptCounts()
    answered(counts, CHINESE, lambda number: int(number * 22 * share) + 1)

    assert counts.least(chat(CHINESE * 30), int(30 * 22 * share)) is None
    assert counts.least(chat(CHINESE * 30), int(30 * 22 * min(share, 1) * 0.45)) is not None


def test_a_prompt_of_another_kind_is_not_taken_for_a_cut_one() -> None:
    counts = PromptCounts()
    answered(counts, CHINESE, lambda number: number * 60)  # a vocabulary that hardly knows Chinese

    assert counts.least(chat(ENGLISH * 9), 9 * 19) is None
    assert counts.least(chat("- 1.25, 3.75\n" * 40), 40 * 8) is None
    assert counts.least(chat("Текст на другом языке. " * 9), 60) is None
    assert counts.least(chat(""), 5) is None


def test_a_cut_prompt_teaches_nothing() -> None:
    counts = PromptCounts()
    answered(counts, CHINESE, lambda number: number * 22)

    found = [counts.least(chat(CHINESE * 30), 30 * 9) for _ in range(100)]

    assert None not in found
    assert len(set(found)) == 1


def test_the_bound_for_every_vocabulary_holds_from_the_first_prompt() -> None:
    assert PromptCounts().least(chat(CHINESE * 30), 100) == prompt_at_least(chat(CHINESE * 30))


def test_the_context_holds_a_prompt_an_answer_and_its_repair() -> None:
    assert context_size(1000, 3000) == 8192
    assert context_size(1000, 10) % 1024 == 0
