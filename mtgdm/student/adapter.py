"""The finished adapter: how it takes its place in the folder of a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mtgdm import rows
from mtgdm.student.chat import Chat

_LAST = "adapter_config.json"


def finish(folder: Path, best: Path, chat: Chat, base_model: str, training: dict[str, Any]) -> None:
    """Put the adapter of the checkpoint `best` into `folder`, with its tokenizer and `training.json`.

    Everything is made beside first. `adapter_config.json` goes first and comes last: while it is
    missing, the folder is no adapter to anybody.
    """
    beside = folder / "checkpoint-final"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    adapter = json.loads((best / _LAST).read_text(encoding="utf-8"))
    # PEFT writes the place where the base lay on this machine; the name is what others can use.
    adapter["base_model_name_or_path"] = base_model
    # A set, whose order differs from process to process: the same training shall make the same file.
    adapter["target_modules"] = sorted(adapter["target_modules"])
    shutil.copyfile(best / "adapter_model.safetensors", beside / "adapter_model.safetensors")
    chat.tokenizer.save_pretrained(str(beside))
    _write_json(beside / "training.json", training)
    _write_json(beside / _LAST, adapter)
    rows.manifest_path(folder).unlink(missing_ok=True)
    (folder / _LAST).unlink(missing_ok=True)
    made = {path.name for path in beside.iterdir()}
    for name in [*sorted(made - {_LAST}), _LAST]:
        (beside / name).replace(folder / name)
    rows.sync_folder(folder)
    beside.rmdir()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")
