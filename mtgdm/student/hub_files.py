"""The files of a model on the Hugging Face Hub: as they lie in its cache, or fetched into it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from mtgdm import network, remarks

Need = Literal["config", "tokenizer", "weights"]

ASK_TIMEOUT_S = 10.0
_BESIDE = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_PATTERNS: dict[Need, list[str]] = {
    "config": ["config.json"],
    "tokenizer": _BESIDE,
    "weights": [*_BESIDE, "model*.safetensors"],
}
_OLDER_WEIGHTS = ["pytorch_model*"]
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")


def cached(source: str, need: Need) -> Path | None:
    """The folder of the cache in which all that is needed of a model lies."""
    try:
        config = try_to_load_from_cache(source, "config.json")
    except HFValidationError:
        return None
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return folder if is_whole(folder, need) else None


def fetched(source: str, need: Need) -> Path:
    """The same; from the Hub where the cache does not hold all. Raises what the Hub's library raises."""
    if (folder := cached(source, need)) is not None:
        return folder
    network.check_hub()
    remarks.say(f"loading {source} from the Hugging Face Hub")
    folder = _download(source, _PATTERNS[need])
    if need == "weights" and not is_whole(folder, need):
        folder = _download(source, _OLDER_WEIGHTS)
        if not is_whole(folder, need):
            raise FileNotFoundError(f"the weights of {source} are not there")
    return folder


def _download(source: str, patterns: list[str]) -> Path:
    # Asked so, the Hub is tried once; the loaders of transformers would retry for half a minute, file by file.
    return Path(snapshot_download(source, allow_patterns=patterns, etag_timeout=ASK_TIMEOUT_S))


def is_whole(folder: Path, need: Need) -> bool:
    """Whether a folder holds all that is needed of a model."""
    if not (folder / "config.json").is_file():
        return False
    if need == "config":
        return True
    if need == "tokenizer":
        return _has_tokenizer(folder)
    return any(_has_all(folder / name) for name in _INDEXES) or any(
        (folder / name).is_file() for name in _SINGLE
    )


def _has_tokenizer(folder: Path) -> bool:
    """Whether the tokenizer lies there with its chat template, which may be a file of its own."""
    settings = folder / "tokenizer_config.json"
    vocabulary = any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    )
    if not vocabulary or not settings.is_file():
        return False
    return any((folder / name).is_file() for name in _TEMPLATES) or '"chat_template"' in settings.read_text(
        encoding="utf-8"
    )


def _has_all(index: Path) -> bool:
    """Whether every file that an index of weights names is there."""
    if not index.is_file():
        return False
    try:
        named: Iterable[str] = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError):
        return False
    return all((index.parent / name).is_file() for name in named)
