"""Messages to tokens by the model's own chat template, and which of the tokens are trained.

Trained is what the student has to write by itself: each assistant turn from its first token to its
end-of-turn token. The template's own text around it (`<|im_start|>assistant\\n`, the newline after
`<|im_end|>`) is not. No template needs generation marks for that: a turn begins where the template
stops when it is asked for the next answer, so the place is the one from which the student will write.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from mtgdm.checkpoints import template_fingerprint
from mtgdm.domain import Message
from mtgdm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is read but not trained."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_BATCH = 512


class ChatProblem(UserError):
    """Messages that the template cannot turn into a row to train on or to answer."""


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens; `labels` has the token where it is trained and IGNORED elsewhere."""

    ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """How many tokens are trained."""
        return sum(label != IGNORED for label in self.labels)


class Chat:
    """A tokenizer with its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        """`name` is what the user calls the model, for errors."""
        self.tokenizer = tokenizer
        self.name = name
        if tokenizer.chat_template is None:
            vocabulary = tokenizer.get_vocab()
            if "<|im_start|>" not in vocabulary or "<|im_end|>" not in vocabulary:
                raise UserError(
                    f"{name} has no chat template",
                    hint="choose a model that can chat: its name often ends in -Instruct",
                )
            tokenizer.chat_template = CHATML

    @property
    def fingerprint(self) -> str:
        """A short hash of the template: training, evaluation and package must use the same."""
        return template_fingerprint(str(self.tokenizer.chat_template))

    @cached_property
    def end_of_turn(self) -> int:
        """The token that ends an assistant turn."""
        probe = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
        return [label for label in next(self.encode([probe])).labels if label != IGNORED][-1]

    @property
    def pad(self) -> int:
        """The token that fills up a batch; it is never trained, so any will do."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.end_of_turn)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens after which the student writes its answer."""
        return self.tokens(self.text(messages, ask=True))

    def text(self, messages: Sequence[Message], *, ask: bool) -> str:
        """A conversation as the template writes it; `ask` ends it where the next answer begins."""
        self._refuse_control_tokens(messages)
        return self._render(messages, ask=ask)

    def encode(self, conversations: Sequence[Sequence[Message]]) -> Iterator[Encoded]:
        """Tokens and labels of conversations that end with an answer; raises ChatProblem."""
        waiting = iter(conversations)
        while batch := list(islice(waiting, _BATCH)):
            placed = [self._placed(messages) for messages in batch]
            found = self.tokenizer(
                [text for text, _ in placed], add_special_tokens=False, return_offsets_mapping=True
            )
            for (text, spans), ids, offsets in zip(
                placed, found["input_ids"], found["offset_mapping"], strict=True
            ):
                yield self._labelled(text, spans, ids, offsets)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token as text; a token that is a part of a character as the tokenizer writes it."""
        texts = [str(self.tokenizer.decode([number])) for number in ids]
        names = self.tokenizer.convert_ids_to_tokens(list(ids))
        return [
            f"<{name}>" if "\ufffd" in text else text.replace("\n", "\\n")
            for text, name in zip(texts, names, strict=True)
        ]

    def _labelled(
        self, text: str, spans: list[tuple[int, int]], ids: list[int], offsets: list[tuple[int, int]]
    ) -> Encoded:
        edges = [edge for span in spans for edge in span]
        if any(begin < edge < end for begin, end in offsets for edge in edges):
            # A token lies across the edge of a turn, which the student can never meet: it reads the
            # prompt's tokens and writes its own. So the pieces are made into tokens one by one.
            return self._in_pieces(text, spans)
        # NFC may leave a token without a width of its own; it belongs to the character before it.
        labels = [
            number
            if any(first <= begin and end <= last and (begin < end or first < begin) for first, last in spans)
            else IGNORED
            for number, (begin, end) in zip(ids, offsets, strict=True)
        ]
        return Encoded(ids, labels)

    def _in_pieces(self, text: str, spans: list[tuple[int, int]]) -> Encoded:
        ids: list[int] = []
        labels: list[int] = []
        place = 0
        for first, last in spans:
            before, turn = self.tokens(text[place:first]), self.tokens(text[first:last])
            ids += before + turn
            labels += [IGNORED] * len(before) + turn
            place = last
        rest = self.tokens(text[place:])
        return Encoded(ids + rest, labels + [IGNORED] * len(rest))

    def _placed(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation and where its assistant turns stand in it, end of turn included."""
        self._refuse_control_tokens(messages)
        text = self._render(messages, ask=False)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            content = _clean(message["content"])
            if not content.strip():
                raise ChatProblem("the answer is empty")
            begin = self._begin(text, messages[:number])
            written = next((form for form in _forms(content) if text.startswith(form, begin)), None)
            if written is None:
                raise ChatProblem(f"the chat template of {self.name} changes the text of an answer")
            end = self._end_of_turn_pattern.match(text, begin + len(written))
            if end is None:
                raise ChatProblem(
                    f"the chat template of {self.name} writes no end-of-turn token after an answer",
                    hint="a student trained so would never stop; use the model's -Instruct variant",
                )
            spans.append((begin, end.end()))
        if not spans:
            raise ChatProblem("the row has no answer to train on")
        return text, spans

    def _begin(self, text: str, before: Sequence[Message]) -> int:
        # Templates of thinking models put an empty thought before the last answer alone: both ways of
        # asking for an answer are tried.
        for thinking in (False, True):
            prompt = self._render(before, ask=True, thinking=thinking)
            if text.startswith(prompt):
                return len(prompt)
        raise ChatProblem(
            f"the chat template of {self.name} renders earlier turns differently from the last one"
        )

    def _render(self, messages: Sequence[Message], *, ask: bool, thinking: bool = False) -> str:
        clean = [{"role": message["role"], "content": _clean(message["content"])} for message in messages]
        try:
            text: Any = self.tokenizer.apply_chat_template(
                clean, tokenize=False, add_generation_prompt=ask, enable_thinking=thinking
            )
        except TemplateError as error:
            raise ChatProblem(f"the chat template of {self.name} refuses the row: {error}") from error
        return str(text)

    def tokens(self, text: str) -> list[int]:
        """A text as tokens, nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _refuse_control_tokens(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if found := self._control_pattern.search(message["content"]):
                raise ChatProblem(f"a {message['role']} text holds the control token '{found.group()}'")

    @cached_property
    def _control_tokens(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        tokens = {token.content for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        return sorted(tokens, key=len, reverse=True)

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(token) for token in self._control_tokens) or r"(?!)")

    @cached_property
    def _end_of_turn_pattern(self) -> re.Pattern[str]:
        return re.compile(rf"\s*(?:{self._control_pattern.pattern})")


def _clean(text: str) -> str:
    """A lone surrogate, which no tokenizer takes, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _forms(content: str) -> tuple[str, ...]:
    """How templates write a text: as it is, or without the white space around it."""
    return content, content.rstrip(), content.lstrip(), content.strip()
