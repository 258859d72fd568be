"""A small domain, a scripted backend, and the teacher stage run with them, in this process or in another."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from mtgdm import plugins
from mtgdm.domain import BadRecord, Domain, FactCheck, Message, Prompt, Record
from mtgdm.rows import row_id
from mtgdm.stages import teacher
from mtgdm.teachers.seam import Backend, Completion, Options
from mtgdm.testing import StageRun
from mtgdm.testing import run as run_stage
from tests.conftest import write_lines
from tests.ollama_server import Question


class Card(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    year: int


class Gardens(Domain):
    """Gardens with a name and a year: a card in JSON, a note in prose."""

    name = "gardens"
    types = ("card", "note")

    def read(self, path: Path, on_bad: BadRecord) -> Iterator[Record]:
        raise NotImplementedError

    def prompts(self, record: Record) -> Iterable[Prompt]:
        for kind in self.types:
            words = f"{record.name}建于{record.facts['year']}年，请写{kind}。"
            yield Prompt(
                kind, [{"role": "system", "content": "你是园丁。"}, {"role": "user", "content": words}]
            )

    def contract(self, prompt_type: str) -> type[BaseModel] | None:
        return Card if prompt_type == "card" else None

    def prose_problem(self, prompt_type: str, text: str) -> str | None:
        return None if text.endswith("。") else "the note does not end with 。"

    def check_facts(self, facts: Mapping[str, Any], prompt_type: str, text: str) -> FactCheck:
        said = set(re.findall(r"\d{4}", text))
        year = str(facts["year"])
        found = (year,) if year in said else ()
        return FactCheck(found, () if found else (year,), tuple(sorted(said - {year})))

    def answer(self, facts: Mapping[str, Any], prompt_type: str) -> str:
        if prompt_type == "card":
            card = {"name": facts["name"], "year": facts["year"]}
            return json.dumps(card, ensure_ascii=False, separators=(",", ":"))
        return f"{facts['name']}建于{facts['year']}年。"


class Scripted(Backend):
    """A stranger's backend: it turns the question around."""

    async def check(self) -> None:
        """Always there."""

    async def answer(
        self, messages: Sequence[Message], contract: type[BaseModel] | None, options: Options
    ) -> Completion:
        return Completion(messages[-1]["content"][::-1] + "。", "stop", 7, 11, 0.5)


_ENTRY_POINTS = {
    "mtgdm.domains": EntryPoint("gardens", "tests.teacher_domain:Gardens", "mtgdm.domains"),
    "mtgdm.teachers": EntryPoint("scripted", "tests.teacher_domain:Scripted", "mtgdm.teachers"),
}
_find = plugins.find


def find(group: str) -> dict[str, EntryPoint]:
    """The installed entry points, and those of this file."""
    found = _find(group)
    if group in _ENTRY_POINTS:
        found[_ENTRY_POINTS[group].name] = _ENTRY_POINTS[group]
    return found


def prompt_rows(count: int, *, types: Sequence[str] = Gardens.types) -> list[dict[str, Any]]:
    """Prompts of so many gardens, one of each type."""
    rows = []
    for number in range(count):
        name = f"第{number}园"
        facts = {"name": name, "year": 1100 + number}
        for prompt in Gardens().prompts(Record(name, "苏州", facts)):
            if prompt.type in types:
                meta = {
                    "spot": name,
                    "province": "苏州",
                    "type": prompt.type,
                    "split": "train",
                    "record": facts,
                }
                rows.append({"id": row_id(prompt.messages), "messages": prompt.messages, "meta": meta})
    return rows


def write_prompts(workspace: Path, count: int, **more: Any) -> list[dict[str, Any]]:
    """The prompts of so many gardens as the stage's input."""
    rows = prompt_rows(count, **more)
    write_lines(workspace / "data" / "prompts.jsonl", *rows)
    return rows


def right_answer(question: Question) -> str:
    """What a good teacher says to the prompt at the beginning of the talk."""
    words = next(m["content"] for m in question.body["messages"] if m["role"] == "user")
    found = re.match(r"(.+)建于(\d+)年，请写(\w+)。", words)
    assert found is not None, words
    return Gardens().answer({"name": found[1], "year": int(found[2])}, found[3])


def run_teacher(workspace: Path, **settings: Any) -> StageRun:
    """The teacher stage over the domain of this file."""
    return run_stage(teacher.run, workspace, domain="gardens", **settings)


if __name__ == "__main__":
    plugins.find = find
    run_teacher(Path(sys.argv[1]), **json.loads(sys.argv[2]))
