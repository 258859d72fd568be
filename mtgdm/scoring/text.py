"""How alike two texts are, and what can be told of one alone.

Texts are compared in NFC and without white space: Chinese has none, and that of JSON says nothing.
"""

from __future__ import annotations

import unicodedata
from collections import Counter

CHRF_ORDER = 6
CHRF_BETA = 2
REPETITION_ORDER = 4


def text_metrics(output: str, reference: str) -> dict[str, float | bool | None]:
    """The text metrics of one row, from 0 (nothing in common) to 1 (the same); `length_ratio` has no end.

    Two empty texts are the same (1), an empty one has nothing in common with another (0).

    - `char_f1`: F1 over the multisets of characters, order ignored.
    - `sequence_ratio`: 2·LCS / (len a + len b), LCS the longest common subsequence.
    - `rouge_l`: ROUGE-L (Lin 2004) over characters, precision and recall weighing the same. With LCS / len a
      and LCS / len b in its formula it is `sequence_ratio` by another name, under which many look for it.
    - `chrf`: chrF2 (Popović 2015) as sacrebleu has it, its 0..100 divided by 100.
    - `exact_match`: the same text but for white space around it.
    - `length_ratio`: characters of the output for each of the reference; None where that is empty.
    - `repetition`: see `repetition`; of the output alone.
    """
    output, reference = unicodedata.normalize("NFC", output), unicodedata.normalize("NFC", reference)
    packed, wanted = "".join(output.split()), "".join(reference.split())
    ratio = sequence_ratio(packed, wanted)
    return {
        "char_f1": char_f1(packed, wanted),
        "sequence_ratio": ratio,
        "rouge_l": ratio,
        "exact_match": output.strip() == reference.strip(),
        "chrf": chrf(packed, wanted),
        "length_ratio": len(packed) / len(wanted) if wanted else None,
        "repetition": repetition(packed),
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
    """chrF2 of one sentence, 0..1: mean precision and recall over the orders that both texts have.

    The value is sacrebleu's (`CHRF(char_order=6, word_order=0, beta=2)`), at a quarter of its time: the grams
    of both texts are numbered with array operations rather than cut out and counted one by one.
    """
    if not output or not reference:
        return float(output == reference)
    import numpy

    data = (output + reference).encode("utf-32-le", "surrogatepass")
    letters = numpy.unique(numpy.frombuffer(data, dtype=numpy.uint32), return_inverse=True)[1]
    size, border = int(letters.max()) + 1, len(output)
    grams = letters  # the number of the gram that begins at each place; those across the border are left out
    precision = recall = 0.0
    orders = min(CHRF_ORDER, len(output), len(reference))
    for order in range(1, orders + 1):
        if order > 1:
            longer = grams[:-1] * size + letters[order - 1 :]
            grams = numpy.unique(longer, return_inverse=True)[1]
        mine, theirs = grams[: border - order + 1], grams[border:]
        kinds = int(grams.max()) + 1
        counts = numpy.minimum(numpy.bincount(mine, minlength=kinds), numpy.bincount(theirs, minlength=kinds))
        shared = int(counts.sum())
        precision += shared / len(mine)
        recall += shared / len(theirs)
    precision, recall = precision / orders, recall / orders
    if not precision + recall:
        return 0.0
    factor = CHRF_BETA**2
    return (1 + factor) * precision * recall / (factor * precision + recall)


def repetition(text: str) -> float:
    """The share of the grams of four characters that stood in the text before: seq-rep-4 of Welleck et al. (2020).

    Keys of JSON repeat too: what is usual for a type is told by the teacher's own answers.
    """
    total = len(text) - REPETITION_ORDER + 1
    if total < 1:
        return 0.0
    return 1 - len({text[place : place + REPETITION_ORDER] for place in range(total)}) / total
