"""Packing: every row once, in bins that fit, and a row in a bin is computed as if it were alone."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtgdm import rows
from mtgdm.errors import UserError
from mtgdm.stages.train import run as train
from mtgdm.student.noise import quiet
from mtgdm.student.resume import whole_checkpoints
from mtgdm.testing import StageRun
from mtgdm.testing import run as run_stage
from tests.conftest import read_rows
from tests.test_train import QUICK, checkpoint, furthest, killed, points
from tests.tiny_student import make_base, teacher_file

with quiet():
    import torch

    from mtgdm.student import packing
    from mtgdm.student.base import Placement
    from mtgdm.student.chat import IGNORED, Encoded
    from mtgdm.student.examples import Example

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

VOCABULARY = 120
FP32 = Placement("cpu", torch.float32, None)
BF16 = Placement("cpu", torch.float32, torch.bfloat16)
SKEWED = [max(12, int(random.Random(number).lognormvariate(4, 1))) for number in range(300)]


def row_of(name: str) -> rows.Row:
    return rows.Row(name, [], {}, Path("rows.jsonl"), 1)


def example(length: int, seed: int) -> Example:
    """Random tokens, the last third of them trained."""
    ids = random.Random(seed).choices(range(1, VOCABULARY), k=length)
    read = max(1, length * 2 // 3)
    return Example(row_of(str(seed)), Encoded(ids, [IGNORED] * read + ids[read:]))


def model_of(family: str, **settings: Any) -> Any:
    """A random model of two layers whose attention is far from even, so that a leak would show."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet():
        config = AutoConfig.for_model(
            family,
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            **{"initializer_range": 0.2, **settings},
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")  # type: ignore[no-untyped-call]
        return model.eval()


def bins_of(lengths: list[list[int]]) -> list[list[Example]]:
    return [
        [example(length, seed=100 * place + number) for number, length in enumerate(found)]
        for place, found in enumerate(lengths)
    ]


STACKED = [[9, 5, 14], [3, 30], [7]]
"""Tokens of the rows of three bins, one of them with much padding."""


def logits_by_row(model: Any, bins: list[list[Example]]) -> Iterator[tuple[Example, Any]]:
    batch = packing.collate(bins, pad=0, packed=True)
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
    for place, found in enumerate(bins):
        start = 0
        for row in found:
            yield row, logits[place, start : start + row.length]
            start += row.length


def rows_in(batches: list[list[packing.Item]]) -> list[int]:
    return sorted(row for batch in batches for item in batch for row in item)


def steps_of(layout: packing.Layout) -> list[list[int]]:
    """The rows of each step of an epoch, over all processes."""
    shares = [list(packing.Batches(SKEWED, layout, seed=1, rank=rank)) for rank in range(layout.processes)]
    assert len({len(share) for share in shares}) == 1  # all processes compute equally often
    count = layout.grad_accum
    starts = range(0, len(shares[0]), count)
    return [
        rows_in([batch for share in shares for batch in share[start : start + count]]) for start in starts
    ]


# --- bins ----------------------------------------------------------------------------------------


def test_every_row_lies_whole_in_one_bin_and_no_bin_is_longer_than_asked() -> None:
    bins = packing.best_fit(SKEWED, max(SKEWED))
    assert sorted(row for found in bins for row in found) == list(range(300))
    filled = [sum(SKEWED[row] for row in found) for found in bins]
    assert max(filled) <= max(SKEWED)
    assert len(bins) == -(-sum(SKEWED) // max(SKEWED))  # no bin more than the tokens need
    with pytest.raises(ValueError, match="a row of 9 tokens in a bin of 8"):
        packing.best_fit([3, 9], 8)


def test_best_fit_takes_the_fullest_bin_that_has_room() -> None:
    assert packing.best_fit([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]


def test_packing_a_hundred_thousand_rows_takes_no_noticeable_time() -> None:
    lengths = [random.Random(1).randint(20, 2048), *(20 + 7919 * row % 1500 for row in range(100_000))]
    began = time.process_time()
    assert len(packing.best_fit(lengths, 2048)) < 1.02 * sum(lengths) / 2048
    assert time.process_time() - began < 3  # 0.2 measured; each row against each bin would take minutes


def test_an_epoch_has_every_row_once_in_an_order_of_seed_and_epoch() -> None:
    layout = packing.packed(SKEWED, batch=2, grad_accum=4, max_len=max(SKEWED), seed=1)
    order = packing.Batches(SKEWED, layout, seed=1)
    first = list(order)
    assert len(first) == len(order)
    assert rows_in(first) == list(range(300))
    assert list(order) == first == list(packing.Batches(SKEWED, layout, seed=1))
    order.set_epoch(1)
    second = list(order)
    assert (second != first) and len(second) == len(order)
    assert rows_in(second) == list(range(300))
    assert list(packing.Batches(SKEWED, layout, seed=2)) != first


def test_a_step_keeps_its_rows_and_its_share_of_memory() -> None:
    for batch, grad_accum in ((1, 1), (2, 8), (4, 4), (8, 1), (16, 2)):
        found = packing.packed(SKEWED, batch=batch, grad_accum=grad_accum, max_len=2048, seed=1)
        assert found.batch <= batch and max(SKEWED) <= found.bin_tokens <= 2048
        least = found.rows / found.items  # a bin cannot be split over two steps
        assert 0.7 * batch * grad_accum < found.rows_a_step < 1.4 * max(batch * grad_accum, least)


@pytest.mark.parametrize("pack", [False, True])
def test_the_rows_of_a_step_do_not_hang_on_how_it_is_shared(pack: bool) -> None:
    def layout(batch: int, grad_accum: int, processes: int) -> packing.Layout:
        settings = {"batch": batch, "grad_accum": grad_accum, "seed": 1, "processes": processes}
        if pack:
            return packing.packed(SKEWED, max_len=max(SKEWED), **settings)
        return packing.padded(SKEWED, **settings)

    whole = steps_of(layout(16, 1, 1))
    assert [row for step in whole for row in step] != list(range(300))
    assert sorted(row for step in whole for row in step) == list(range(300))
    for way in ((2, 8, 1), (1, 16, 1), (4, 2, 2), (1, 4, 4), (2, 4, 2)):
        assert steps_of(layout(*way)) == whole


def test_where_rows_run_short_a_process_computes_nothing_but_padding() -> None:
    layout = packing.padded([5, 4, 3], batch=2, grad_accum=1, seed=0, processes=2)
    shares = [list(packing.Batches([5, 4, 3], layout, seed=0, rank=rank)) for rank in range(2)]
    assert shares == [[[[0], [1]]], [[[2]]]]
    layout = packing.padded([5, 4], batch=2, grad_accum=1, seed=0, processes=2)
    assert list(packing.Batches([5, 4], layout, seed=0, rank=1)) == [[[]]]
    batch = packing.collate([[]], pad=7, packed=False)
    assert (batch["input_ids"].tolist(), batch["trained"].tolist(), batch["tokens"]) == ([[7]], [], 0)


def test_the_hungriest_batch_is_that_of_all_which_costs_most() -> None:
    layout = packing.padded(SKEWED, batch=4, grad_accum=2, seed=3)
    batch = packing.hungriest(SKEWED, [1] * 300, layout, 3, cost=lambda positions, trained: positions)
    assert max(SKEWED) in [SKEWED[row] for item in batch for row in item]
    trained = [0] * 300
    trained[SKEWED.index(min(SKEWED))] = 5
    batch = packing.hungriest(SKEWED, trained, layout, 3, cost=lambda positions, trained: trained)
    assert [SKEWED.index(min(SKEWED))] in batch


def test_bins_pay_on_a_gpu_where_rows_are_short_and_never_on_a_cpu() -> None:
    def chosen(lengths: list[int], on_cpu: bool = False) -> bool:
        alike = packing.padded(lengths, batch=2, grad_accum=8, seed=0)
        bins = packing.packed(lengths, batch=2, grad_accum=8, max_len=8192, seed=0)
        return packing.pays(alike, bins, on_cpu=on_cpu)

    assert chosen(SKEWED) and not chosen(SKEWED, on_cpu=True)
    assert not chosen([1500] * 50)  # one row a bin
    assert not chosen([*SKEWED, 8000])  # a bin as long as the longest row


def test_the_padding_told_is_that_of_the_batches() -> None:
    lengths = [len_ for len_ in SKEWED if len_ < 300]
    bins = packing.packed(lengths, batch=2, grad_accum=8, max_len=512, seed=3)
    alike = packing.padded(lengths, batch=2, grad_accum=8, seed=3)
    examples = [example(length, seed) for seed, length in enumerate(lengths)]
    computed = sum(
        packing.collate([[examples[row] for row in item] for item in batch], 0, packed=True)[
            "input_ids"
        ].numel()
        for batch in packing.Batches(lengths, bins, 3)
    )
    assert bins.padding == pytest.approx(1 - sum(lengths) / computed)
    assert 0 < alike.padding < 0.2
    assert str(bins).startswith(f"packed: {len(lengths)} rows in {bins.items} bins of")


# --- no leak -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral"])
def test_logits_of_a_packed_row_are_those_of_the_row_alone(family: str) -> None:
    model = model_of(family, **({"sliding_window": 6} if family == "mistral" else {}))
    for row, packed in logits_by_row(model, bins_of(STACKED)):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([row.tokens.ids]), use_cache=False).logits[0]
        assert float((packed - alone).abs().max()) <= 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_another_row_of_the_bin_changes_no_logit(checkpointing: bool, autocast: Any) -> None:
    model = model_of("qwen2").train()
    if checkpointing:
        with quiet():
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
    bins = bins_of(STACKED)
    other = [[bins[0][0], example(5, seed=999), bins[0][2]], *bins[1:]]
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        before = [(row.row.id, logits) for row, logits in logits_by_row(model, bins)]
        after = [(row.row.id, logits) for row, logits in logits_by_row(model, other)]
    changed = [
        one for (one, logits), (_, again) in zip(before, after, strict=True) if not torch.equal(logits, again)
    ]
    assert changed == ["1"]


def test_neither_the_first_token_of_a_row_nor_padding_is_trained() -> None:
    trained_from_the_start = Example(row_of("0"), Encoded([5, 6, 7], [5, 6, 7]))
    batch = packing.collate([[trained_from_the_start] * 2, [trained_from_the_start]], pad=0, packed=True)
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 6, 7], [IGNORED, 6, 7] + [IGNORED] * 3]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]] * 2
    assert batch["input_ids"].tolist() == [[5, 6, 7, 5, 6, 7], [5, 6, 7, 0, 0, 0]]
    assert (batch["trained"].tolist(), batch["targets"].tolist()) == ([0, 1, 3, 4, 6, 7], [6, 7] * 3)
    assert "attention_mask" not in batch  # with one, position_ids would no longer separate the rows


@pytest.mark.parametrize("placement", [FP32, BF16])
def test_a_model_is_tried_before_its_rows_are_packed(placement: Placement) -> None:
    from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

    assert packing.keeps_rows_apart(model_of("qwen2"), placement)
    convolving = model_of("lfm2", initializer_range=0.02, full_attn_idxs=[1])
    with quiet():
        assert not packing.keeps_rows_apart(convolving, placement)  # its window reaches over the border
        bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2))
        mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2))
        assert not packing.keeps_rows_apart(bloom, placement)  # takes no positions
        assert not packing.keeps_rows_apart(mamba, placement)  # carries a state from row to row


# --- the same training ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def workspace(tmp_path: Path, base: Path) -> Path:
    shutil.copytree(base, tmp_path / "base")
    teacher_file(tmp_path)
    return tmp_path


def trained(workspace: Path, **settings: Any) -> StageRun:
    return run_stage(train, workspace, **{**QUICK, **settings})


WHOLE: dict[str, Any] = {
    "max_steps": 2,
    "eval_steps": 1,
    "lora_dropout": 0,
    "lr": 1e-3,
    "scheduler": "constant",
    "warmup": 0,
    "max_len": 256,
    "batch": 5,
    "grad_accum": 2,
}
"""Every step takes all ten rows, so that packed and padded ones hold the same."""


@pytest.mark.parametrize("checkpointing", [False, True])
def test_steps_on_packed_rows_are_those_on_padded_rows(workspace: Path, checkpointing: bool) -> None:
    trained(workspace, packing=False, gradient_checkpointing=checkpointing, **WHOLE)
    padded, finished = points(workspace), checkpoint(workspace).rename(workspace / "padded")
    trained(workspace, packing=True, gradient_checkpointing=checkpointing, **WHOLE)
    packed = points(workspace)
    assert (packed[0]["layout"]["bin_tokens"], padded[0]["layout"]["bin_tokens"]) == (256, 0)
    assert packed[0]["layout"]["items"] < 10
    assert packed[0]["layout"]["items"] == packed[0]["layout"]["items_a_step"]
    for one, other in zip(padded, packed, strict=True):
        for key in ("loss", "grad_norm", "eval_loss"):
            assert one.get(key) == pytest.approx(other.get(key), abs=1e-4)
    assert furthest(finished, checkpoint(workspace)) <= 1e-4


def test_a_killed_packed_run_goes_on_with_the_same_bins(workspace: Path) -> None:
    teacher_file(workspace, train=30)
    settings: dict[str, Any] = {"packing": True, "batch": 2, "grad_accum": 4, "max_len": 256}
    trained(workspace, **settings)
    whole = {point["step"]: point["loss"] for point in points(workspace, "train")}
    assert points(workspace, "start")[0]["layout"]["bin_tokens"] == 256
    assert points(workspace, "train")[-1]["epoch"] > 1  # the kill comes when the rows are packed anew
    finished = checkpoint(workspace).rename(workspace / "whole")
    (workspace / "data" / "checkpoints" / "base-lora.manifest.json").unlink()

    killed(workspace, 6, **settings)
    assert whole_checkpoints(checkpoint(workspace))[-1].mark.step == 4
    trained(workspace, **settings)
    again = {point["step"]: point["loss"] for point in points(workspace, "train")}
    assert again == pytest.approx(whole, abs=1e-6)
    assert furthest(checkpoint(workspace), finished) <= 1e-6


def test_epochs_of_packed_rows_count_steps_by_bins(workspace: Path) -> None:
    trained(workspace, packing=True, max_steps=0, epochs=2, max_len=256, batch=2, grad_accum=2)
    start, end = points(workspace, "start")[0], points(workspace, "end")[0]
    layout = start["layout"]
    assert start["total_steps"] == 2 * -(-layout["items"] // layout["items_a_step"])
    assert end["steps"] == start["total_steps"]


def test_the_log_says_how_the_rows_lie(workspace: Path) -> None:
    ran = trained(workspace, packing=True, max_len=256, max_steps=1)
    assert any(line.startswith("packed: 10 rows in ") for line in ran.printed)
    ran = trained(workspace, max_steps=1, overwrite=True)
    assert any(line.startswith("10 rows, 2 of like length to a batch, ") for line in ran.printed)
    assert points(workspace, "start")[0]["layout"]["bin_tokens"] == 0  # ten rows on a CPU: nothing to gain
    ran = trained(workspace, preview=True)
    assert [line for line in ran.printed if " rows" in line and "padding" in line][1].startswith("packed: ")


def test_a_model_that_would_mix_packed_rows_is_not_trained_packed(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "keeps_rows_apart", lambda *_: False)
    with pytest.raises(UserError, match="the attention of base lets packed rows see one another") as caught:
        trained(workspace, packing=True)
    assert "--no-packing" in str(caught.value.hint)
    monkeypatch.setattr(packing, "pays", lambda *_, **__: True)
    ran = trained(workspace, max_steps=1)
    assert any(line.startswith("no packing: the attention of base would let") for line in ran.printed)
    assert points(workspace, "start")[0]["layout"]["bin_tokens"] == 0
    assert read_rows(workspace / "data" / "teacher.jsonl")
