"""Which answers to look at first, and what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

LITTLE = 0.5
"""Less of the facts, or of the reference, than this is worth a look."""
TOO_SHORT = 0.5
TOO_LONG = 2.0
"""Characters for each of the reference's."""
GOES_ROUND = 0.3
"""So much more repetition than the teacher's answer has."""
MANY_CLAIMS = 5
"""So many unsupported claims are as bad as an answer can be in this respect."""


def why_bad(metrics: Mapping[str, Any], teacher: Mapping[str, Any] | None = None) -> list[str]:
    """What is wrong with an answer, in words; nothing where it is as it should be.

    `teacher` is the metrics of the reference: an answer is not blamed for what its teacher did too.
    """
    reference = teacher or {}
    reasons = []
    if metrics.get("finish_reason") not in (None, "stop", "eos"):
        reasons.append(f"ended by {metrics['finish_reason']}")
    if _worse(metrics, reference, "contract_valid"):
        key = metrics.get("contract_key")
        reasons.append("breaks its contract" + (f": {key}" if key else ""))
    if _worse(metrics, reference, "prose_valid"):
        reasons.append(str(metrics.get("problem") or "breaks the rules of its type"))
    elif _worse(metrics, reference, "language_ok"):
        reasons.append("in the wrong language")
    recall = number(metrics, "fact_recall")
    teachers = number(reference, "fact_recall")
    if recall is not None and recall < (LITTLE if teachers is None else min(LITTLE, teachers)):
        reasons.append(f"states {recall:.0%} of the facts")
    claims = number(metrics, "unsupported_facts") or 0
    if claims > (number(reference, "unsupported_facts") or 0):
        reasons.append(f"{claims:.0f} unsupported claim{'' if claims == 1 else 's'}")
    if (number(metrics, "repetition") or 0.0) > GOES_ROUND + (number(reference, "repetition") or 0.0):
        reasons.append("repeats itself")
    ratio = number(metrics, "length_ratio")
    if ratio is not None and not TOO_SHORT <= ratio <= TOO_LONG:
        reasons.append(f"{ratio:.1f} times the length of the reference")
    likeness = number(metrics, "char_f1")
    if likeness is not None and likeness < LITTLE:
        reasons.append("little in common with the reference")
    return reasons


def badness(metrics: Mapping[str, Any], teacher: Mapping[str, Any] | None = None) -> float:
    """How much is wrong with an answer; each thing that can be wrong counts 1 at most.

    An answer that nobody can use (a broken contract, cut, the wrong language) is thus worse than one that is
    only worded otherwise than the teacher's. What the teacher's own answer has wrong too does not count.
    """
    reference = teacher or {}
    lost = 1 - (1.0 if (likeness := number(metrics, "char_f1")) is None else likeness)
    recall, teachers = number(metrics, "fact_recall"), number(reference, "fact_recall")
    if recall is not None:
        lost += max(0.0, (1.0 if teachers is None else teachers) - recall)
    claims = (number(metrics, "unsupported_facts") or 0.0) - (number(reference, "unsupported_facts") or 0.0)
    lost += min(1.0, max(0.0, claims) / MANY_CLAIMS)
    lost += any(_worse(metrics, reference, key) for key in ("contract_valid", "prose_valid"))
    lost += _worse(metrics, reference, "language_ok")
    lost += metrics.get("finish_reason") not in (None, "stop", "eos")
    return lost


def _worse(metrics: Mapping[str, Any], teacher: Mapping[str, Any], key: str) -> bool:
    """Whether an answer breaks what its teacher's keeps."""
    return metrics.get(key) is False and teacher.get(key) is not False


def number(metrics: Mapping[str, Any] | None, key: str) -> float | None:
    """A metric as a finite number; None where it does not apply or is no number."""
    value = (metrics or {}).get(key)
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        return None
    return float(value)
