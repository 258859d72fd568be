"""Answers drawn at random, each row by random numbers of its own, and handed over as soon as it ends.

What a row says depends on its prompt and its seed, not on the rows beside it: tokens are drawn by the
Gumbel-max trick (Maddison, Tarlow and Minka 2014, "A* Sampling") with the row's own numbers. Another batch
moves the last digits of the scores; with the tiny base in float32, alone and in a batch of 32, no draw of
288,000 followed them, where inversion of the cumulated distribution did 21 times.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from mtgdm.student.generation import Answer, answer_of, end_tokens, padded

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from mtgdm.student.chat import Chat


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn: at temperature 0 its tokens are the likeliest ones."""

    temperature: float
    top_p: float
    seed: str
    longest: int
    """The answer is cut after so many tokens."""


def sample(
    model: PreTrainedModel | PeftModel,
    chat: Chat,
    prompts: Sequence[list[int]],
    how: Sequence[Sampling],
    *,
    wanted: Callable[[int], bool],
    hand_over: Callable[[int, Answer], None],
) -> None:
    """Answer all prompts in one batch; `wanted` is asked at every token whether a row is still waited for.

    `hand_over` gets the place of a prompt and its answer, whose seconds count from the batch's start.
    """
    ids, mask = padded(prompts, chat.pad)
    ends = end_tokens(model, chat)
    started = time.perf_counter()

    def ended(place: int, written: list[int]) -> None:
        seconds = time.perf_counter() - started
        hand_over(place, answer_of(chat, written, ends, len(prompts[place]), seconds))

    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max(one.longest for one in how),
        do_sample=False,  # Dice leaves one token to choose from
        eos_token_id=ends,
        pad_token_id=chat.pad,
    )
    generate: Any = model.generate
    with torch.inference_mode():
        generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=[Dice(how, model.device)] if any(one.temperature for one in how) else [],
            stopping_criteria=[_Ends(ids.shape[1], how, ends, wanted, ended)],
        )


class Dice(LogitsProcessor):
    """Leaves each row the one token that its next random number draws from its nucleus.

    The nucleus is the smallest set of likeliest tokens that holds `top_p` of the probability (Holtzman et
    al. 2020, "The Curious Case of Neural Text Degeneration").
    """

    def __init__(self, how: Sequence[Sampling], device: torch.device) -> None:
        self._numbers = [torch.Generator(device).manual_seed(_number(one.seed)) for one in how]
        # So cold that nothing but the likeliest token is left, and no division by zero.
        self._temperature = torch.tensor([[max(one.temperature, 1e-30)] for one in how], device=device)
        self._top_p = torch.tensor([[one.top_p] for one in how], device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary) that are -inf but for the drawn tokens."""
        below_best = scores - scores.amax(dim=-1, keepdim=True)
        likely = torch.softmax(below_best / self._temperature, dim=-1)
        ordered, tokens = likely.sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= self._top_p
        likely = likely.masked_fill(outside.scatter(-1, tokens, outside), 0.0)
        # Where E is exponential, -log E is Gumbel's, and log(p) - log(E) is largest where p / E is.
        waits = torch.empty_like(likely)
        for row, numbers in zip(waits, self._numbers, strict=True):
            row.exponential_(generator=numbers)
        drawn = (likely / waits).argmax(dim=-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)


def _number(seed: str) -> int:
    return int.from_bytes(hashlib.sha256(seed.encode("utf-8")).digest()[:8], "big")


class _Ends(StoppingCriteria):
    """Ends a row at its last token, at its own limit, or where nobody waits for it."""

    def __init__(
        self,
        width: int,
        how: Sequence[Sampling],
        ends: Sequence[int],
        wanted: Callable[[int], bool],
        ended: Callable[[int, list[int]], None],
    ) -> None:
        self._width = width
        self._how = how
        self._ends = frozenset(ends)
        self._wanted = wanted
        self._ended = ended
        self._over = [False] * len(how)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Which rows are over, (rows,)."""
        length = input_ids.shape[1] - self._width
        for place, token in enumerate(input_ids[:, -1].tolist()):
            if self._over[place]:
                continue
            if not self._wanted(place):
                self._over[place] = True
            elif token in self._ends or length >= self._how[place].longest:
                self._over[place] = True
                self._ended(place, input_ids[place, self._width :].tolist())
        return torch.tensor(self._over, device=input_ids.device)
