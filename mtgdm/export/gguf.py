"""A merged model written as one GGUF file, tensor by tensor: keys, tokenizer, chat template and weights."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType

from mtgdm.checkpoints import json_object
from mtgdm.errors import UserError
from mtgdm.export import architectures, quantize, rotary, vocabulary
from mtgdm.export.architectures import Family
from mtgdm.export.vocabulary import Vocabulary
from mtgdm.export.weights import Weights, ignore, is_finite, width

Quant = Literal["f32", "f16", "bf16", "q8_0", "q4_k_m", "q5_k_m", "q6_k"]
QUANTS: tuple[Quant, ...] = get_args(Quant)

Array = np.ndarray[Any, Any]

_WRITTEN_HERE = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_SOURCE = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
"""The type that holds a stored dtype without loss, which the k-quants are made from."""
_LEFT_OUT = ("rotary_emb.inv_freq",)
"""Buffers in old files, which the configuration tells as well."""
CASTS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_PHI3 = re.compile("phi-?3", re.IGNORECASE)
_Q8_BLOCK_BYTES = 34
_CHUNK_NUMBERS = 2**20
"""So many numbers are encoded at once: 4 MiB in float32."""
_BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.8, "q4_k_m": 5.0}
"""Bits a weight as llama.cpp's mixes come out (embeddings wider than the rest), for estimates."""


@dataclass(frozen=True)
class Written:
    """A GGUF file."""

    path: Path
    bytes: int
    file_type: str
    tensors: int


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file: where it comes from (None: computed), its name, shape and type in GGUF."""

    source: str | None
    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return prod(self.shape) // int(block) * int(size)


def convert(
    merged: Path,
    out: Path,
    quant: str,
    *,
    name: str,
    template: str,
    advance: Callable[[int], None] = ignore,
) -> Written:
    """Write the merged model of a folder to `out`; `advance` gets the bytes of the stored tensors it has done.

    `template` is the chat template of the training. Raises UserError, before any work, for a model that GGUF
    cannot hold as it is, and for a k-quant without llama-cpp-python.
    """
    config = config_of(merged)
    if found := architectures.problems(config, merged, template):
        raise UserError(f"this model cannot be written as GGUF: {found[0]}", where=merged)
    if quant not in _WRITTEN_HERE:
        quantize.require()
    beside = out.with_name(f".{out.name}.tmp")
    try:
        if quant in _WRITTEN_HERE:
            tensors = _write(merged, config, beside, quant, name, template, advance)
        else:
            source = out.with_name(f".{out.name}.source.tmp")
            try:
                tensors = _write(merged, config, source, _lossless(merged), name, template, advance)
                quantize.quantize(source, beside, quant)
            finally:
                source.unlink(missing_ok=True)
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
    return Written(out, out.stat().st_size, quant, tensors)


def gguf_bytes(parameters: int, quant: str) -> int:
    """About how large a file of so many weights will be."""
    return int(parameters * _BITS[quant] / 8)


def room_needed(parameters: int, quant: str) -> int:
    """About how many bytes of disk `convert` takes at its most; a k-quant is made from a file of 16 bits."""
    return gguf_bytes(parameters, quant) + (0 if quant in _WRITTEN_HERE else gguf_bytes(parameters, "bf16"))


def config_of(folder: Path) -> dict[str, Any]:
    """The config.json of a merged model; UserError where it cannot be read."""
    return json_object(folder / "config.json")


def _lossless(merged: Path) -> str:
    kinds = {one.dtype for one in Weights(merged).stored.values() if len(one.shape) > 1}
    return _SOURCE[kinds.pop()] if len(kinds) == 1 and kinds <= _SOURCE.keys() else "f32"


def _write(
    merged: Path,
    config: Mapping[str, Any],
    out: Path,
    quant: str,
    name: str,
    template: str,
    advance: Callable[[int], None],
) -> int:
    """Write one file in the types that are encoded here; how many tensors it holds."""
    weights = Weights(merged)
    tensors = list(plan(weights, config, type_for(quant, merged)))
    writer = header(out, merged, config, quant, name, template)
    try:
        for one in tensors:
            writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), one.bytes, raw_dtype=one.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
        with _alone(), ThreadPoolExecutor(os.cpu_count()) as threads:
            for one in tensors:
                for chunk in _chunks(one, weights, config, threads):
                    file.write(chunk.data)
                writer.write_padding(file, one.bytes)
                if one.source is not None:
                    stored = weights.stored[one.source]
                    advance(stored.numbers * width(stored.dtype))
        writer.flush()
        os.fsync(file.fileno())
    finally:
        writer.close()
    return len(tensors)


def header(
    out: Path | None, merged: Path, config: Mapping[str, Any], quant: str, name: str, template: str
) -> gguf.GGUFWriter:
    """A writer to `out` with all the keys of a file."""
    writer = gguf.GGUFWriter(out, architectures.family(config).architecture)
    words = vocabulary.read(merged, int(config["vocab_size"]), template)
    _add_general(writer, _named(name, words), _file_type(quant))
    architectures.add_keys(writer, config)
    _add_tokenizer(writer, words, _special_ids(words, config), _end_of_turn(merged, template), template)
    return writer


def _named(name: str, words: Vocabulary) -> str:
    """A name that tells llama.cpp what the tokenizer does: with phi-3 in it, tokens take the spaces behind them."""
    if words.strips_like_phi3:
        return name if _PHI3.search(name) else f"{name} (phi-3)"
    return _PHI3.sub("phi 3", name)


def _file_type(quant: str) -> LlamaFileType:
    return _WRITTEN_HERE[quant][1] if quant in _WRITTEN_HERE else quantize.FILE_TYPES[quant]


def type_for(quant: str, merged: Path) -> GGMLQuantizationType:
    """The type of the matrices in a file; of a k-quant that of the file it is made from."""
    return _WRITTEN_HERE[quant if quant in _WRITTEN_HERE else _lossless(merged)][0]


def plan(weights: Weights, config: Mapping[str, Any], wanted: GGMLQuantizationType) -> Iterator[Tensor]:
    """The tensors of a file in their order; UserError for one that has no place in it."""
    found = architectures.family(config)
    names = name_map(found, config)
    for computed, factors in rotary.tensors(config).items():
        yield Tensor(None, computed, factors.shape, GGMLQuantizationType.F32)
    for name, stored in weights.stored.items():
        if name.endswith(_LEFT_OUT) or (name == "lm_head.weight" and config.get("tie_word_embeddings")):
            continue
        named = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if named is None:
            raise UserError(
                f"the tensor {name} has no place in a GGUF of {found.known_as}", where=weights.folder
            )
        yield Tensor(name, named, stored.shape, _type_of(stored.shape, wanted))


def name_map(found: Family, config: Mapping[str, Any]) -> gguf.TensorNameMap:
    """From the names of transformers to those of GGUF."""
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == found.architecture)
    return gguf.get_tensor_name_map(architecture, int(config["num_hidden_layers"]))


def _type_of(shape: tuple[int, ...], wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """Vectors stay in float32; rows that are no whole number of blocks are kept in 16 bits."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block == 0 else GGMLQuantizationType.F16


def _add_general(writer: gguf.GGUFWriter, name: str, file_type: LlamaFileType) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _special_ids(words: Vocabulary, config: Mapping[str, Any]) -> dict[str, int]:
    """The special tokens that the tokenizer names, and those that the configuration alone does."""
    named = {role: config.get(f"{role}_token_id") for role in vocabulary.ROLES}
    return {
        **{
            role: place
            for role, place in named.items()
            if type(place) is int and 0 <= place < len(words.tokens)
        },
        **words.ids,
    }


def _add_tokenizer(
    writer: gguf.GGUFWriter, words: Vocabulary, ids: Mapping[str, int], end_of_turn: int, template: str
) -> None:
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.merges:
        writer.add_token_merges(words.merges)
    if words.scores:
        writer.add_token_scores(words.scores)
    if words.space_in_front is not None:
        writer.add_add_space_prefix(words.space_in_front)
    writer.add_add_bos_token(words.adds_bos)
    writer.add_add_eos_token(False)
    adders = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "pad": writer.add_pad_token_id,
        "unk": writer.add_unk_token_id,
        "sep": writer.add_sep_token_id,
        "mask": writer.add_mask_token_id,
    }
    for role, place in ids.items():
        adders[role](place)
    if end_of_turn != ids.get("eos"):
        writer.add_eot_token_id(end_of_turn)
    writer.add_chat_template(template)


def _end_of_turn(merged: Path, template: str) -> int:
    """The token by which the student learned to end an answer: a server stops there, whatever it is called."""
    from mtgdm.student.base import load_tokenizer
    from mtgdm.student.chat import Chat

    tokenizer = load_tokenizer(str(merged), merged.name)
    tokenizer.chat_template = template
    return Chat(tokenizer, merged.name).end_of_turn


# --- encoding ------------------------------------------------------------------------------------


@contextmanager
def _alone() -> Iterator[None]:
    """Let torch compute on the thread that asks: its own threads spin between two chunks, three times the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _chunks(
    planned: Tensor, weights: Weights, config: Mapping[str, Any], threads: ThreadPoolExecutor
) -> Iterator[Array]:
    """The bytes of a tensor in its GGUF type, some rows at a time."""
    parts = parts_of(planned, weights, config)
    return threads.map(lambda part: encode(part, planned.type, planned.name), parts)


def parts_of(planned: Tensor, weights: Weights, config: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The weights of a tensor of the file, some rows at a time."""
    if planned.source is None:
        yield torch.from_numpy(rotary.tensors(config)[planned.name])
        return
    tensor = architectures.in_gguf(planned.source, weights.tensor(planned.source), config)
    rows = max(1, _CHUNK_NUMBERS // prod(tensor.shape[1:]))
    for first in range(0, len(tensor), rows):
        yield tensor[first : first + rows]


def encode(rows: torch.Tensor, wanted: GGMLQuantizationType, name: str = "") -> Array:
    """Weights as bytes of a GGUF type, rows by bytes of a row; UserError for one that is no number in it."""
    if wanted == GGMLQuantizationType.Q8_0:
        blocks: Array = gguf.quantize(rows.float().numpy(), wanted)
        # Each block begins with its scale, which is made from its largest weight and keeps what is no number.
        scales = np.ascontiguousarray(blocks.reshape(-1, _Q8_BLOCK_BYTES)[:, :2]).view(np.float16)
        if not np.isfinite(scales).all():
            raise _no_number(rows, name)
        return blocks
    if not is_finite(rows.to(CASTS[wanted])):
        raise _no_number(rows, name)
    return row_bytes(rows, wanted)


def row_bytes(rows: torch.Tensor, wanted: GGMLQuantizationType) -> Array:
    """Weights in a type that is not quantized, as bytes: rows by bytes of a row."""
    cast = rows.to(CASTS[wanted]).contiguous()
    found: Array = cast.view(torch.uint8).reshape(len(rows), -1).numpy()
    return found


def _no_number(rows: torch.Tensor, name: str) -> UserError:
    if is_finite(rows):
        return UserError(f"a weight of {name} is too large for float16", hint="--quantize bf16")
    return UserError(f"a weight of {name} is infinite or no number")
