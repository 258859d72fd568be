"""Text metrics against their definitions, and intervals that keep their promise."""

from __future__ import annotations

import math
import random
import unicodedata
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtgdm.scoring.statistics import mean_interval, paired_difference, percentile
from mtgdm.scoring.text import repetition, text_metrics

texts = st.text(
    alphabet=st.sampled_from("故宫博物院ABab １é\u0301\ud800\u2028\n12，。𠮷👨"), max_size=24
) | st.text(max_size=12)
alike = st.tuples(texts, texts, texts).map(lambda parts: (parts[0] + parts[1], parts[0] + parts[2]))
"""Two texts with a common beginning: those of `texts` alone share little."""


def packed(text: str) -> str:
    return "".join(character for character in unicodedata.normalize("NFC", text) if not character.isspace())


def lcs(one: str, other: str) -> int:
    """The longest common subsequence by the table of the textbooks."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, left in enumerate(one):
        for j, right in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def chrf_by_hand(output: str, reference: str) -> float:
    """chrF2 as Popović (2015) has it: mean precision and recall over the orders both texts have."""
    precisions, recalls = [], []
    for order in range(1, 7):
        mine = Counter(output[i : i + order] for i in range(len(output) - order + 1))
        theirs = Counter(reference[i : i + order] for i in range(len(reference) - order + 1))
        if mine and theirs:
            shared = sum(min(count, theirs[gram]) for gram, count in mine.items())
            precisions.append(shared / mine.total())
            recalls.append(shared / theirs.total())
    if not precisions:
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 5 * precision * recall / (4 * precision + recall) if precision + recall else 0.0


def rouge_l_by_hand(output: str, reference: str) -> float:
    """ROUGE-L of a sentence as Lin (2004) has it, equation 4, with beta 1."""
    if not output and not reference:
        return 1.0
    common = lcs(output, reference)
    if not common:
        return 0.0
    recall, precision = common / len(reference), common / len(output)
    return 2 * recall * precision / (recall + precision)


def repetition_by_hand(text: str) -> float:
    seen: list[str] = []
    again = 0
    for place in range(len(text) - 3):
        again += text[place : place + 4] in seen
        seen.append(text[place : place + 4])
    return again / len(seen) if seen else 0.0


@settings(max_examples=1000, deadline=None)
@given(alike | st.tuples(texts, texts))
def test_text_metrics_are_what_their_definitions_say(pair: tuple[str, str]) -> None:
    output, reference = pair
    found: dict[str, Any] = text_metrics(output, reference)
    one, other = packed(output), packed(reference)
    shared = sum(min(one.count(character), other.count(character)) for character in set(one))
    if not one and not other:
        f1 = ratio = grams = 1.0
    else:
        precision = shared / len(one) if one else 0.0
        recall = shared / len(other) if other else 0.0
        f1 = 2 * precision * recall / (precision + recall) if shared else 0.0
        ratio = 2 * lcs(one, other) / (len(one) + len(other))
        grams = chrf_by_hand(one, other)
    assert found["char_f1"] == pytest.approx(f1)
    assert found["sequence_ratio"] == pytest.approx(ratio)
    assert found["rouge_l"] == pytest.approx(rouge_l_by_hand(one, other))
    assert found["chrf"] == pytest.approx(grams)
    assert found["repetition"] == pytest.approx(repetition_by_hand(one))
    assert found["length_ratio"] == (pytest.approx(len(one) / len(other)) if other else None)
    exact = unicodedata.normalize("NFC", output).strip() == unicodedata.normalize("NFC", reference).strip()
    assert found["exact_match"] is exact
    assert all(0 <= value <= 1 for key, value in found.items() if key != "length_ratio")


@settings(max_examples=1000, deadline=None)
@given(alike | st.tuples(texts, texts))
def test_chrf_is_sacrebleus_to_the_last_digit_but_one(pair: tuple[str, str]) -> None:
    from sacrebleu.metrics.chrf import CHRF

    one, other = map(packed, pair)
    theirs = CHRF(char_order=6, word_order=0, beta=2).sentence_score(one, [other]).score / 100
    wanted = theirs if one and other else float(one == other)  # of two empty texts sacrebleu makes 0
    assert text_metrics(*pair)["chrf"] == pytest.approx(wanted, rel=1e-12)


def test_chrf_is_sacrebleus_for_long_texts_of_many_characters_too() -> None:
    from sacrebleu.metrics.chrf import CHRF

    source = random.Random(3)
    every = [chr(number) for number in (*range(0x4E00, 0x9FFF), *range(0x20000, 0x20800))]
    text = "".join(source.choices(every, k=3000))
    other = "".join(one if source.random() < 0.8 else source.choice(every) for one in text)[:2500]
    theirs = CHRF(char_order=6, word_order=0, beta=2).sentence_score(text, [other]).score / 100
    assert text_metrics(text, other)["chrf"] == pytest.approx(theirs, rel=1e-12)


@given(texts)
def test_a_text_is_wholly_like_itself(text: str) -> None:
    assert text_metrics(text, text) == {
        "char_f1": 1.0,
        "sequence_ratio": 1.0,
        "rouge_l": 1.0,
        "exact_match": True,
        "chrf": pytest.approx(1.0),
        "length_ratio": 1.0 if packed(text) else None,
        "repetition": repetition(packed(text)),
    }


@pytest.mark.parametrize(
    ("output", "reference"), [("", "故宫"), ("故宫", ""), (" \n", "故宫"), ("长城", "故宫")]
)
def test_nothing_in_common_is_zero(output: str, reference: str) -> None:
    found = text_metrics(output, reference)
    assert [found[key] for key in ("char_f1", "sequence_ratio", "rouge_l", "chrf")] == [0.0] * 4
    assert found["exact_match"] is False


def test_two_empty_texts_are_the_same() -> None:
    found = text_metrics("", " \u3000\n")
    assert (found["char_f1"], found["sequence_ratio"], found["exact_match"], found["chrf"]) == (
        1.0,
        1.0,
        True,
        1.0,
    )


def test_white_space_and_composition_do_not_count_but_width_does() -> None:
    assert text_metrics("故 宫\n博物院", "故宫博物院")["char_f1"] == 1.0
    assert text_metrics("故 宫\n博物院", "故宫博物院")["exact_match"] is False
    assert text_metrics("cafe\u0301", "café")["exact_match"] is True
    assert text_metrics("１２３", "123")["char_f1"] == 0.0


def test_order_counts_for_the_sequence_ratio_alone() -> None:
    found = text_metrics("院物博宫故", "故宫博物院")
    assert found["char_f1"] == 1.0
    assert found["sequence_ratio"] == pytest.approx(0.2)


def test_a_character_beyond_the_basic_plane_is_one_character() -> None:
    found = text_metrics("𠮷野家", "吉野家")  # of four UTF-16 units three would be shared
    assert found["char_f1"] == pytest.approx(2 / 3)
    assert found["length_ratio"] == 1.0
    assert text_metrics("\ud842", "\ud842")["chrf"] == 1.0  # half a character, as a broken server sends it


def test_metrics_by_hand_in_chinese() -> None:
    found = text_metrics("故宫始建于1420年。", "故宫始建于1406年，在北京。")
    # Of 11 and 15 characters 故宫始建于, 1, 4, 0, 年 and 。 are in common, and in this order.
    assert found["char_f1"] == pytest.approx(2 * 10 / 26)
    assert found["sequence_ratio"] == found["rouge_l"] == pytest.approx(2 * 10 / 26)
    assert found["length_ratio"] == pytest.approx(11 / 15)


def test_what_goes_round_in_circles_repeats_itself() -> None:
    assert repetition("湖光山色" * 10) == pytest.approx(1 - 4 / 37)
    assert repetition("湖光山色，四季皆宜。") == 0
    assert repetition("湖光") == 0


# --- statistics ----------------------------------------------------------------------------------


def test_an_interval_of_nothing_or_of_one_value_says_so() -> None:
    nothing, one = mean_interval([]), mean_interval([0.5])
    assert (nothing.rows, one.rows, one.mean) == (0, 1, 0.5)
    assert all(map(math.isnan, (nothing.mean, nothing.low, nothing.high, one.low, one.high)))
    rows_of_one_spot = mean_interval([0.5, 0.7], groups=["故宫", "故宫"])
    assert rows_of_one_spot.mean == pytest.approx(0.6)
    assert math.isnan(rows_of_one_spot.low)


def test_the_same_values_give_the_same_interval() -> None:
    source = random.Random(1)
    values = [source.random() for _ in range(50)]
    assert mean_interval(values) == mean_interval(list(values))
    assert mean_interval(values).low < mean_interval(values).mean < mean_interval(values).high


@pytest.mark.parametrize("spots", [6, 21])
def test_intervals_hold_the_truth_as_often_as_they_promise(spots: int) -> None:
    """Three correlated rows a spot: resampling rows would be right in about 75 % of the runs."""
    source = random.Random(7)
    right = 0
    for _ in range(300):
        values, groups = [], []
        for spot in range(spots):
            level = source.gauss(0, 1)
            values += [level + source.gauss(0, 0.4) for _ in range(3)]
            groups += [spot] * 3
        interval = mean_interval(values, groups=groups)
        right += interval.low <= 0 <= interval.high
    assert 0.90 <= right / 300 <= 0.99


def test_many_rows_give_what_resampling_would() -> None:
    source = random.Random(3)
    values = [source.random() for _ in range(3000)]
    many, some = mean_interval(values), mean_interval(values[:1999])
    assert many.high - many.low == pytest.approx((some.high - some.low) * (1999 / 3000) ** 0.5, rel=0.08)


def test_none_of_21_spots_does_not_mean_never() -> None:
    interval = mean_interval([0] * 63, groups=[row // 3 for row in range(63)])
    assert interval.mean == interval.low == 0.0
    assert 0.1 < interval.high < 0.2
    assert mean_interval([True] * 42).low > 0.9


def test_spots_that_are_all_alike_do_not_make_a_mean_certain() -> None:
    half = mean_interval([0.5] * 21)
    assert half.low < 0.35 and half.high > 0.65
    by_spot = mean_interval([0.0, 1.0] * 21, groups=[spot for spot in range(21) for _ in range(2)])
    assert (by_spot.low, by_spot.high) == (half.low, half.high)


@pytest.mark.parametrize("spots", [2, 3, 4, 5, 7])
def test_intervals_of_few_spots_hold_the_truth_as_often_as_they_promise(spots: int) -> None:
    chance = random.Random(1)
    runs = [mean_interval([chance.gauss(0, 1) for _ in range(spots)], shares=False) for _ in range(2000)]
    assert 0.93 < sum(run.low <= 0 <= run.high for run in runs) / len(runs) < 0.97


def test_a_gain_that_is_the_same_everywhere_has_a_direction_and_no_bounds() -> None:
    gain = paired_difference([1.0] * 6, [0.0] * 6)
    assert gain.verdict == "better" and math.isnan(gain.low)
    nothing = paired_difference([0.3] * 6, [0.1 + 0.2] * 6)
    assert nothing.verdict == "too few rows to tell"


def test_counts_without_spread_promise_what_a_poisson_rate_does() -> None:
    none = mean_interval([0] * 21, shares=False)
    assert none.low == 0 and none.high == pytest.approx(3.689 / 21, abs=1e-3)
    same = mean_interval([3] * 21, shares=False)
    assert same.mean == 3 and math.isnan(same.low) and math.isnan(same.high)


def test_a_difference_is_taken_row_by_row() -> None:
    """The rows differ by far more than the models: unpaired intervals would overlap."""
    base = [float(level) for level in range(20)]
    student = [value + 0.1 + 0.01 * (place % 3) for place, value in enumerate(base)]
    found = paired_difference(student, base)
    assert found.verdict == "better"
    assert found.low < found.mean < found.high
    assert paired_difference(base, student).verdict == "worse"
    assert paired_difference(student, base, lower_is_better=True).verdict == "worse"


def test_few_spots_never_make_a_verdict() -> None:
    assert paired_difference([1.0] * 5, [0.0] * 5).verdict == "too few rows to tell"
    assert paired_difference([1.0] * 6, [0.0] * 6).verdict == "better"
    rows, spots = [1.0] * 30, [row // 10 for row in range(30)]
    assert paired_difference(rows, [0.0] * 30, groups=spots).verdict == "too few rows to tell"
    assert paired_difference([], []).verdict == "too few rows to tell"
    assert math.isnan(paired_difference([], []).mean)


def test_no_difference_is_no_verdict() -> None:
    assert paired_difference([0.5] * 40, [0.5] * 40).verdict == "too few rows to tell"
    signs = [(-1) ** place * 0.3 for place in range(40)]
    assert paired_difference(signs, [0.0] * 40).verdict == "too few rows to tell"


def test_rows_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0], [1.0, 2.0])


def test_percentiles_are_interpolated() -> None:
    assert percentile([4, 1, 3, 2], 0.5) == 2.5
    assert percentile([1.0, 2.0], 0.95) == pytest.approx(1.95)
    assert percentile([7], 0.95) == 7
    assert math.isnan(percentile([], 0.5))
