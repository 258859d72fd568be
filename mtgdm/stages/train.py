"""Teacher rows to a LoRA checkpoint: trained on `train`, checked on `val`, `test` never read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr

from mtgdm import processes, rows
from mtgdm.checkpoints import ADAPTER_CONFIG, checkpoint_name, hub_id, model_state, settle
from mtgdm.errors import UserError
from mtgdm.manifest import settings_digest
from mtgdm.rows import Row, Split
from mtgdm.stage import Context, Input, Output, Result, Runtime, StageConfig, expanded, stage
from mtgdm.student.installed import INSTALL, TRAINING
from mtgdm.student.resume import WholeCheckpoint, remove_checkpoints, whole_checkpoints

if TYPE_CHECKING:
    from peft import PeftModel

    from mtgdm.student.adapter import LoraSettings
    from mtgdm.student.base import Placement
    from mtgdm.student.chat import Chat
    from mtgdm.student.examples import Example
    from mtgdm.student.memory import Memory, Shape
    from mtgdm.student.packing import Item, Layout
    from mtgdm.student.trainer import LoopSettings, Outcome

CHECKPOINTS = Path("data/checkpoints")
CPU_PARAMETERS = 200_000_000
"""Beyond that many parameters training on a CPU is a matter of days, and has to be asked for."""

_SHOWN_ROWS = 3
_LONGER_ROWS = {
    "error": "stop the run: --too-long says what to do with them",
    "drop": "are left out",
    "truncate": "are cut",
}


class TrainConfig(StageConfig):
    """Settings of `mtgdm train`."""

    several_processes = True
    _workspace: Path = PrivateAttr(Path())

    in_: Annotated[Path, Input()] = Field(Path("data/teacher.jsonl"), alias="in")
    """The answered rows."""
    student_base: str = Field("Qwen/Qwen2.5-3B-Instruct", min_length=1)
    """The model to train: a Hub id, a folder, or `mtgdm-tiny`, the offline base that ships with mtgdm. A Hub link, an
    Ollama tag and a name without its owner are understood."""
    ckpt_out: Annotated[Path | None, Output()] = None
    """Folder of the checkpoint; by default data/checkpoints/ and the name of the base."""
    device_mode: Literal["cuda0", "auto", "cpu"] = "auto"
    """First GPU, what there is, or the CPU."""
    allow_cpu: Annotated[bool, Runtime()] = False
    """Train a model of more than 200 million parameters on the CPU where auto finds no GPU."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Numbers to compute in; auto takes bfloat16 on a GPU, float32 on a CPU. A CPU without bfloat16 keeps float32."""
    attention: Annotated[
        Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"], Runtime()
    ] = "auto"
    """How attention is computed; auto leaves it to transformers."""
    load_in_4bit: bool = False
    """QLoRA: hold the base in 4-bit NF4 with double quantisation."""
    bnb_compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Numbers that 4-bit weights are computed in."""
    gradient_checkpointing: Annotated[bool, Runtime()] = False
    """Compute activations twice to hold fewer: less memory, about a third slower."""
    lora_r: int = Field(16, ge=1)
    """Rank of the adapter."""
    lora_alpha: int = Field(32, ge=1)
    """Scale of the adapter; its weight is alpha / rank."""
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    """Dropout before the adapter."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Layers that get an adapter, by the end of their names."""
    lora_rslora: bool = False
    """Scale the adapter by alpha / sqrt(rank), which keeps high ranks learning."""
    lora_dora: bool = False
    """DoRA: train the size of each weight apart from its direction; slower, sometimes better at low ranks."""
    epochs: float = Field(3.0, gt=0, allow_inf_nan=False)
    """Passes over the rows."""
    max_steps: int = Field(0, ge=0)
    """Stop after so many steps, whatever the epochs; 0 goes by epochs."""
    lr: float = Field(2e-4, gt=0, allow_inf_nan=False)
    """Highest learning rate."""
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """How the learning rate falls."""
    warmup: float = Field(0.03, ge=0, allow_inf_nan=False)
    """Warm-up: a share of all steps below 1, else a number of steps."""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
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
    thoughts: Literal["auto", "keep", "drop"] = "auto"
    """Whether the student learns to write the thoughts that come with answers (`<think>` or `reasoning_content`): auto
    keeps them where every row has them, and stops where only some have."""
    val_ratio: float = Field(rows.VAL_RATIO, ge=0, lt=1)
    """Share of `val` among rows that carry no split of their own."""
    seed: int = Field(42, ge=0, lt=2**32)
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
    report_to: Annotated[tuple[str, ...], Runtime()] = ()
    """Send the metrics to trackers that are installed too: tensorboard, wandb, mlflow, or others transformers knows."""
    overwrite: Annotated[bool, Runtime()] = False
    """Train anew where this very training is finished, or under way."""
    package_check: Annotated[bool, Runtime()] = True
    """Warn before the training where this base cannot be packaged as GGUF."""
    preview: Annotated[bool, Runtime()] = False
    """Show three rows token by token with the loss mask and the lengths, and train nothing."""

    def resolved(self, workspace: Path) -> Self:
        """The same settings with every path absolute, the base named as the Hub does, the checkpoint's folder named."""
        base = self.student_base
        if not (workspace / expanded(Path(base))).is_dir():
            base = hub_id(base)
        named = self.model_copy(
            update={
                "student_base": base,
                "ckpt_out": self.ckpt_out or CHECKPOINTS / checkpoint_name(base),
            }
        )
        named._workspace = workspace
        return super(TrainConfig, named).resolved(workspace)

    def finished(self) -> tuple[int, int] | None:
        """Steps done and to do of an interrupted run."""
        whole = whole_checkpoints(self.ckpt_out) if self.ckpt_out else []
        whole = [one for one in whole if one.mark.fingerprint.startswith(_settings_digest(self))]
        return (whole[-1].mark.step, whole[-1].mark.total_steps) if whole else None

    def estimate(self) -> dict[str, Any]:
        """Tokens by the real lengths, steps, memory by term and disk; hours where this base was trained before."""
        from mtgdm.student.installed import missing

        if not self.in_.is_file():
            return {}
        if lacking := missing(*self.libraries):
            return {"not_counted": f"{' and '.join(lacking)} not installed: {INSTALL}"}
        from mtgdm.student.noise import quiet

        with quiet():
            return _expected(self)

    @property
    def libraries(self) -> tuple[str, ...]:
        """What training needs of the extra `train`."""
        return (*TRAINING, *(["bitsandbytes"] if self.load_in_4bit else []))

    @property
    def memory_savers(self) -> str:
        """The settings to change where memory runs out, the cheapest first."""
        same = [
            f"--batch 1 --grad-accum {self.batch * self.grad_accum}" if self.batch > 1 else "",
            "" if self.gradient_checkpointing else "--gradient-checkpointing",
        ]
        ways = [way for way in same if way]
        if ways:
            ways[-1] += " (this far the same training goes on)"
        ways += [] if self.load_in_4bit else ["--load-in-4bit"]
        return "; ".join([*ways, f"a --max-len below {self.max_len}", "a smaller --student-base"])


@stage
def run(config: TrainConfig, context: Context) -> Result:
    """Train the student: teacher rows in, a LoRA checkpoint out; goes on where it was interrupted."""
    from mtgdm.student.installed import require

    require(*config.libraries)
    if config.preview and not processes.is_first():
        return Result(outputs=[])
    from mtgdm.student.examples import decide_thoughts, read_splits

    split, thoughts = decide_thoughts(read_splits(config.in_, config.val_ratio), config.thoughts)
    from mtgdm.student.noise import quiet

    with quiet():
        if config.preview:
            return _preview(config, context, split, thoughts)
        from mtgdm.student import base, distributed

        placement = base.place(config.device_mode, config.precision)
        _refuse_attention(config, placement)
        with distributed.joined(placement):
            return _train(config, context, split, thoughts, placement)


# --- the run -------------------------------------------------------------------------------------


def _preview(
    config: TrainConfig, context: Context, split: Mapping[Split, Sequence[Row]], thoughts: bool
) -> Result:
    chat = _chat(config, thoughts)
    train_rows, _ = _examples(config, context, split, chat)
    for layout in _layouts(config, train_rows):
        context.print(str(layout))
    return Result(summary="preview: nothing was trained", outputs=[])


def _train(
    config: TrainConfig,
    context: Context,
    split: Mapping[Split, Sequence[Row]],
    thoughts: bool,
    placement: Placement,
) -> Result:
    from mtgdm.export import architectures
    from mtgdm.student import adapter, base, distributed, memory, trainer, watch

    assert config.ckpt_out is not None
    with distributed.first_alone():
        settle(config.ckpt_out)
    if not context.may_replace:
        _refuse_other(config, context, f"{_settings_digest(config)}-")  # before hours of loading
    source = base.locate(config.student_base, context.workspace)
    reporters = watch.reporters(
        config.report_to, context.workspace / "log" / "tensorboard" / context.timestamp
    )
    with distributed.first_alone():
        chat = _chat(config, thoughts)
        lora = _lora(config)
        about = base.load_config(source, config.student_base)
        shape = memory.shape_of(about, lora.config)
    _refuse_cpu(config, placement, shape)
    if config.package_check and processes.is_first():
        for problem in architectures.base_problems(about.to_dict(), chat.tokenizer):
            context.warn(f"{config.student_base} can be trained, but not packaged as GGUF: {problem}")
    train_rows, val_rows = _examples(config, context, split, chat)
    _refuse_unknown_tokens(config, [*train_rows, *val_rows], shape)
    if not val_rows:
        context.warn(
            f"no row of {config.in_.name} is in the split `val`: no eval loss, no early stop, the last step counts"
        )
    # PyTorch counts a GPU's memory for itself; of a CPU's only the peak of the whole process is known.
    held_before = memory.peak_bytes(placement.device) if placement.on_cpu else 0
    model = adapter.with_adapter(
        base.load_model(
            source,
            config.student_base,
            placement,
            load_in_4bit=config.load_in_4bit,
            compute_dtype=config.bnb_compute_dtype,
            attention=config.attention,
        ),
        lora,
        checkpointing=config.gradient_checkpointing,
        seed=config.seed,
    )
    layout = _layout(config, context, train_rows, model, placement)
    hungriest, expected = _memory(config, train_rows, layout, shape, on_cpu=placement.on_cpu)
    loop = _loop(config, layout, reporters, run_name=f"{config.ckpt_out.name}-{context.timestamp}")
    fingerprint = _fingerprint(config, source, chat, train_rows, val_rows, layout)
    done = distributed.from_first(_finished_already(config.ckpt_out, fingerprint))
    if done is not None and not config.overwrite:
        context.print("this very training is finished, and its adapter is there; --overwrite trains anew")
        return _result(done, peak_memory_mib=None)
    _refuse_other(config, context, fingerprint)
    if config.overwrite and processes.is_first():
        remove_checkpoints(config.ckpt_out)
    resume = distributed.from_first(
        _to_resume(config.ckpt_out, fingerprint, context) if processes.is_first() else None
    )
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
        "processes": processes.count(),
        "max_grad_norm": trainer.MAX_GRAD_NORM,
        "layout": asdict(layout),
        "expected_memory_mib": expected.in_mib() if expected else None,
        "settings": _shaping(config),
    }
    context.print(
        f"{config.student_base}: {parameters:,} parameters, {trainable:,} of them trained, on {placement.device} · "
        f"{len(train_rows):,} rows to train on, {len(val_rows):,} to check · "
        f"{start['trained_tokens']:,} trained tokens an epoch"
    )
    context.print(str(layout))
    chosen = config.epochs != TrainConfig.model_fields["epochs"].default
    if chosen and config.max_steps and config.max_steps != (of_epochs := layout.steps(config.epochs)):
        context.print(
            f"--max-steps {config.max_steps:,} decides, not --epochs {config.epochs:g} ({of_epochs:,} steps)"
        )
    if expected:
        context.print(f"memory, as expected: {expected}")
    context.log.info("start %s", json.dumps(start, ensure_ascii=False))
    metrics = context.log_path(".metrics.jsonl") if processes.is_first() else None
    points = watch.Points(metrics, resume.metrics if resume else [start])
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
        hungriest=hungriest,
        held_bytes=held_before,
        progress=lambda total, done: context.progress(total, "steps", done=done),
    )
    taken = memory.peak_bytes(placement.device) - held_before
    ended = {
        "event": "end",
        **{key: value for key, value in asdict(outcome).items() if key != "adapter"},
        "peak_memory_mib": round(taken / memory.MIB),
    }
    points.add(ended)
    context.log.info("end %s", json.dumps(ended))
    training = _training(config, chat, train_rows, val_rows, outcome) | {"fingerprint": fingerprint}
    if processes.is_first():
        adapter.finish(config.ckpt_out, outcome.adapter, chat, config.student_base, training)
        if not config.keep_checkpoints:
            remove_checkpoints(config.ckpt_out)
    return _result(training, peak_memory_mib=ended["peak_memory_mib"])


def _expected(config: TrainConfig) -> dict[str, Any]:
    """What `mtgdm plan` says of a run; where the base is not at hand, why nothing is known."""
    import torch

    from mtgdm.student import base, examples, forecast, memory, packing

    split, thoughts = examples.decide_thoughts(
        examples.read_splits(config.in_, config.val_ratio), config.thoughts
    )
    try:
        chat = _chat(config, thoughts)
        source = base.locate(config.student_base, config._workspace)
        shape = memory.shape_of(base.load_config(source, config.student_base), _lora(config).config)
    except UserError as error:
        counts = {f"{name}_rows": len(split[name]) for name in ("train", "val")}
        return {**counts, "tokens_and_memory_are_not_known": str(error)}
    train, val = (examples.encode_rows(split[name], chat) for name in ("train", "val"))
    too_long = sum(example.length > config.max_len for example in train)
    fitting = examples.fit(
        train, config.max_len, "drop" if config.too_long == "error" else config.too_long
    ).examples
    if not fitting:
        return {"train_rows": len(train), "rows_longer_than_max_len": too_long}
    small = shape is not None and shape.parameters <= CPU_PARAMETERS
    on_cpu = config.device_mode == "cpu" or (small and not torch.cuda.is_available())
    padded, packed = _layouts(config, fitting)
    pack = packing.pays(padded, packed, on_cpu=on_cpu) if config.packing is None else config.packing
    layout = packed if pack else padded
    return forecast.forecast(
        fitting,
        val,
        too_long={"rows_longer_than_max_len": too_long, "these_rows": _LONGER_ROWS[config.too_long]}
        if too_long
        else {},
        layout=layout,
        steps=config.max_steps or layout.steps(config.epochs),
        memory=_memory(config, fitting, layout, shape, on_cpu=on_cpu)[1],
        shape=shape,
        on_cpu=on_cpu,
        tokens_per_s=forecast.earlier_pace(
            config._workspace / "log",
            base_model=config.student_base,
            on_cpu=on_cpu,
            settings=_shaping(config),
        ),
    )


def _chat(config: TrainConfig, thoughts: bool) -> Chat:
    """The tokenizer of the base with the student's chat template."""
    from mtgdm.student import base
    from mtgdm.student.chat import Chat

    source = base.locate(config.student_base, config._workspace)
    if base.is_adapter(source):
        raise UserError(
            "--student-base is a LoRA adapter, not a model",
            where=source,
            hint=f"--student-base {base.base_of(source)}, which it was trained on",
        )
    return Chat(base.load_tokenizer(source, config.student_base), config.student_base, thoughts=thoughts)


def _lora(config: TrainConfig) -> LoraSettings:
    from mtgdm.student.adapter import LoraSettings

    return LoraSettings(
        rank=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        targets="all-linear" if config.lora_targets == ("all-linear",) else list(config.lora_targets),
        rslora=config.lora_rslora,
        dora=config.lora_dora,
    )


def _loop(config: TrainConfig, layout: Layout, reporters: tuple[str, ...], *, run_name: str) -> LoopSettings:
    from mtgdm.student.trainer import LoopSettings

    return LoopSettings(
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
        report_to=reporters,
        run_name=run_name,
        save_memory=config.memory_savers,
    )


def _refuse_unknown_tokens(config: TrainConfig, rows_: Sequence[Example], shape: Shape | None) -> None:
    """A tokenizer of another model would name tokens that the base has no embedding for."""
    largest = max(max(example.tokens.ids) for example in rows_)
    if shape is not None and largest >= shape.vocabulary:
        raise UserError(
            f"the tokenizer of {config.student_base} makes token {largest:,}, and the model knows {shape.vocabulary:,}",
            hint="tokenizer and weights of two models lie in one folder: fetch the model anew",
        )


def _refuse_attention(config: TrainConfig, placement: Placement) -> None:
    """Attention that is not there, or has no backward pass here."""
    if config.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        raise UserError(
            "flash-attn is not installed, and --attention flash_attention_2 needs it",
            hint="pip install flash-attn --no-build-isolation, or --attention sdpa",
        )
    if placement.on_cpu and config.attention in ("flash_attention_2", "flex_attention"):
        raise UserError(
            f"--attention {config.attention} cannot train on a CPU", hint="--attention auto, or a GPU"
        )


def _refuse_cpu(config: TrainConfig, placement: Placement, shape: Shape | None) -> None:
    """Nobody shall wait for days on a CPU because a driver is missing."""
    if not placement.on_cpu or config.device_mode == "cpu" or config.allow_cpu:
        return
    if shape is not None and shape.parameters > CPU_PARAMETERS:
        raise UserError(
            f"PyTorch sees no GPU, and {config.student_base} with {shape.parameters / 1e9:.1f} billion parameters "
            "would be trained on the CPU",
            hint="`nvidia-smi` and `mtgdm doctor` tell why no GPU is seen; --allow-cpu trains all the same",
        )


def _examples(
    config: TrainConfig, context: Context, split: Mapping[Split, Sequence[Row]], chat: Chat
) -> tuple[list[Example], list[Example]]:
    """What is trained and checked on, guarded, measured and shown in the log (or on the terminal)."""
    from mtgdm.student import examples

    splits: tuple[Split, ...] = ("train", "val")
    encoded: dict[str, list[Example]] = {name: examples.encode_rows(split[name], chat) for name in splits}
    for line in chat.decided:
        context.print(f"chat template: {line}")
    apart = [name for name in splits if len(encoded[name]) > len(split[name])]
    if apart:
        counts = ", ".join(
            f"{len(split[name]):,} rows of {name} make {len(encoded[name]):,}" for name in apart
        )
        context.print(f"each answer is an example of its own, behind the prompt that asks for it: {counts}")
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
    of_train = {id(example.row) for example in encoded["train"]}
    train = [example for example in fitted.examples if id(example.row) in of_train]
    if not train:
        raise UserError("every row is longer than --max-len", where=config.in_, hint="a larger --max-len")
    return train, [example for example in fitted.examples if id(example.row) not in of_train]


def _layouts(config: TrainConfig, train: Sequence[Example]) -> tuple[Layout, Layout]:
    """The rows in padded batches and in bins."""
    from mtgdm.student import packing

    lengths = [example.length for example in train]
    shared: dict[str, int] = {
        "batch": config.batch,
        "grad_accum": config.grad_accum,
        "seed": config.seed,
        "processes": processes.count(),
    }
    return packing.padded(lengths, **shared), packing.packed(lengths, max_len=config.max_len, **shared)


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


def _memory(
    config: TrainConfig, train: Sequence[Example], layout: Layout, shape: Shape | None, *, on_cpu: bool
) -> tuple[list[Item], Memory | None]:
    """The batch that asks for most memory, and what the run is expected to take; None for an unknown architecture."""
    from mtgdm.student import packing
    from mtgdm.student.memory import Demand

    narrow = config.precision != "float32" and not on_cpu
    demand = Demand(
        width=2 if narrow or (on_cpu and config.precision == "bfloat16") else 4,
        weight_bytes=2 if narrow else 4,
        four_bit=config.load_in_4bit,
        checkpointing=config.gradient_checkpointing,
        mask=0 if config.lora_dropout == 0 else 4 if on_cpu else 1,
        bin_tokens=layout.bin_tokens,
        processes=layout.processes,
    )

    def cost(positions: int, trained: int) -> int:
        return positions if shape is None else sum(demand.of_batch(shape, positions, trained))

    lengths = [example.length for example in train]
    trained = [example.tokens.trained for example in train]
    batch = packing.hungriest(lengths, trained, layout, config.seed, cost)
    if shape is None:
        return batch, None
    positions = len(batch) * max(sum(lengths[row] for row in item) for item in batch)
    return batch, demand.estimate(shape, positions, sum(trained[row] for item in batch for row in item))


def _shaping(config: TrainConfig) -> dict[str, Any]:
    """The settings that shape the result."""
    return config.model_dump(mode="json", exclude=_ABOUT_THE_RUN)


_ABOUT_THE_RUN = {
    "in_",
    "ckpt_out",
    "save_steps",
    "logging_steps",
    "keep_checkpoints",
    "overwrite",
    "preview",
    "package_check",
    "allow_cpu",
    "report_to",
}
"""Settings that change nothing about the result."""
_HOW_NOT_WHAT = {
    "batch",
    "grad_accum",
    "packing",
    "gradient_checkpointing",
    "attention",
    "device_mode",
    "thoughts",
}
"""Settings that say how a step is computed: which rows it takes stands in the layout, whether thoughts are trained in
the tokens of the rows and in the template."""


def _fingerprint(
    config: TrainConfig,
    source: str,
    chat: Chat,
    train: Sequence[Example],
    val: Sequence[Example],
    layout: Layout,
) -> str:
    """Hashes of the settings, and of everything else that a resumed run must share with the interrupted one."""
    rest = settings_digest(
        {
            "step": [layout.bin_tokens, layout.items_a_step],
            "base": model_state(source),
            "template": chat.fingerprint,
            "train": [settings_digest({"tokens": example.tokens.ids}) for example in train],
            "val": [settings_digest({"tokens": example.tokens.ids}) for example in val],
        }
    )
    return f"{_settings_digest(config)}-{rest}"


def _settings_digest(config: TrainConfig) -> str:
    """A hash of the settings that say what is learnt; how a step is computed may change under way."""
    return settings_digest(
        {key: value for key, value in _shaping(config).items() if key not in _HOW_NOT_WHAT}
    )[:16]


def _refuse_other(config: TrainConfig, context: Context, fingerprint: str) -> None:
    """UserError where a finished checkpoint of another training would be lost; `fingerprint` may be its first part."""
    from mtgdm.student import distributed

    assert config.ckpt_out is not None
    problem = distributed.from_first(_other_finished(config, fingerprint) if processes.is_first() else None)
    if problem is None or config.overwrite:
        return
    if context.may_replace:
        context.print(
            f"{problem}: it was made by this pipeline, and is replaced once the new one is finished"
        )
        return
    raise UserError(
        problem,
        where=config.ckpt_out,
        hint="--overwrite replaces it once the new one is finished; --ckpt-out FOLDER trains beside it",
    )


def _other_finished(config: TrainConfig, fingerprint: str) -> str | None:
    """What another finished training lies in the folder; None where none does, or where this one is under way."""
    assert config.ckpt_out is not None
    folder = config.ckpt_out
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    if any(one.mark.fingerprint.startswith(fingerprint) for one in whole_checkpoints(folder)):
        return None
    try:
        training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        if str(training["fingerprint"]).startswith(fingerprint):
            return None
        had = {"base": training["base_model"], **training["settings"]}
    except (OSError, ValueError, KeyError, TypeError):
        return "a finished adapter of another tool lies here"
    has = {"base": config.student_base, **_shaping(config)}
    others = [f"{key} {had[key]} → {has[key]}" for key in has if key in had and had[key] != has[key]]
    changed = ", ".join(others[:3]) or "other rows, or another base"
    return f"a finished checkpoint of another training lies here ({changed})"


def _to_resume(folder: Path, fingerprint: str, context: Context) -> WholeCheckpoint | None:
    """The newest whole checkpoint of this very run; those of other settings or rows are deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = whole_checkpoints(folder)
    mine = [one for one in whole if one.mark.fingerprint == fingerprint and one.is_usable]
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


def _training(
    config: TrainConfig,
    chat: Chat,
    train_rows: Sequence[Example],
    val_rows: Sequence[Example],
    outcome: Outcome,
) -> dict[str, Any]:
    """What a checkpoint knows of its training, for evaluation and package."""
    from mtgdm.student import base

    return {
        "base_model": config.student_base,
        "base_state": model_state(base.locate(config.student_base, config._workspace)),
        "settings": _shaping(config),
        "template_fingerprint": chat.fingerprint,
        "answer_start": chat.answer_start,
        "thoughts": chat.thoughts,
        "max_len": config.max_len,
        "train_rows": len(train_rows),
        "val_rows": len(val_rows),
        "trained_tokens": sum(example.tokens.trained for example in train_rows),
        "steps": outcome.steps,
        "best_step": outcome.best_step,
        "best_eval_loss": outcome.best_eval_loss,
        "first_eval_loss": outcome.first_eval_loss,
        "stopped_early": outcome.stopped_early,
        "seconds": round(outcome.seconds, 3),
        "train_spots": sorted({one.row.spot for one in train_rows if one.row.spot is not None}),
        "train_ids": sorted({one.row.id for one in train_rows}),
    }


def _finished_already(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """The training.json of this very training where it came to its end, be it killed before its manifest."""
    path = folder / "training.json"
    if not all((folder / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors")):
        return None
    try:
        training: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return training if training.get("fingerprint") == fingerprint else None


def _result(training: Mapping[str, Any], *, peak_memory_mib: int | None) -> Result:
    """What the end and the manifest tell of a training."""
    told = ("train_rows", "val_rows", "steps", "best_step", "best_eval_loss", "template_fingerprint")
    return Result(
        counts={**{key: training[key] for key in told}, "peak_memory_mib": peak_memory_mib},
        summary=_summary(training),
    )


def _summary(training: Mapping[str, Any]) -> str:
    took = f"{training['steps']:,} steps in {training['seconds']:,.0f} s"
    if training["best_eval_loss"] is None:
        return f"{took}, not checked on val"
    start = "" if training["first_eval_loss"] is None else f"{training['first_eval_loss']:.3f} → "
    early = ", stopped early" if training["stopped_early"] else ""
    return f"{took}{early} · loss on val {start}{training['best_eval_loss']:.3f} at step {training['best_step']:,}"
