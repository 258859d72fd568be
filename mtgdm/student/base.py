"""Where a model lies, on which device it runs, and loading it with errors a user can act on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # that of its HTTP library
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TokenizersBackend,
)

from mtgdm import network, processes
from mtgdm.checkpoints import ADAPTER_CONFIG, ADAPTER_FILE, hub_id, json_object, settle
from mtgdm.errors import SettingError, UserError
from mtgdm.stage import expanded
from mtgdm.student import hub_files
from mtgdm.student.installed import require

DeviceMode = Literal["cuda0", "auto", "cpu"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"]
ComputeDtype = Literal["bfloat16", "float16", "float32"]

TINY = "mtgdm-tiny"
"""The name of the base model that ships with mtgdm."""

ADAPTER_WEIGHTS = (ADAPTER_FILE, "adapter_model.bin")

_LFS = b"version https://git-lfs"
_SAVE_MEMORY = "--load-in-4bit, or a smaller model"


_DISK_IS_FULL = ("No space left", "inline_container", "PytorchStreamWriter")
"""How Python, torch.save and safetensors say it."""


@dataclass(frozen=True)
class Placement:
    """Where a model goes and in which numbers it computes."""

    device: str
    """`cpu`, `cuda:0`, or `auto`: spread over the GPUs there are."""
    weights: torch.dtype
    autocast: torch.dtype | None
    """Matrix products in this dtype over weights of a wider one; None computes in the weights' own."""

    @property
    def on_cpu(self) -> bool:
        """Whether no GPU is used."""
        return self.device == "cpu"


def place(mode: DeviceMode, precision: Precision = "auto") -> Placement:
    """The device of a mode, and the dtypes that suit it: bfloat16 on a GPU, float32 on a CPU.

    Of several processes each has a GPU of its own.
    """
    if mode == "cuda0" and not torch.cuda.is_available():
        raise UserError(
            "--device-mode cuda0 needs a CUDA GPU, and PyTorch sees none here",
            hint="--device-mode cpu, or auto; `nvidia-smi` and a CUDA build of torch tell why none is seen",
        )
    if mode == "cpu" or not torch.cuda.is_available():
        if precision == "float16":
            raise UserError("--precision float16 needs a GPU", hint="--precision bfloat16, or float32")
        narrow = precision == "bfloat16" and _multiplies_bfloat16()
        return Placement("cpu", torch.float32, torch.bfloat16 if narrow else None)
    if processes.count() > 1:
        if processes.local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"process {processes.local_rank()} of this machine has no GPU of its own: there are "
                f"{torch.cuda.device_count()}",
                hint="as many processes as GPUs: torchrun --nproc-per-node gpu",
            )
        device = f"cuda:{processes.local_rank()}"
    else:
        device = "cuda:0" if mode == "cuda0" or torch.cuda.device_count() == 1 else "auto"
    if precision == "float32":
        return Placement(device, torch.float32, None)
    wide = precision == "bfloat16" or (precision == "auto" and torch.cuda.is_bf16_supported())
    half = torch.bfloat16 if wide else torch.float16
    return Placement(device, half, half)


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16; without them it is eight times slower than float32."""
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in tests)


# --- where it lies -------------------------------------------------------------------------------


def locate(name: str, workspace: Path) -> str:
    """A folder where `name` is one (or the shipped base), else the Hub id it stands for."""
    if name == TINY:
        folder = Path(__file__).parent / "tiny_base"
        if not (folder / "config.json").is_file():
            raise UserError("the tiny base model is not in this installation", where=folder)
        return str(folder)
    folder = workspace / expanded(Path(name))
    if folder.is_dir():
        settle(folder)
        return str(folder)
    found = hub_id(name)
    if name.startswith((".", "/", "~")) or found.count("/") > 1 or Path(name).is_absolute():
        raise UserError("there is no such model folder", where=folder)
    return found


def is_adapter(source: str) -> bool:
    """Whether a folder holds a LoRA adapter rather than a model.

    axolotl puts the base's config.json beside its adapters: a model has weights of its own as well.
    """
    folder = Path(source)
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    if not (folder / "config.json").is_file():
        return True
    whole = any(folder.glob("model*.safetensors*")) or any(folder.glob("pytorch_model*.bin*"))
    return not whole and any((folder / name).is_file() for name in ADAPTER_WEIGHTS)


def adapter_config(adapter: str) -> dict[str, Any]:
    """The adapter_config.json of a folder; UserError where it is none of a LoRA adapter."""
    path = Path(adapter) / "adapter_config.json"
    value = json_object(path)
    kind, rank = value.get("peft_type"), value.get("r")
    if kind != "LORA" or not isinstance(rank, int) or rank < 1:
        found = f"its peft_type is {kind!r}" if kind != "LORA" else f"its rank `r` is {rank!r}"
        raise UserError(f"this is no LoRA adapter: {found}", where=path)
    if not any((Path(adapter) / name).is_file() for name in ADAPTER_WEIGHTS):
        raise UserError(
            f"the weights of the adapter are missing: {ADAPTER_WEIGHTS[0]}",
            where=adapter,
            hint="copy the whole checkpoint folder, or train it to its end with `mtgdm train`",
        )
    return value


def base_of(adapter: str) -> str:
    """The base model that an adapter's folder names."""
    for file, key in (("training.json", "base_model"), ("adapter_config.json", "base_model_name_or_path")):
        path = Path(adapter) / file
        value = json_object(path).get(key) if path.is_file() else None
        if isinstance(value, str) and value:
            return value
    raise UserError(
        "this adapter does not name its base model", where=adapter, hint="name it with --base-model"
    )


def names_base(adapter: str) -> str:
    """Where an adapter's folder says what its base is, for a hint."""
    if (Path(adapter) / "training.json").is_file():
        return "`base_model` in training.json names it"
    return f"`base_model_name_or_path` in {ADAPTER_CONFIG} names it"


def training_settings(adapter: str) -> dict[str, Any]:
    """The settings that an adapter was trained with, as its training.json has them; empty where nothing tells."""
    path = Path(adapter) / "training.json"
    settings = json_object(path).get("settings") if path.is_file() else None
    return settings if isinstance(settings, dict) else {}


def writes_thoughts(source: str) -> bool | None:
    """Whether a student was trained to write its thoughts before an answer; None for a model of somebody else."""
    path = Path(source) / "training.json"
    return json_object(path).get("thoughts") is True if path.is_file() else None


def check_folder(source: str) -> None:
    """UserError where a folder holds Git-LFS pointers in place of its files."""
    folder = Path(source)
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".safetensors", ".bin", ".json", ".model") or not path.is_file():
            continue
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise UserError(
                    "this is a Git-LFS pointer, not the file itself",
                    where=path,
                    hint="git lfs pull && git lfs checkout",
                )


# --- loading -------------------------------------------------------------------------------------


def load_tokenizer(source: str, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id."""
    check_folder(source)
    with _readable_errors(source, name):
        folder = _folder(source, "tokenizer")
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        if tokenizer.is_fast and not _cuts_as_its_file(tokenizer, Path(folder)):
            tokenizer = TokenizersBackend.from_pretrained(folder)
    if not tokenizer.is_fast:
        raise UserError(
            f"{name} has only a slow tokenizer, which cannot say where its tokens lie in the text"
        )
    return tokenizer


def _cuts_as_its_file(tokenizer: Any, folder: Path) -> bool:
    """Whether a loaded tokenizer cuts texts as its tokenizer.json says.

    transformers 5 builds some by the name of their class and not from that file: SmolLM2's, called GPT-2's, then
    no longer cuts numbers into digits, and makes other tokens than llama.cpp and the model's own makers.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return True
    of_file, loaded = json_object(path), json.loads(tokenizer.backend_tokenizer.to_str())
    return all(of_file.get(part) == loaded.get(part) for part in ("normalizer", "pre_tokenizer"))


def load_model(
    source: str,
    name: str,
    placement: Placement,
    *,
    load_in_4bit: bool = False,
    compute_dtype: ComputeDtype = "bfloat16",
    attention: Attention = "auto",
) -> PreTrainedModel:
    """A causal language model on its device, in 4-bit NF4 with double quantisation where asked."""
    if is_adapter(source):
        raise UserError(
            "this is a LoRA adapter, not a base model",
            where=source,
            hint=f"--student-base {base_of(source)}, which it was trained on",
        )
    check_folder(source)
    options: dict[str, Any] = {"dtype": placement.weights, "device_map": _device_map(placement)}
    if attention != "auto":
        options["attn_implementation"] = attention
    if load_in_4bit:
        require("bitsandbytes")
        options["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, compute_dtype),
            # FSDP cuts up only what all has one dtype.
            bnb_4bit_quant_storage=getattr(torch, compute_dtype) if _is_sharded() else torch.uint8,
        )
    with _readable_errors(source, name), memory_errors():
        folder = _folder(source, "weights")
        AutoConfig.from_pretrained(folder)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
    model.name_or_path = (
        source  # not the cache, whose place on this machine an adapter would name as its base
    )
    module: Any
    for module in model.modules():
        # bitsandbytes repacks 4-bit weights for some CPUs at the first evaluation, and cannot train on them then.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def load_config(source: str, name: str) -> PretrainedConfig:
    """The architecture of a model, without its weights."""
    check_folder(source)
    with _readable_errors(source, name):
        config: PretrainedConfig = AutoConfig.from_pretrained(_folder(source, "config"))
    return config


def folder_of(source: str, name: str) -> Path:
    """The folder in which the files of a model lie; those of a Hub id are fetched where they are not at hand."""
    check_folder(source)
    with _readable_errors(source, name):
        return _folder(source, "weights")


def tokenizer_folder(source: str, name: str) -> Path:
    """The folder in which the tokenizer of a model lies, fetched where it is not at hand."""
    check_folder(source)
    with _readable_errors(source, name):
        return _folder(source, "tokenizer")


def at_hand(source: str) -> Path | None:
    """The folder of a model that is on this machine with its weights; nothing is fetched."""
    if Path(source).is_dir():
        return Path(source)
    return hub_files.cached(source, "weights")


def _folder(source: str, need: hub_files.Need) -> Path:
    return Path(source) if Path(source).is_dir() else hub_files.fetched(source, need)


def _is_sharded() -> bool:
    """Whether `accelerate launch` will spread the model over the processes by FSDP or DeepSpeed."""
    return "true" in (
        os.environ.get("ACCELERATE_USE_FSDP", "").lower(),
        os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower(),
    )


def _device_map(placement: Placement) -> Any:
    if _is_sharded():
        return None
    return "auto" if placement.device == "auto" else {"": placement.device}


@contextmanager
def memory_errors(hint: str = _SAVE_MEMORY, *, doing: str = "out of memory") -> Iterator[None]:
    """Say which settings to change, the cheapest first, where memory runs out."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise UserError(f"{doing}: {_first_line(error)}", hint=hint) from error
        raise


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Say that the disk is full, in the words of none of the libraries that meet it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not any(sign in str(error) for sign in _DISK_IS_FULL):
            raise
        raise UserError(
            "there is no room left for a checkpoint",
            where=folder,
            hint="make room, then the same command goes on from the last whole checkpoint; `mtgdm plan` tells the need",
        ) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch failed for want of memory, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def _readable_errors(source: str, name: str) -> Iterator[None]:
    """Turn what the Hub and the file formats raise into one line and a way out."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, ImportError, SafetensorError, HTTPError) as error:
        if isinstance(error, SettingError | UserError):
            raise
        kinds = {type(cause).__name__ for cause in _causes(error)}
        if Path(source).is_dir():
            raise UserError(
                f"the model cannot be loaded: {_first_line(error)}",
                where=source,
                hint="the folder needs config.json, tokenizer.json and *.safetensors of a causal language model",
            ) from error
        if "GatedRepoError" in kinds:
            raise UserError(
                f"{name} is gated: its owner wants its licence accepted",
                hint=f"accept it on https://huggingface.co/{source}, then `hf auth login`",
            ) from error
        if "RepositoryNotFoundError" in kinds and (variable := network.token_variable()):
            raise UserError(
                f"the Hugging Face Hub has no model '{name}' for the token in {variable}, or refuses the token",
                hint=f"check the spelling, and the token with `hf auth whoami`; a public model needs no {variable}",
            ) from error
        if kinds & {"RepositoryNotFoundError", "HFValidationError"}:
            raise UserError(
                f"there is no model '{name}': neither a folder nor on the Hugging Face Hub",
                hint=f"check the spelling, or use the offline base: --student-base {TINY}",
            ) from error
        if isinstance(error, OSError | HTTPError):
            raise UserError(
                f"the model '{name}' is not on this machine and cannot be fetched from the Hugging Face Hub"
                + (f" ({told})" if (told := network.told()) else ""),
                hint="check the name and the network (HF_HUB_OFFLINE, HF_ENDPOINT, proxies), give a folder that "
                f"holds the model, or use the offline base: --student-base {TINY}",
            ) from error
        raise UserError(f"the model '{name}' cannot be loaded: {_first_line(error)}") from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, down to the first."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
