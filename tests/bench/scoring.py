"""Scoring in `mtgdm eval`: 10,000 pairs of 600 characters on one core, and chrF against sacrebleu's."""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

from mtgdm.scoring.text import chrf, text_metrics

CHARACTERS = 600
CHANGED = 0.25
CHECKED = 300
"""So many of the pairs are given to sacrebleu, which takes five times as long."""
Pair = tuple[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_known_args()[0]
    if hasattr(os, "getloadavg"):
        print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    pairs = made(given.pairs)
    text_metrics(*pairs[0])  # numpy and rapidfuzz are imported now
    taken = [seconds(text_metrics, pairs) for _ in range(given.runs)]
    print(
        f"{len(pairs):,} pairs of {CHARACTERS} characters, all text metrics, one core: "
        f"{statistics.median(taken):.1f} s ({', '.join(f'{one:.1f}' for one in taken)})"
    )
    if find_spec("sacrebleu") is None:
        print("chrF was not compared: sacrebleu is not installed (it comes with the tests)")
        return
    from sacrebleu.metrics.chrf import CHRF

    theirs = CHRF(char_order=6, word_order=0, beta=2)

    def by_sacrebleu(one: str, other: str) -> float:
        return float(theirs.sentence_score(one, [other]).score) / 100

    some = pairs[:CHECKED]
    furthest = max(abs(chrf(*pair) - by_sacrebleu(*pair)) for pair in some)
    ratios = [seconds(by_sacrebleu, some) / seconds(chrf, some) for _ in range(given.runs)]
    print(
        f"chrF: sacrebleu takes {statistics.median(ratios):.1f} times as long "
        f"({', '.join(f'{ratio:.1f}' for ratio in ratios)}); the values differ by {furthest:.0e} at most"
    )


def made(count: int) -> list[Pair]:
    """References of 800 characters in use, as often as text has them, and outputs that leave a quarter of each."""
    source = random.Random(5)
    letters = [chr(0x4E00 + number) for number in range(800)] + list('，。："{}[]abcdef0123456789') * 8
    pairs = []
    for _ in range(count):
        reference = source.choices(letters, k=CHARACTERS)
        output = [source.choice(letters) if source.random() < CHANGED else one for one in reference]
        pairs.append(("".join(output), "".join(reference)))
    return pairs


def seconds(score: Callable[[str, str], object], pairs: list[Pair]) -> float:
    """Of this process's own time, so that what else the machine does is left out."""
    started = time.process_time()
    for output, reference in pairs:
        score(output, reference)
    return time.process_time() - started


if __name__ == "__main__":
    main()
