"""What models and checkpoints are called, where checkpoints lie, and which one is meant when nobody says."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path, PureWindowsPath
from typing import Any

from mtgdm.errors import UserError
from mtgdm.manifest import sha256_of
from mtgdm.rows import manifest_path, sync_folder

ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
FINAL = "checkpoint-final"
"""Where a finished adapter is made, inside the folder into which it moves."""

_TOKENIZER_FILES = (
    "added_tokens.json",
    "additional_chat_templates",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
_HUB_LINK = re.compile(r"^(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/", re.IGNORECASE)
_OLLAMA_TAG = re.compile(
    r"(?P<family>[\w.]+):(?P<size>\d[\d.]*b)(?P<kind>(?:-(?:instruct|base|coder))*)(?:-(?:q\d\w*|fp16))?",
    re.IGNORECASE,
)
_QUANTIZED = re.compile(r"(?:-unsloth)?-bnb-4bit$", re.IGNORECASE)
_BESIDE_WEIGHTS = ("config.json", "generation_config.json", "tokenizer.json", "adapter_config.json")
_WHOLE_BYTES = 64 * 2**20
_PIECES, _PIECE_BYTES = 256, 4096
_SIZE = re.compile(r"a?\d[\d.]*b", re.IGNORECASE)
_OWNERS = {
    "qwen": "Qwen",
    "llama": "meta-llama",
    "mistral": "mistralai",
    "gemma": "google",
    "phi": "microsoft",
}
"""Who publishes the families on the Hub, by how their names begin."""


def hub_id(name: str) -> str:
    """The Hub id that a sloppily written name stands for.

    A link, a name without its owner and an Ollama tag are understood: `Qwen2.5-3B-Instruct`,
    `qwen2.5:3b-instruct-q4_K_M` and `huggingface.co/Qwen/Qwen2.5-3B-Instruct` are `Qwen/Qwen2.5-3B-Instruct`. What
    can only be a path stays as it is.
    """
    if name.startswith((".", "/", "~")) or PureWindowsPath(name).is_absolute():
        return name
    plain = name.strip().strip("\"'").replace("\\", "/").strip("/")
    if link := _HUB_LINK.match(plain):
        plain = "/".join(plain[link.end() :].split("?")[0].split("/")[:2])
    if tag := _OLLAMA_TAG.fullmatch(plain):
        # Ollama's Qwen2.5 without another word is the Instruct model; a later family has one model for both.
        kind = tag["kind"] or ("-instruct" if tag["family"].lower().startswith("qwen2") else "")
        plain = f"{tag['family']}-{tag['size']}{kind}"
    if "/" in plain:
        return plain
    owner = next((owner for start, owner in _OWNERS.items() if plain.lower().startswith(start)), None)
    if owner is None:
        return plain
    return f"{owner}/{_as_qwen_writes(plain) if owner == 'Qwen' else plain}"


def _as_qwen_writes(name: str) -> str:
    """`qwen2.5-3b-instruct` as it is published: the Hub takes either, a cache on this disk does not."""
    return "-".join(
        part.upper() if _SIZE.fullmatch(part) else part[:1].upper() + part[1:] for part in name.split("-")
    )


def full_precision(base_model: str) -> str | None:
    """The model that a quantized one was made from, by how unsloth names them; None where the name tells nothing."""
    plain = _QUANTIZED.sub("", base_model)
    return plain if plain != base_model else None


def checkpoint_name(base_model: str) -> str:
    """`Qwen/Qwen2.5-32B-Instruct` makes `qwen2.5-32b-lora`."""
    name = base_model.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].lower()
    for ending in ("-instruct", "-chat", "-it"):
        name = name.removesuffix(ending)
    return f"{name}-lora"


def main_template(template: Any) -> str | None:
    """The chat template that chats are rendered with, of one or of several named ones; None where there is none.

    transformers gives named ones as a mapping, tokenizer_config.json holds them as a list. Line ends are
    brought to `\\n`, which is what Jinja reads them as: on Windows and through git they come as `\\r\\n`.
    """
    if isinstance(template, list):
        template = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()), None)
    if not isinstance(template, str):
        return None
    return template.replace("\r\n", "\n").replace("\r", "\n")


def template_fingerprint(template: Any) -> str:
    """A short hash of a chat template in any of its forms: a student has to be asked by the one it was trained with."""
    # Jinja drops one line end at the end of a file, and editors add one.
    text = (main_template(template) or "").removesuffix("\n")
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def model_state(source: str) -> dict[str, str]:
    """A digest of each file that a model's answers hang on; a Hub id stands for itself as `hub`."""
    folder = Path(source)
    if not folder.is_dir():
        return {"hub": source}
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    files = [*weights, *(folder / name for name in _BESIDE_WEIGHTS)]
    return {path.name: _digest(path) for path in sorted(files) if path.is_file()}


def _digest(path: Path) -> str:
    """A digest of a file; of one with more than 64 MiB its size and 256 pieces of 4 KiB spread over it.

    Weights that were trained or merged anew differ nearly everywhere, and 60 GB are not read for that.
    """
    size = path.stat().st_size
    if size <= _WHOLE_BYTES:
        return sha256_of(path)
    digest = hashlib.sha256(str(size).encode("ascii"))
    with path.open("rb") as file:
        for piece in range(_PIECES):
            file.seek((size - _PIECE_BYTES) * piece // (_PIECES - 1))
            digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()


def json_object(path: Path) -> dict[str, Any]:
    """A JSON file of a model or a checkpoint; UserError where it cannot be read or holds no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"this file cannot be read: {error}", where=path) from error
    if not isinstance(value, dict):
        raise UserError(f"this file holds no JSON object but {type(value).__name__}", where=path)
    return value


def normalises(folder: Path) -> bool:
    """Whether the tokenizer of a folder brings texts into NFC, which llama.cpp leaves to who asks it."""
    path = folder / "tokenizer.json"
    return path.is_file() and '"NFC"' in json.dumps(json_object(path).get("normalizer"))


def settle(folder: Path) -> None:
    """Move a finished adapter from FINAL into its folder, be it one that a kill left there.

    `adapter_config.json` goes first and comes last: meanwhile the folder is no adapter to anybody. Whoever opens a
    checkpoint calls this, so that a kill at any moment leaves the old adapter or the new one.
    """
    made = folder / FINAL
    if not (made / ADAPTER_CONFIG).is_file():
        return
    manifest_path(folder).unlink(missing_ok=True)
    (folder / ADAPTER_CONFIG).unlink(missing_ok=True)
    if (
        made / ADAPTER_FILE
    ).is_file():  # nothing is moved yet: files of an earlier tokenizer would be read too
        for name in _TOKENIZER_FILES:
            _remove(folder / name)
        _move(made / ADAPTER_FILE, folder)
    for child in sorted(made.iterdir()):
        if child.name != ADAPTER_CONFIG:
            _move(child, folder)
    _move(made / ADAPTER_CONFIG, folder)
    sync_folder(folder)
    made.rmdir()


def _move(path: Path, folder: Path) -> None:
    """Put a file or a folder in the place of what has its name there; a full folder cannot be renamed over."""
    target = folder / path.name
    if path.is_dir() or target.is_dir():
        _remove(target)
    path.replace(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of a folder that was completed last, or None."""
    if not folder.is_dir():
        return None
    complete = [child for child in folder.iterdir() if child.is_dir() and manifest_path(child).is_file()]
    return max(complete, key=lambda child: manifest_path(child).stat().st_mtime_ns, default=None)


def chosen_checkpoint(model: str | None, folder: Path) -> str:
    """`model` as given, else the newest checkpoint of `folder`; UserError where there is none."""
    if model is not None:
        settle(Path(model))
        return model
    found = newest_checkpoint(folder)
    if found is None:
        raise UserError(
            "there is no finished checkpoint",
            where=folder,
            hint="run `mtgdm train`, or name one with --model",
        )
    return str(found)
