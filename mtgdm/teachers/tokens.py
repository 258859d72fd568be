"""How many tokens a text may make, without the teacher's tokenizer: one bound from above, one from below.

On the 600 prompts of the sample, with Qwen's vocabulary, the upper bound is 1.3 to 1.9 times the true
count and the lower bound 0.32 to 0.38 times. Counted on UTF-8 bytes with `bytes.translate`, which runs at
C speed: a million prompts take seconds.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence

_LETTERS = bytes([*range(0x41, 0x5B), *range(0x61, 0x7B)])
_DIGITS = bytes(range(0x30, 0x3A))
_ASCII = bytes(range(0x80))
_HAN_LEADS = bytes(range(0xE4, 0xEA))
"""First bytes of U+4000..U+9FFF: the Han characters in everyday use, and little else."""
_PUNCTUATION_LEADS = bytes([0xE3, 0xEF])
"""First bytes of 、。「」, kana, and the full-width forms ，：！"""

TURN_TOKENS = 8
"""What a chat template puts around one message, at most: `<|im_start|>user\\n ... <|im_end|>\\n`."""
ROUNDED_TO = 1024

LEARNT_FROM = 20
"""So many prompts of a run are counted by the server before its counts are compared with each other."""
CUT_BELOW = 0.6
"""A count below this share of what is usual in the run: where Ollama cuts, it leaves a half at most."""
REMEMBERED = 500


def at_most(text: str) -> int:
    """Tokens of a text, estimated from above for vocabularies that know Chinese.

    A Han character counts 1 (Qwen needs about 0.65), two letters 1, digits and signs 1 each, anything
    rarer its bytes. A strict bound would be the bytes, three times as many: so much context costs
    gigabytes of GPU memory, and a prompt that does not fit is refused by the server, not cut.
    """
    data = text.encode("utf-8", "surrogatepass")
    ascii_, letters = _count(data, _ASCII), _count(data, _LETTERS)
    threes = _count(data, _HAN_LEADS) + _count(data, _PUNCTUATION_LEADS)
    return (letters + 1) // 2 + (ascii_ - letters) + threes + (len(data) - ascii_ - 3 * threes)


def at_least(text: str) -> int:
    """Tokens of a text, estimated from below: three Han characters, eight letters or four digits make one."""
    return _least(_kinds(text))


def prompt_at_most(messages: Iterable[dict[str, str]]) -> int:
    """Tokens of a chat with its template, estimated from above."""
    return TURN_TOKENS + sum(TURN_TOKENS + at_most(message["content"]) for message in messages)


def prompt_at_least(messages: Iterable[dict[str, str]]) -> int:
    """Tokens of a chat, estimated from below."""
    return sum(at_least(message["content"]) for message in messages)


class PromptCounts:
    """Notices a prompt that a server cut without a word, by what the server counts for the others.

    `prompt_at_least` holds for every vocabulary and so lets a prompt pass that was cut to 40 %. A cut
    prompt is also one whose count is odd in two ways at once: less than any vocabulary in use makes of
    its words, and far less, for its words, than the server counts for the others. Either alone would
    reject good rows: of a new vocabulary, or of another language among the prompts. On the sample with
    Qwen's vocabulary that notices a cut to between 0.4 and 0.8 of the true count. Where most prompts are
    cut from the start, the bound for every vocabulary alone speaks.
    """

    def __init__(self) -> None:
        self._shares: list[float] = []
        """Counted tokens against `_usual`, in rising order."""

    def least(self, messages: Sequence[dict[str, str]], seen: int) -> int | None:
        """The tokens that these messages make at least, where the server saw fewer of them; else None."""
        kinds = [_kinds(message["content"]) for message in messages]
        least, usual = sum(map(_least, kinds)), sum(map(_usual, kinds))
        if len(self._shares) >= LEARNT_FROM:
            median = self._shares[len(self._shares) // 2]
            least = max(least, int(usual * min(1.0, CUT_BELOW * median)))
        if seen < least:
            return least
        if usual and len(self._shares) < REMEMBERED:
            insort(self._shares, seen / usual)
        return None


def context_size(longest_prompt: int, max_tokens: int, correction: int = 256) -> int:
    """The context that holds the longest prompt, an answer, its correction and the answer after that."""
    needed = longest_prompt + max_tokens + correction + max_tokens
    return -(-needed // ROUNDED_TO) * ROUNDED_TO


def _least(kinds: tuple[int, int, int]) -> int:
    han, letters, digits = kinds
    return han // 3 + letters // 8 + digits // 4


def _usual(kinds: tuple[int, int, int]) -> float:
    """Tokens that the vocabularies of Qwen, Llama 3, GPT and DeepSeek hardly ever fall short of."""
    han, letters, digits = kinds
    return han / 1.8 + letters / 5.5 + digits / 3


def _kinds(text: str) -> tuple[int, int, int]:
    """Han characters, letters of the alphabet and digits."""
    data = text.encode("utf-8", "surrogatepass")
    return _count(data, _HAN_LEADS), _count(data, _LETTERS), _count(data, _DIGITS)


def _count(data: bytes, kind: bytes) -> int:
    return len(data) - len(data.translate(None, kind))
