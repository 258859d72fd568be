"""Text metrics against their definitions, and intervals that keep their promise."""

from __future__ import annotations

import math
import random
import unicodedata
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtgdm.scoring.statistics import mean_interval, paired_difference, percentile
from mtgdm.scoring.text import text_metrics

texts = st.text(
    alphabet=st.sampled_from("故宫博物院ABab １é\u0301\ud800\u2028\n12，。"), max_size=24
) | st.text(max_size=12)


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


@settings(max_examples=400, deadline=None)
@given(texts, texts)
def test_text_metrics_are_what_their_definitions_say(output: str, reference: str) -> None:
    found = text_metrics(output, reference)
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
    assert found["chrf"] == pytest.approx(grams)
    exact = unicodedata.normalize("NFC", output).strip() == unicodedata.normalize("NFC", reference).strip()
    assert found["exact_match"] is exact
    assert all(0 <= value <= 1 for value in found.values())


@given(texts)
def test_a_text_is_wholly_like_itself(text: str) -> None:
    assert text_metrics(text, text) == {
        "char_f1": 1.0,
        "sequence_ratio": 1.0,
        "exact_match": True,
        "chrf": pytest.approx(1.0),
    }


@pytest.mark.parametrize(
    ("output", "reference"), [("", "故宫"), ("故宫", ""), (" \n", "故宫"), ("长城", "故宫")]
)
def test_nothing_in_common_is_zero(output: str, reference: str) -> None:
    assert text_metrics(output, reference) == {
        "char_f1": 0.0,
        "sequence_ratio": 0.0,
        "exact_match": False,
        "chrf": 0.0,
    }


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
