"""The model card: what a student is, what it learned from, how good it is, how to run it, where it ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from mtgdm.export.folder import in_words
from mtgdm.export.lineage import told
from mtgdm.export.modelfile import is_ollama_name

if TYPE_CHECKING:
    from mtgdm.export.merge import Merged
    from mtgdm.export.modelfile import Modelfile

_METRICS = (
    ("char_f1", "char-F1"),
    ("sequence_ratio", "sequence ratio"),
    ("chrf", "chrF"),
    ("exact_match", "exact match"),
    ("contract_valid", "contract valid"),
    ("fact_recall", "fact recall"),
    ("unsupported_facts", "unsupported facts a row"),
)
_TOY = "mtgdm-tiny"
ADAPTER = "gguf-adapter"


@dataclass(frozen=True)
class File:
    """A GGUF of the package: its name, its type (`gguf-adapter` for one of LoRA alone), its size, its proof.

    `weights` is how it was read back and compared with the merged model.
    """

    name: str
    quant: str
    bytes: int
    proof: Mapping[str, Any] | None = None
    weights: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Card:
    """What the card is written from; `training` is the checkpoint's training.json, `report` an eval report."""

    student: str
    domain: str
    languages: Sequence[str]
    base_model: str
    base_is_on_hub: bool
    base_revision: str | None
    licence: Mapping[str, str]
    """`license` and what else the Hub knows of it: `license_name`, `license_link`."""
    datasets: Sequence[str]
    training: Mapping[str, Any]
    formats: Sequence[str]
    merged: Merged | None
    files: Sequence[File]
    proof_split: str
    """Whose rows the files were compared on: `val`, or `train` where there are none."""
    modelfile: Modelfile | None
    report: Mapping[str, Any] | None
    lineage: Sequence[Mapping[str, Any]]
    normalises: bool
    """Whether its tokenizer brings text into NFC, which llama.cpp does not."""
    version: str

    def text(self) -> str:
        """The whole card as Markdown, with the Hub's front matter."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        front = yaml.safe_dump(self._front_matter(), allow_unicode=True, sort_keys=False).strip()
        yield from ("---", front, "---", "", f"# {self.student}", "")
        revision = f" (revision `{self.base_revision}`)" if self.base_revision else ""
        yield f"A LoRA student of `{self.base_model}`{revision} for the domain *{self.domain}*,"
        yield f"distilled with mtgdm {self.version}."
        if self.base_model == _TOY:
            yield ""
            yield "**This is a toy.** Its base is a tiny model that comes with mtgdm to show the chain working"
            yield "on a CPU: it copies what the prompt holds into the asked layout and knows nothing of the world."
        yield from ("", "## Run it", "")
        yield from self._usage()
        yield from ("", "## Evaluation", "")
        yield from self._evaluation()
        if self.merged or self.files:
            yield from ("", "## Is it the model that was trained?", "")
            yield from self._proof()
        yield from ("", "## Trained on", "")
        yield from self._training()
        yield from ("", "## Limits", "")
        yield from self._limits()

    def _front_matter(self) -> dict[str, Any]:
        front: dict[str, Any] = {
            "language": [*self.languages],
            **self.licence,
            "library_name": "transformers" if self.merged else "gguf" if self.files else "peft",
            "pipeline_tag": "text-generation",
            "datasets": [*self.datasets],
        }
        if self.base_is_on_hub:
            front["base_model"] = self.base_model
            whole = self.merged or any(file.quant != ADAPTER for file in self.files)
            front["base_model_relation"] = "finetune" if whole else "adapter"
        gguf = ["gguf"] if self.files else []
        front["tags"] = ["mtgdm", "distillation", "lora", self.domain, *gguf]
        return {key: value for key, value in front.items() if value}

    # --- how to run it ---

    def _usage(self) -> Iterator[str]:
        whole = [file for file in self.files if file.quant != ADAPTER]
        if self.modelfile and whole:
            yield "In Ollama:"
            name = self.student if is_ollama_name(self.student) else "student"
            yield from ("", "```bash", f"ollama create {name} -f Modelfile")
            yield from (f"ollama run {name}", "```", "")
            yield "In llama.cpp, with an OpenAI-compatible API:"
            yield from ("", "```bash")
            yield (
                f"llama-server -m {whole[0].name} -c {self.modelfile.num_ctx} --jinja --temp 0 --repeat-penalty 1"
            )
            yield from ("```", "")
        if self.merged:
            yield "In transformers:"
            yield from ("", "```python", "from transformers import pipeline", "")
            yield 'chat = pipeline("text-generation", "merged")'
            yield 'messages = [{"role": "user", "content": "..."}]  # or a system and a user turn, as in the training'
            yield "answer = chat(messages, max_new_tokens=1024, do_sample=False)"
            yield 'print(answer[0]["generated_text"][-1]["content"])'
            yield from ("```", "")
        yield from ("| file | size | what |", "|---|---|---|")
        yield from self._files()

    def _files(self) -> Iterator[str]:
        for file in self.files:
            what = f"the whole model in {file.quant}"
            if file.quant == ADAPTER:
                what = f"the LoRA weights alone, for a GGUF of `{self.base_model}` (`llama-server --lora`)"
            yield f"| `{file.name}` | {in_words(file.bytes)} | {what} |"
        if self.merged:
            yield f"| `merged/` | | {self.merged.parameters:,} parameters in {self.merged.dtype} |"
        if "adapter" in self.formats:
            yield f"| `adapter/` | | the LoRA weights alone (PEFT), for `{self.base_model}` |"
        yield "| `SHA256SUMS` | | `sha256sum -c SHA256SUMS` tells whether every file came whole |"

    # --- how good it is ---

    def _evaluation(self) -> Iterator[str]:
        if self.report is None:
            yield "There was no evaluation report of this student when the package was made."
            return
        student, base = self.report["student"], self.report.get("base")
        yield f"{self._evaluated_rows(self.report)}: means with 95 % intervals, greedy decoding."
        yield ""
        yield "| metric | student |" + (" base |" if base else "")
        yield "|---|---|" + ("---|" if base else "")
        for key, label in _METRICS:
            if student.get(key):
                yield f"| {label} | {_interval(student[key])} |" + (
                    f" {_interval(base.get(key))} |" if base else ""
                )
        if self.merged or self.files:
            below = "; what that changed stands below" if self._proved else ""
            yield from ("", f"Evaluated was the checkpoint, before it was merged or quantized{below}.")

    @staticmethod
    def _evaluated_rows(report: Mapping[str, Any]) -> str:
        """Which rows they are, and how they were asked if not as the student comes."""
        _, *asked = str(report["model"]).split(", ")
        how = "".join(f", {one}" for one in asked if not one.startswith("beside "))
        if leaked := report.get("leaked_rows"):
            return f"{report['rows']:,} rows of the split `test`, {leaked:,} of them about spots of the training{how}"
        return f"{report['rows']:,} held-out rows (the split `test`){how}"

    @property
    def _proved(self) -> dict[str, Mapping[str, Any]]:
        return {file.name: file.proof for file in self.files if file.proof and file.proof["engine"]}

    def _proof(self) -> Iterator[str]:
        if self.merged:
            yield from (*self._merge_proof(self.merged), "")
        if self._proved:
            of = "the split `val`, which it was not trained on"
            if self.proof_split == "train":
                of = "the split `train`, which it was trained on, for want of any of `val`"
            yield f"These files were loaded again and compared with the trained model on rows of {of}:"
            yield ""
            yield "| file | compared by | tokens equal | mean KL | same likeliest token | greedy answers equal |"
            yield "|---|---|---|---|---|---|"
        for name, proof in self._proved.items():
            yield "| " + " | ".join([f"`{name}`", *proof_cells(proof)]) + " |"
        for file in self.files:
            if file.proof and not file.proof["engine"]:
                yield from ("", f"`{file.name}` is **unproved**: {file.proof['reason']}.")
        for file in self.files:
            if file.weights:
                yield from (
                    "",
                    f"`{file.name}` was read back from the disk: {weights_in_words(file.weights)}.",
                )
        for file in self.files:
            if file.quant == ADAPTER:
                yield from ("", f"`{file.name}` was not compared: it is nothing without a GGUF of the base.")

    def _merge_proof(self, merged: Merged) -> Iterator[str]:
        if merged.max_logit_difference is None:
            yield "`merged/` was made tensor by tensor in float32; its logits were not compared with those of"
            yield f"base and adapter: {merged.unproved}."
            return
        yield f"Before the cast to {merged.dtype} the logits of `merged/` differ from those of base and adapter by at"
        yield f"most {merged.max_logit_difference:.1e}; after it the likeliest token is the same at"
        yield f"{merged.top1_agreement:.1%} of the probed positions."

    # --- what it comes from ---

    def _training(self) -> Iterator[str]:
        for key, label in (("train_rows", "rows trained on"), ("val_rows", "rows checked on")):
            if key in self.training:
                yield f"- {self.training[key]:,} {label}"
        if "train_spots" in self.training:
            spots = len(self.training["train_spots"])
            leaked = self.report is not None and self.report.get("leaked_rows")
            apart = "" if leaked else "; the split is made by spot, so no evaluated spot is among them"
            yield f"- {spots:,} spots{apart}"
        for key, label in (("best_step", "best step"), ("best_eval_loss", "best eval loss")):
            if self.training.get(key) is not None:
                yield f"- {label}: {self.training[key]:.4g}"
        if self.lineage:
            yield from ("", "| stage | made | sha256 | from |", "|---|---|---|---|")
            for step in self.lineage:
                sources = ", ".join(f"`{one['path']}`" for one in step.get("inputs", ()))
                if step.get("changed_since"):
                    sources = "*the file was changed since, so that what it was made from is not known*"
                yield f"| {step['stage']} | `{step['output']}` | `{step['sha256'][:12]}…` | {sources} |"
        settings = self.training.get("settings")
        if isinstance(settings, Mapping):
            yield from ("", "<details><summary>Settings of the training</summary>", "")
            yield from ("| setting | value |", "|---|---|")
            yield from (
                f"| {key} | {told(str(value))} |" for key, value in settings.items() if value is not None
            )
            yield from ("", "</details>")

    def _limits(self) -> Iterator[str]:
        yield "- It answers from the record that its prompt holds, in the layout that the prompt asks for; prompts of"
        yield "  other kinds were neither trained nor evaluated. How often it claims more than the record says is"
        yield "  among the metrics above, where it was evaluated."
        if "max_len" in self.training:
            yield f"- No row of the training was longer than {self.training['max_len']:,} tokens, answer included."
        if self.normalises and self.files:
            yield "- Its tokenizer brings text into Unicode's form NFC, and llama.cpp (so Ollama too) does not: send"
            yield '  prompts in NFC (`unicodedata.normalize("NFC", text)`), or the model reads other tokens.'
        for remark in self.modelfile.remarks if self.modelfile else ():
            yield f"- {remark}"


def proof_cells(proof: Mapping[str, Any]) -> list[str]:
    """How a GGUF compares with the trained model: engine, tokens, KL, likeliest token, greedy answers."""
    if not proof["engine"]:
        return ["not compared", "–", "–", "–", "–"]
    return [
        f"{proof['engine']}, {proof['rows']:,} rows",
        _count(proof["tokens_equal"], proof["rows"]),
        _figure(proof["mean_kl"], ".1e"),
        _figure(proof["top1_agreement"], ".1%"),
        _count(proof["greedy_equal"], proof["greedy_rows"]),
    ]


def weights_in_words(weights: Mapping[str, Any]) -> str:
    """How the tensors of a GGUF compare with those of the merged model."""
    equal, error = weights["equal"], weights["largest_error"]
    words = f"all its keys are as they were meant, {equal:,} of {weights['tensors']:,} tensors hold the merged weights"
    if error is None:
        return f"{words} bit for bit"
    return f"{words} bit for bit, the others within {error:.1%} (root mean square, by tensor)"


def _count(equal: int | None, rows: int) -> str:
    return "–" if equal is None else f"{equal} of {rows}"


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _interval(value: Mapping[str, Any] | None) -> str:
    if not value or value.get("mean") is None:
        return "–"
    low, high = value["ci95"]
    return f"{value['mean']:.3f} [{low:.3f}, {high:.3f}]" if low is not None else f"{value['mean']:.3f}"
