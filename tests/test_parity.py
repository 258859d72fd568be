"""The proof of a GGUF without llama.cpp: what transformers reads, what stays unproved, and what a proof refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mtgdm.export import build, engines, parity, quantize
from mtgdm.export.gguf import convert
from mtgdm.export.merge import merge
from mtgdm.export.parity import Proof
from mtgdm.rows import Row
from mtgdm.student.chat import Chat
from mtgdm.student.noise import quiet
from tests.families import SHAPE, make_checkpoint, make_family

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

GOOD = Proof(
    engine="llama.cpp",
    rows=2,
    positions=100,
    tokens_equal=2,
    mean_kl=1e-6,
    max_logit_difference=1e-5,
    logit_spread=1.0,
    top1_agreement=1.0,
    greedy_equal=2,
    greedy_rows=2,
)


@pytest.fixture(autouse=True)
def _without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(quantize, "is_installed", lambda: False)
    yield


def row(answer: str) -> Row:
    messages = [{"role": "user", "content": "西湖在哪里？"}, {"role": "assistant", "content": answer}]
    return Row("0" * 16, messages, {}, Path("rows.jsonl"), 1)


END = 9

ROWS = [row("西湖在杭州市，始建于1089年。"), row("It's in Hangzhou 🎉")]


def proved(
    kind: str, folder: Path, rows: Sequence[Row] = ROWS, *, seed: int = 1, quant: str = "f32"
) -> Proof:
    """The proof of a file made of a checkpoint of seed 1 against one of another seed."""
    from mtgdm.student.base import load_tokenizer

    base = make_family(folder / "base", kind)
    checkpoint = make_checkpoint(folder / "checkpoint", base)
    asked = make_checkpoint(folder / "asked", base, seed=seed)
    with quiet():
        tokenizer: Any = load_tokenizer(str(checkpoint), "checkpoint")
        merge(checkpoint, str(base), "base", Chat(tokenizer, "base"), "float32", folder / "merged")
        file = convert(
            folder / "merged", folder / "x.gguf", quant, name="guide", template=tokenizer.chat_template
        ).path
        return parity.prove_all([file], asked, rows, name="base", workspace=folder, merged=folder / "merged")[
            0
        ]


def test_transformers_proves_a_file_of_qwen2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proof = proved("qwen2-tied", tmp_path)
    assert proof.engine == "transformers"
    assert (proof.tokens_equal, proof.greedy_equal, proof.top1_agreement) == (2, 2, 1.0)
    assert proof.failures("f32") == []
    assert capsys.readouterr() == ("", "")


def test_a_file_of_another_student_is_found_out(tmp_path: Path) -> None:
    failures = proved("qwen2-untied", tmp_path, seed=2).failures("f32")
    assert any("mean KL" in failure for failure in failures)
    assert any("a logit differs" in failure for failure in failures)


@pytest.mark.parametrize("kind", ["qwen3", "llama3"])
def test_a_model_that_transformers_reads_wrongly_stays_plainly_unproved(kind: str, tmp_path: Path) -> None:
    proof = proved(kind, tmp_path)
    assert proof.engine is None
    assert "mtgdm[llama]" in str(proof)
    assert proof.failures("f32") == []


def test_without_rows_nothing_is_proved(tmp_path: Path) -> None:
    assert "no rows of the split val" in str(proved("qwen2-tied", tmp_path, rows=[]))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"tokens_equal": 1}, "1 of 2 rows have other tokens"),
        ({"mean_kl": 3e-2}, "mean KL 0.03"),
        ({"mean_kl": float("nan")}, "mean KL nan"),
        ({"top1_agreement": 0.5}, "same at 50.0%"),
    ],
)
def test_what_is_beyond_a_limit_is_named(changed: dict[str, Any], reason: str) -> None:
    assert GOOD.failures("q8_0") == []
    (failure,) = dataclasses.replace(GOOD, **changed).failures("q8_0")
    assert reason in failure


def test_a_file_is_held_to_the_numbers_it_was_made_from() -> None:
    rounded = dataclasses.replace(GOOD, mean_kl=5e-5, max_logit_difference=0.04)
    assert rounded.failures("f32", "bfloat16") == []
    assert rounded.failures("f32", "float32") != []


def test_the_divergence_is_that_of_the_definition() -> None:
    sums = parity._Sums()
    model, file = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.25, 0.5]])
    sums.add(model + 3, file)  # a constant added to all logits changes no probability
    assert sums.kl == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))
    assert sums.agreeing == 0


LONG = row("西湖在杭州市，始建于1089年。湖光山色。" * 12)
"""Of more positions than are held at once."""


def test_however_long_a_row_only_its_last_positions_are_compared(tmp_path: Path) -> None:
    proof = proved("qwen2-tied", tmp_path, [LONG, LONG, LONG])
    assert proof.failures("f32") == []
    assert (proof.rows, proof.greedy_rows, proof.greedy_equal) == (3, 2, 2)
    assert proof.positions <= 3 * parity.POSITIONS
    assert proof.positions > 2 * (parity.POSITIONS - parity.ANSWER_TOKENS)


@pytest.mark.parametrize(
    ("answer", "likeliest", "equal"),
    [
        ([3, 4, END], [7, 3, 4, END], True),
        ([3, 4, END], [7, 3, 4, 8], True),
        ([3, 4, END], [7, 3, 4, 5], False),
        ([3, 4, END], [7, 5, 4, END], False),
        ([3, 8, 4, END], [3, 8, 4, END], False),
        ([3] * parity.ANSWER_TOKENS, [3] * parity.ANSWER_TOKENS, True),
        ([3] * parity.ANSWER_TOKENS, [3] * (parity.ANSWER_TOKENS - 1) + [8], False),
    ],
    ids=["equal", "another end", "goes on", "parts", "stops before", "both long", "stops at the last"],
)
def test_an_answer_is_equal_where_a_file_would_write_it_and_stop(
    answer: list[int], likeliest: list[int], equal: bool
) -> None:
    file: Any = SimpleNamespace(ends=lambda token: token in (END, 8))
    assert parity._writes(answer, likeliest, file) is equal


def test_a_model_that_does_not_fit_in_float32_is_proved_layer_by_layer_without_greedy_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity.Need, "whole", 2**60)
    proof = proved("qwen2-tied", tmp_path)
    assert (proof.rows, proof.greedy_rows, proof.greedy_equal) == (2, 0, None)
    assert (proof.tokens_equal, proof.top1_agreement) == (2, 1.0)
    assert proof.failures("f32") == []
    assert "greedy answers not compared" in str(proof)


def test_a_file_that_is_read_without_the_factors_of_its_rotation_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "read_rightly_by_transformers", lambda config: True)
    failures = proved("llama3", tmp_path).failures("q8_0", "bfloat16")
    assert any("mean KL" in failure for failure in failures)


def test_the_rows_that_a_file_is_proved_on_are_the_shortest_of_each_type() -> None:
    def typed(kind: str, length: int) -> Row:
        return dataclasses.replace(row("答" * length), meta={"type": kind})

    rows = [typed("a", 9), typed("b", 8), typed("a", 3), typed("b", 5), typed("a", 4)]
    chosen = [(one.type, len(one.messages[-1]["content"])) for one in build.proof_rows(rows)]
    assert chosen == [("a", 3), ("b", 5), ("a", 4), ("b", 8)]
    assert len(build.proof_rows([row("答")] * 9)) == build.PROOF_ROWS


@pytest.mark.parametrize(
    ("busy", "threads"),
    [
        ([0, 0, 0, 0, 0, 0], 2),
        ([5, 2, 9, 1, 99, 99], 2),
        ([95, 60, 90, 70, 0, 0], 1),
        ([99, 99, 99, 99, 0, 0], 1),
    ],
)
def test_llama_cpp_takes_the_cores_that_are_idle(
    busy: list[float], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of six processors this process may use four, which are two cores."""
    monkeypatch.setattr(engines, "_allowed", lambda: range(4))
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 2)
    monkeypatch.setattr("psutil.cpu_percent", lambda interval, percpu: busy)
    assert engines._threads() == threads


def test_the_memory_hardly_grows_with_the_row_and_counts_what_transformers_holds_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {"vocab_size": 1000, **SHAPE}

    def needed(tokens: int) -> parity.Need:
        return parity.Need(10**9, config, rows=3, longest=tokens)

    cache = 2 * 2 * 4 * 1000 * SHAPE["num_hidden_layers"] * SHAPE["hidden_size"] // 2
    assert needed(2000).of_file(10**9) - needed(1000).of_file(10**9) == parity.GREEDY_ROWS * cache // 2
    assert needed(1000).layered < needed(1000).whole - 10**9
    through_transformers = needed(1000).of_file(10**9)
    monkeypatch.setattr(quantize, "is_installed", lambda: True)
    assert through_transformers - needed(1000).of_file(10**9) == 7 * 10**9


def test_a_model_for_which_the_memory_is_short_stays_plainly_unproved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**20))
    assert "GiB of memory, of which 0.0 are free" in str(proved("qwen2-tied", tmp_path))
