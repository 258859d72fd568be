"""Who runs the model in a proof: PyTorch, llama.cpp, or PyTorch with weights that transformers read from a GGUF."""

from __future__ import annotations

import io
import json
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from mtgdm.errors import UserError
from mtgdm.export import architectures, quantize
from mtgdm.student import generation
from mtgdm.student.chat import Chat

Array = np.ndarray[Any, Any]
EngineName = Literal["llama.cpp", "transformers"]

_THREADS = max(1, (os.cpu_count() or 1) // 2)
"""llama.cpp's threads wait for one another by spinning: with one a core, a machine that does anything else crawls."""


class Engine(Protocol):
    """Something that runs the model: what is trained on one side, what was written on the other."""

    def tokens(self, text: str) -> list[int] | None:
        """A text as tokens, special ones among them; None where another tokenizer will be used."""

    def logits(self, ids: Sequence[int]) -> Array:
        """(positions, vocabulary) in float32."""

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

    def logits(self, ids: Sequence[int]) -> Array:
        """(positions, vocabulary) in float32."""
        with torch.inference_mode():
            logits = self._model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits
        found: Array = logits[0].float().numpy()
        return found

    def greedy(self, ids: Sequence[int], most: int) -> list[int]:
        """The likeliest tokens one after another; asked again for every file, and computed once."""
        key = (*ids, most)
        if key not in self._written:
            self._written[key] = self._greedy(ids, most)
        return self._written[key]

    def _greedy(self, ids: Sequence[int], most: int) -> list[int]:
        written: list[int] = []
        cache: Any = None
        given = list(ids)
        with torch.inference_mode():
            while len(written) < most:
                step = self._model(input_ids=torch.tensor([given]), past_key_values=cache, use_cache=True)
                cache, token = step.past_key_values, int(step.logits[0, -1].argmax())
                if token in self._ends:
                    break
                written.append(token)
                given = [token]
        return written


class LlamaCpp:
    """A GGUF in llama.cpp, on the CPU."""

    def __init__(self, llama: Any, normalizes: bool) -> None:
        self._llama = llama
        self._normalizes = normalizes

    def tokens(self, text: str) -> list[int] | None:
        """A text as tokens, by the file's own tokenizer; NFC is the caller's to apply."""
        given = unicodedata.normalize("NFC", text) if self._normalizes else text
        return list(self._llama.tokenize(given.encode("utf-8"), add_bos=False, special=True))

    def logits(self, ids: Sequence[int]) -> Array:
        """(positions, vocabulary) in float32."""
        self._llama.reset()
        self._llama.eval(list(ids))
        found: Array = self._llama.scores[: len(ids)].copy()
        return found

    def greedy(self, ids: Sequence[int], most: int) -> list[int]:
        """The likeliest tokens one after another, up to one that llama.cpp itself stops at."""
        written: list[int] = []
        self._llama.reset()
        self._llama.eval(list(ids))
        while len(written) < most:
            token = int(self._llama.scores[self._llama.n_tokens - 1].argmax())
            if self._ends(token):
                break
            written.append(token)
            self._llama.eval([token])
        return written

    def _ends(self, token: int) -> bool:
        import llama_cpp

        return bool(llama_cpp.llama_vocab_is_eog(self._vocabulary, token))

    @cached_property
    def _vocabulary(self) -> Any:
        import llama_cpp

        return llama_cpp.llama_model_get_vocab(self._llama.model)


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
                logits_all=True,
                type_k=llama_cpp.GGML_TYPE_F32,
                type_v=llama_cpp.GGML_TYPE_F32,
                verbose=False,
            )
        except ValueError as error:
            raise UserError(
                f"llama.cpp cannot load this file: {(said or [str(error)])[0]}", where=file
            ) from error
        try:
            yield "llama.cpp", LlamaCpp(llama, _normalizes(chat))
        finally:
            llama.close()


def _normalizes(chat: Chat) -> bool:
    backend: Any = chat.tokenizer
    return json.loads(backend.backend_tokenizer.to_str()).get("normalizer") is not None


def _through_transformers(file: Path, chat: Chat) -> Trained:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with redirect_stderr(io.StringIO()):  # a bar that nothing else switches off
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return Trained(generation.ready(model), chat, tokenizer)


def read_rightly_by_transformers(config: Mapping[str, Any]) -> bool:
    """Its reader takes every head for one of 128 numbers in Qwen3, and loses the factors of Llama 3's rotation."""
    known = architectures.family(config).architecture
    if known == "qwen3":
        return architectures.head_size(config) == 128
    return bool(architectures.rope_of(config)["rope_type"] == "default")
