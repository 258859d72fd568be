"""The metrics of one answer: likeness to the teacher's, its contract, its language, the facts of its record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mtgdm.domain import answer_problem, contract_fault
from mtgdm.scoring.text import repetition, text_metrics
from mtgdm.teachers.judgement import script_problem

if TYPE_CHECKING:
    from mtgdm.domain import Domain
    from mtgdm.rows import Row

Metrics = dict[str, Any]


def score(domain: Domain, row: Row, output: str, runtime: Mapping[str, Any]) -> Metrics:
    """All metrics of an output to this row's prompt; None where one does not apply."""
    return {**runtime, **text_metrics(output, row.answer or ""), **against_prompt(domain, row, output)}


def reference_score(domain: Domain, row: Row) -> Metrics:
    """The same of the teacher's own answer, as far as it can be told without a reference."""
    text = row.answer or ""
    return {"repetition": repetition("".join(text.split())), **against_prompt(domain, row, text)}


def against_prompt(domain: Domain, row: Row, text: str) -> Metrics:
    """What the prompt and its record say of an answer.

    - `contract_valid`: a JSON answer keeps its contract; `contract_key`: where it is broken first.
    - `prose_valid`: prose keeps the rules of its type.
    - `language_ok`: written in the script, or the languages, that its type wants.
    - `problem`: what breaks the contract or the rules, in words.
    - `fact_recall`, `unsupported_facts`: against `meta.record`.
    """
    kind = row.type
    if kind is None:
        return _verdicts(problem=answer_problem(domain, None, text))
    contract = domain.contract(kind)
    record = row.meta.get("record")
    facts = domain.check_facts(record, kind, text) if isinstance(record, dict) else None
    found = _verdicts(
        language_ok=_language_ok(domain, kind, text),
        fact_recall=None if facts is None else facts.recall,
        unsupported_facts=None if facts is None else len(facts.unsupported),
    )
    problem = answer_problem(domain, kind, text)
    if contract is None:
        return found | {"prose_valid": problem is None, "problem": problem}
    fault = None if problem is None else contract_fault(contract, text)
    key = None if fault is None else fault.key
    return found | {"contract_valid": problem is None, "contract_key": key, "problem": problem}


def _verdicts(**known: Any) -> Metrics:
    keys = ("contract_valid", "contract_key", "prose_valid", "language_ok", "problem")
    return dict.fromkeys((*keys, "fact_recall", "unsupported_facts")) | known


def _language_ok(domain: Domain, kind: str, text: str) -> bool | None:
    right = domain.languages_right(kind, text)
    script = domain.script(kind)
    if right is None and script is not None:
        return script_problem(text, script) is None
    return right
