"""One contender of the training benchmark in a process of its own: `python train_once.py JOB.json RESULT.json`.

Measured is the training loop alone, the same two marks for every contender, whoever wrote its loop: from the
first call of Trainer's training step to the end of the last optimizer step. On a CPU in CPU-seconds of the
process, on a GPU in seconds with the queue of the GPU emptied at both marks. Imports, tokenising, loading the
model, the one batch that mtgdm tries before the first step, and saving lie outside; a short run before it pays for
what only the first step of a process pays for.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from mtgdm.student.chat import Chat, Encoded
from mtgdm.student.noise import quiet

JsonObject = dict[str, Any]

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
"""ChatML with the marks by which `assistant_only_loss` tells the answer: TRL trains the tokens that mtgdm trains."""


@dataclass(frozen=True)
class Settings:
    """What is the same for all contenders of a comparison."""

    base: str
    device: str
    rows: str
    max_len: int
    pad_to: int
    """Length to which the original's way pads every row."""
    batch: int
    grad_accum: int
    steps: int
    """Optimizer steps; 0 goes once over the rows."""
    lr: float
    lora_r: int
    load_in_4bit: bool
    checkpointing: bool
    seed: int = 42

    @property
    def conversations(self) -> list[list[dict[str, str]]]:
        lines = Path(self.rows).read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["messages"] for line in lines]


class LoopClock:
    """Marks the begin and the end of whatever training loop runs while it is armed."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self.begun = self.ended = 0.0
        self.steps = 0

    @property
    def seconds(self) -> float:
        return self.ended - self.begun

    def now(self) -> float:
        if not self._cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def armed(self) -> Iterator[None]:
        training_step = Trainer.training_step

        def begin(*arguments: Any, **options: Any) -> torch.Tensor:
            Trainer.training_step = training_step  # type: ignore[method-assign]
            if self._cuda:
                torch.cuda.reset_peak_memory_stats()
            self.begun = self.now()
            return training_step(*arguments, **options)

        def step(*_: Any) -> None:
            self.steps += 1
            self.ended = self.now()

        Trainer.training_step = begin  # type: ignore[method-assign]
        every = register_optimizer_step_post_hook(step)
        try:
            yield
        finally:
            Trainer.training_step = training_step  # type: ignore[method-assign]
            every.remove()


# --- contenders ----------------------------------------------------------------------------------


def ours(settings: Settings, folder: Path, *, packing: bool | None = None) -> JsonObject:
    """The stage as a user runs it."""
    from mtgdm import testing
    from mtgdm.stages import train

    testing.run(
        train.run,
        folder,
        in_=settings.rows,
        student_base=settings.base,
        device_mode="cuda0" if settings.device == "cuda" else "cpu",
        precision="auto",
        load_in_4bit=settings.load_in_4bit,
        gradient_checkpointing=settings.checkpointing,
        lora_r=settings.lora_r,
        lora_alpha=2 * settings.lora_r,
        lora_dropout=0.0,
        lr=settings.lr,
        scheduler="linear",
        warmup=0,
        epochs=1,
        max_steps=settings.steps,
        batch=settings.batch,
        grad_accum=settings.grad_accum,
        packing=packing,
        max_len=settings.max_len,
        seed=settings.seed,
        logging_steps=1,
        save_steps=1_000_000,
    )
    [metrics] = (folder / "log").glob("train-*.metrics.jsonl")
    points = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return {
        "losses": [point["loss"] for point in points if point["event"] == "train"],
        "trained": next(point["trained_tokens"] for point in points if point["event"] == "start"),
    }


def ours_packed(settings: Settings, folder: Path) -> JsonObject:
    """The stage with `--packing`."""
    return ours(settings, folder, packing=True)


def sft(settings: Settings, folder: Path, *, packing: bool = False, sampling: str = "random") -> JsonObject:
    """TRL's SFTTrainer on answers alone, with the defaults corrected that a careful user corrects."""
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    tokenizer = tokenizer_of(settings)
    tokenizer.chat_template = MARKED
    conversations = settings.conversations
    batch, grad_accum = settings.batch, settings.grad_accum
    if packing:
        # TRL flattens the bins of a batch into one row, whose attention costs the square: one at a time.
        lengths = [len(one.ids) for one in encoded(settings)]
        rows_a_step = settings.batch * settings.grad_accum
        batch, grad_accum = 1, max(1, round(rows_a_step * sum(lengths) / len(lengths) / settings.max_len))
    trainer = SFTTrainer(
        model=adapted(settings),
        args=SFTConfig(
            **common(settings, folder),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=grad_accum,
            assistant_only_loss=True,
            max_length=settings.max_len,
            packing=packing,
            packing_strategy="bfd",
            train_sampling_strategy=sampling,
            bf16=settings.device == "cuda",
            gradient_checkpointing=settings.checkpointing,
        ),
        train_dataset=Dataset.from_list([{"messages": messages} for messages in conversations]),
        processing_class=tokenizer,
    )
    trainer.train()
    labels = (label for row in trainer.train_dataset for label in row["labels"])
    return {"losses": losses(trainer), "trained": sum(label != -100 for label in labels)}


def sft_grouped(settings: Settings, folder: Path) -> JsonObject:
    """SFTTrainer with rows of like length in a batch."""
    return sft(settings, folder, sampling="group_by_length")


def sft_packed(settings: Settings, folder: Path) -> JsonObject:
    """SFTTrainer with `packing="bfd"`."""
    return sft(settings, folder, packing=True)


def plain(settings: Settings, folder: Path) -> JsonObject:
    """A careful script on Trainer: answers alone, rows of like length in a batch, padded to its longest."""
    tokenizer = tokenizer_of(settings)
    rows = [{"input_ids": one.ids, "labels": one.labels} for one in encoded(settings)]
    trainer = Trainer(
        model=adapted(settings),
        args=TrainingArguments(
            **common(settings, folder),
            per_device_train_batch_size=settings.batch,
            gradient_accumulation_steps=settings.grad_accum,
            train_sampling_strategy="group_by_length",
            bf16=settings.device == "cuda",
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    return {
        "losses": losses(trainer),
        "trained": sum(label != -100 for row in rows for label in row["labels"]),
    }


def original(settings: Settings, folder: Path) -> JsonObject:
    """The usual training script: one row at a time, each padded to the full length, the loss on every token."""
    tokenizer = tokenizer_of(settings)
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in settings.conversations]
    rows = [
        tokenizer(text, truncation=True, max_length=settings.pad_to, padding="max_length") for text in texts
    ]
    trainer = Trainer(
        model=adapted(settings),
        args=TrainingArguments(
            **common(settings, folder),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=settings.batch * settings.grad_accum,
            bf16=settings.device == "cuda",
        ),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    return {"losses": losses(trainer), "trained": None}


CONTENDERS = {
    found.__name__: found for found in (ours, ours_packed, sft, sft_grouped, sft_packed, plain, original)
}


# --- what the peers share ------------------------------------------------------------------------


def common(settings: Settings, folder: Path) -> JsonObject:
    """Arguments of every Trainer: optimizer, schedule and seed are those of the stage."""
    return {
        "output_dir": str(folder),
        "use_cpu": settings.device == "cpu",
        "num_train_epochs": 1,
        "max_steps": settings.steps or -1,
        "learning_rate": settings.lr,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "seed": settings.seed,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": settings.device == "cuda",
    }


def adapted(settings: Settings) -> PeftModel:
    """The base with the adapter that the stage makes of the same seed."""
    options: JsonObject = {"dtype": torch.float32 if settings.device == "cpu" else torch.bfloat16}
    if settings.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    device = {"": "cuda:0" if settings.device == "cuda" else "cpu"}
    model = AutoModelForCausalLM.from_pretrained(settings.base, device_map=device, **options)
    set_seed(settings.seed)
    if settings.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=settings.checkpointing)  # type: ignore[no-untyped-call]
    lora = LoraConfig(
        r=settings.lora_r,
        lora_alpha=2 * settings.lora_r,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    found = get_peft_model(model, lora)
    assert isinstance(found, PeftModel)
    return found


def tokenizer_of(settings: Settings) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(settings.base)
    return tokenizer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def encoded(settings: Settings) -> list[Encoded]:
    return list(Chat(tokenizer_of(settings), settings.base).encode(settings.conversations))


# --- the process ---------------------------------------------------------------------------------


def timed(contender: str, settings: Settings) -> JsonObject:
    clock = LoopClock(settings.device)
    with tempfile.TemporaryDirectory() as folder, clock.armed():
        found = CONTENDERS[contender](settings, Path(folder))
    peak = torch.cuda.max_memory_allocated() / 2**20 if settings.device == "cuda" else None
    gc.collect()
    if settings.device == "cuda":
        torch.cuda.empty_cache()
    return {
        **found,
        "seconds": clock.seconds,
        "steps": clock.steps,
        "peak_memory_mib": peak,
        "lengths": [len(one.ids) for one in encoded(settings)],
    }


def main(arguments: Sequence[str]) -> None:
    """A job names a contender, the settings for each set of rows, and those of the short run before them."""
    job = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    with quiet():
        timed(job["contender"], Settings(**job["before"]))
        results = {name: timed(job["contender"], Settings(**found)) for name, found in job["sets"].items()}
    Path(arguments[1]).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
