"""Answers drawn at random, each row by random numbers of its own, and handed over as soon as it ends.

What a row says depends on its prompt and its seed, not on the rows beside it: every token takes one number
of the row's own generator, and inversion makes a token of it (Devroye, "Non-Uniform Random Variate
Generation", 1986, III.2). In float32 the answer is the one that the row gets alone.
"""

from __future__ import annotations

import random
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
            logits_processor=[Dice(how)] if any(one.temperature for one in how) else [],
            stopping_criteria=[_Ends(ids.shape[1], how, ends, wanted, ended)],
        )


class Dice(LogitsProcessor):
    """Leaves each row the one token that its next random number draws from its nucleus.

    The nucleus is the smallest set of likeliest tokens that holds `top_p` of the probability (Holtzman et
    al. 2020, "The Curious Case of Neural Text Degeneration").
    """

    def __init__(self, how: Sequence[Sampling]) -> None:
        self._numbers = [random.Random(one.seed) for one in how]
        # So cold that nothing but the likeliest token is left, and no division by zero.
        self._temperature = torch.tensor([[max(one.temperature, 1e-30)] for one in how])
        self._top_p = torch.tensor([[one.top_p] for one in how])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary) that are -inf but for the drawn tokens."""
        device = scores.device
        below_best = scores - scores.amax(dim=-1, keepdim=True)
        likely = torch.softmax(below_best / self._temperature.to(device), dim=-1)
        ordered, tokens = likely.sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= self._top_p.to(device)
        likely = likely.masked_fill(outside.scatter(-1, tokens, outside), 0.0)
        # In the vocabulary's order, where rounding cannot make two tokens change places.
        mass = likely.double().cumsum(dim=-1)
        numbers = torch.tensor([[one.random()] for one in self._numbers], dtype=mass.dtype, device=device)
        drawn = torch.searchsorted(mass, numbers * mass[:, -1:], right=True)
        left = torch.full_like(scores, -torch.inf)
        return left.scatter(-1, drawn.clamp(max=scores.shape[-1] - 1), 0.0)


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
