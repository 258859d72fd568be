"""Teacher rows to a LoRA checkpoint: trained on `train`, checked on `val`, `test` never read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field

from mtgdm import rows
from mtgdm.checkpoints import checkpoint_name
from mtgdm.errors import UserError
from mtgdm.manifest import settings_digest
from mtgdm.rows import Row, Split
from mtgdm.stage import Context, Input, Output, Result, Runtime, StageConfig, stage
from mtgdm.student.resume import WholeCheckpoint, remove_checkpoints, whole_checkpoints

if TYPE_CHECKING:
    from peft import PeftModel

    from mtgdm.student.base import Placement
    from mtgdm.student.chat import Chat
    from mtgdm.student.examples import Example
    from mtgdm.student.packing import Layout
    from mtgdm.student.trainer import Outcome

CHECKPOINTS = Path("data/checkpoints")

_SHOWN_ROWS = 3


class TrainConfig(StageConfig):
    """Settings of `mtgdm train`."""

    in_: Annotated[Path, Input()] = Field(Path("data/teacher.jsonl"), alias="in")
    """The answered rows."""
    student_base: str = "Qwen/Qwen2.5-3B-Instruct"
    """The model to train: a Hub id, a folder, or `mtgdm-tiny`, the offline base that ships with mtgdm."""
    ckpt_out: Annotated[Path | None, Output()] = None
    """Folder of the checkpoint; by default data/checkpoints/ and the name of the base."""
    device_mode: Literal["cuda0", "auto", "cpu"] = "auto"
    """First GPU, what there is, or the CPU."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Numbers to compute in; auto takes bfloat16 on a GPU, float32 on a CPU. A CPU without bfloat16 keeps float32."""
    load_in_4bit: bool = False
    """QLoRA: hold the base in 4-bit NF4 with double quantisation."""
    bnb_compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Numbers that 4-bit weights are computed in."""
    gradient_checkpointing: bool = False
    """Compute activations twice to hold fewer: less memory, about a third slower."""
    lora_r: int = Field(16, ge=1)
    """Rank of the adapter."""
    lora_alpha: int = Field(32, ge=1)
    """Scale of the adapter; its weight is alpha / rank."""
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    """Dropout before the adapter."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Layers that get an adapter, by the end of their names."""
    epochs: float = Field(3.0, gt=0)
    """Passes over the rows."""
    max_steps: int = Field(0, ge=0)
    """Stop after so many steps, whatever the epochs; 0 goes by epochs."""
    lr: float = Field(2e-4, gt=0)
    """Highest learning rate."""
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """How the learning rate falls."""
    warmup: float = Field(0.03, ge=0)
    """Warm-up: a share of all steps below 1, else a number of steps."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""
    batch: int = Field(2, ge=1)
    """Rows a device computes at once; with packing at most so many bins."""
    grad_accum: int = Field(8, ge=1)
    """Batches to one step: batch x grad_accum rows, with packing as near to that as whole bins come."""
    packing: bool | None = None
    """Short rows share bins of at most max_len tokens, and none sees another. A step takes as many rows as without, so
    epochs, steps and lr mean the same. By default on a GPU where bins are a quarter fewer than rows. Otherwise rows of
    like length share a batch: on a CPU that is the faster way."""
    max_len: int = Field(2048, ge=16)
    """Most tokens of a row."""
    too_long: Literal["error", "drop", "truncate"] = "error"
    """What happens to longer rows."""
    val_ratio: float = Field(rows.VAL_RATIO, ge=0, lt=1)
    """Share of `val` among rows that carry no split of their own."""
    seed: int = 42
    """Seed of the adapter, the order of the rows and the dropout."""
    eval_steps: int = Field(50, ge=1)
    """Measure the loss on val every so many steps; the best checkpoint is the result."""
    early_stop: bool = False
    """Stop when the loss on val no longer falls."""
    early_stop_patience: int = Field(3, ge=1)
    """So many measurements in a row without a gain stop the run."""
    early_stop_threshold: float = Field(1e-4, ge=0)
    """A smaller gain counts as none."""
    save_steps: Annotated[int, Runtime()] = Field(100, ge=1)
    """Save every so many steps: an interrupted run goes on from there."""
    logging_steps: Annotated[int, Runtime()] = Field(10, ge=1)
    """A point of the metrics every so many steps."""
    keep_checkpoints: Annotated[bool, Runtime()] = False
    """Keep the checkpoint-N folders with their optimizer states after the end."""
    preview: Annotated[bool, Runtime()] = False
    """Show three rows token by token with the loss mask and the lengths, and train nothing."""

    def resolved(self, workspace: Path) -> Self:
        """The same settings with every path absolute and the checkpoint's folder named."""
        named = (
            self
            if self.ckpt_out
            else self.model_copy(update={"ckpt_out": CHECKPOINTS / checkpoint_name(self.student_base)})
        )
        return super(TrainConfig, named).resolved(workspace)

    def finished(self) -> tuple[int, int] | None:
        """Steps done and to do of an interrupted run."""
        whole = whole_checkpoints(self.ckpt_out) if self.ckpt_out else []
        return (whole[-1].mark.step, whole[-1].mark.total_steps) if whole else None


@stage
def run(config: TrainConfig, context: Context) -> Result:
    """Train the student: teacher rows in, a LoRA checkpoint out; goes on where it was interrupted."""
    from mtgdm.student.installed import TRAINING, require

    require(*TRAINING, *(["bitsandbytes"] if config.load_in_4bit else []))
    split = _split(config)
    from mtgdm.student.noise import quiet

    with quiet():
        return _train(config, context, split)


# --- rows ----------------------------------------------------------------------------------------


def _split(config: TrainConfig) -> dict[Split, list[Row]]:
    """The rows by split; a spot in two splits, an empty file and a file without `train` stop the run."""
    found: dict[Split, list[Row]] = {"train": [], "val": [], "test": []}
    of_spot: dict[str, set[Split]] = {}
    for row in rows.read_rows(config.in_, answered=True):
        split = _split_of(row, config.val_ratio)
        found[split].append(row)
        if row.spot is not None:
            of_spot.setdefault(row.spot, set()).add(split)
    both = sorted(spot for spot, splits in of_spot.items() if len(splits) > 1)
    if both:
        raise UserError(
            f"{len(both):,} spots stand in more than one split, so what is checked would have been trained on: "
            f"{'、'.join(both[:3])}{' …' if len(both) > 3 else ''}",
            where=config.in_,
            hint="the split hangs on the spot: make the prompts again with `mtgdm prompts`",
        )
    if not any(found.values()):
        raise UserError("there are no rows", where=config.in_, hint="run `mtgdm teacher` first")
    if not found["train"]:
        raise UserError(
            f"none of the {sum(map(len, found.values())):,} rows is in the split `train`",
            where=config.in_,
            hint="more spots, or smaller ratios for val and test in `mtgdm prompts`",
        )
    return found


def _split_of(row: Row, val_ratio: float) -> Split:
    if row.meta.get("split") in ("train", "val", "test"):
        return row.split
    return rows.split_of(row.spot or row.id, val_ratio=val_ratio)


# --- the run -------------------------------------------------------------------------------------


def _train(config: TrainConfig, context: Context, split: dict[Split, list[Row]]) -> Result:
    from mtgdm.student import base, trainer
    from mtgdm.student.chat import Chat

    assert config.ckpt_out is not None
    source = base.locate(config.student_base, context.workspace)
    if base.is_adapter(source):
        raise UserError(
            "--student-base is a LoRA adapter, not a model",
            where=source,
            hint=f"--student-base {base.base_of(source)}, which it was trained on",
        )
    placement = None if config.preview else base.place(config.device_mode, config.precision)
    chat = Chat(base.load_tokenizer(source, config.student_base), config.student_base)
    train_rows, val_rows = _examples(config, context, split, chat)
    if placement is None:
        for layout in _layouts(config, train_rows):
            context.print(str(layout))
        return Result(summary="preview: nothing was trained", outputs=[])
    if not val_rows:
        context.warn(
            f"no row of {config.in_.name} is in the split `val`: no eval loss, no early stop, the last step counts"
        )

    model = trainer.with_adapter(
        base.load_model(
            source,
            config.student_base,
            placement,
            load_in_4bit=config.load_in_4bit,
            compute_dtype=config.bnb_compute_dtype,
        ),
        trainer.LoraSettings(
            config.lora_r,
            config.lora_alpha,
            config.lora_dropout,
            "all-linear" if config.lora_targets == ("all-linear",) else list(config.lora_targets),
        ),
        checkpointing=config.gradient_checkpointing,
        seed=config.seed,
    )
    layout = _layout(config, context, train_rows, model, placement)
    loop = trainer.LoopSettings(
        epochs=config.epochs,
        max_steps=config.max_steps,
        lr=config.lr,
        scheduler=config.scheduler,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        layout=layout,
        gradient_checkpointing=config.gradient_checkpointing,
        seed=config.seed,
        eval_steps=config.eval_steps,
        save_steps=config.save_steps,
        logging_steps=config.logging_steps,
        early_stop=config.early_stop,
        patience=config.early_stop_patience,
        threshold=config.early_stop_threshold,
    )
    fingerprint = _fingerprint(config, source, chat, train_rows, val_rows, layout)
    resume = _to_resume(config.ckpt_out, fingerprint, context)
    trainable, parameters = model.get_nb_trainable_parameters()
    start = {
        "event": "start",
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "base_model": config.student_base,
        "total_steps": trainer.total_steps(loop),
        "train_rows": len(train_rows),
        "val_rows": len(val_rows),
        "trained_tokens": sum(example.tokens.trained for example in train_rows),
        "parameters": parameters,
        "trainable_parameters": trainable,
        "device": placement.device,
        "layout": asdict(layout),
        "settings": _shaping(config),
    }
    context.print(
        f"{config.student_base}: {parameters:,} parameters, {trainable:,} of them trained, on {placement.device} · "
        f"{len(train_rows):,} rows to train on, {len(val_rows):,} to check · "
        f"{start['trained_tokens']:,} trained tokens an epoch"
    )
    context.print(str(layout))
    context.log.info("start %s", json.dumps(start, ensure_ascii=False))
    points = trainer.Points(context.log_path(".metrics.jsonl"), resume.metrics if resume else [start])
    outcome = trainer.train(
        model,
        (train_rows, val_rows),
        settings=loop,
        placement=placement,
        folder=config.ckpt_out,
        pad=chat.pad,
        points=points,
        fingerprint=fingerprint,
        resume=resume,
        progress=lambda total, done: context.progress(total, "steps", done=done),
    )
    ended = {
        "event": "end",
        **{key: value for key, value in asdict(outcome).items() if key != "adapter"},
    }
    points.add(ended)
    context.log.info("end %s", json.dumps(ended))
    if _is_first_process():
        _finish(config, config.ckpt_out, outcome, chat, train_rows, val_rows)
    return Result(
        counts={
            "train_rows": len(train_rows),
            "val_rows": len(val_rows),
            "steps": outcome.steps,
            "best_step": outcome.best_step,
            "best_eval_loss": outcome.best_eval_loss,
        },
        summary=_summary(outcome),
    )


def _examples(
    config: TrainConfig, context: Context, split: dict[Split, list[Row]], chat: Chat
) -> tuple[list[Example], list[Example]]:
    """What is trained and checked on, guarded, measured and shown in the log (or on the terminal)."""
    from mtgdm.student import examples

    encoded = {name: examples.encode_rows(split[name], chat) for name in ("train", "val")}
    table = examples.length_table(encoded)
    lines = [
        "  ".join(cells) for cells in ([column.lstrip("#") for column in examples.LENGTH_COLUMNS], *table)
    ]
    preview = [*examples.shown(encoded["train"][:_SHOWN_ROWS], chat)]
    context.log.info("lengths in tokens, then rows token by token:\n%s", "\n".join([*lines, *preview]))
    too_long = any(example.length > config.max_len for found in encoded.values() for example in found)
    if config.preview:
        for line in preview:
            context.print(line)
    if config.preview or (too_long and config.too_long == "error"):
        context.terminal.table(examples.LENGTH_COLUMNS, table, title="tokens a row")
    # Named together, so that the error counts the rows of both.
    everything = encoded["train"] + encoded["val"]
    fitted = examples.fit(everything, config.max_len, config.too_long)
    if fitted.dropped or fitted.truncated:
        context.warn(
            f"rows longer than --max-len {config.max_len:,}: {fitted.dropped:,} left out, {fitted.truncated:,} cut "
            f"(of {len(everything):,})"
        )
    of_train = {example.row.id for example in encoded["train"]}
    train = [example for example in fitted.examples if example.row.id in of_train]
    if not train:
        raise UserError("every row is longer than --max-len", where=config.in_, hint="a larger --max-len")
    return train, [example for example in fitted.examples if example.row.id not in of_train]


def _layouts(config: TrainConfig, train: Sequence[Example]) -> tuple[Layout, Layout]:
    """The rows in padded batches and in bins."""
    from mtgdm.student import packing

    lengths = [example.length for example in train]
    batch, grad_accum, seed = config.batch, config.grad_accum, config.seed
    return (
        packing.padded(lengths, batch=batch, grad_accum=grad_accum, seed=seed),
        packing.packed(lengths, batch=batch, grad_accum=grad_accum, max_len=config.max_len, seed=seed),
    )


def _layout(
    config: TrainConfig,
    context: Context,
    train: Sequence[Example],
    model: PeftModel,
    placement: Placement,
) -> Layout:
    """The layout asked for, or the faster one; bins only where the model keeps their rows apart."""
    from mtgdm.student import packing

    padded, packed = _layouts(config, train)
    pack = config.packing
    if pack is None:
        pack = packing.pays(padded, packed, on_cpu=placement.on_cpu)
    if not pack:
        return padded
    if packing.keeps_rows_apart(model, placement):
        return packed
    if config.packing:
        raise UserError(
            f"the attention of {config.student_base} lets packed rows see one another",
            where="--packing",
            hint="--no-packing: rows of like length share a batch",
        )
    context.print(f"no packing: the attention of {config.student_base} would let packed rows see one another")
    return padded


def _shaping(config: TrainConfig) -> dict[str, Any]:
    """The settings that shape the result."""
    skipped = {"in_", "ckpt_out", "save_steps", "logging_steps", "keep_checkpoints", "preview"}
    return config.model_dump(mode="json", exclude=skipped)


def _fingerprint(
    config: TrainConfig,
    source: str,
    chat: Chat,
    train: Sequence[Example],
    val: Sequence[Example],
    layout: Layout,
) -> str:
    """One hash over everything a resumed run must share with the one that was interrupted."""
    folder = Path(source)
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    return settings_digest(
        {
            "settings": _shaping(config),
            "layout": asdict(layout),
            "base": [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files],
            "template": chat.fingerprint,
            "train": [settings_digest({"messages": example.row.messages}) for example in train],
            "val": [settings_digest({"messages": example.row.messages}) for example in val],
            "processes": os.environ.get("WORLD_SIZE", "1"),
        }
    )


def _to_resume(folder: Path, fingerprint: str, context: Context) -> WholeCheckpoint | None:
    """The newest whole checkpoint of this very run; those of other settings or rows are deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = whole_checkpoints(folder)
    mine = [checkpoint for checkpoint in whole if checkpoint.mark.fingerprint == fingerprint]
    gone = remove_checkpoints(folder, keep=frozenset(checkpoint.path for checkpoint in mine))
    if gone and len(mine) < len(whole):
        context.print("the settings, the rows or the base changed since the interrupted run: starting anew")
    if not mine:
        return None
    newest = mine[-1]
    context.print(
        f"going on from step {newest.mark.step:,} of {newest.mark.total_steps:,} ({newest.path.name})"
    )
    return newest


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


# --- the end -------------------------------------------------------------------------------------


def _finish(
    config: TrainConfig,
    folder: Path,
    outcome: Outcome,
    chat: Chat,
    train: Sequence[Example],
    val: Sequence[Example],
) -> None:
    """Put the finished adapter into its folder, then remove what only a resumed run needs.

    Everything is made beside first. `adapter_config.json` goes first and comes last: while it is
    missing, the folder is no adapter to anybody.
    """
    beside = folder / "checkpoint-final"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    adapter = json.loads((outcome.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    # PEFT writes the place where the base lay on this machine; the name is what others can use.
    adapter["base_model_name_or_path"] = config.student_base
    # A set, whose order differs from process to process: the same training shall make the same file.
    adapter["target_modules"] = sorted(adapter["target_modules"])
    shutil.copyfile(outcome.adapter / "adapter_model.safetensors", beside / "adapter_model.safetensors")
    chat.tokenizer.save_pretrained(str(beside))
    training = {
        "base_model": config.student_base,
        "settings": _shaping(config),
        "template_fingerprint": chat.fingerprint,
        "max_len": config.max_len,
        "train_rows": len(train),
        "val_rows": len(val),
        "trained_tokens": sum(example.tokens.trained for example in train),
        "steps": outcome.steps,
        "best_step": outcome.best_step,
        "best_eval_loss": outcome.best_eval_loss,
        "first_eval_loss": outcome.first_eval_loss,
        "stopped_early": outcome.stopped_early,
        "train_spots": sorted({example.row.spot for example in train if example.row.spot is not None}),
        "train_ids_without_spot": sorted({example.row.id for example in train if example.row.spot is None}),
    }
    _write_json(beside / "training.json", training)
    _write_json(beside / "adapter_config.json", adapter)
    rows.manifest_path(folder).unlink(missing_ok=True)
    last = "adapter_config.json"
    (folder / last).unlink(missing_ok=True)
    made = {path.name for path in beside.iterdir()}
    for name in [*sorted(made - {last}), last]:
        (beside / name).replace(folder / name)
    rows.sync_folder(folder)
    beside.rmdir()
    if not config.keep_checkpoints:
        remove_checkpoints(folder)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def _summary(outcome: Outcome) -> str:
    if outcome.best_eval_loss is None:
        return f"{outcome.steps:,} steps in {outcome.seconds:,.0f} s, not checked on val"
    start = "" if outcome.first_eval_loss is None else f"{outcome.first_eval_loss:.3f} → "
    early = ", stopped early" if outcome.stopped_early else ""
    return (
        f"{outcome.steps:,} steps in {outcome.seconds:,.0f} s{early} · loss on val {start}{outcome.best_eval_loss:.3f} "
        f"at step {outcome.best_step:,}"
    )
