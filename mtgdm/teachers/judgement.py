"""Whether an answer is kept: its contract, its language, and what it says of its record."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from mtgdm.contracts import compact, cut_at_bound
from mtgdm.domain import FactCheck, answer_problem
from mtgdm.teachers.cleaning import markup

if TYPE_CHECKING:
    from pydantic import BaseModel

    from mtgdm.domain import Domain, Script
    from mtgdm.rows import Row

JsonForm = Literal["compact", "as_answered"]
"""How JSON answers are written: with their keys in the contract's order and no white space, or as they came."""

FOREIGN_WORDS = 40
"""So much text in another script is a language of its own; fewer words are names and units."""
NAMED = 8
"""So many facts are named in a reason, which the teacher reads in its repair turn."""
RECALL_DIGITS = 4
"""To so many digits recall stands in a row, and is held to a threshold."""

_KEYS = re.compile(r'"\w+"\s*:')
_HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")
_KANA_OR_HANGUL = re.compile("[\u3040-\u30ff\u1100-\u11ff\uac00-\ud7af]+")
_OTHER_WORD = re.compile(
    r"(?:(?![\u1100-\u11ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff])[^\W\d_]){2,}"
)


@dataclass(frozen=True)
class Judgement:
    """What was found: why the answer is not kept, or None; and its facts, where there is a record."""

    problem: str | None
    facts: FactCheck | None = None


class Standard(Protocol):
    """What the request loop asks about each row: the form of its answer, and whether an answer will do."""

    takes_all: ClassVar[bool]
    """Whether every answer is taken as it came, a cut or an empty one too: then none is asked for again."""

    def contract(self, row: Row) -> type[BaseModel] | None:
        """The model that the answer to this row is held to; None for prose."""
        ...

    def judge(self, row: Row, text: str) -> Judgement:
        """What is wrong with an answer."""
        ...


class Judge:
    """Judges a teacher's answers as they come."""

    takes_all: ClassVar[bool] = False

    def __init__(
        self,
        domain: Domain,
        *,
        min_fact_recall: float = 0.0,
        max_unsupported: int | None = None,
        json_form: JsonForm = "compact",
    ) -> None:
        """`min_fact_recall`: share of the record's facts, 0 to 1; `max_unsupported`: claims, None for any number."""
        self._domain = domain
        self.json_form: JsonForm = json_form
        self._min_fact_recall = round(min_fact_recall, RECALL_DIGITS)
        self._max_unsupported = max_unsupported

    def contract(self, row: Row) -> type[BaseModel] | None:
        """The contract of the row's type."""
        return None if row.type is None else self._domain.contract(row.type)

    def kept_text(self, row: Row, text: str) -> str:
        """An answer in the form in which it is written: servers and models order and indent JSON as they like."""
        contract = self.contract(row)
        if contract is None or self.json_form == "as_answered":
            return text
        return compact(contract, text)

    def judge(self, row: Row, text: str) -> Judgement:
        """What is wrong with an answer to this row's prompt, the gravest first."""
        problem = _markup_problem(text) or answer_problem(self._domain, row.type, text)
        contract = self.contract(row)
        if problem is None and contract is not None:
            problem = cut_at_bound(contract, text)
        if problem is None and row.type is not None:
            problem = script_problem(text, self._domain.script(row.type))
        if problem is not None:
            return Judgement(problem)
        facts = self.facts(row.meta, row.type, text)
        return Judgement(self.fact_problem(facts), facts)

    def facts(self, meta: Mapping[str, Any], prompt_type: str | None, text: str) -> FactCheck | None:
        """What the answer says of the record it was made from; None where the row carries none."""
        record = meta.get("record")
        if prompt_type is None or not isinstance(record, dict):
            return None
        return self._domain.check_facts(record, prompt_type, text)

    def keeps(self, facts: Mapping[str, Any]) -> bool:
        """Whether an answer with these facts, as its row carries them, passes the thresholds of this run."""
        recall, claims = facts.get("recall"), facts.get("unsupported") or ()
        return not (
            (isinstance(recall, int | float) and recall < self._min_fact_recall)
            or (self._max_unsupported is not None and len(claims) > self._max_unsupported)
        )

    def fact_problem(self, facts: FactCheck | None) -> str | None:
        """What is wrong with the facts of an answer, in words that its teacher can act on."""
        if facts is None or self.keeps(facts_json(facts)):
            return None
        told, all_ = len(facts.found), len(facts.found) + len(facts.missing)
        if all_ and round(told / all_, RECALL_DIGITS) < self._min_fact_recall:
            return (
                f"the answer tells {told} of {all_} facts of the record, less than {self._min_fact_recall:g}; "
                f"missing: {_named(facts.missing)}"
            )
        return (
            f"the answer makes {len(facts.unsupported)} claims that the record does not support, "
            f"more than {self._max_unsupported}: {_named(facts.unsupported)}"
        )


def facts_json(checked: FactCheck | None) -> dict[str, Any]:
    """`meta.teacher.facts` of a row; the same keys in every row, whether or not there is a record."""
    if checked is None:
        return {"recall": None, "unsupported": []}
    recall = None if checked.recall is None else round(checked.recall, RECALL_DIGITS)
    return {"recall": recall, "unsupported": list(checked.unsupported)}


def script_problem(text: str, script: Script | None) -> str | None:
    """Why a text is in another language than was asked for, by its script; None where it is not.

    Han characters, kana and hangul count one each, words of alphabets as one; keys of JSON count nothing.
    """
    if script is None:
        return None
    text = _KEYS.sub("", text)
    han = sum(map(len, _HAN.findall(text)))
    others = sum(map(len, _KANA_OR_HANGUL.findall(text))) + len(_OTHER_WORD.findall(text))
    wanted, foreign = (han, others) if script == "Han" else (others, han)
    if foreign >= FOREIGN_WORDS and foreign > wanted:
        name = "Chinese" if script == "Han" else "letters"
        return f"the answer is not in {name}: {wanted} characters or words of it, {foreign} of other scripts"
    return None


def _markup_problem(text: str) -> str | None:
    found = markup(text)
    return None if found is None else f"markup of a chat template stands inside the answer: '{found}'"


def _named(facts: Sequence[str]) -> str:
    more = f" and {len(facts) - NAMED} more" if len(facts) > NAMED else ""
    return ", ".join(facts[:NAMED]) + more
