"""A profile's YAML as nodes with their lines: anchors and merge keys within bounds, what YAML misreads refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtgdm.errors import SettingError

if TYPE_CHECKING:
    import yaml
# yaml is imported where it is used: it takes a tenth of the time of `--help`.

MAX_VALUES = 10_000
"""So many values a profile may hold, those of an anchor counted wherever it is named; the shipped ones hold 60."""
MAX_DEPTH = 50

_MERGE = "tag:yaml.org,2002:merge"
_INT = "tag:yaml.org,2002:int"
_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")

Pairs = dict[str, tuple["yaml.Node", "yaml.Node"]]


def compose(path: Path) -> yaml.Node | None:
    """The root of a file; SettingError with file:line where it is no YAML or holds what no setting can be."""
    import yaml

    try:
        node: yaml.Node | None = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SettingError(f"not YAML: {error.problem or error}", where=f"{path}{line}") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise SettingError(f"not YAML: {' '.join(str(error).split())}", where=path) from error
    except RecursionError as error:
        raise SettingError("nested too deeply", where=path) from error
    except OSError as error:
        raise SettingError(f"cannot be read: {error.strerror}", where=path) from error
    if node is not None:
        _count(path, node, {}, ())
    return node


def pairs(path: Path, node: yaml.MappingNode) -> Pairs:
    """The keys of a mapping with the nodes of key and value; those of `<<: *anchor` where it has none of its own."""
    found: Pairs = {}
    merged: Pairs = {}
    for key_node, value_node in node.value:
        if key_node.tag == _MERGE:
            for one in _anchors(path, value_node):
                merged = {**pairs(path, one), **merged}  # of several anchors the first counts
            continue
        key = plain(path, key_node)
        if not isinstance(key, str):
            raise SettingError(f"the key {key!r} is not a text", where=place(path, key_node))
        if key in found:
            raise SettingError(f"the key '{key}' stands twice", where=place(path, key_node))
        found[key] = (key_node, value_node)
    return {**merged, **found}


def plain(path: Path, node: yaml.Node) -> Any:
    """The value of a node."""
    import yaml

    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise SettingError(f"not a plain value: {error.problem}", where=place(path, node)) from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        # What a tag promises and the text does not keep, as in `!!bool x`.
        raise SettingError(
            f"not a plain value: {type(error).__name__}: {error}", hint="quote it", where=place(path, node)
        ) from error
    finally:
        loader.dispose()


def place(path: Path, node: yaml.Node) -> str:
    """`file:line` of a node."""
    return f"{path}:{node.start_mark.line + 1}"


def _anchors(path: Path, node: yaml.Node) -> Iterator[yaml.MappingNode]:
    """The mappings that a merge key names: one, or a list of them."""
    import yaml

    for one in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        if not isinstance(one, yaml.MappingNode):
            raise SettingError(
                "`<<` takes an anchor of a mapping, or a list of them", where=place(path, node)
            )
        yield one


def _count(path: Path, node: yaml.Node, known: dict[int, int], above: tuple[int, ...]) -> int:
    """How many values a node holds, written out; each node is looked at once, however often it is named."""
    import yaml

    if id(node) in known:
        return known[id(node)]
    if id(node) in above:
        raise SettingError("an anchor holds itself", where=place(path, node))
    if len(above) > MAX_DEPTH:
        raise SettingError(f"nested more than {MAX_DEPTH} deep", where=place(path, node))
    total = 1
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(path, node)
    else:
        children = (
            node.value if isinstance(node, yaml.SequenceNode) else [one for two in node.value for one in two]
        )
        total += sum(_count(path, one, known, (*above, id(node))) for one in children)
    if total > MAX_VALUES:
        raise SettingError(
            f"more than {MAX_VALUES:,} values, its anchors written out", where=place(path, node)
        )
    known[id(node)] = total
    return total


def _check_scalar(path: Path, node: yaml.ScalarNode) -> None:
    text = node.value
    if found := _NOT_TEXT.search(text):
        raise SettingError(f"a text with the character U+{ord(found[0]):04X}", where=place(path, node))
    if node.tag != _INT:
        return
    if _OCTAL.fullmatch(text):
        ten = text.replace("_", "").lstrip("+-0") or "0"
        raise SettingError(
            f"{text} would be read as an octal number",
            hint=f"write {ten}, or quote it where it is a text",
            where=place(path, node),
        )
    if ":" in text:
        raise SettingError(
            f"{text} would be read as a number to the base of 60", hint="quote it", where=place(path, node)
        )
