"""Messages to tokens by the student's chat template, and which of the tokens are trained.

Trained is what the student has to write by itself: each assistant turn from its first token to its
end-of-turn token. The template's own text around it (`<|im_start|>assistant\\n`, the newline after
`<|im_end|>`) is not. No template needs generation marks for that: a turn begins where the template
stops when it is asked for the next answer, so the place is the one from which the student will write.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from mtgdm.checkpoints import template_fingerprint
from mtgdm.domain import Message
from mtgdm.errors import UserError
from mtgdm.student.template import RENDER_ERRORS, student_template
from mtgdm.thoughts import split_thoughts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is read but not trained."""

_BATCH = 512
_MARK = "mtgdm-user-mark"


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


@dataclass(frozen=True)
class _Placed:
    """A rendered conversation and where its trained turns stand in it, end of turn included."""

    text: str
    spans: list[tuple[int, int]]


class Chat:
    """A tokenizer with the chat template of a student."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, name: str, *, thoughts: bool | None = False
    ) -> None:
        """`name` is what the user calls the model, for errors.

        `thoughts` says whether the student writes its thoughts before an answer; None leaves it to the template.
        The tokenizer gets the student's template, by which it is saved and asked from here on.
        """
        self.tokenizer = tokenizer
        self.name = name
        self.fingerprint_of_base = template_fingerprint(tokenizer.chat_template)
        self._template = student_template(tokenizer, name, thoughts=thoughts)
        tokenizer.chat_template = self._template.text

    @property
    def template(self) -> str:
        """The student's chat template."""
        return self._template.text

    @property
    def thoughts(self) -> bool:
        """Whether the student writes its thoughts before an answer."""
        return self._template.thoughts

    @property
    def decided(self) -> tuple[str, ...]:
        """What the student's template decides that its base's left to whoever renders it, in words."""
        return self._template.decided

    @property
    def fingerprint(self) -> str:
        """A short hash of the template: training, evaluation and package must use the same."""
        return template_fingerprint(self.template)

    @property
    def fingerprints(self) -> frozenset[str]:
        """What a training may have written down: an earlier mtgdm wrote that of the base's template."""
        return frozenset({self.fingerprint, self.fingerprint_of_base})

    @cached_property
    def answer_start(self) -> str:
        """What the template writes between the text of a question and the answer."""
        return self._render([{"role": "user", "content": _MARK}], ask=True).rpartition(_MARK)[2]

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
        return self.tokens(self.prompt_text(messages))

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The text after which the student writes its answer, as the template writes it."""
        self._refuse_control_tokens(messages)
        return self._render(_as_asked(messages), ask=True)

    def trained_text(self, messages: Sequence[Message]) -> str:
        """A conversation that ends with an answer, as the student was trained on that answer."""
        return self._placed(messages)[-1].text

    def render(self, messages: Sequence[Message], ask: bool) -> str:
        """A conversation as the template writes it; `ask` ends it where the next answer begins."""
        return str(
            self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
        )

    def encode(self, conversations: Sequence[Sequence[Message]]) -> Iterator[Encoded]:
        """Tokens and labels of conversations, all that `encode_each` gives in one line; raises ChatProblem."""
        return chain.from_iterable(self.encode_each(conversations))

    def encode_each(self, conversations: Sequence[Sequence[Message]]) -> Iterator[list[Encoded]]:
        """Tokens and labels of each conversation.

        They are one sequence where the template writes an earlier answer as it wrote it when it was asked for, else
        one for each answer (Qwen3 leaves the empty thought out of earlier turns). Raises ChatProblem.
        """
        waiting = iter(conversations)
        while batch := list(islice(waiting, _BATCH)):
            placed = [self._placed(messages) for messages in batch]
            found = self.tokenizer(
                [one.text for several in placed for one in several],
                add_special_tokens=False,
                return_offsets_mapping=True,
            )
            tokenized = zip(found["input_ids"], found["offset_mapping"], strict=True)
            for messages, several in zip(batch, placed, strict=True):
                encoded = [self._labelled(one, *next(tokenized)) for one in several]
                whole = [one for one in encoded if one is not None]
                if len(whole) < len(encoded):
                    # A token lies across the edge of a turn, which the student can never meet: it reads the prompt's
                    # tokens and writes its own.
                    whole = [self._in_pieces(one) for one in self._apart(messages)]
                yield whole

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token as text; a token that is a part of a character as the tokenizer writes it."""
        texts = [str(self.tokenizer.decode([number])) for number in ids]
        names = self.tokenizer.convert_ids_to_tokens(list(ids))
        return [
            f"<{name}>" if "\ufffd" in text else text.replace("\n", "\\n")
            for text, name in zip(texts, names, strict=True)
        ]

    def tokens(self, text: str) -> list[int]:
        """A text as tokens, nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    # --- labels ---

    def _labelled(self, placed: _Placed, ids: list[int], offsets: list[tuple[int, int]]) -> Encoded | None:
        """Tokens and labels; None where a token lies across the edge of a trained turn."""
        edges = [edge for span in placed.spans for edge in span]
        if any(begin < edge < end for begin, end in offsets for edge in edges):
            return None
        # NFC may leave a token without a width of its own; it belongs to the character before it.
        labels = [
            number
            if any(
                first <= begin and end <= last and (begin < end or first < begin)
                for first, last in placed.spans
            )
            else IGNORED
            for number, (begin, end) in zip(ids, offsets, strict=True)
        ]
        return Encoded(ids, labels)

    def _in_pieces(self, placed: _Placed) -> Encoded:
        """A single turn and its prompt, each made into tokens by itself."""
        ((first, last),) = placed.spans
        prompt, turn, rest = (
            self.tokens(part) for part in (placed.text[:first], placed.text[first:last], placed.text[last:])
        )
        return Encoded(prompt + turn + rest, [IGNORED] * len(prompt) + turn + [IGNORED] * len(rest))

    # --- where the answers stand ---

    def _placed(self, messages: Sequence[Message]) -> list[_Placed]:
        self._refuse_control_tokens(messages)
        for place in _trained(messages):
            self._check_thoughts(messages[place])
        whole = self._in_one(messages)
        return [whole] if whole else self._apart(messages)

    def _apart(self, messages: Sequence[Message]) -> list[_Placed]:
        """Each trained answer behind the very prompt that asks for it."""
        return [self._alone(messages[: place + 1]) for place in _trained(messages)]

    def _in_one(self, messages: Sequence[Message]) -> _Placed | None:
        """All answers in one text; None where the template writes one otherwise than it was asked for."""
        text = self._answered(messages)
        spans = []
        for place in _trained(messages):
            prompt = self._render(_as_asked(messages[:place]), ask=True)
            if not text.startswith(prompt):
                return None
            turn = self._turn(self._to_write(messages[place], prompt), text, len(prompt))
            if turn is None:
                return None
            spans.append((len(prompt), turn))
        return _Placed(text, spans)

    def _turn(self, written: str, text: str, begin: int) -> int | None:
        """Where the turn ends that begins with what is to be written; None where another text stands there."""
        form = next((form for form in _forms(written) if text.startswith(form, begin)), None)
        end = None if form is None else self._end_of_turn_pattern.match(text, begin + len(form))
        return end and end.end()

    def _alone(self, messages: Sequence[Message]) -> _Placed:
        """The last answer behind the very prompt that asks for it, in the form that the template gives to its text."""
        prompt = self._render(_as_asked(messages[:-1]), ask=True)
        text = self._answered(messages)
        answer = _answer(messages[-1])
        written = self._to_write(messages[-1], prompt).removesuffix(answer) + self._ended(answer, text)
        return _Placed(prompt + written, [(len(prompt), len(prompt + written))])

    def _ended(self, answer: str, text: str) -> str:
        """An answer as a template writes it at the end of a text, with its end of turn."""
        end = self._end_of_turn_pattern.pattern
        for form in _forms(answer):
            if found := re.search(rf"(?P<ended>{re.escape(form)}(?:{end})).*\Z", text, re.DOTALL):
                return found["ended"]
        if not any(form in text for form in _forms(answer)):
            raise ChatProblem(f"the chat template of {self.name} changes the text of an answer")
        raise ChatProblem(
            f"the chat template of {self.name} writes no end-of-turn token after an answer",
            hint="a student trained so would never stop; use the model's -Instruct variant",
        )

    def _answered(self, messages: Sequence[Message]) -> str:
        """A conversation as the template writes it, with the end of its last turn."""
        text = self._render([*_as_asked(messages[:-1]), self._full(messages[-1])], ask=False)
        if messages[-1]["role"] == "assistant" and text.endswith(_forms(_answer(messages[-1]))):
            text = text.rstrip() + self._next_turn_token
        return text

    @cached_property
    def _next_turn_token(self) -> str:
        """The token that follows an answer where another question does: GLM-4's template writes no other end."""
        turns = [{"role": role, "content": _MARK} for role in ("user", "assistant", "user")]
        found = self._end_of_turn_pattern.match(self._render(turns, ask=False).split(_MARK)[2])
        return found.group().lstrip() if found else ""

    # --- thoughts ---

    def _check_thoughts(self, message: Message) -> None:
        thoughts, answer = _parts(message)
        if not answer.strip():
            raise ChatProblem("the answer is empty")
        if thoughts and not self.thoughts:
            raise ChatProblem(
                "the answer comes with thoughts, and this student is asked for answers without",
                hint="--thoughts keep trains them, --thoughts drop leaves them out",
            )

    def _to_write(self, message: Message, prompt: str) -> str:
        """The student's own text of a turn: thoughts, but for the tag that the prompt has opened, and answer."""
        full = self._full(message)["content"]
        opening = self._template.opening
        if opening and prompt.endswith(opening):
            return full.removeprefix(f"<{self._template.opened_tag}>\n")
        return full

    def _full(self, message: Message) -> Message:
        """A message as a template is given it where it is the last: with the thoughts before the answer."""
        if message["role"] != "assistant":
            return _as_asked([message])[0]
        thoughts, answer = _parts(message)
        if not self.thoughts or not (thoughts or self._template.knows_thoughts):
            return {"role": "assistant", "content": answer}
        tag = self._template.opened_tag or "think"
        return {"role": "assistant", "content": f"<{tag}>\n{thoughts}\n</{tag}>\n\n{answer}"}

    # --- rendering ---

    def _render(self, messages: Sequence[Message], *, ask: bool) -> str:
        try:
            return self.render(messages, ask)
        except RENDER_ERRORS as error:
            raise ChatProblem(f"the chat template of {self.name} refuses the row: {error}") from error

    def _refuse_control_tokens(self, messages: Sequence[Message]) -> None:
        for message in messages:
            thoughts = str(message.get("reasoning_content") or "")
            found = self._control_pattern.search(message["content"]) or self._control_pattern.search(thoughts)
            if found:
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


def _trained(messages: Sequence[Message]) -> list[int]:
    """The places of the answers that are trained."""
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ChatProblem("the row has no answer to train on")
    weights: dict[int, Any] = {place: messages[place].get("weight") for place in answers}
    trained = [place for place in answers if weights[place] != 0]
    if not trained:
        raise ChatProblem("every answer of the row has the weight 0: nothing of it is to be trained")
    return trained


def without_thoughts(message: Message) -> Message:
    """A message as a later turn sees it: an answer without the thoughts that led to it."""
    if message["role"] != "assistant":
        return message
    return {
        **{key: value for key, value in message.items() if key != "reasoning_content"},
        "content": _answer(message),
    }


def has_thoughts(message: Message) -> bool:
    """Whether an answer comes with thoughts, in its text or beside it."""
    return message["role"] == "assistant" and bool(_parts(message)[0])


def _as_asked(messages: Sequence[Message]) -> list[Message]:
    """Messages as a template is given them: texts alone, of earlier answers without their thoughts."""
    return [
        {
            "role": message["role"],
            "content": _answer(message) if message["role"] == "assistant" else _clean(message["content"]),
        }
        for message in messages
    ]


def _answer(message: Mapping[str, Any]) -> str:
    return _parts(message)[1]


def _parts(message: Mapping[str, Any]) -> tuple[str, str]:
    """Thoughts and answer of an assistant's message."""
    inside, answer = split_thoughts(_clean(message["content"]))
    beside = message.get("reasoning_content")
    thoughts = _clean(beside) if isinstance(beside, str) else inside
    return thoughts.strip(), answer


def _clean(text: str) -> str:
    """A lone surrogate, which no tokenizer takes, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _forms(content: str) -> tuple[str, ...]:
    """How templates write a text: as it is, or without the white space around it.

    Those of Llama 2 and Mistral's first models put a space before an answer, which the student then writes.
    """
    return content, content.rstrip(), content.lstrip(), content.strip(), f" {content}", f" {content.strip()}"
