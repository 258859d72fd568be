"""The chat template of a student: that of its base with nothing left open that a server might decide otherwise.

A base's template asks whoever renders it: is the model to think (`enable_thinking`), what is the date
(`strftime_now`, `date_string`), which of several named templates is meant? Each engine answers in its own way,
and then asks another prompt than the trained one. So these are decided once, before the training, and what is
decided is written into the template that the checkpoint, `merged/` and the GGUF carry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from mtgdm.checkpoints import main_template
from mtgdm.domain import Message
from mtgdm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE = date(2024, 7, 26)
"""What a template that writes the date of the day is given: the date that Llama 3's own template falls back to. The
day of the training would change the prompt where a run goes on after midnight."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_CLOCK = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>[^"']*)(?P=quote)\s*\)""")
_SWITCHES = ("enable_thinking", "thinking")
"""What templates call the switch: Qwen3, SmolLM3, GLM-4.5 and most others; DeepSeek-V3.1 and Granite."""
_OPENED = re.compile(r"<(?P<tag>think|thinking|thought|reasoning)>(?P<white>\s*)$")
_PROBE: list[Message] = [{"role": "user", "content": "1"}]
_SYSTEM_PROBE: list[Message] = [{"role": "system", "content": "mtgdm-system-mark"}, *_PROBE]
_FOLDED = (
    "{%- if messages[0]['role'] == 'system' and messages | length > 1 %}"
    "{%- set messages = [{'role': 'user', 'content': messages[0]['content'] + '\\n\\n' + messages[1]['content']}]"
    " + messages[2:] %}{%- endif %}"
)
"""At the head of a template: a system text becomes the beginning of the first question, as Gemma 3 writes it."""

RENDER_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)
"""What a template may raise, which is a program of somebody else's."""

Render = Callable[..., str]
"""A template, messages and the template's variables to the prompt of the answer."""


@dataclass(frozen=True)
class StudentTemplate:
    """A template that renders the same whatever variables it is given."""

    text: str
    thoughts: bool
    """Whether the student writes its thoughts before an answer."""
    opened_tag: str | None
    """The tag of a thought that the prompt has opened already, where it has."""
    opening: str
    """That tag with the white space behind it, as it ends the prompt."""
    knows_thoughts: bool
    """Whether the template was made for a model that thinks."""
    decided: tuple[str, ...] = ()
    """What was decided in place of whoever renders it, in words."""


def student_template(
    tokenizer: PreTrainedTokenizerBase, name: str, *, thoughts: bool | None = False
) -> StudentTemplate:
    """The template by which a student is trained and asked.

    `thoughts` says whether it writes its thoughts; None leaves that to the template: it does where each prompt
    opens a thought, as those of DeepSeek-R1 do, and not where that is a switch.
    """
    given = main_template(tokenizer.chat_template)
    if given is None:
        vocabulary = tokenizer.get_vocab()
        if "<|im_start|>" not in vocabulary or "<|im_end|>" not in vocabulary:
            raise UserError(
                f"{name} has no chat template",
                hint="choose a model that can chat: its name often ends in -Instruct",
            )
        given = CHATML

    def render(template: str, messages: list[Message] = _PROBE, **variables: Any) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True, **variables
            )
        )

    dated = _CLOCK.sub(lambda call: f'"{DATE.strftime(call["format"])}"', given)
    decided = {} if dated == given else {"": f"it writes the date {DATE:%d %b %Y}, whatever the day"}
    try:
        decided |= dict(_decided(dated, render, thinks=bool(thoughts)))
        text = "".join([*decided, dated])
        asked = render(text)
    except RENDER_ERRORS:  # it refuses even this question: the rows will tell, with their line
        return StudentTemplate(dated, bool(thoughts), None, "", knows_thoughts=False)
    opened = _OPENED.search(asked)
    if opened is not None and thoughts is False:
        text += _closing(opened)
        decided[text] = "the thought that each prompt opens is closed at once, for the rows hold none"
        opened = None
    return StudentTemplate(
        text,
        thoughts=bool(thoughts) or opened is not None,
        opened_tag=opened and opened["tag"],
        opening=opened.group() if opened else "",
        knows_thoughts="think" in given.lower(),
        decided=tuple(decided.values()),
    )


def _decided(template: str, render: Render, *, thinks: bool) -> Iterator[tuple[str, str]]:
    """What is set at the head of a template, where it changes what that renders, and the same in words."""
    for switch in _SWITCHES:
        if render(template, **{switch: True}) != render(template, **{switch: False}):
            setting = f"{{%- set {switch} = {'true' if thinks else 'false'} %}}"
            yield setting, f"thinking is {'on' if thinks else 'off'}, whatever a server asks for"
    if render(template, date_string="another day") != render(template):
        yield (
            f'{{%- set date_string = "{DATE:%d %b %Y}" %}}',
            f"it writes the date {DATE:%d %b %Y}, whatever the day",
        )
    if not _takes_system(template, render):
        yield _FOLDED, "a system text is put before the first question, for the template knows none"


def _takes_system(template: str, render: Render) -> bool:
    """Whether a system text is written; some templates refuse it (Gemma 2), some leave it out without a word."""
    try:
        return _SYSTEM_PROBE[0]["content"] in render(template, _SYSTEM_PROBE)
    except RENDER_ERRORS:
        return False


def _closing(opened: re.Match[str]) -> str:
    """The end of a template that closes the thought which it has opened, as Qwen3 writes an empty one."""
    newline = "" if opened["white"].endswith("\n") else "\\n"
    text = f"{newline}\\n</{opened['tag']}>\\n\\n"
    return f"{{%- if add_generation_prompt %}}{{{{ '{text}' }}}}{{%- endif %}}"
