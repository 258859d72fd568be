"""The tourism domain: spots in, three prompts a spot, and what a spot lets an answer say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel

from mtgdm.domain import BadRecord, Domain, FactCheck, Prompt, Record, Script
from mtgdm.tourism import answers, prose, spots, templates
from mtgdm.tourism.facts import check_facts
from mtgdm.tourism.record import readable


class Tourism(Domain):
    """China's tourist attractions, from the collector's `spots.jsonl`."""

    name: ClassVar[str] = "tourism"
    types: ClassVar[tuple[str, ...]] = ("general", "itinerary", "bilingual")
    languages: ClassVar[tuple[str, ...]] = ("zh", "en")

    def read(self, path: Path, on_bad: BadRecord) -> Iterator[Record]:
        """The spots of a file, one at a time."""
        return spots.read(path, on_bad)

    def prompts(self, record: Record) -> Iterator[Prompt]:
        """One prompt for each of `types`."""
        for prompt_type in self.types:
            yield Prompt(prompt_type, templates.messages(record.facts, prompt_type))

    def contract(self, prompt_type: str) -> type[BaseModel] | None:
        """General or Itinerary; bilingual answers are prose."""
        return templates.CONTRACTS.get(prompt_type)

    def prose_problem(self, prompt_type: str, text: str) -> str | None:
        """What is wrong with a bilingual answer."""
        return prose.problem(text) if prompt_type == "bilingual" else None

    def languages_right(self, prompt_type: str, text: str) -> bool | None:
        """Whether a bilingual answer is Chinese first and then English."""
        return prose.languages_right(text) if prompt_type == "bilingual" else None

    def script(self, prompt_type: str) -> Script | None:
        """Chinese where the answer is JSON; the bilingual type has a check of its own."""
        return "Han" if prompt_type in templates.CONTRACTS else None

    def check_facts(self, facts: Mapping[str, Any], prompt_type: str, text: str) -> FactCheck:
        """Compare a text with the record it was written from."""
        return check_facts({"name": "", **readable(facts)}, prompt_type, text)

    def answer(self, facts: Mapping[str, Any], prompt_type: str) -> str:
        """The offline teacher's answer."""
        return answers.render(readable(facts), prompt_type)
