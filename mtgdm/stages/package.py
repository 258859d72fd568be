"""A checkpoint made into what others run: adapter, merged model, model card, checksums."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mtgdm import __version__, rows
from mtgdm.checkpoints import chosen_checkpoint, newest_checkpoint, template_fingerprint
from mtgdm.errors import SettingError, UserError
from mtgdm.evaluation.training import Training
from mtgdm.stage import Context, Input, Result, StageConfig, newest, stage

if TYPE_CHECKING:
    from mtgdm.export.merge import Merged

_ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "training.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_REPORTS = "eval-report-*.json"


class PackageConfig(StageConfig):
    """Settings of `mtgdm package`."""

    model: Path | None = None
    """The checkpoint; by default the newest finished one."""
    checkpoints: Path = Path("data/checkpoints")
    """Where checkpoints lie."""
    out: Path = Path("data/export")
    """The package goes into a folder of the student's name under this one."""
    name: str = ""
    """The student's name; by default made from the checkpoint and the domain."""
    formats: tuple[Literal["adapter", "merged", "gguf"], ...] = ("adapter", "merged")
    """What to make: adapter, merged."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Numbers of the merged model; auto takes those the base is stored in."""
    report_dir: Annotated[Path, Input(newest=_REPORTS, optional=True)] = Path("data/report")
    """The newest eval report here goes into the model card."""

    def inputs(self) -> list[Path]:
        """The checkpoint and the report that the card quotes."""
        checkpoint = self.model or newest_checkpoint(self.checkpoints)
        return [checkpoint or self.checkpoints, *super().inputs()]

    def outputs(self) -> list[Path]:
        """The student's folder."""
        checkpoint = self.model or newest_checkpoint(self.checkpoints)
        return [self.out / self.student(checkpoint)] if checkpoint else [self.out / "*"]

    def student(self, checkpoint: Path) -> str:
        """The student's name."""
        return self.name or checkpoint.name.removesuffix("-lora") + "-student"


@stage
def run(config: PackageConfig, context: Context) -> Result:
    """Package the checkpoint: adapter, merged model, model card, checksums."""
    if "gguf" in config.formats:
        raise SettingError("this version of mtgdm does not write GGUF yet", hint="--formats adapter,merged")
    if not config.formats:
        raise SettingError("`formats` names nothing to make", hint="--formats adapter,merged")
    checkpoint = Path(chosen_checkpoint(str(config.model) if config.model else None, config.checkpoints))
    training = _training(checkpoint)
    _check_template(checkpoint)
    target = config.out / config.student(checkpoint)
    with rows.replace_folder(target) as folder, context.progress(len(config.formats), "formats") as bar:
        merged = None
        if "adapter" in config.formats:
            _copy_adapter(checkpoint, folder / "adapter")
            bar.advance()
        if "merged" in config.formats:
            bar.note("merging")
            merged = _merge(checkpoint, str(training["base_model"]), config, context, folder / "merged")
            bar.advance()
        _write_card(config, context, training, merged, target.name, folder / "README.md")
        _write_checksums(folder)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    counts: dict[str, Any] = {"formats": list(config.formats), "bytes": size}
    if merged:
        counts["max_logit_difference"] = merged.max_logit_difference
        counts["top1_agreement"] = merged.top1_agreement
    return Result(
        counts=counts,
        summary=f"{target.name}: {', '.join(config.formats)}, {size / 1e6:,.1f} MB"
        + (
            f" · merged = base + adapter within {merged.max_logit_difference:.0e}"
            if merged and merged.max_logit_difference is not None
            else ""
        ),
    )


def _training(checkpoint: Path) -> dict[str, Any]:
    if not (checkpoint / "adapter_config.json").is_file():
        raise UserError("this is no finished checkpoint: adapter_config.json is missing", where=checkpoint)
    path = checkpoint / "training.json"
    if not path.is_file():
        adapter = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
        return {"base_model": adapter["base_model_name_or_path"]}
    training: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return training


def _check_template(checkpoint: Path) -> None:
    """UserError where the template beside the adapter is not the one of its training."""
    training, path = Training.of(checkpoint), checkpoint / "chat_template.jinja"
    if training is not None and path.is_file():
        training.check_template(template_fingerprint(path.read_bytes().decode("utf-8")))


def _copy_adapter(checkpoint: Path, folder: Path) -> None:
    folder.mkdir()
    for name in _ADAPTER_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)


def _merge(
    checkpoint: Path, base_model: str, config: PackageConfig, context: Context, folder: Path
) -> Merged:
    from mtgdm.student.installed import TRAINING, require

    require(*TRAINING)
    from mtgdm.student.noise import quiet

    with quiet():
        from mtgdm.export.merge import merge
        from mtgdm.student.base import check_folder, load_tokenizer, locate

        check_folder(str(checkpoint))
        tokenizer = load_tokenizer(str(checkpoint), checkpoint.name)
        base = locate(base_model, context.workspace)
        merged = merge(checkpoint, base, base_model, tokenizer, config.dtype, folder)
    context.log.info("merged: %s", merged)
    return merged


def _write_card(
    config: PackageConfig,
    context: Context,
    training: dict[str, Any],
    merged: Merged | None,
    student: str,
    path: Path,
) -> None:
    from mtgdm.export.card import Card

    report = newest(config.report_dir, _REPORTS)
    card = Card(
        student=student,
        domain=context.domain_name,
        base_model=str(training["base_model"]),
        training=training,
        formats=config.formats,
        merged=merged,
        report=json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None,
        version=__version__,
    )
    path.write_text(card.text(), encoding="utf-8", newline="\n")


def _write_checksums(folder: Path) -> None:
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                lines.append(
                    f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(folder).as_posix()}\n"
                )
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8", newline="\n")
