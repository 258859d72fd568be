"""Who runs the model in a proof: PyTorch, llama.cpp, or PyTorch with weights that transformers read from a GGUF."""

from __future__ import annotations

import io
import json
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import gguf
import numpy as np
import psutil
import torch
from transformers import DynamicCache

from mtgdm.errors import UserError
from mtgdm.export import architectures, pretokenizers, quantize
from mtgdm.student import generation
from mtgdm.student.chat import Chat

Array = np.ndarray[Any, Any]
EngineName = Literal["llama.cpp", "transformers"]

READ_AT_ONCE = 512
"""Tokens that llama.cpp reads at once: more hardly helps it, fewer cost it time."""
_LOOK_S = 0.25
"""So long it is looked at what others compute."""
LOGITS_AT_ONCE = 64
"""Positions whose logits it gives at once: with 150,000 tokens each of them takes 0.6 MB in float32."""


class Engine(Protocol):
    """Something that reads a finished file."""

    def tokens(self, text: str) -> list[int] | None:
        """A text as tokens, special ones among them; None where another tokenizer will be used."""

    def logits(self, ids: Sequence[int], first: int) -> Iterator[Array]:
        """(positions, vocabulary) in float32 from the position `first` on, some at a time.

        Each is gone when the next is asked for.
        """

    def ends(self, token: int) -> bool:
        """Whether an answer is over with this token."""


@dataclass(frozen=True)
class Continued:
    """What a model writes after a prompt: its likeliest tokens, the one that ends the answer among them."""

    tokens: list[int]
    logits: Array
    """(positions, vocabulary) in float32 of the last positions of the prompt and of all tokens but the last."""


class InTorch:
    """A model in PyTorch."""

    def __init__(self, model: Any, chat: Chat, tokenizer: Any = None) -> None:
        """`tokenizer` is the one that `tokens` asks, the chat's own by default."""
        self._model = model
        self._tokenizer = tokenizer or chat.tokenizer
        self._pad = chat.pad
        self._ends = frozenset(generation.end_tokens(model, chat))

    def tokens(self, text: str) -> list[int] | None:
        """A text as tokens."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def ends(self, token: int) -> bool:
        """Whether an answer is over with this token: the end of turn, and what the model itself declares."""
        return token in self._ends

    def logits(self, ids: Sequence[int], first: int) -> Iterator[Array]:
        """(positions, vocabulary) in float32 from the position `first` on."""
        yield self.last_logits([list(ids)], len(ids) - first)[0]

    def last_logits(self, sequences: Sequence[list[int]], positions: int) -> list[Array]:
        """The logits of the last so many positions of each sequence, of shorter ones of all: one forward pass."""
        logits = self._step(*self._batch(sequences), None, positions)
        return [
            one[-min(positions, len(ids)) :].cpu().numpy() for one, ids in zip(logits, sequences, strict=True)
        ]

    def continued(self, prompts: Sequence[list[int]], positions: int, most: int) -> list[Continued]:
        """The likeliest tokens after each prompt, at most so many, and the logits they were taken from."""
        ids, mask = self._batch(prompts)
        # Made without the model's configuration it keeps all positions, also of layers with a window.
        cache = DynamicCache()
        parts = [self._step(ids, mask, cache, positions)]
        read = parts[0].shape[1]
        written: list[list[int]] = [[] for _ in prompts]
        while True:
            likeliest = parts[-1][:, -1].argmax(-1)
            for tokens, token in zip(written, likeliest.tolist(), strict=True):
                if len(tokens) < most and not (tokens and self.ends(tokens[-1])):
                    tokens.append(token)
            if all(len(tokens) == most or self.ends(tokens[-1]) for tokens in written):
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            parts.append(self._step(likeliest.unsqueeze(1), mask, cache, 1))
        every = torch.cat(parts, dim=1)
        return [
            Continued(tokens, _placed(row, read, min(positions, len(prompt)), len(tokens)))
            for row, tokens, prompt in zip(every, written, prompts, strict=True)
        ]

    def _batch(self, sequences: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and mask, padded on the left."""
        ids, mask = generation.padded(sequences, self._pad)
        return ids.to(self._model.device), mask.to(self._model.device)

    def _step(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any, positions: int) -> torch.Tensor:
        places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.inference_mode():
            step = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=places,
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=positions,
            )
        logits: torch.Tensor = step.logits.float()
        return logits


def _placed(row: torch.Tensor, read: int, of_prompt: int, written: int) -> Array:
    """Of the logits of a padded row those of the prompt's last positions and of what was written but for its last."""
    placed: Array = row[read - of_prompt : read + written - 1].cpu().numpy()
    return placed


class LlamaCpp:
    """A GGUF in llama.cpp, on the CPU."""

    def __init__(self, llama: Any, normalizes: bool) -> None:
        import llama_cpp

        self._llama = llama
        self._normalizes = normalizes
        self._batch = llama_cpp.llama_batch_init(READ_AT_ONCE, 0, 1)

    def tokens(self, text: str) -> list[int] | None:
        """A text as tokens, by the file's own tokenizer; NFC is the caller's to apply."""
        given = unicodedata.normalize("NFC", text) if self._normalizes else text
        return list(self._llama.tokenize(given.encode("utf-8"), add_bos=False, special=True))

    def ends(self, token: int) -> bool:
        """Whether llama.cpp itself stops at this token."""
        import llama_cpp

        return bool(llama_cpp.llama_vocab_is_eog(self._vocabulary, token))

    def logits(self, ids: Sequence[int], first: int) -> Iterator[Array]:
        """(positions, vocabulary) in float32 from the position `first` on: views of llama.cpp's own numbers."""
        import llama_cpp

        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._llama.ctx), True)
        for begin, end in _parts(0, first, READ_AT_ONCE):
            self._read(ids, begin, end, wanted=False)
        for begin, end in _parts(first, len(ids), LOGITS_AT_ONCE):
            self._read(ids, begin, end, wanted=True)
            yield np.ctypeslib.as_array(
                llama_cpp.llama_get_logits(self._llama.ctx), shape=(end - begin, self._llama.n_vocab())
            )

    def _read(self, ids: Sequence[int], begin: int, end: int, *, wanted: bool) -> None:
        """Some tokens behind those read. `Llama.eval` would keep the logits of the whole context."""
        import llama_cpp

        batch = self._batch
        batch.n_tokens = end - begin
        for number, place in enumerate(range(begin, end)):
            batch.token[number], batch.pos[number], batch.logits[number] = ids[place], place, wanted
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, 0
        if code := llama_cpp.llama_decode(self._llama.ctx, batch):
            raise UserError(
                f"llama.cpp cannot compute with this file (code {code})", where=self._llama.model_path
            )

    def close(self) -> None:
        """Give back what llama.cpp holds."""
        import llama_cpp

        llama_cpp.llama_batch_free(self._batch)
        self._llama.close()

    @cached_property
    def _vocabulary(self) -> Any:
        import llama_cpp

        return llama_cpp.llama_model_get_vocab(self._llama.model)


def _parts(begin: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + size, end)) for first in range(begin, end, size))


def cores() -> int:
    """The physical cores that this process may use."""
    allowed = len(_allowed())
    physical: int = psutil.cpu_count(logical=False) or allowed
    return max(1, min(allowed, physical))


def _allowed() -> Sequence[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _threads() -> int:
    """As many as there are cores that nobody else uses just now.

    llama.cpp's threads wait for one another by spinning: on two cores that others kept busy, two threads took twice
    the processor time of one, and twice to three times as long.
    """
    busy = psutil.cpu_percent(_LOOK_S, percpu=True)
    idle: float = sum(1 - busy[core] / 100 for core in _allowed() if core < len(busy))
    return max(1, min(cores(), round(idle)))


@contextmanager
def opened(file: Path, chat: Chat, positions: int) -> Iterator[tuple[EngineName, Engine]]:
    """The best engine at hand with a GGUF loaded, with room for so many positions."""
    if not quantize.is_installed():
        yield "transformers", _through_transformers(file, chat)
        return
    import llama_cpp

    threads = _threads()
    with quantize.log() as said:
        try:
            llama = llama_cpp.Llama(
                str(file),
                n_ctx=positions,
                n_threads=threads,
                n_threads_batch=threads,
                n_batch=READ_AT_ONCE,
                type_k=llama_cpp.GGML_TYPE_F32,
                type_v=llama_cpp.GGML_TYPE_F32,
                verbose=False,
            )
        except ValueError as error:
            raise UserError(
                f"llama.cpp cannot load this file: {(said or [str(error)])[0]}", where=file
            ) from error
        with closing(LlamaCpp(llama, _normalizes(chat))) as engine:
            yield "llama.cpp", engine


def _normalizes(chat: Chat) -> bool:
    backend: Any = chat.tokenizer
    return pretokenizers.normalizes(json.loads(backend.backend_tokenizer.to_str()))


def _through_transformers(file: Path, chat: Chat) -> InTorch:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _keys_read_once():
        with redirect_stderr(io.StringIO()):  # a bar that nothing else switches off
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32
            )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return InTorch(generation.ready(model), chat, tokenizer)


@contextmanager
def _keys_read_once() -> Iterator[None]:
    """Let transformers keep what it has read of a file's keys.

    It reads them four times and more for one model, each time 11 s where the vocabulary has 150,000 tokens.
    """
    reader = gguf.GGUFReader
    gguf.GGUFReader = cache(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def read_rightly_by_transformers(config: Mapping[str, Any]) -> bool:
    """Whether its GGUF reader makes the same model of a file."""
    return architectures.family(config).read_by_transformers(config)
