"""A checkpoint made into what others run: adapter, merged model, GGUF, Modelfile, model card, checksums."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import Field, PrivateAttr, field_validator

from mtgdm import __version__, manifest, rows
from mtgdm.checkpoints import chosen_checkpoint, model_state, newest_checkpoint
from mtgdm.errors import SettingError, UserError
from mtgdm.stage import Context, Flag, Input, Result, Runtime, StageConfig, stage

if TYPE_CHECKING:
    from mtgdm.export.build import Order
    from mtgdm.export.modelfile import Modelfile
    from mtgdm.export.ollama import OllamaServer
    from mtgdm.export.trained import Trained

Format = Literal["adapter", "merged", "gguf", "gguf-adapter"]
Quant = Literal["f32", "f16", "bf16", "q8_0", "q4_k_m", "q5_k_m", "q6_k"]

ALL: tuple[Format, ...] = ("adapter", "merged", "gguf")
"""What is made where nobody says."""
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)
"""What Windows takes for a device, whatever its ending."""
_BY_LLAMA_CPP = ("q4_k_m", "q5_k_m", "q6_k")
_OLLAMA_QUANTIZES = ("f16", "bf16", "f32")
_REPORTS = "eval-report-*.json"
_ROOM_TO_SPARE = 1.05


class PackageConfig(StageConfig):
    """Settings of `mtgdm package`."""

    _workspace: Path = PrivateAttr(Path())

    model: Path | None = None
    """The checkpoint; by default the newest finished one."""
    checkpoints: Path = Path("data/checkpoints")
    """Where checkpoints lie."""
    base_model: str | None = None
    """Where the base lies now, if not where the checkpoint says; the card names it as the training did."""
    out: Path = Path("data/export")
    """The package goes into a folder of the student's name under this one."""
    name: str = Field("", pattern=r"^(\w[\w.-]*)?$")
    """The student's name; by default made from the checkpoint."""
    formats: tuple[Format, ...] | None = None
    """What to make, of adapter, merged, gguf, gguf-adapter; by default the first three, less GGUF where the base does
    not allow it."""
    quantize: tuple[Quant, ...] = Field(("q8_0",), min_length=1)
    """Types of the GGUF files: f32, f16, bf16, q8_0, and with the extra `llama` q4_k_m, q5_k_m, q6_k. The first one is
    that of the Modelfile."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Numbers of the merged model; auto takes those the base is stored in."""
    in_: Annotated[Path, Input(optional=True)] = Field(Path("data/teacher.jsonl"), alias="in")
    """The answered rows: those of the split `val` prove that a GGUF answers as the trained model."""
    report_dir: Path = Path("data/report")
    """The newest eval report of this student on the split test goes into the model card."""
    license: str = ""
    """The student's licence, as the Hub calls it; by default that of its base, where the base's card says it."""
    datasets: tuple[str, ...] = ()
    """Hub ids of data sets that belong to the student, for the model card."""
    overwrite: Annotated[bool, Runtime()] = False
    """Replace a package of which something would be lost (files edited, added, not asked for now, another student),
    and a model in Ollama that is another."""
    ollama_create: Annotated[str, Runtime()] = ""
    """Make a model of this name in an Ollama server, and ask it a row of `val`."""
    url: Annotated[str, Runtime(), Flag(also=("ollama_url",))] = "http://localhost:11434"
    """Where that server listens."""
    ollama_quantize: Annotated[Literal["q8_0", "q4_K_S", "q4_K_M"] | None, Runtime()] = None
    """Let Ollama quantize what it is given, which is f16, bf16 or f32 then: needs no llama.cpp here."""
    push: Annotated[str, Runtime()] = ""
    """A repository of the Hugging Face Hub, OWNER/NAME: list what would be uploaded there."""
    push_now: Annotated[bool, Runtime()] = False
    """Upload it, with the token of HF_TOKEN or `hf auth login`."""
    push_private: Annotated[bool, Runtime()] = True
    """Whether a repository that the upload has to make can be seen by its owner alone."""

    @field_validator("name")
    @classmethod
    def _as_every_system_allows(cls, name: str) -> str:
        """A folder of this name can be made on Windows too."""
        if name.endswith(".") or _DEVICE.fullmatch(name):
            raise ValueError("no folder can be called so on Windows")
        return name

    @field_validator("formats", mode="before")
    @classmethod
    def _in_one_order(cls, value: Any) -> Any:
        """`merged,adapter` asks for the same as `adapter,merged`."""
        known = get_args(Format)
        if not isinstance(value, list | tuple) or any(one not in known for one in value):
            return value
        return tuple(one for one in known if one in value)

    @field_validator("quantize", mode="before")
    @classmethod
    def _as_gguf_writes(cls, value: Any) -> Any:
        """`Q4_K_M` is as good as `q4_k_m`, and twice the same is once."""
        if not isinstance(value, list | tuple):
            return value
        return tuple(dict.fromkeys(one.lower() if isinstance(one, str) else one for one in value))

    def resolved(self, workspace: Path) -> Self:
        """The same settings with every path absolute."""
        absolute = super().resolved(workspace)
        absolute._workspace = workspace
        return absolute

    def inputs(self) -> list[Path]:
        """The checkpoint, the rows, and the report that the card quotes."""
        checkpoint = self.checkpoint
        report = self.report
        return [checkpoint or self.checkpoints, *super().inputs(), *([report] if report else [])]

    def outputs(self) -> list[Path]:
        """The student's folder."""
        checkpoint = self.checkpoint
        return [self.out / self.student(checkpoint)] if checkpoint else [self.out / "*"]

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that is meant, where there is one."""
        return self.model or newest_checkpoint(self.checkpoints)

    @property
    def report(self) -> Path | None:
        """The newest eval report of this checkpoint as it is now, on the split test."""
        checkpoint = self.checkpoint
        if checkpoint is None:
            return None
        found = (path for path in self.report_dir.glob(_REPORTS) if not rows.is_manifest(path))
        name = manifest.relative(checkpoint, self._workspace)
        return next((path for path in sorted(found, reverse=True) if _is_about(path, name, checkpoint)), None)

    def student(self, checkpoint: Path) -> str:
        """The student's name."""
        return self.name or checkpoint.name.removesuffix("-lora") + "-student"

    def estimate(self) -> dict[str, Any]:
        """Room on the disk by format, and whether llama.cpp is at hand."""
        from mtgdm.student.installed import INSTALL, TRAINING, missing

        checkpoint = self.checkpoint
        if checkpoint is None or not (checkpoint / "adapter_config.json").is_file():
            return {}
        if lacking := missing(*TRAINING):
            return {"not_counted": f"{' and '.join(lacking)} not installed: {INSTALL}"}
        from mtgdm.student.noise import quiet

        with quiet():
            try:
                return _expected(self, checkpoint)
            except UserError as error:
                return {"room_is_not_known": str(error)}


@stage
def run(config: PackageConfig, context: Context) -> Result:
    """Package the checkpoint: adapter, merged model, GGUF with its proof, Modelfile, model card, checksums."""
    _check_settings(config)
    checkpoint = Path(chosen_checkpoint(str(config.model) if config.model else None, config.checkpoints))
    from mtgdm.student.installed import TRAINING, require

    require(*TRAINING)
    from mtgdm.student.noise import quiet

    with quiet(), ExitStack() as held:
        from mtgdm.evaluation.training import Training
        from mtgdm.export import build, trained

        training = trained.read_training(checkpoint)
        student = trained.Trained.of(
            checkpoint, training, config.in_, context.workspace, base=config.base_model
        )
        if known := Training.of(checkpoint):
            known.check_chat(student.chat)
            known.check_base_state(
                model_state(student.source), otherwise=", or name its place: --base-model FOLDER"
            )
        formats = _formats(config, context, student)
        target = config.out / config.student(checkpoint)
        server = _server(config, student, held)
        _check_hub(config)
        order = _order(config, context, student, formats, target.name)
        about = _made_before(config, context, order, target)
        if about is None:
            room = _check_room(config, student, formats, target)
            about = build.build(order, student, context, target, room)
        if server is not None:
            _create_in_ollama(config, context, student, server, target)
        if config.push:
            _push(config, context, student, target, about["formats"])
        return _result(about, target)


# --- checked before any work ---------------------------------------------------------------------


def _check_settings(config: PackageConfig) -> None:
    if config.formats == ():
        raise SettingError("`formats` names nothing to make", hint=f"--formats {','.join(ALL)}")
    if config.ollama_create and config.formats is not None and "gguf" not in config.formats:
        raise SettingError(
            "Ollama is given a GGUF, and `formats` makes none", hint="--formats gguf, with --ollama-create"
        )
    from mtgdm.export.modelfile import is_ollama_name

    if config.ollama_create and not is_ollama_name(config.ollama_create):
        raise SettingError(
            f"Ollama takes no model of the name '{config.ollama_create}'",
            hint="MODEL or NAMESPACE/MODEL:TAG, of a-z 0-9 _ - . alone: --ollama-create guide:3b",
        )
    if config.ollama_quantize and not config.ollama_create:
        raise SettingError("--ollama-quantize says how, and not as what: name the model with --ollama-create")
    if config.ollama_quantize and _for_ollama(config) is None:
        raise SettingError(
            f"Ollama quantizes f16, bf16 and f32, and none is among --quantize {','.join(config.quantize)}",
            hint=f"--quantize f16 --ollama-quantize {config.ollama_quantize}",
        )
    if config.push_now and not config.push:
        raise SettingError("--push-now does not say where to", hint="--push OWNER/NAME --push-now")


def _for_ollama(config: PackageConfig) -> Quant | None:
    """The type of the GGUF that Ollama is given."""
    if config.ollama_quantize is None:
        return config.quantize[0]
    return next((quant for quant in config.quantize if quant in _OLLAMA_QUANTIZES), None)


def _formats(config: PackageConfig, context: Context, student: Trained) -> tuple[Format, ...]:
    """What to make; a GGUF that the base does not allow is refused where it was asked for, else left out."""
    from mtgdm.export import architectures, lora, lora_gguf, quantize

    formats = config.formats or ALL
    if formats == ("adapter",):
        return formats
    adapter = lora.read(student.checkpoint)  # refuses one that cannot be merged
    if "gguf-adapter" in formats and (problem := lora_gguf.adapter_problem(adapter, student.config)):
        raise UserError(
            f"{problem}, which a GGUF adapter cannot hold",
            where=student.checkpoint,
            hint="--formats gguf holds the same student whole",
        )
    if not any(one.startswith("gguf") for one in formats):
        return formats
    problems = architectures.problems(student.config, student.tokenizer_folder)
    if problems and (config.formats or config.ollama_create):
        raise UserError(
            f"{student.base_model} cannot be written as GGUF: {problems[0]}", hint="--formats adapter,merged"
        )
    if problems:
        context.warn(f"no GGUF: {problems[0]}")
        return tuple(one for one in formats if not one.startswith("gguf"))
    if "gguf" in formats and any(quant in _BY_LLAMA_CPP for quant in config.quantize):
        quantize.require()
    return formats


def _check_room(config: PackageConfig, student: Trained, formats: Sequence[Format], target: Path) -> float:
    """Bytes of the package and of what is made on the way; UserError where the disk is too small for them."""
    from mtgdm.export import disk, folder

    # What a killed run left is cleared away by this one.
    free = disk.free(config.out) + folder.size_of(target.with_name(f".{target.name}.tmp"))
    needed = _ROOM_TO_SPARE * sum(_room(config, student, formats).values())
    if needed > free:
        raise UserError(
            f"the package takes about {folder.in_words(round(needed))} while it is made, and "
            f"{folder.in_words(free)} are free",
            where=config.out,
            hint="make room, write elsewhere with --out, or make less: --formats gguf, one --quantize",
        )
    return needed


def _room(config: PackageConfig, student: Trained, formats: Sequence[Format]) -> dict[str, int]:
    """Bytes by format; what is needed while a GGUF is made stands as `on_the_way`."""
    from mtgdm.export import gguf
    from mtgdm.student import adapter_files

    adapter = adapter_files.weights_file(student.checkpoint).stat().st_size
    tokenizer = student.tokenizer_bytes
    sizes_of = {"adapter": adapter + tokenizer, "gguf-adapter": adapter}
    found: dict[str, int] = {name: size for name, size in sizes_of.items() if name in formats}
    if not {"merged", "gguf"} & set(formats):
        return found
    merged = student.merged_bytes(config.dtype) + tokenizer
    if "merged" in formats:
        found["merged"] = merged
    if "gguf" in formats:
        sizes: dict[str, int] = {
            quant: gguf.gguf_bytes(student.parameters, quant) for quant in config.quantize
        }
        most = max(gguf.room_needed(student.parameters, quant) - size for quant, size in sizes.items())
        found["gguf"] = sum(sizes.values()) + len(sizes) * tokenizer
        found["on_the_way"] = most + (0 if "merged" in formats else merged)
    return found


def _server(config: PackageConfig, student: Trained, held: ExitStack) -> OllamaServer | None:
    """The Ollama server that is to get the student, if one is; it is asked before hours of work, not after."""
    if not config.ollama_create:
        return None
    from mtgdm.export.ollama import OllamaServer

    server = held.enter_context(OllamaServer(config.url))
    server.check()
    if not config.overwrite:
        server.check_name(config.ollama_create, student.modelfile("", {}).request(), student.template)
    return server


def _check_hub(config: PackageConfig) -> None:
    if not config.push:
        return
    from mtgdm.export import hub

    hub.check_name(config.push)
    if config.push_now:
        hub.check_access(config.push)


def _made_before(
    config: PackageConfig, context: Context, order: Order, target: Path
) -> dict[str, Any] | None:
    """The provenance of a package that was made of the same; UserError where replacing another would lose work."""
    from mtgdm.export import folder

    there = folder.look(target)
    if there is None:
        return None
    as_ordered = there.is_usable and there.about["fingerprint"] == order.fingerprint
    if as_ordered and not (config.overwrite and there.by_hand):
        kept = ", and whole"
        if there.by_hand:
            kept = f"; kept as you left them, unlike {folder.CHECKSUMS}: {', '.join(sorted(there.by_hand))}"
        context.print(f"{manifest.relative(target, context.workspace)} is there already{kept}")
        return there.about
    if not config.overwrite and (lost := there.lost_to(order.makes, order.checkpoint)):
        raise UserError(
            f"a package lies here, and replacing it would lose: {', '.join(lost)}",
            where=target,
            hint="--name or --out make the new one elsewhere, --overwrite replaces this one",
        )
    return None


# --- the work ------------------------------------------------------------------------------------


def _order(
    config: PackageConfig, context: Context, student: Trained, formats: tuple[Format, ...], name: str
) -> Order:
    from mtgdm.export import quantize
    from mtgdm.export.build import Order
    from mtgdm.export.lineage import told

    licence = {"license": config.license} if config.license else student.licence
    order = Order(
        student=name,
        checkpoint=told(manifest.relative(student.checkpoint.resolve(), context.workspace.resolve())),
        formats=formats,
        quants=config.quantize,
        dtype=config.dtype,
        licence=licence,
        datasets=config.datasets,
        report=config.report,
    )
    inputs = [path for path in config.inputs() if path.exists()]
    known = [made.output for path in inputs if (made := manifest.read(path))]
    read = [manifest.state(path, context.workspace, known).sha256 for path in inputs]
    shaping = {
        **asdict(order),
        "report": None,  # among what was read
        "domain": context.domain_name,
        "mtgdm": __version__,
        "read": read,
        "base": [model_state(student.source), student.revision],
        "llama.cpp": quantize.is_installed(),  # which proves more
    }
    return replace(order, fingerprint=manifest.settings_digest(shaping))


def _expected(config: PackageConfig, checkpoint: Path) -> dict[str, Any]:
    """What `mtgdm plan` says: the room by format, on the way and in the end; time and memory of GGUF files."""
    from mtgdm.export import architectures, forecast, quantize, trained

    student = trained.Trained.of(
        checkpoint, trained.read_training(checkpoint), config.in_, config._workspace, base=config.base_model
    )
    formats, problems = (
        config.formats or ALL,
        architectures.problems(student.config, student.tokenizer_folder),
    )
    if problems:
        formats = tuple(one for one in formats if not one.startswith("gguf"))
    room = _room(config, student, formats)
    return {
        "parameters": student.parameters,
        "mib_of_disk": {name: max(1, round(size / 2**20)) for name, size in room.items()},
        **(forecast.forecast(student, config.quantize) if "gguf" in formats else {}),
        "gguf": f"not for this base: {problems[0]}" if problems else None,
        "llama.cpp": "at hand"
        if quantize.is_installed()
        else f"not installed, so no k-quants: {quantize.INSTALL}",
    }


def _create_in_ollama(
    config: PackageConfig, context: Context, student: Trained, server: OllamaServer, target: Path
) -> None:
    """Make the model in Ollama, ask it a row, and see that it read the prompt as the training would have."""
    from mtgdm.export import folder

    quant = _for_ollama(config)
    path = target / f"{target.name}-{quant}.gguf"
    licence = {"license": config.license} if config.license else student.licence
    modelfile = student.modelfile(path.name, licence)
    digest = folder.checksums(target)[path.name]
    server.create(
        config.ollama_create, path, digest, modelfile.request(), context, quantize=config.ollama_quantize
    )
    if not _renders_as_trained(config.ollama_create, student, modelfile, server):
        context.print(
            "this Ollama does not show the prompts it renders: they are compared by their length alone"
        )
        if modelfile.template_of_old is not None:
            old = modelfile.request() | {"template": modelfile.template_of_old}
            server.create(config.ollama_create, path, digest, old, context, quantize=config.ollama_quantize)
            context.warn(
                f"{config.ollama_create} got the TEMPLATE for an old Ollama: send texts without white space at "
                "their ends"
            )
    asked = student.question
    server.introduce(
        config.ollama_create, asked, len(student.chat.prompt(asked)), context, num_ctx=modelfile.num_ctx
    )


def _renders_as_trained(name: str, student: Trained, modelfile: Modelfile, server: OllamaServer) -> bool:
    """Whether a server shows the prompts it renders; UserError where one is not that of the training."""
    from mtgdm.evaluation import rendering

    for messages in student.chats_to_compare:
        # The server puts its own before a chat that brings no system text.
        led = [] if messages[0]["role"] == "system" or modelfile.system is None else [modelfile.system]
        meant = [*({"role": "system", "content": text} for text in led), *messages]
        for think in (None, False):
            rendered = server.rendered(name, messages, think)
            if rendered is None:
                return False
            asked = "" if think is None else " (asked with think: false)"
            rendering.check(student.chat, meant, rendered, f"{name} in Ollama", asked)
    return True


def _push(
    config: PackageConfig, context: Context, student: Trained, target: Path, formats: Sequence[str]
) -> None:
    """List what would go to the Hub; with --push-now send it."""
    from mtgdm.export import folder, hub
    from mtgdm.student.base import TINY

    files = hub.listing(target)
    context.terminal.table(["file", "#size"], [[name, folder.in_words(size)] for name, size in files])
    if not student.is_on_hub and student.base_name != TINY and "adapter" in formats:
        context.warn(
            f"the base, {student.base_name}, is in a folder of this machine: others have nothing of the adapter alone"
        )
    total = f"{len(files):,} files, {folder.in_words(folder.size_of(target))}"
    if not config.push_now:
        context.print(f"{total} would go to {config.push}: --push-now uploads them")
        return
    message = f"{target.name}, packaged with mtgdm {__version__}"
    address = hub.push(target, config.push, private=config.push_private, message=message)
    context.print(f"{total} are at {address}")


def _result(about: Mapping[str, Any], target: Path) -> Result:
    from mtgdm.export import folder

    size, merged = folder.size_of(target), about["merged"]
    proved = [file for file in about["files"] if file["proof"]]
    parts = [f"{target.name}: {', '.join(about['formats'])}, {folder.in_words(size)}"]
    if merged and merged["max_logit_difference"] is not None:
        parts.append(f"merged = base + adapter within {merged['max_logit_difference']:.0e}")
    parts += [_proof_in_words(file["quant"], file["proof"]) for file in proved]
    told = ("formats", "base_model", "base_revision", "files", "lineage")
    counts = {key: about[key] for key in told} | {"bytes": size}
    if merged:
        counts |= {key: merged[key] for key in ("max_logit_difference", "top1_agreement")}
    return Result(counts=counts, summary=" · ".join(parts))


def _proof_in_words(quant: str, proof: Mapping[str, Any]) -> str:
    if not proof["engine"]:
        return f"{quant} unproved: {proof['reason']}"
    return f"{quant}: mean KL {proof['mean_kl']:.0e}, same likeliest token at {proof['top1_agreement']:.1%}"


def _is_about(report: Path, name: str, checkpoint: Path) -> bool:
    """Whether a report is about this checkpoint on the split `test`, and not from before it was trained again."""
    try:
        value = json.loads(report.read_text(encoding="utf-8"))
        model, created = str(value["model"]), datetime.fromisoformat(value["created"]).astimezone()
    except (OSError, ValueError, KeyError, TypeError):
        return False
    made = manifest.read(checkpoint)
    return f"{model},".startswith(f"{name} on test,") and (made is None or created >= made.finished)
