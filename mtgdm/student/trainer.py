"""LoRA training on transformers' Trainer: the loss at trained positions alone, every point kept, resumable."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import PrinterCallback, TrainerControl, TrainerState

from mtgdm.errors import SettingError, UserError, nearest
from mtgdm.student import distributed
from mtgdm.student.base import Placement, memory_errors
from mtgdm.student.examples import Example
from mtgdm.student.memory import MIB, peak_bytes
from mtgdm.student.packing import Batches, Item, Layout, Rows, collate
from mtgdm.student.resume import Mark, WholeCheckpoint, write_mark

if TYPE_CHECKING:
    from mtgdm.terminal import Progress

EVAL_POSITIONS = 16_384
"""Most positions of a batch while the loss on `val` is measured."""
EVAL_ROOM = 4
"""So many times the positions of a training batch find room in one that keeps nothing for a backward pass."""


@dataclass(frozen=True)
class LoraSettings:
    """The adapter."""

    rank: int
    alpha: int
    dropout: float
    targets: str | list[str]
    rslora: bool = False
    """Scale by alpha / sqrt(rank), which keeps high ranks learning (Kalajdzievski 2023)."""
    dora: bool = False
    """Train the length of each weight's columns apart from their direction (Liu et al. 2024)."""

    @property
    def config(self) -> LoraConfig:
        """The same as PEFT takes it."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets,
            use_rslora=self.rslora,
            use_dora=self.dora,
            task_type="CAUSAL_LM",
        )


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


class Points:
    """The metrics file of a run: one JSON object a line, kept in memory too for the checkpoints.

    Without a path, as in all processes but the first, it is kept in memory alone.
    """

    def __init__(self, path: Path | None, earlier: Sequence[dict[str, Any]] = ()) -> None:
        """`earlier` are the points of the same run before it was interrupted."""
        self.path = path
        self.points: list[dict[str, Any]] = []
        if path is not None:
            path.write_bytes(b"")
        for point in earlier:
            self.add(point)

    def add(self, point: dict[str, Any]) -> None:
        """Write a point."""
        self.points.append(point)
        if self.path is None:
            return
        with self.path.open("ab") as file:
            file.write(json.dumps(point, ensure_ascii=False).encode("utf-8") + b"\n")


# --- the model -----------------------------------------------------------------------------------


def with_adapter(model: PreTrainedModel, lora: LoraSettings, *, checkpointing: bool, seed: int) -> PeftModel:
    """The model with a fresh LoRA adapter, the only part that is trained."""
    set_seed(seed)
    # PEFT's own preparation of a 4-bit model would hold its embeddings and its output layer in float32, and with
    # them all that flows from layer to layer: gigabytes for a large vocabulary, where LoRA without 4-bit does not.
    if checkpointing:
        # The embeddings are frozen: without this no gradient would reach a checkpointed layer.
        model.enable_input_require_grads()  # type: ignore[no-untyped-call]
    model.config.use_cache = False
    try:
        adapted = get_peft_model(model, lora.config)
    except ValueError as error:
        raise UserError(f"no adapter can be put on this model: {error}") from error
    assert isinstance(adapted, PeftModel)
    return adapted


# --- the loop ------------------------------------------------------------------------------------


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
            raise UserError(f"the loss on val became {loss_mean}", hint="lower --lr")
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


_SAID = ("loss", "val", "rate", "lr", "memory")
"""What stands beside the bar; the last goes first where there is no room."""


class Watch(TrainerCallback):
    """Points, progress, best checkpoint, early stop and the marks of whole checkpoints."""

    def __init__(
        self, settings: LoopSettings, points: Points, bar: Progress, fingerprint: str, before_s: float
    ) -> None:
        self._settings = settings
        self._points = points
        self._bar = bar
        self._fingerprint = fingerprint
        self._before_s = before_s
        self._started = time.monotonic()
        self.trainer: StudentTrainer
        self.stopped_early = False
        self._step_s = 0.0
        self._steps = 0
        self._tokens = self._trained = 0
        self._begun = 0.0
        self._notes: dict[str, str] = {}

    @property
    def seconds(self) -> float:
        """How long the run has trained, earlier sittings included."""
        return self._before_s + time.monotonic() - self._started

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell the batches which epoch it is, also that of a resumed run."""
        self.trainer.batches.set_epoch(state.global_step // self._settings.layout.steps_an_epoch)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock of a step."""
        self._begun = time.monotonic()

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """No step is taken on a loss that is no number."""
        self.trainer.check_step_loss()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop the clock; the last step is always measured and kept."""
        self._step_s += time.monotonic() - self._begun
        self._steps += 1
        self._bar.advance()
        if state.global_step >= state.max_steps:
            control.should_save = control.should_log = True
            control.should_evaluate = bool(self.trainer.eval_dataset)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A training point."""
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs or not self._steps:
            return
        if not math.isfinite(logs.get("grad_norm", 0.0)) and not args.fp16:
            raise UserError(
                f"the gradient became {logs['grad_norm']} at step {state.global_step}", hint="lower --lr"
            )
        tokens, trained = self.trainer.summed(
            self.trainer.tokens - self._tokens, self.trainer.trained_tokens - self._trained
        )
        peak = peak_bytes(args.device.type)
        point = {
            "event": "train",
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 4),
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "step_seconds": self._step_s / self._steps,
            "tokens_per_s": tokens / self._step_s if self._step_s else 0.0,
            "trained_tokens_per_s": trained / self._step_s if self._step_s else 0.0,
            "peak_memory_mib": round(peak / MIB),
        }
        self._points.add(point)
        self._say("loss", f"loss {logs['loss']:.4f}")
        self._say("lr", f"lr {point['learning_rate']:.1e}")
        self._say("rate", f"{point['tokens_per_s']:,.0f} tok/s")
        if args.device.type != "cpu":
            self._say("memory", f"{peak / 2**30:.1f} GiB")
        self._step_s, self._steps = 0.0, 0
        self._tokens, self._trained = self.trainer.tokens, self.trainer.trained_tokens

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A point of the loss on `val`: a new best is saved, too many without one stop the run."""
        metrics: dict[str, float] = kwargs["metrics"]
        loss = metrics["eval_loss"]
        self._points.add(
            {
                "event": "eval",
                "step": state.global_step,
                "eval_loss": loss,
                "perplexity": math.exp(min(loss, 700.0)),
                "seconds": metrics["eval_runtime"],
            }
        )
        self._say("val", f"val {loss:.4f}")
        if state.global_step == 0:
            return
        if state.best_metric is None or loss < state.best_metric:
            control.should_save = True
        if self._settings.early_stop and evals_without_gain(state.log_history, self._settings.threshold) >= (
            self._settings.patience
        ):
            self.stopped_early = state.global_step < state.max_steps
            control.should_training_stop = True
            control.should_save = True

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Declare the checkpoint whole, when every process has written its part."""
        distributed.wait()
        if not state.is_world_process_zero:
            return
        finished = control.should_training_stop or state.global_step >= state.max_steps
        mark = Mark(self._fingerprint, state.global_step, state.max_steps, finished, round(self.seconds, 3))
        write_mark(Path(args.output_dir) / f"checkpoint-{state.global_step}", mark, self._points.points)

    def _say(self, key: str, text: str) -> None:
        self._notes[key] = text
        self._bar.note(" · ".join(self._notes[name] for name in _SAID if name in self._notes))


class TriesFirst(TrainerCallback):
    """Computes one batch before the first step, to see whether the memory holds."""

    def __init__(self, trainer: StudentTrainer, items: Sequence[Item], hint: str) -> None:
        self._trainer = trainer
        self._items = items
        self._hint = hint

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Try it on the model as it is wrapped for the processes."""
        with memory_errors(self._hint, doing="the largest batch does not fit"):
            self._trainer.try_batch(self._trainer.model_wrapped, self._items)


def evals_without_gain(history: Sequence[dict[str, Any]], threshold: float) -> int:
    """How many of the last measurements on `val` in a row did not beat the best before by the threshold.

    Counted from the history, which a checkpoint carries: a resumed run stops where it would have.
    """
    best = math.inf
    waited = 0
    for entry in history:
        if "eval_loss" not in entry or entry["step"] == 0:
            continue
        if entry["eval_loss"] < best - threshold:
            best = entry["eval_loss"]
            waited = 0
        else:
            waited += 1
    return waited


def reporters(names: Sequence[str], tensorboard: Path) -> tuple[str, ...]:
    """Names of trackers, each known to transformers and installed; `tensorboard` is where its files go.

    Raises SettingError for an unknown name, UserError for one that is not installed.
    """
    known = set(INTEGRATION_TO_CALLBACK)
    for name in names:
        if name not in known:
            raise SettingError(
                f"there is no tracker '{name}'", where="--report-to", hint=nearest(name, known)
            )
        if name == "tensorboard":
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(tensorboard))
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            raise UserError(
                f"{name} is not installed", where="--report-to", hint=f"pip install {name}"
            ) from error
    return tuple(names)


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
    progress: Callable[[int, int], Any],
) -> Outcome:
    """Train, or go on from a checkpoint of the same run; the best checkpoint is the outcome.

    `hungriest` is the batch that takes most memory: it is tried before the first step, for nobody should learn
    after a night that it does not fit. `progress(total, done)` opens the bar. `folder` holds the `checkpoint-N/`
    while training.
    """
    train_examples, val_examples = examples
    steps = total_steps(settings)
    args = _arguments(settings, placement, folder, with_eval=bool(val_examples), resumed=resume is not None)
    if placement.device != "auto":
        args._n_gpu = min(1, args.n_gpu)  # else the Trainer would spread one GPU's model by DataParallel
    with progress(steps, resume.mark.step if resume else 0) as bar:
        watch = Watch(settings, points, bar, fingerprint, resume.mark.seconds if resume else 0.0)
        trainer = StudentTrainer(model, args, train_examples, val_examples, pad, settings.layout, hungriest)
        watch.trainer = trainer
        trainer.add_callback(watch)
        trainer.add_callback(TriesFirst(trainer, hungriest, settings.save_memory))
        if resume is not None and resume.mark.finished:
            trainer.state = TrainerState.load_from_json(str(resume.path / "trainer_state.json"))
            watch.stopped_early = resume.mark.step < resume.mark.total_steps
        else:
            with memory_errors(settings.save_memory):
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
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
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
