"""A package made, whole or not at all: adapter, merged model, GGUF files with their proof, Modelfile, card, sums."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypedDict

from safetensors.torch import save_file

from mtgdm import __version__, rows
from mtgdm.checkpoints import ADAPTER_FILE
from mtgdm.errors import UserError
from mtgdm.export import disk, folder, gguf, lora, lora_gguf, merge, parity, readback
from mtgdm.export.card import ADAPTER, Card, File, proof_cells
from mtgdm.export.lineage import lineage
from mtgdm.export.merge import Dtype, Merged
from mtgdm.export.modelfile import Modelfile
from mtgdm.export.parity import Proof
from mtgdm.export.trained import Trained
from mtgdm.rows import Row
from mtgdm.stage import Context
from mtgdm.student import adapter_files

PROOF_ROWS = 3
"""So many rows at least a GGUF is compared on, as many of each prompt type."""

_ADAPTER_CONFIG, _TRAINING = "adapter_config.json", "training.json"
_TEMPLATE = "chat_template.jinja"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


@dataclass(frozen=True)
class Order:
    """What to make."""

    student: str
    checkpoint: str
    """As the package names what it was made of."""
    formats: tuple[str, ...]
    quants: tuple[str, ...]
    dtype: Dtype
    licence: Mapping[str, str]
    datasets: tuple[str, ...]
    report: Path | None
    fingerprint: str = ""
    """One hash over all that the package is made from."""

    @property
    def makes(self) -> set[str]:
        """The files and folders at the top of the package."""
        whole = [f"{self.student}-{quant}.gguf" for quant in self.quants] if "gguf" in self.formats else []
        lora = [f"{self.student}-adapter.gguf"] if "gguf-adapter" in self.formats else []
        folders = {"adapter", "merged"} & set(self.formats)
        modelfile = ["Modelfile"] if whole else []
        return {*folders, *whole, *lora, *modelfile, folder.CARD, folder.PROVENANCE, folder.CHECKSUMS}


def build(order: Order, student: Trained, context: Context, target: Path, room: float) -> dict[str, Any]:
    """Fill the folder `target`, which stays as it was where anything fails; returns its provenance.

    `room` is what it takes on the disk while it is made, in bytes, for the user who has not so much.
    """
    with disk.told_if_full(target, room), rows.replace_folder(target) as made:
        if "adapter" in order.formats:
            _copy_adapter(student, made / "adapter")
        merged, files = _weights(order, student, context, made)
        whole = [file for file in files if file.quant in order.quants]
        modelfile = student.modelfile(whole[0].name, order.licence) if whole else None
        if modelfile is not None:
            _write(made / "Modelfile", modelfile.text())
        card = _card(order, student, context, merged, files, modelfile)
        _write(made / folder.CARD, card.text())
        about: dict[str, Any] = {
            "student": order.student,
            "checkpoint": order.checkpoint,
            "fingerprint": order.fingerprint,
            "mtgdm": __version__,
            "base_model": student.base_name,
            "base_revision": student.revision,
            "formats": list(order.formats),
            "merged": asdict(merged) if merged else None,
            "files": [asdict(file) for file in files],
            "lineage": card.lineage,
        }
        folder.write_provenance(made, about)
        folder.write_checksums(made)
    return about


def _weights(
    order: Order, student: Trained, context: Context, made: Path
) -> tuple[Merged | None, list[File]]:
    """The merged model and the GGUF files; what is only needed on the way is gone in the end."""
    files = [_gguf_adapter(order, student, made)] if "gguf-adapter" in order.formats else []
    if not {"merged", "gguf"} & set(order.formats):
        return None, files
    folder_ = made / "merged"
    quants = order.quants if "gguf" in order.formats else ()
    with context.progress(student.merged_bytes(order.dtype) * (1 + 2 * len(quants)), "bytes") as bar:
        bar.note("merging")
        merged = merge.merge(
            student.checkpoint,
            student.source,
            student.base_model,
            student.chat,
            order.dtype,
            folder_,
            advance=bar.advance,
        )
        context.log.info("merged: %s", merged)
        written, compared = [], []
        about: _About = {"name": order.student, "template": student.template, "advance": bar.advance}
        for quant in quants:
            bar.note(f"writing {quant}")
            path = made / f"{order.student}-{quant}.gguf"
            written.append(gguf.convert(folder_, path, quant, **about))
            bar.note(f"reading {quant} back")
            compared.append(readback.check(path, folder_, quant, **about))
            context.log.info("%s, beside the merged model: %s", path.name, compared[-1])
    proofs = _proved([one.path for one in written], quants, merged, student, context, folder_)
    files[:0] = [
        File(one.path.name, quant, one.bytes, proof.as_dict(), weights.as_dict())
        for one, quant, proof, weights in zip(written, quants, proofs, compared, strict=True)
    ]
    if "merged" in order.formats:
        return merged, files
    shutil.rmtree(folder_)
    return None, files


class _About(TypedDict):
    """What a GGUF is written and read back with."""

    name: str
    template: str
    advance: Callable[[int], None]


def _gguf_adapter(order: Order, student: Trained, made: Path) -> File:
    path = made / f"{order.student}-adapter.gguf"
    written = lora_gguf.convert_adapter(student.checkpoint, student.config, path, name=order.student)
    return File(path.name, ADAPTER, written.bytes)


def _proved(
    paths: Sequence[Path],
    quants: Sequence[str],
    merged: Merged,
    student: Trained,
    context: Context,
    folder_: Path,
) -> list[Proof]:
    """How each GGUF compares with the trained model; UserError, and no package, where one is another model."""
    if not paths:
        return []
    chosen = proof_rows(student.rows)
    with context.progress(len(chosen) * (1 + len(paths)), "rows") as bar:
        proofs = parity.prove_all(
            paths,
            student.checkpoint,
            chosen,
            name=student.base_model,
            base=student.source,
            workspace=context.workspace,
            merged=folder_,
            advance=bar.advance,
            note=bar.note,
        )
    context.terminal.table(
        ["type", "compared by", "#tokens equal", "#mean KL", "#top-1", "#greedy equal"],
        [[quant, *proof_cells(proof.as_dict())] for quant, proof in zip(quants, proofs, strict=True)],
    )
    for path, proof in zip(paths, proofs, strict=True):
        context.log.info("%s: %s", path.name, proof)
        if proof.engine is None:
            context.warn(
                f"{path.name} is unproved, though its weights are those of the merged model: {proof.reason}"
            )
    _refuse_others(dict(zip(quants, proofs, strict=True)), paths, merged.dtype)
    return proofs


def _refuse_others(proofs: Mapping[str, Proof], paths: Sequence[Path], dtype: str) -> None:
    """UserError that names every file which is another model, and the types that are good."""
    failures = {quant: proof.failures(quant, dtype) for quant, proof in proofs.items()}
    found = [
        f"{path.name} does not answer as the trained model: {'; '.join(failures[quant])}"
        for path, quant in zip(paths, proofs, strict=True)
        if failures[quant]
    ]
    good = ",".join(quant for quant in proofs if not failures[quant])
    if found:
        raise UserError(
            ". ".join(found),
            hint="no package was made, an earlier one is as it was; "
            + (f"the rest is good: --quantize {good}" if good else "another type: --quantize f16"),
        )


def proof_rows(answered: Sequence[Row]) -> list[Row]:
    """The rows that a GGUF is proved on: the shortest of each prompt type, one of each type before a second."""
    by_type: dict[str | None, list[Row]] = {}
    for row in answered:
        by_type.setdefault(row.type, []).append(row)
    share = -(-PROOF_ROWS // max(1, len(by_type)))
    groups = [sorted(group, key=_characters)[:share] for group in by_type.values()]
    return [row for rank in zip_longest(*groups) for row in rank if row is not None]


def _characters(row: Row) -> int:
    return sum(len(message["content"]) for message in row.messages)


def _copy_adapter(student: Trained, folder_: Path) -> None:
    folder_.mkdir()
    weights = adapter_files.weights_file(student.checkpoint)
    if weights.suffix == ".bin":
        save_file(adapter_files.tensors(student.checkpoint), folder_ / ADAPTER_FILE)
    else:
        shutil.copyfile(weights, folder_ / ADAPTER_FILE)
    for name in _TOKENIZER_FILES:
        if (student.tokenizer_folder / name).is_file():
            shutil.copyfile(student.tokenizer_folder / name, folder_ / name)
    adapter = lora.config_of(student.checkpoint)
    if student.revision is not None and adapter.get("revision") is None:
        adapter["revision"] = student.revision  # of the base: another one would be another model
    adapter["base_model_name_or_path"] = student.base_name
    # An earlier mtgdm left the base's own in the checkpoint, which may think where the student was trained not to.
    _write(folder_ / _TEMPLATE, student.chat.template)
    if (student.checkpoint / _TRAINING).is_file():
        _write(folder_ / _TRAINING, json.dumps(student.training_to_tell, ensure_ascii=False, indent=2) + "\n")
    _write(folder_ / _ADAPTER_CONFIG, json.dumps(adapter, ensure_ascii=False, indent=2) + "\n")


def _card(
    order: Order,
    student: Trained,
    context: Context,
    merged: Merged | None,
    files: Sequence[File],
    modelfile: Modelfile | None,
) -> Card:
    return Card(
        student=order.student,
        domain=context.domain_name,
        languages=context.domain.languages,
        base_model=student.base_name,
        base_is_on_hub=student.is_on_hub,
        base_revision=student.revision,
        licence=order.licence,
        datasets=order.datasets,
        training=student.training_to_tell,
        formats=order.formats,
        merged=merged,
        files=files,
        proof_split=student.split,
        modelfile=modelfile,
        report=json.loads(order.report.read_text(encoding="utf-8")) if order.report else None,
        lineage=lineage(student.checkpoint, context.workspace),
        normalises=student.normalises,
        version=__version__,
    )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
