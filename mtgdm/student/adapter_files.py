"""The folder of a LoRA adapter as PEFT and the tools on it write it: its tensors, and the vocabulary they are for."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from mtgdm.checkpoints import ADAPTER_FILE
from mtgdm.errors import UserError
from mtgdm.student.base import ADAPTER_WEIGHTS, adapter_config

T = TypeVar("T")

EMBEDDINGS, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_PREFIX = "base_model.model."
_DELTA = ".token_adapter.trainable_tokens_delta"
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer of its own: its vocabulary and its settings, not one of them alone."""
    return (folder / "tokenizer_config.json").is_file() and any(
        (folder / name).is_file() for name in _VOCABULARIES
    )


def weights_file(folder: Path) -> Path:
    """The file of an adapter's weights."""
    return next(
        (path for name in ADAPTER_WEIGHTS if (path := folder / name).is_file()), folder / ADAPTER_FILE
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, by their names in the file; UserError where it cannot be read."""
    path = weights_file(folder)
    if path.suffix == ".bin":
        return _read(path, _pickled)
    return _read(path, load_file)


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor; of a safetensors file no more than its table is read."""
    path = weights_file(folder)
    if path.suffix == ".bin":
        return {name: tuple(tensor.shape) for name, tensor in _read(path, _pickled).items()}
    return _read(path, _table)


def _table(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _pickled(path: Path) -> dict[str, torch.Tensor]:
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not all(isinstance(one, torch.Tensor) for one in found.values()):
        raise ValueError("it holds something else than tensors")
    return found


def _read(path: Path, reader: Callable[[Path], T]) -> T:
    try:
        return reader(path)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the adapter's weights cannot be read: {first}",
            where=path,
            hint="the file is not whole: copy the checkpoint anew"
            if path.suffix != ".bin"
            else "save it as safetensors where it was trained: PEFT's save_pretrained() does",
        ) from error


# --- names ---------------------------------------------------------------------------------------


def plain_name(key: str) -> str | None:
    """The tensor of the base that one of an adapter stands for; None of a copy of what the base had before."""
    name = key.removeprefix(_PREFIX)
    if ".original_module." in name:
        return None
    for wrapper in (".token_adapter.base_layer.", ".base_layer.", ".modules_to_save."):
        name = name.replace(wrapper, ".")
    return name


def tokens_of(key: str, config: Mapping[str, Any]) -> tuple[str, list[int]] | None:
    """The tensor and the rows that PEFT's trained tokens take the place of; None where `key` holds none."""
    module = key.removeprefix(_PREFIX)
    if not module.endswith(_DELTA):
        return None
    module = module.removesuffix(_DELTA)
    trained = config.get("trainable_token_indices") or []
    if isinstance(trained, dict):
        named = (rows for name, rows in trained.items() if module.endswith(name))
        # An output layer that is tied to the embeddings follows them.
        trained = next(named, next(iter(trained.values()), []))
    return f"{module}.weight", [int(row) for row in trained]


# --- the vocabulary ------------------------------------------------------------------------------


def vocabulary(folder: Path, base: int) -> int:
    """How many tokens the base of an adapter had in its training, where `base` is how many it has now.

    Another number means that the embeddings were resized for the training; the adapter holds them whole then.
    """
    whole, single = set(), [base]
    config = adapter_config(str(folder))
    for key, shape in shapes(folder).items():
        if trained := tokens_of(key, config):
            single += [row + 1 for row in trained[1]]
        elif plain_name(key) in (EMBEDDINGS, OUTPUT):
            whole.add(shape[0])
    return max(whole) if whole else max(single)


def check_vocabulary(folder: Path, base: int, base_name: str, *, tied: bool) -> int:
    """The same; UserError where the adapter lacks what was added to the vocabulary.

    `tied`: the output layer of the base is its embeddings.
    """
    rows = vocabulary(folder, base)
    if rows <= base:
        return rows
    config = adapter_config(str(folder))
    held = set()
    for key, shape in shapes(folder).items():
        if trained := tokens_of(key, config):
            if set(range(base, rows)) <= set(trained[1]):
                held.add(trained[0])
        elif (name := plain_name(key)) is not None and shape[0] == rows:
            held.add(name)
            if (
                tied and ".base_layer." in key
            ):  # the output layer is what lies under the adapter of the embeddings
                held.add(OUTPUT)
    if lacking := sorted({EMBEDDINGS, OUTPUT} - held):
        raise UserError(
            f"the vocabulary was extended for the training, from {base:,} tokens to {rows:,}, and the adapter does not "
            f"hold the new rows of {' and '.join(lacking)}",
            where=folder,
            hint=f"save the resized {base_name} beside it and name it with --base-model FOLDER, or train again with "
            "modules_to_save=['embed_tokens', 'lm_head']",
        )
    return rows
