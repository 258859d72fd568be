"""LoRA training on transformers' Trainer: the loss at trained positions alone, every point kept, resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerState

from mtgdm.errors import UserError
from mtgdm.student.base import Placement, disk_errors, memory_errors
from mtgdm.student.examples import Example
from mtgdm.student.packing import Batches, Item, Layout, Rows, collate
from mtgdm.student.resume import WholeCheckpoint
from mtgdm.student.watch import Points, TriesFirst, Watch

MAX_GRAD_NORM = 1.0
"""Gradients of a larger norm are clipped to it."""
EVAL_POSITIONS = 16_384
"""Most positions of a batch while the loss on `val` is measured."""
EVAL_ROOM = 4
"""So many times the positions of a training batch find room in one that keeps nothing for a backward pass."""


@dataclass(frozen=True)
class LoopSettings:
    """The loop; 0 in `max_steps` goes by epochs."""

    epochs: float
    max_steps: int
    lr: float
    scheduler: str
    warmup: float
    weight_decay: float
    layout: Layout
    gradient_checkpointing: bool
    seed: int
    eval_steps: int
    save_steps: int
    logging_steps: int
    early_stop: bool
    patience: int
    threshold: float
    report_to: tuple[str, ...] = ()
    run_name: str = ""
    save_memory: str = ""
    """What to do where memory runs out."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended; `adapter` is the checkpoint folder whose weights are the result."""

    adapter: Path
    steps: int
    best_step: int
    best_eval_loss: float | None
    first_eval_loss: float | None
    stopped_early: bool
    seconds: float


class StudentTrainer(Trainer):
    """Trainer with the loss of the trained tokens, summed over all and divided by their number."""

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        train: list[Example],
        val: list[Example],
        pad: int,
        layout: Layout,
        hungriest: Sequence[Item],
    ) -> None:
        """`layout` says how the rows of `train` lie in batches; none of `val` takes more memory than `hungriest`."""
        self._collate = partial(collate, pad=pad, packed=bool(layout.bin_tokens))
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collate,
            train_dataset=Rows(train),
            eval_dataset=val or None,
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True
        self.tokens = 0
        """Tokens of the steps so far, padding left out, in this process."""
        self.trained_tokens = 0
        self.batches = Batches([example.length for example in train], layout, args.seed, args.process_index)
        self._pad = pad
        largest = self._collate([Rows(train)[item] for item in hungriest])
        self._val_batches = list(
            _batches(
                sorted(val, key=lambda example: -example.length),
                positions=min(EVAL_POSITIONS, EVAL_ROOM * largest["input_ids"].numel()),
                trained=largest["trained"].numel(),
            )
        )
        self._step_loss: torch.Tensor | None = None
        self._trained: torch.Tensor | None = None
        head = model.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(self._at_trained_positions)

    def _at_trained_positions(self, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
        """Give the output layer only the hidden states whose logits the loss reads.

        Exact, and on rows that are mostly prompt the largest matrix product of a small model shrinks
        to a third. A hook rather than a call of the inner model, so that DDP and FSDP see a forward.
        """
        if self._trained is None:
            return None
        hidden = inputs[0].flatten(0, 1)
        return (hidden[self._trained.to(hidden.device)], *inputs[1:])

    def summed_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, int]:
        """The loss summed over the trained tokens of a batch, and their number."""
        self._trained = inputs["trained"]
        # Neither an attention mask nor a cache: with one of them position_ids no longer keep packed rows apart.
        read = {name: inputs[name] for name in ("input_ids", "position_ids") if name in inputs}
        try:
            logits = model(**read, use_cache=False).logits
        finally:
            self._trained = None
        if logits.dim() == 3:  # a model whose output layer the hook could not reach
            logits = logits.flatten(0, 1)[inputs["trained"].to(logits.device)]
        targets = inputs["targets"].to(logits.device)
        return cross_entropy(logits.float(), targets, reduction="sum"), targets.numel()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The loss of one batch, as a share of the mean over all batches of the step."""
        loss, trained = self.summed_loss(model, inputs)
        self.trained_tokens += trained
        loss = loss / (trained if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return loss

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """One batch forward and backward."""
        self.tokens += inputs["tokens"]
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        return loss

    def check_step_loss(self) -> None:
        """UserError where the loss of the step is no number; asked once a step, since a GPU has to stop for it."""
        loss, self._step_loss = self._step_loss, None
        if loss is not None and not math.isfinite(float(loss)):
            raise UserError(
                f"the loss became {float(loss)} at step {self.state.global_step + 1}",
                hint="lower --lr, or compute in wider numbers: --precision float32, --bnb-compute-dtype bfloat16",
            )

    def try_batch(self, model: torch.nn.Module, items: Sequence[Item]) -> None:
        """Compute a batch forward and backward and forget it: nothing of it is left but the memory it took.

        The random numbers of dropout go back to where they were. DeepSpeed's backward would take a step.
        """
        if self.is_deepspeed_enabled:
            return
        batch = self._prepare_inputs(self._collate([self.train_dataset[item] for item in items]))  # type: ignore[index]
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        model.train()
        with torch.random.fork_rng(devices), self.accelerator.no_sync(model):
            with self.compute_loss_context_manager():
                loss, _ = self.summed_loss(model, batch)
            self.accelerator.backward(loss)
        model.zero_grad()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The batches of this process, shared out by `Batches`: accelerate would repeat rows to fill up the last."""
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self.batches,
            collate_fn=self._collate,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The loss on `val`: the mean over all trained tokens, not the mean of batch means."""
        started = time.monotonic()
        model = self.model
        assert model is not None
        model.eval()
        rank, world = self.args.process_index, self.args.world_size
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        # All processes compute equally often, or a model spread over them would wait for ever.
        nothing: list[list[Example]] = [[]] * (-len(self._val_batches) % world)
        for batch in [*self._val_batches, *nothing][rank::world]:
            inputs = self._prepare_inputs(
                collate([[example] for example in batch] or [[]], self._pad, packed=False)
            )
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, trained = self.summed_loss(model, inputs)
            total += torch.stack([loss.double(), loss.new_tensor(trained).double()]).to(total.device)
        if world > 1:
            total = self.accelerator.reduce(total, "sum")
        loss_mean = float(total[0] / total[1])
        if not math.isfinite(loss_mean):
            step = self.state.global_step
            raise UserError(f"the loss on val became {loss_mean} at step {step}", hint="lower --lr")
        metrics = {"eval_loss": loss_mean, "eval_runtime": time.monotonic() - started}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def summed(self, *counts: int) -> list[int]:
        """Counts added up over all processes."""
        if self.args.world_size == 1:
            return list(counts)
        shared = torch.tensor(counts, dtype=torch.int64, device=self.args.device)
        return [int(value) for value in self.accelerator.reduce(shared, "sum")]

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: transformers walks over all parameters for it at every step."""
        return 0


def _batches(examples: Sequence[Example], *, positions: int, trained: int) -> Iterator[list[Example]]:
    """Batches of at most so many positions, padding included, and trained tokens, or of one row that has more.

    The rows come sorted, the longest first.
    """
    batch: list[Example] = []
    logits = 0
    for example in examples:
        logits += example.tokens.trained
        if batch and ((len(batch) + 1) * batch[0].length > positions or logits > trained):
            yield batch
            batch, logits = [], example.tokens.trained
        batch.append(example)
    if batch:
        yield batch


def total_steps(settings: LoopSettings) -> int:
    """Optimizer steps of a whole run."""
    return settings.max_steps or settings.layout.steps(settings.epochs)


def train(
    model: PeftModel,
    examples: tuple[list[Example], list[Example]],
    *,
    settings: LoopSettings,
    placement: Placement,
    folder: Path,
    pad: int,
    points: Points,
    fingerprint: str,
    resume: WholeCheckpoint | None,
    hungriest: Sequence[Item],
    held_bytes: int,
    progress: Callable[[int, int], Any],
) -> Outcome:
    """Train, or go on from a checkpoint of the same run; the best checkpoint is the outcome.

    `hungriest` is the batch that takes most memory: it is tried before the first step, for nobody should learn
    after a night that it does not fit. `held_bytes` are no part of the run's peak of memory: what the process
    held before there was a model. `progress(total, done)` opens the bar. `folder` holds the `checkpoint-N/`
    while training.
    """
    train_examples, val_examples = examples
    steps = total_steps(settings)
    args = _arguments(settings, placement, folder, with_eval=bool(val_examples), resumed=resume is not None)
    if placement.device != "auto":
        args._n_gpu = min(1, args.n_gpu)  # else the Trainer would spread one GPU's model by DataParallel
    with progress(steps, resume.mark.step if resume else 0) as bar:
        before_s = resume.mark.seconds if resume else 0.0
        watch = Watch(settings, points, bar, fingerprint, before_s, held_bytes)
        trainer = StudentTrainer(model, args, train_examples, val_examples, pad, settings.layout, hungriest)
        watch.trainer = trainer
        trainer.add_callback(watch)
        trainer.add_callback(TriesFirst(trainer, hungriest, settings.save_memory))
        if resume is not None and resume.mark.finished:
            trainer.state = TrainerState.load_from_json(str(resume.path / "trainer_state.json"))
            watch.stopped_early = resume.mark.step < resume.mark.total_steps
        else:
            with memory_errors(settings.save_memory), disk_errors(folder):
                trainer.train(resume_from_checkpoint=str(resume.path) if resume else None)
    state = trainer.state
    best = state.best_global_step if state.best_global_step else state.global_step
    first = next((entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry), None)
    return Outcome(
        adapter=folder / f"checkpoint-{best}",
        steps=state.global_step,
        best_step=best,
        best_eval_loss=state.best_metric,
        first_eval_loss=first,
        stopped_early=watch.stopped_early,
        seconds=watch.seconds,
    )


def _arguments(
    settings: LoopSettings, placement: Placement, folder: Path, *, with_eval: bool, resumed: bool
) -> TrainingArguments:
    checkpointing: dict[str, Any] = {}
    if settings.gradient_checkpointing:
        names = TrainingArguments.__dataclass_fields__
        name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
        checkpointing = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup if total_steps(settings) > 1 else 0,  # its first step has a rate of 0
        weight_decay=settings.weight_decay,
        max_grad_norm=MAX_GRAD_NORM,
        per_device_train_batch_size=settings.layout.batch,
        gradient_accumulation_steps=settings.layout.grad_accum,
        run_name=settings.run_name or None,
        bf16=placement.autocast is torch.bfloat16,
        fp16=placement.autocast is torch.float16,
        use_cpu=placement.on_cpu,
        seed=settings.seed,
        eval_strategy="steps" if with_eval else "no",
        eval_steps=settings.eval_steps,
        eval_on_start=with_eval and not resumed,
        metric_for_best_model="eval_loss" if with_eval else None,
        greater_is_better=False if with_eval else None,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=list(settings.report_to),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not placement.on_cpu,
        ddp_find_unused_parameters=False,
        **checkpointing,
    )
