"""The model card: what the student is, what it learned from, how good it is, how to run it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from mtgdm.export.merge import Merged

_METRICS = (
    ("char_f1", "char-F1"),
    ("sequence_ratio", "sequence ratio"),
    ("chrf", "chrF"),
    ("exact_match", "exact match"),
    ("contract_valid", "contract valid"),
    ("fact_recall", "fact recall"),
    ("unsupported_facts", "unsupported facts a row"),
)
_NOT_A_HUB_ID = "mtgdm-tiny"


@dataclass(frozen=True)
class Card:
    """What the card is written from; `training` is the checkpoint's training.json, `report` an eval report."""

    student: str
    domain: str
    base_model: str
    training: Mapping[str, Any]
    formats: Sequence[str]
    merged: Merged | None
    report: Mapping[str, Any] | None
    version: str

    def text(self) -> str:
        """The whole card as Markdown, with the Hub's front matter."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        yield from (
            "---",
            yaml.safe_dump(self._front_matter(), allow_unicode=True, sort_keys=False).strip(),
            "---",
            "",
        )
        yield f"# {self.student}"
        yield ""
        yield f"A LoRA student of `{self.base_model}` for the domain *{self.domain}*,"
        yield f"distilled with mtgdm {self.version}."
        if self.base_model == _NOT_A_HUB_ID:
            yield ""
            yield "**This is a toy.** Its base is a tiny model that comes with mtgdm to show the chain working"
            yield "on a CPU: it copies what the prompt holds into the asked layout and knows nothing of the world."
        yield from ("", "## Trained on", "")
        for key, label in (("train_rows", "rows trained on"), ("val_rows", "rows checked on")):
            if key in self.training:
                yield f"- {self.training[key]:,} {label}"
        if "train_spots" in self.training:
            spots = len(self.training["train_spots"])
            yield f"- {spots:,} spots; the split is made by spot, so no evaluated spot is among them"
        for key, label in (("best_step", "best step"), ("best_eval_loss", "best eval loss")):
            if self.training.get(key) is not None:
                yield f"- {label}: {self.training[key]:.4g}"
        settings = self.training.get("settings")
        if isinstance(settings, Mapping):
            yield from ("", "| setting | value |", "|---|---|")
            yield from (f"| {key} | {value} |" for key, value in settings.items() if value is not None)
        yield from ("", "## Evaluation", "")
        yield from self._evaluation()
        yield from ("", "## Run it", "")
        yield from self._usage()
        yield from ("", "## Limits", "")
        yield "It answers from the record that its prompt holds, in the layout the prompt asks for. What the"
        yield "record does not say it should call 未知; the unsupported facts above say how often it claims more."

    def _front_matter(self) -> dict[str, Any]:
        front: dict[str, Any] = {
            "language": ["zh", "en"],
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
        }
        if self.base_model != _NOT_A_HUB_ID:
            front["base_model"] = self.base_model
            front["base_model_relation"] = "finetune" if self.merged else "adapter"
        front["tags"] = ["mtgdm", "distillation", "lora", self.domain]
        return front

    def _evaluation(self) -> Iterator[str]:
        if self.report is None:
            yield "There was no evaluation report when this package was made."
            return
        student, base = self.report["student"], self.report.get("base")
        yield f"{self.report['rows']:,} held-out rows, 95 % intervals:"
        yield ""
        yield "| metric | student |" + (" base |" if base else "")
        yield "|---|---|" + ("---|" if base else "")
        for key, label in _METRICS:
            if student.get(key):
                yield f"| {label} | {_interval(student[key])} |" + (
                    f" {_interval(base.get(key))} |" if base else ""
                )

    def _usage(self) -> Iterator[str]:
        if self.merged:
            yield from ("```python", "from transformers import pipeline", "")
            yield 'chat = pipeline("text-generation", "merged")'
            yield 'messages = [{"role": "user", "content": "..."}]  # as in prompts.jsonl'
            yield 'print(chat(messages, max_new_tokens=1024)[0]["generated_text"][-1]["content"])'
            yield "```"
            yield ""
            yield f"`merged/`: {self.merged.parameters:,} parameters in {self.merged.dtype}."
            if self.merged.max_logit_difference is not None:
                yield "Before the cast its logits differ from base and adapter by at most"
                yield f"{self.merged.max_logit_difference:.1e}; after it the likeliest token is the same at"
                yield f"{self.merged.top1_agreement:.1%} of the probed positions."
            yield ""
        if "adapter" in self.formats:
            yield f"`adapter/`: the LoRA weights alone (PEFT), for `{self.base_model}`."


def _interval(value: Mapping[str, Any] | None) -> str:
    if not value or value.get("mean") is None:
        return "–"
    low, high = value["ci95"]
    return f"{value['mean']:.3f} [{low:.3f}, {high:.3f}]" if low is not None else f"{value['mean']:.3f}"
