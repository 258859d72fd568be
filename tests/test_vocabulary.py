"""Tokenizers as GGUF holds them: rules recognised by what they do, scores from merges, spaces and special tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtgdm.export import pretokenizers, sentencepiece, vocabulary
from mtgdm.export.vocabulary import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED, Vocabulary
from tests.families import FAMILIES, INST, KINDS, WORDS, make_family

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in FAMILIES:
        make_family(folder / kind, kind)
    return folder


def about(model: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    return found


def size_of(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def read(model: Path, **options: Any) -> Vocabulary:
    assert list(vocabulary.problems(model, size_of(model), **options)) == []
    return vocabulary.read(model, size_of(model), **options)


def changed(model: Path, folder: Path, change: Change) -> Path:
    """A copy of a model with another tokenizer.json."""
    copy = Path(shutil.copytree(model, folder / model.name, dirs_exist_ok=True))
    new = about(model)
    change(new)
    (copy / "tokenizer.json").write_text(json.dumps(new, ensure_ascii=False), encoding="utf-8", newline="\n")
    return copy


def problem(model: Path, **options: Any) -> str:
    (found,) = vocabulary.problems(model, size_of(model), **options)
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_each_tokenizer_is_recognised_and_each_place_is_filled_once(kind: str, models: Path) -> None:
    found, words = read(models / kind), WORDS[KINDS[kind].words]
    assert (found.model, found.pre) == (("gpt2", words.rules) if words.rules else ("llama", "default"))
    assert len(set(found.tokens)) == len(found.tokens) == len(found.types) == size_of(models / kind)
    assert bool(found.merges) != bool(found.scores)
    assert found.normalizes == words.nfc


@pytest.mark.parametrize(
    ("rules", "steps"),
    [
        ("smollm", [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}]),
        ("gpt-2", [{"type": "ByteLevel", "use_regex": True}]),
        (None, [{"type": "Digits", "individual_digits": False}, {"type": "ByteLevel", "use_regex": True}]),
        (None, [{"type": "Punctuation"}, {"type": "ByteLevel", "use_regex": True}]),
    ],
)
def test_steps_are_recognised_by_what_they_do(rules: str | None, steps: list[dict[str, Any]]) -> None:
    found = pretokenizers.rules_of(
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "model": {}}
    )
    assert (found.name if found else None) == rules


def test_a_pattern_whose_words_are_kept_and_one_whose_gaps_are_dropped_are_the_same(models: Path) -> None:
    tokenizer = about(models / "phi4-mini")
    split = tokenizer["pre_tokenizer"]["pretokenizers"][0]
    split["behavior"], split["invert"] = "Removed", True
    found = pretokenizers.rules_of(tokenizer)
    assert found is not None and found.name == "gpt-4o"
    split["invert"] = False
    assert pretokenizers.rules_of(tokenizer) is None


def test_an_empty_sequence_changes_no_text(models: Path, tmp_path: Path) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer["normalizer"] = {"type": "Sequence", "normalizers": []}

    assert not read(changed(models / "llama3", tmp_path, change)).normalizes


def test_merges_used_otherwise_are_refused(models: Path, tmp_path: Path) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["ignore_merges"] = True

    assert "uses its merges otherwise" in problem(changed(models / "qwen3", tmp_path, change))


def test_a_token_named_like_one_of_control_is_one(models: Path) -> None:
    found = read(models / "deepseek")
    kinds = dict(zip(found.tokens, found.types, strict=True))
    assert kinds["<｜User｜>"] == CONTROL, "tokenizer.json does not call it special"
    assert kinds["<think>"] == USER_DEFINED


def test_two_tokens_in_front_of_a_text_are_no_bos(models: Path) -> None:
    assert not read(models / "glm4").adds_bos
    assert read(models / "mistral-nemo").adds_bos


# --- SentencePiece's kind ------------------------------------------------------------------------


def test_scores_fall_in_the_order_of_the_merges_and_tokens_have_their_kinds(models: Path) -> None:
    found = read(models / "gemma3")
    tokenizer = about(models / "gemma3")
    ids = tokenizer["model"]["vocab"]
    added = {one["content"] for one in tokenizer["added_tokens"]}
    made = dict.fromkeys("".join(pair) for pair in tokenizer["model"]["merges"])
    scores = [found.scores[ids[token]] for token in made if token not in added]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)
    kinds = dict(zip(found.tokens, found.types, strict=True))
    assert kinds["<0x0A>"] == BYTE
    assert kinds["<start_of_turn>"] == kinds["<mask>"] == kinds["<unused0>"] == CONTROL
    assert kinds["\n\n"] == kinds["  "] == kinds["<b>"] == USER_DEFINED, (
        "runs of spaces as they stand in a text"
    )
    assert found.types[-5:] == [UNUSED] * 5
    assert kinds["▁"] == NORMAL


def tiny(merges: list[str], *, added: tuple[str, ...] = ()) -> dict[str, Any]:
    """A tokenizer of letters and what the merges make, in their order."""
    letters = sorted({letter for merge in merges for letter in merge.replace(" ", "")})
    made = dict.fromkeys(merge.replace(" ", "") for merge in merges)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: place for place, token in enumerate([*bytes_, *made, *letters])}
    return {
        "model": {"vocab": vocabulary, "merges": merges, "byte_fallback": True},
        "added_tokens": [{"content": one, "id": vocabulary[one]} for one in added],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
    }


def test_tokens_in_the_order_of_their_numbers_get_the_scores_of_sentencepiece() -> None:
    scores = sentencepiece.scores(tiny(["a b", "b c", "ab c", "a bc"]), 300)
    assert [scores[token] for token in ("ab", "bc", "abc", "a", "b", "c")] == [0, -1, -2, -3, -4, -5]


def test_merges_of_one_token_that_stand_apart_are_refused() -> None:
    assert list(sentencepiece.problems(tiny(["a b", "b c", "ab c", "c d", "a bc"]))) == [
        "its merges stand in an order that scores cannot tell"
    ]


def test_a_token_that_no_merge_makes_is_refused_where_llama_cpp_would_make_it() -> None:
    tokenizer = tiny(["a b", "b c"])
    tokenizer["model"]["vocab"]["abc"] = 999
    (found,) = sentencepiece.problems(tokenizer)
    assert "never make the token abc" in found
    tokenizer["added_tokens"] = [{"content": "abc", "id": 999}]
    assert list(sentencepiece.problems(tokenizer)) == []


RUNS = ["▁ ▁", "▁▁ ▁▁", "▁ ▁▁", "▁▁ ▁", "▁▁▁ ▁", "▁ ▁▁▁"]


def test_runs_of_spaces_share_the_lowest_score_whatever_their_order() -> None:
    tokenizer = tiny(["a b", *RUNS])
    assert list(sentencepiece.problems(tokenizer)) == []
    scores = sentencepiece.scores(tokenizer, 300)
    assert scores["ab"] == 0
    assert {scores["▁" * count] for count in (1, 2, 3, 4)} == {-1e9}


def test_runs_that_would_be_joined_otherwise_get_scores_of_their_own_or_are_refused() -> None:
    # Of four spaces these make 2 + 2, and the pair furthest left would make 3 + 1.
    apart = tiny(["a b", "▁ ▁", "▁▁ ▁", "▁ ▁▁"])
    assert list(sentencepiece.problems(apart)) == []
    scores = sentencepiece.scores(apart, 300)
    assert scores["ab"] > scores["▁▁"] > scores["▁▁▁"] > -1e9
    mixed = tiny(["a b", "▁ ▁", "▁▁ ▁", "▁▁ ▁▁", "▁ ▁▁"])
    assert list(sentencepiece.problems(mixed)) == ["its merges stand in an order that scores cannot tell"]


# --- spaces in front -----------------------------------------------------------------------------

METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
SPACED = INST.replace("{{ m['content'] + '</s>' }}", "{{ ' ' + m['content'] + '</s>' }}")
SPACED = SPACED.replace("'[INST]' +", "'[INST] ' +")


def with_scheme(scheme: str) -> Change:
    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer["normalizer"] = None
        tokenizer["pre_tokenizer"] = METASPACE | {"prepend_scheme": scheme}

    return change


@pytest.mark.parametrize(
    ("scheme", "template", "in_front"),
    [
        ("never", INST, False),
        ("always", INST, True),
        ("always", SPACED, False),
        ("first", INST, False),
        ("first", SPACED, False),
        ("first", "{% for m in messages %}{{ m['content'] }}{% endfor %}", True),
    ],
)
def test_whether_a_space_is_put_in_front_is_decided_by_what_the_template_writes(
    scheme: str, template: str, in_front: bool, models: Path, tmp_path: Path
) -> None:
    model = changed(models / "mistral", tmp_path, with_scheme(scheme))
    assert read(model, template=template).space_in_front is in_front


@pytest.mark.parametrize(
    ("scheme", "template"),
    [
        ("always", INST.replace("'[INST]' +", "'[INST] ' +")),
        ("first", "{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}"),
    ],
)
def test_a_space_before_some_texts_alone_is_refused(
    scheme: str, template: str, models: Path, tmp_path: Path
) -> None:
    model = changed(models / "mistral", tmp_path, with_scheme(scheme))
    assert "puts a space before some of the texts" in problem(model, template=template)


def test_a_metaspace_that_cuts_at_spaces_is_refused(models: Path, tmp_path: Path) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer["pre_tokenizer"] = METASPACE | {"split": True, "prepend_scheme": "first"}

    assert "changes or cuts texts" in problem(changed(models / "mistral", tmp_path, change))


def test_a_token_looked_for_behind_the_space_is_refused(models: Path, tmp_path: Path) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer["added_tokens"][1]["normalized"] = True

    assert "looks for its token <s> after a space" in problem(changed(models / "llama2", tmp_path, change))


def test_the_tokens_of_phi3_take_the_spaces_behind_them_as_its_name_tells_llama_cpp(
    models: Path, tmp_path: Path
) -> None:
    assert read(models / "phi3").strips_like_phi3
    assert not read(models / "llama2").strips_like_phi3

    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer["added_tokens"][-1]["rstrip"] = False

    other = changed(models / "phi3", tmp_path, change)
    assert "takes the spaces around it" in next(iter(vocabulary.problems(other, size_of(other))))
