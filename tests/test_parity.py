"""The proof of a GGUF without llama.cpp: what transformers reads, what stays unproved, and what a proof refuses."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mtgdm.export import engines, parity, quantize
from mtgdm.export import merge as merging
from mtgdm.export.gguf import convert
from mtgdm.export.merge import merge
from mtgdm.export.parity import Proof
from mtgdm.export.weights import Weights
from mtgdm.rows import Row
from mtgdm.student.chat import Chat
from mtgdm.student.noise import quiet
from tests.families import make_checkpoint, make_family

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
)


@pytest.fixture(autouse=True)
def _without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(quantize, "is_installed", lambda: False)
    yield


def row(answer: str) -> Row:
    messages = [{"role": "user", "content": "西湖在哪里？"}, {"role": "assistant", "content": answer}]
    return Row("0" * 16, messages, {}, Path("rows.jsonl"), 1)


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
        ({"mean_kl": 2e-2}, "mean KL 0.02"),
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


def test_no_layer_ever_answers_for_all_positions_of_a_long_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    positions = set()

    def note(_: Any, __: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 3:
            positions.add(output.shape[0] * output.shape[1])

    monkeypatch.setattr(merging, "MEMORY_SHARE", 0.0)  # whose own comparison has its own number of positions
    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        proof = proved("qwen2-tied", tmp_path, [LONG])
    finally:
        hook.remove()
    assert proof.failures("f32") == []
    assert proof.positions > 3 * engines.POSITIONS_AT_ONCE
    assert max(positions) == engines.POSITIONS_AT_ONCE


def test_what_is_reckoned_for_a_logit_is_no_less_than_it_takes() -> None:
    logits = np.random.default_rng(0).normal(size=(engines.POSITIONS_AT_ONCE, 20_000)).astype(np.float32)
    tracemalloc.start()
    parity._Sums().add(logits, logits)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    both_sides = 2 * 2 * 4 * logits.size  # the logits, and those that a library keeps for itself
    assert peak + both_sides <= parity._BYTES_A_LOGIT * logits.size


def test_the_memory_hardly_grows_with_the_row_and_counts_what_transformers_holds_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_family(tmp_path / "model", "qwen2-tied")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    file = model / "model.safetensors"

    def needed(tokens: int) -> int:
        return parity.memory_needed([file], tokens, config, model)

    cache = 2 * 2 * 4 * 1000 * config["num_hidden_layers"] * config["hidden_size"] // 2
    assert needed(2000) - needed(1000) == cache
    through_transformers = needed(1000)
    monkeypatch.setattr(quantize, "is_installed", lambda: True)
    assert through_transformers - needed(1000) == 2 * sum(
        4 * stored.numbers for stored in Weights(model).stored.values()
    )


def test_a_model_for_which_the_memory_is_short_stays_plainly_unproved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**20))
    assert "of which 0 are free" in str(proved("qwen2-tied", tmp_path))
