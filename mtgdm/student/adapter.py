"""The adapter: how it is put on a base, and how the finished one takes its place in a checkpoint's folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import Linear
from transformers import PreTrainedModel, set_seed

from mtgdm import rows
from mtgdm.checkpoints import ADAPTER_CONFIG, ADAPTER_FILE, FINAL, settle
from mtgdm.errors import SettingError, UserError
from mtgdm.student.base import disk_errors
from mtgdm.student.chat import Chat


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


def with_adapter(model: PreTrainedModel, lora: LoraSettings, *, checkpointing: bool, seed: int) -> PeftModel:
    """The model with a fresh LoRA adapter, the only part that is trained."""
    set_seed(seed)
    # PEFT's own preparation of a 4-bit model would hold its embeddings and its output layer in float32, and with
    # them all that flows from layer to layer: gigabytes for a large vocabulary, where LoRA without 4-bit does not.
    if checkpointing:
        # The embeddings are frozen: without this no gradient would reach a checkpointed layer.
        model.enable_input_require_grads()  # type: ignore[no-untyped-call]
    model.config.use_cache = False
    return put_on(model, lora.config)


def put_on(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """The model with an adapter; UserError where it takes none, SettingError for targets that name no layer."""
    targets = config.target_modules if isinstance(config.target_modules, set | list) else []
    names = [name for name, _ in model.named_modules()]
    unknown = sorted(
        one for one in targets if not any(name == one or name.endswith(f".{one}") for name in names)
    )
    if unknown or not config.target_modules:
        linear = {
            name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, Linear)
        }
        raise SettingError(
            f"no layer of this model is called {', '.join(unknown) or 'so'}",
            where="--lora-targets",
            hint=f"all-linear alone, or of: {', '.join(sorted(linear))}",
        )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"no adapter can be put on this model: {error}", hint="--lora-targets all-linear"
        ) from error
    assert isinstance(adapted, PeftModel)
    return adapted


def finish(folder: Path, best: Path, chat: Chat, base_model: str, training: dict[str, Any]) -> None:
    """Put the adapter of the checkpoint `best` into `folder`, with its tokenizer and `training.json`.

    Everything is made beside first, `adapter_config.json` last of all: from then on a kill leaves the new adapter,
    which `checkpoints.settle` moves in, before that the old one.
    """
    beside = folder / FINAL
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    adapter = json.loads((best / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    # PEFT writes the place where the base lay on this machine; the name is what others can use.
    adapter["base_model_name_or_path"] = base_model
    # A set, whose order differs from process to process: the same training shall make the same file.
    adapter["target_modules"] = sorted(adapter["target_modules"])
    with disk_errors(folder):
        shutil.copyfile(best / ADAPTER_FILE, beside / ADAPTER_FILE)
        chat.tokenizer.save_pretrained(str(beside))
        _write_json(beside / "training.json", training)
        with rows.replace(beside / ADAPTER_CONFIG) as file:
            file.write(_as_json(adapter))
    settle(folder)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_bytes(_as_json(value))


def _as_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode("utf-8")
