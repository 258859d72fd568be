"""The messages of a row: what other tools write into them is brought into one form, or refused with a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

ROLES = ("system", "user", "assistant")
"""As a tuple: a role that is a list compares with it, where a set would want its hash."""

_LEAVE_OUT = "leave such rows out, or train them with a tool that takes them"
_TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_LOSS = ("train", "training", "loss")
"""axolotl's and others' way to say of a message whether it is trained."""
_PARTLY = ("train_detail", "training_detail")
_ROW_TOOLS = ("tools", "functions")
_ROW_MEDIA = ("images", "image", "videos", "audios")

_SHAREGPT = (
    'jq -c \'{{messages: [.{key}[] | {{role: ({{human: "user", gpt: "assistant"}}[.from] // .from), '
    "content: .value}}]}}' {name} > rows.jsonl"
)
_RENAMED = "jq -c '.messages = .{key} | del(.{key})' {name} > rows.jsonl"
_ALPACA = (
    'jq -c \'{{messages: [{{role: "user", content: ([.instruction, .input // empty] | map(select(. != "")) | '
    'join("\\n"))}}, {{role: "assistant", content: .output}}]}}\' {name} > rows.jsonl'
)
_PAIR = (
    'jq -c \'{{messages: [{{role: "user", content: .{asked}}}, {{role: "assistant", content: .{answer}}}]}}\' '
    "{name} > rows.jsonl"
)
_PREFERENCE = (
    "mtgdm trains one answer a row, the chosen one: "
    '{"messages": [..., {"role": "assistant", "content": CHOSEN}]}'
)
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("question", "response"),
    ("instruction", "response"),
    ("input", "output"),
    ("context", "target"),
)
_LISTS = ("conversations", "conversation", "dialogue", "dialog", "turns", "chat", "history")


class NotARow(Exception):
    """Why a JSON object is no row, with a way out where there is one."""

    def __init__(self, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


def plain(message: Any, place: int, ignored: Counter[str]) -> dict[str, Any]:
    """One message with `role` and `content`, and `weight` and `reasoning_content` where it has them.

    `place` is its number in the row. Keys that mean nothing to a training are counted in `ignored`; what would
    change the training and is not done here raises NotARow, as does a message that is none.
    """
    if not isinstance(message, dict):
        raise NotARow(f"message {place} is {kind(message)}, not an object with `role` and `content`")
    if "from" in message and "value" in message:
        raise NotARow(
            f"message {place} has `from` and `value` (ShareGPT) in place of `role` and `content`",
            _SHAREGPT.format(key="messages", name="FILE"),
        )
    given = {key: value for key, value in message.items() if not _is_nothing(value)}
    for key in _TOOL_KEYS:
        if key in given:
            raise NotARow(f"message {place} has `{key}`: mtgdm trains no tool calls", _LEAVE_OUT)
    if "audio" in given:
        raise NotARow(f"message {place} has `audio`: mtgdm trains text alone", _LEAVE_OUT)
    role = _role(message.get("role"), place)
    made: dict[str, Any] = {"role": role, "content": _content(message, place)}
    if (weight := _weight(given, place)) is not None:
        made["weight"] = weight
    if thought := _thought(given, place):
        if role != "assistant":
            raise NotARow(f"message {place} of the {role} has a thought, which is the assistant's alone")
        made["reasoning_content"] = thought
    known = {"role", "content", "weight", *_THOUGHTS, *_LOSS}
    ignored.update(key for key in given if key not in known)
    return made


def check_beside(rest: Mapping[str, Any]) -> None:
    """NotARow where the keys of a row beside its messages would change the training, and are not read here."""
    for key in _ROW_TOOLS:
        if not _is_nothing(rest.get(key)):
            raise NotARow(f"the row has `{key}`: mtgdm trains no tool calls", _LEAVE_OUT)
    for key in _ROW_MEDIA:
        if not _is_nothing(rest.get(key)):
            raise NotARow(f"the row has `{key}`: mtgdm trains text alone", _LEAVE_OUT)
    if not _is_nothing(rest.get("system")):
        raise NotARow(
            "the row has `system` beside its messages, where it would not be trained",
            'put it in front of the messages: {"role": "system", "content": ...}',
        )


def no_messages(row: Mapping[str, Any], found: Any, name: str) -> NotARow:
    """Why a row has no messages: in which form of which tool it stands, and the command that changes it.

    `found` is what stands under `messages`, `name` the file.
    """
    if isinstance(found, str) and found.lstrip()[:1] == "[":
        return NotARow(
            "`messages` is a list written as text", f"jq -c '.messages |= fromjson' {name} > rows.jsonl"
        )
    if found is not None and found != []:
        return NotARow(f"`messages` is {kind(found)}, not a list of messages")
    if found == []:
        return NotARow("`messages` is empty")
    for key in _LISTS:
        turns = row.get(key)
        if isinstance(turns, list) and turns:
            return _under_another_name(key, turns[0], name)
    body = row.get("body")
    if isinstance(body, dict) and "messages" in body:
        return NotARow(
            "a request of OpenAI's batch API, not a row: its messages stand in `body`",
            f"jq -c '{{messages: .body.messages}}' {name} > rows.jsonl",
        )
    return _of_texts(row, name)


def _under_another_name(key: str, turn: Any, name: str) -> NotARow:
    if isinstance(turn, dict) and "from" in turn:
        return NotARow(
            f"a ShareGPT row (`{key}` with `from` and `value`), and `messages` is missing",
            _SHAREGPT.format(key=key, name=name),
        )
    if isinstance(turn, dict) and "role" in turn:
        return NotARow(
            f"`messages` is missing: they stand under `{key}`", _RENAMED.format(key=key, name=name)
        )
    return NotARow(f"`messages` is missing, and `{key}` is no list of messages with `role` and `content`")


def _of_texts(row: Mapping[str, Any], name: str) -> NotARow:
    if "chosen" in row or "rejected" in row:
        return NotARow("a preference row (`chosen`, `rejected`), and `messages` is missing", _PREFERENCE)
    if "instruction" in row and "output" in row:
        return NotARow(
            "an Alpaca row (`instruction`, `input`, `output`), and `messages` is missing",
            _ALPACA.format(name=name),
        )
    for asked, answer in _PAIRS:
        if asked in row and answer in row:
            hint = _PAIR.format(asked=asked, answer=answer, name=name)
            if isinstance(row[asked], list):
                hint = f"jq -c '{{messages: (.{asked} + .{answer})}}' {name} > rows.jsonl"
            return NotARow(f"a row of `{asked}` and `{answer}`, and `messages` is missing", hint)
    if "text" in row:
        return NotARow(
            "a row of plain `text`, and `messages` is missing: mtgdm trains answers, not running text"
        )
    if "name" in row and ("text_zh" in row or "province" in row):
        return NotARow(
            "a spot record, and `messages` is missing", "prompts are made of it by `mtgdm prompts --spots`"
        )
    keys = ", ".join(f"`{key}`" for key in list(row)[:6])
    return NotARow(f"`messages` is missing{f': the row has {keys}' if keys else ', as is everything else'}")


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    names = ((str, "a text"), (int | float, "a number"), (list, "a list"), (dict, "an object"))
    return next(name for type_, name in names if isinstance(value, type_))


def _is_nothing(value: Any) -> bool:
    """Whether a key says nothing: dumps of OpenAI's objects hold every key there is, most of them null or empty."""
    return value is None or value in ("", [], {})


def _role(role: Any, place: int) -> str:
    if role == "developer":  # OpenAI's newer name
        return "system"
    if role in ("tool", "function", "ipython", "observation"):
        raise NotARow(f"message {place} has the role `{role}`: mtgdm trains no tool calls", _LEAVE_OUT)
    if role in ROLES:
        return str(role)
    found = f"'{role[:40]}'" if isinstance(role, str) else kind(role)
    raise NotARow(f"the `role` of message {place} is {found}, not one of {', '.join(ROLES)}")


def _content(message: Mapping[str, Any], place: int) -> str:
    if "content" not in message:
        raise NotARow(f"message {place} has no `content`")
    content = message["content"]
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        found = "an empty list" if content == [] else kind(content)
        raise NotARow(f"the `content` of message {place} is {found}, not a text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            found = repr(part.get("type"))[:40] if isinstance(part, dict) else kind(part)
            raise NotARow(
                f"the `content` of message {place} holds a part that is no text ({found})", _LEAVE_OUT
            )
        texts.append(text)
    return "".join(texts)


def _weight(given: Mapping[str, Any], place: int) -> int | None:
    """0 or 1 where a message says whether it is trained, by OpenAI's `weight` or by a flag of other tools."""
    for key in _PARTLY:
        if key in given:
            raise NotARow(f"message {place} has `{key}`: mtgdm trains an answer as a whole", _LEAVE_OUT)
    said: dict[str, int] = {}
    if "weight" in given:
        value = given["weight"]
        if isinstance(value, bool) or not isinstance(value, int | float) or value not in (0, 1):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            shown = str(value)[:20] if is_number else kind(value)
            raise NotARow(
                f"the `weight` of message {place} is {shown}: 0 is not trained, 1 is, and nothing lies between"
            )
        said["weight"] = int(value)
    for key in _LOSS:
        if key in given:
            if not isinstance(given[key], bool):
                raise NotARow(f"`{key}` of message {place} is {kind(given[key])}, not true or false")
            said[key] = int(given[key])
    if len(set(said.values())) > 1:
        raise NotARow(f"{' and '.join(f'`{key}`' for key in said)} of message {place} contradict each other")
    value = next(iter(said.values()), None)
    # A message is trained unless something says no.
    return value if "weight" in said or value == 0 else None


def _thought(given: Mapping[str, Any], place: int) -> str | None:
    found = {key: given[key] for key in _THOUGHTS if key in given}
    for key, value in found.items():
        if not isinstance(value, str):
            raise NotARow(f"`{key}` of message {place} is {kind(value)}, not a text")
    if len(set(found.values())) > 1:
        raise NotARow(
            f"{' and '.join(f'`{key}`' for key in found)} of message {place} are two different thoughts"
        )
    thought = next(iter(found.values()), "")
    return thought if thought.strip() else None
