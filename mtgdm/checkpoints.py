"""Where checkpoints lie and which one is meant when nobody says."""

from __future__ import annotations

from pathlib import Path

from mtgdm.errors import UserError
from mtgdm.rows import manifest_path


def checkpoint_name(base_model: str) -> str:
    """`Qwen/Qwen2.5-32B-Instruct` makes `qwen2.5-32b-lora`."""
    name = base_model.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].lower()
    for ending in ("-instruct", "-chat", "-it"):
        name = name.removesuffix(ending)
    return f"{name}-lora"


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of a folder that was completed last, or None."""
    if not folder.is_dir():
        return None
    complete = [child for child in folder.iterdir() if child.is_dir() and manifest_path(child).is_file()]
    return max(complete, key=lambda child: manifest_path(child).stat().st_mtime_ns, default=None)


def chosen_checkpoint(model: str | None, folder: Path) -> str:
    """`model` as given, else the newest checkpoint of `folder`; UserError where there is none."""
    if model is not None:
        return model
    found = newest_checkpoint(folder)
    if found is None:
        raise UserError(
            "there is no finished checkpoint",
            where=folder,
            hint="run `mtgdm train`, or name one with --model",
        )
    return str(found)
