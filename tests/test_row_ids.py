"""Ids by the million: the arrays against plain sets, dicts and lists, the blocks against the lines."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtgdm import row_ids, rows
from mtgdm.errors import BadRow
from mtgdm.row_ids import IdList, IdSet, as_ids, lines_in_order
from tests.conftest import write_lines

# Few, so that they meet often; zeros at the end, which numpy cuts off where one is not careful.
IDS = [f"{number:024x}" for number in range(6)] + [f"{number:02x}{'0' * 22}" for number in range(1, 6)]
ids = st.sampled_from(IDS)
MESSAGES = [{"role": "user", "content": "西湖？"}]


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Sizes that a few rows reach, so that every boundary is crossed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_ids, "MERGED_AT", 3)
        patch.setattr(row_ids, "BLOCK_BYTES", 64)
        patch.setattr(row_ids, "_AT_ONCE", 2)
        yield


def keys(of: Sequence[str]) -> bytes:
    return bytes.fromhex("".join(of))


@given(first=st.lists(ids), added=st.lists(ids))
def test_a_set_of_ids_is_a_set(first: list[str], added: list[str]) -> None:
    ours, plain = IdSet(keys(first)), set(first)
    for identity in added:
        assert (identity in ours) == (identity in plain)
        ours.add(identity)
        plain.add(identity)
        assert len(ours) == len(plain)
    assert ours == plain
    assert list(ours) == sorted(plain)
    assert bool(ours) == bool(plain)


@pytest.mark.parametrize("foreign", ["", "1", "F" * 24, " ".join(["ab"] * 12)[:24], "g" * 24, 7, None, ["a"]])
def test_what_is_no_id_of_ours_is_in_no_set_and_goes_into_none(foreign: object) -> None:
    held = IdSet(keys(IDS))
    assert foreign not in held
    assert foreign not in IdList.of(IDS)
    if isinstance(foreign, str):
        with pytest.raises(ValueError, match="no row id"):
            held.add(foreign)


@given(listed=st.lists(ids), asked=st.lists(ids))
def test_a_list_of_ids_knows_the_first_place_of_each(listed: list[str], asked: list[str]) -> None:
    ours = IdList.of(listed)
    first = {identity: place for place, identity in reversed(list(enumerate(listed)))}
    assert list(ours) == listed
    assert ours.places(as_ids(keys(asked))).tolist() == [first.get(identity, -1) for identity in asked]
    assert [ours.place(identity) for identity in asked] == [first.get(identity) for identity in asked]
    assert ours.repeated().tolist() == [first[identity] != place for place, identity in enumerate(listed)]


@given(listed=st.lists(ids, unique=True), held=st.sets(ids))
def test_which_of_a_list_are_in_a_set(listed: list[str], held: set[str]) -> None:
    found = IdList.of(listed).among(IdSet(keys(sorted(held))))
    assert found.tolist() == [identity in held for identity in listed]


@given(lines=st.lists(ids), wanted=st.lists(ids, unique=True))
def test_lines_are_put_in_order_as_a_dict_would(lines: list[str], wanted: list[str]) -> None:
    last: dict[str, int] = {}
    for number, identity in enumerate(lines):
        last.pop(identity, None)
        last[identity] = number
    order = [last[identity] for identity in wanted if identity in last]
    order += [number for identity, number in last.items() if identity not in wanted]
    found = lines_in_order(as_ids(keys(lines)), IdList.of(wanted))
    if order == list(range(len(lines))):
        assert found is None
    else:
        assert found is not None
        assert found.tolist() == order


def row(identity: str | None, text: str) -> str:
    """A line of ours, or one of another tool, whose id is that of its messages."""
    begun = {"messages": [{"role": "user", "content": text}]}
    return json.dumps(begun if identity is None else {"id": identity, **begun}, ensure_ascii=False)


line = st.one_of(
    st.builds(row, ids, st.sampled_from(["", "灵隐寺", "x" * 100])),
    st.builds(row, st.sampled_from([None, "F" * 24, "7"]), st.sampled_from(["西湖", "雷峰塔" * 30])),
    st.sampled_from(["", " ", "\t "]),
    st.builds(lambda identity: f' {{"id" : "{identity}", "messages": {json.dumps(MESSAGES)}}}  ', ids),
    st.builds(lambda identity: f'{{"id": "{identity}"}}', ids),
)


@given(
    lines=st.lists(st.tuples(line, st.sampled_from(["\n", "\r\n"]))),
    mark=st.booleans(),
    torn=st.booleans(),
)
def test_blocks_hold_what_the_lines_hold(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, str]], mark: bool, torn: bool
) -> None:
    text = "".join(line + end for line, end in lines)
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" * mark + (text.rstrip("\n") if torn else text).encode())
    blocks = list(rows.read_blocks(path))
    assert [pair for block in blocks for pair in block.lines()] == list(rows.read_lines(path))
    by_line = [rows._line_id(path, *pair) for pair in rows.read_lines(path)]
    assert [identity for block in blocks for identity in row_ids.hex_digits(block.ids)] == by_line
    data = path.read_bytes()
    for block in blocks:
        for (start, end), (_, held) in zip(block.offset + block.spans, block.lines(), strict=True):
            assert data[start:end] == held


def test_a_block_grows_with_the_line_it_holds() -> None:
    long = b"x" * 1000 + b"\n"
    read = [block.data for block in row_ids.read_blocks(io.BytesIO(b"a\n" + long + b"b\nc"))]
    assert b"".join(read) == b"a\n" + long + b"b\nc"
    assert all(data.endswith(b"\n") for data in read[:-1])


def test_a_bad_line_of_another_form_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *[row(IDS[1], "西湖")] * 20, '{"messages": []}')
    with pytest.raises(BadRow, match="`messages` is empty") as caught:
        list(rows.read_blocks(path))
    assert caught.value.where == f"{path}:21"


@given(count=st.integers(0, 30), numbers=st.sets(st.integers(1, 35)))
def test_lines_can_be_picked_by_their_numbers(
    tmp_path_factory: pytest.TempPathFactory, count: int, numbers: set[int]
) -> None:
    path = tmp_path_factory.getbasetemp() / "picked.jsonl"
    path.write_text("".join(f"{n}\n" * (n % 5 > 0) + "\n" * (n % 5 == 0) for n in range(count)))
    picked = list(rows.read_lines(path, sorted(numbers)))
    assert picked == [pair for pair in rows.read_lines(path) if pair[0] in numbers]
