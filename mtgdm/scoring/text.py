"""How alike two texts are."""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sacrebleu.metrics.chrf import CHRF


def text_metrics(output: str, reference: str) -> dict[str, float | bool]:
    """The text metrics of one row, all from 0 (nothing in common) to 1 (the same).

    Both texts are put into NFC first; all but `exact_match` leave white space out of account.
    Two empty texts are the same (1), an empty one has nothing in common with another (0).

    - `char_f1`: F1 over the multisets of characters, order ignored.
    - `sequence_ratio`: 2·LCS / (len a + len b), LCS the longest common subsequence.
    - `chrf`: sacrebleu's chrF (character order 6, word order 0, beta 2), its 0..100 divided by 100.
    - `exact_match`: the same text but for white space around it.
    """
    output, reference = unicodedata.normalize("NFC", output), unicodedata.normalize("NFC", reference)
    packed, wanted = "".join(output.split()), "".join(reference.split())
    return {
        "char_f1": char_f1(packed, wanted),
        "sequence_ratio": sequence_ratio(packed, wanted),
        "exact_match": output.strip() == reference.strip(),
        "chrf": chrf(packed, wanted),
    }


def char_f1(output: str, reference: str) -> float:
    """F1 over character multisets: twice the shared characters over all characters."""
    if not output and not reference:
        return 1.0
    shared = (Counter(output) & Counter(reference)).total()
    return 2 * shared / (len(output) + len(reference))


def sequence_ratio(output: str, reference: str) -> float:
    """Twice the longest common subsequence over all characters."""
    if not output and not reference:
        return 1.0
    from rapidfuzz.distance import LCSseq

    return 2 * LCSseq.similarity(output, reference) / (len(output) + len(reference))


def chrf(output: str, reference: str) -> float:
    """Sacrebleu's chrF of one sentence, 0..1; recall weighs twice as much as precision."""
    if not output or not reference:
        return float(output == reference)
    return float(_chrf().sentence_score(output, [reference]).score) / 100


@cache
def _chrf() -> CHRF:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF(char_order=6, word_order=0, beta=2)
