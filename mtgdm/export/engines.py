"""Who runs the model in a proof: PyTorch, llama.cpp, or PyTorch with weights that transformers read from a GGUF."""

from __future__ import annotations

import io
import json
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stderr
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from mtgdm.errors import UserError
from mtgdm.export import architectures, pretokenizers, quantize
from mtgdm.student import generation
from mtgdm.student.chat import Chat

Array = np.ndarray[Any, Any]
EngineName = Literal["llama.cpp", "transformers"]

_THREADS = max(1, (os.cpu_count() or 1) // 2)
"""llama.cpp's threads wait for one another by spinning: with one a core, a machine that does anything else crawls."""
POSITIONS_AT_ONCE = 64
"""Positions whose logits are held at once: with 150,000 tokens each of them takes 0.6 MB in float32."""


class Engine(Protocol):
    """Something that runs the model: what is trained on one side, what was written on the other."""

    def tokens(self, text: str) -> list[int] | None:
        """A text as tokens, special ones among them; None where another tokenizer will be used."""

    def logits(self, ids: Sequence[int]) -> Iterator[Array]:
        """(positions, vocabulary) in float32, some positions at a time; each is gone when the next is asked for."""

    def greedy(self, ids: Sequence[int], most: int) -> list[int]:
        """The likeliest tokens one after another, without the one that ends an answer."""


class Trained:
    """A model in PyTorch."""

    def __init__(self, model: Any, chat: Chat, tokenizer: Any = None) -> None:
        """`tokenizer` is the one that `tokens` asks, the chat's own by default."""
        self._model = model
        self._tokenizer = tokenizer or chat.tokenizer
        self._ends = frozenset(generation.end_tokens(model, chat))
        self._written: dict[tuple[int, ...], list[int]] = {}

    def tokens(self, text: str) -> list[int] | None:
        """A text as tokens."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def logits(self, ids: Sequence[int]) -> Iterator[Array]:
        """(positions, vocabulary) in float32, some positions at a time."""
        cache: Any = None
        for given in _parts(ids):
            logits, cache = self._step(given, cache)
            yield logits[0].float().numpy()

    def _step(self, ids: Sequence[int], cache: Any) -> tuple[torch.Tensor, Any]:
        """The logits of some tokens behind those of the cache, and the cache with them."""
        with torch.inference_mode():
            step = self._model(input_ids=torch.tensor([list(ids)]), past_key_values=cache, use_cache=True)
        return step.logits, step.past_key_values

    def greedy(self, ids: Sequence[int], most: int) -> list[int]:
        """The likeliest tokens one after another; asked again for every file, and computed once."""
        key = (*ids, most)
        if key not in self._written:
            self._written[key] = self._greedy(ids, most)
        return self._written[key]

    def _greedy(self, ids: Sequence[int], most: int) -> list[int]:
        written: list[int] = []
        cache: Any = None
        for given in _parts(ids):
            logits, cache = self._step(given, cache)
        while (token := int(logits[0, -1].argmax())) not in self._ends and len(written) < most:
            written.append(token)
            logits, cache = self._step([token], cache)
        return written


class LlamaCpp:
    """A GGUF in llama.cpp, on the CPU."""

    def __init__(self, llama: Any, normalizes: bool) -> None:
        import llama_cpp

        self._llama = llama
        self._normalizes = normalizes
        self._batch = llama_cpp.llama_batch_init(POSITIONS_AT_ONCE, 0, 1)
        self._read = 0

    def tokens(self, text: str) -> list[int] | None:
        """A text as tokens, by the file's own tokenizer; NFC is the caller's to apply."""
        given = unicodedata.normalize("NFC", text) if self._normalizes else text
        return list(self._llama.tokenize(given.encode("utf-8"), add_bos=False, special=True))

    def logits(self, ids: Sequence[int]) -> Iterator[Array]:
        """(positions, vocabulary) in float32, some positions at a time: views of llama.cpp's own numbers."""
        self._forget()
        for given in _parts(ids):
            yield self._step(given)

    def greedy(self, ids: Sequence[int], most: int) -> list[int]:
        """The likeliest tokens one after another, up to one that llama.cpp itself stops at."""
        written: list[int] = []
        self._forget()
        for given in _parts(ids):
            logits = self._step(given)
        while not self._ends(token := int(logits[-1].argmax())) and len(written) < most:
            written.append(token)
            logits = self._step([token])
        return written

    def _forget(self) -> None:
        import llama_cpp

        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._llama.ctx), True)
        self._read = 0

    def _step(self, ids: Sequence[int]) -> Array:
        """The logits of some tokens behind those read. `Llama.eval` would keep those of the whole context."""
        import llama_cpp

        batch = self._batch
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.logits[place] = token, self._read + place, True
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        if code := llama_cpp.llama_decode(self._llama.ctx, batch):
            raise UserError(
                f"llama.cpp cannot compute with this file (code {code})", where=self._llama.model_path
            )
        self._read += len(ids)
        return np.ctypeslib.as_array(
            llama_cpp.llama_get_logits(self._llama.ctx), shape=(len(ids), self._llama.n_vocab())
        )

    def close(self) -> None:
        """Give back what llama.cpp holds."""
        import llama_cpp

        llama_cpp.llama_batch_free(self._batch)
        self._llama.close()

    def _ends(self, token: int) -> bool:
        import llama_cpp

        return bool(llama_cpp.llama_vocab_is_eog(self._vocabulary, token))

    @cached_property
    def _vocabulary(self) -> Any:
        import llama_cpp

        return llama_cpp.llama_model_get_vocab(self._llama.model)


def _parts(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    return (ids[first : first + POSITIONS_AT_ONCE] for first in range(0, len(ids), POSITIONS_AT_ONCE))


@contextmanager
def opened(file: Path, chat: Chat, positions: int) -> Iterator[tuple[EngineName, Engine]]:
    """The best engine at hand with a GGUF loaded, with room for so many positions."""
    if not quantize.is_installed():
        yield "transformers", _through_transformers(file, chat)
        return
    import llama_cpp

    with quantize.log() as said:
        try:
            llama = llama_cpp.Llama(
                str(file),
                n_ctx=positions,
                n_threads=_THREADS,
                n_threads_batch=_THREADS,
                n_batch=POSITIONS_AT_ONCE,
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


def _through_transformers(file: Path, chat: Chat) -> Trained:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with redirect_stderr(io.StringIO()):  # a bar that nothing else switches off
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return Trained(generation.ready(model), chat, tokenizer)


def read_rightly_by_transformers(config: Mapping[str, Any]) -> bool:
    """Whether its GGUF reader makes the same model of a file."""
    return architectures.family(config).read_by_transformers(config)
