"""A package made: adapter, merged model, GGUF files with their proof, Modelfile, card, checksums; whole, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtgdm import __version__, rows
from mtgdm.errors import UserError
from mtgdm.export import folder, gguf, lora_gguf, merge, parity
from mtgdm.export.card import Card, File, proof_cells
from mtgdm.export.lineage import lineage
from mtgdm.export.merge import Dtype, Merged
from mtgdm.export.modelfile import Modelfile
from mtgdm.export.trained import Trained
from mtgdm.stage import Context

_ADAPTER = "adapter_config.json"
_ADAPTER_FILES = (
    "adapter_model.safetensors",
    "training.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Order:
    """What to make."""

    student: str
    formats: tuple[str, ...]
    quants: tuple[str, ...]
    dtype: Dtype
    licence: Mapping[str, str]
    datasets: tuple[str, ...]
    report: Path | None
    fingerprint: str = ""
    """One hash over all that the package is made from."""


def build(order: Order, student: Trained, context: Context, target: Path) -> dict[str, Any]:
    """Fill the folder `target`, which stays as it was where anything fails; returns its provenance."""
    with rows.replace_folder(target) as made:
        if "adapter" in order.formats:
            _copy_adapter(student, made / "adapter")
        merged, files = _weights(order, student, context, made)
        whole = [file for file in files if file.quant in order.quants]
        modelfile = student.modelfile(whole[0].name, order.licence) if whole else None
        if modelfile is not None:
            _write(made / "Modelfile", modelfile.text())
        steps = lineage(student.checkpoint, context.workspace)
        card = _card(order, student, context, merged, files, modelfile, steps)
        _write(made / "README.md", card.text())
        about: dict[str, Any] = {
            "student": order.student,
            "fingerprint": order.fingerprint,
            "mtgdm": __version__,
            "base_model": student.base_model,
            "base_revision": student.revision,
            "formats": list(order.formats),
            "merged": asdict(merged) if merged else None,
            "files": [asdict(file) for file in files],
            "lineage": steps,
        }
        folder.write_provenance(made, about)
        folder.write_checksums(made)
    return about


def _weights(order: Order, student: Trained, context: Context, made: Path) -> tuple[Merged | None, list[File]]:
    """The merged model and the GGUF files; what is only needed on the way is gone in the end."""
    files: list[File] = []
    merged = None
    if {"merged", "gguf"} & set(order.formats):
        merged = _merged(order, student, context, made / "merged")
    if "gguf" in order.formats:
        for quant in order.quants:
            files.append(_gguf(order, student, context, made, quant))
    if "gguf-adapter" in order.formats:
        files.append(_gguf_adapter(order, student, made))
    if merged is not None and "merged" not in order.formats:
        shutil.rmtree(made / "merged")
        merged = None
    return merged, files
