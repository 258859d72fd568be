"""The memory a run is expected to take, against what PyTorch really keeps."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from mtgdm.student.noise import quiet

with quiet():
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter
    from transformers import AutoConfig, AutoModelForCausalLM, MambaConfig

    from mtgdm.student.adapter import LoraSettings
    from mtgdm.student.memory import NF4_BYTES, Demand, Memory, checkpoint_bytes, peak_bytes, shape_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

POSITIONS = 1024


@pytest.fixture(autouse=True)
def without_the_libraries_warnings() -> Iterator[None]:
    with quiet():
        yield


def lora(dropout: float = 0.0) -> LoraConfig:
    return LoraSettings(rank=16, alpha=32, dropout=dropout, targets="all-linear").config


def config_of(family: str) -> Any:
    more = {"head_dim": 64} if family == "qwen3" else {}
    return AutoConfig.for_model(
        family,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
        **more,
    )


def base_of(config: Any, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]


def kept_bytes(
    config: Any, dropout: float, *, narrow: bool, checkpointing: bool = False, packed: bool = False
) -> int:
    """Bytes that a forward pass keeps for the backward pass, by PyTorch's own hooks."""
    dtype = torch.bfloat16 if narrow else torch.float32
    model: Any = get_peft_model(base_of(config, dtype), lora(dropout))
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    own = {value.untyped_storage().data_ptr() for value in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.zeros((1, POSITIONS), dtype=torch.long)
    places = {"position_ids": torch.arange(POSITIONS // 4).repeat(4)[None]} if packed else {}
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow),
    ):
        model.train().model.model(input_ids=tokens, use_cache=False, **places)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize(
    ("narrow", "dropout", "most"),
    [(True, 0.05, 1.02), (True, 0.0, 1.02), (False, 0.05, 1.02), (False, 0.0, 1.25)],
)
def test_what_a_batch_keeps_is_known_before(family: str, narrow: bool, dropout: float, most: float) -> None:
    config = config_of(family)
    shape = shape_of(config, lora(dropout))
    assert shape is not None
    width, mask = 2 if narrow else 4, 4 if dropout else 0
    expected = POSITIONS * shape.kept_per_position(width=width, mask=mask)
    real = kept_bytes(config, dropout, narrow=narrow)
    assert 0.97 * real < expected < most * real
    expected = POSITIONS * shape.kept_per_position(width=width, mask=mask, bin_tokens=POSITIONS)
    real = kept_bytes(config, dropout, narrow=narrow, packed=True)
    assert 0.97 * real < expected < most * real


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at once: every operation is looked at."""

    def __init__(self, apart: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held = {tensor.untyped_storage()._cdata: 0 for tensor in apart}
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._held:
            return
        self._held[storage._cdata] = storage.nbytes()
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self._now -= self._held.pop(key, 0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("vocabulary", [1_000, 30_000])
def test_a_batch_takes_what_was_expected_of_it(vocabulary: int, checkpointing: bool) -> None:
    config = config_of("qwen2")
    config.vocab_size = vocabulary
    shape = shape_of(config, lora(0.05))
    assert shape is not None
    model: Any = get_peft_model(base_of(config, torch.float32), lora(0.05))
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens, trained = torch.zeros((2, POSITIONS), dtype=torch.long), 300
    apart = [*model.parameters(), *model.buffers()]
    with LiveBytes(apart) as live:
        hidden = model.train().model.model(input_ids=tokens, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden.flatten(0, 1)[:trained])
        loss = torch.nn.functional.cross_entropy(logits.float(), torch.zeros(trained, dtype=torch.long))
        del logits, hidden
        loss.backward()  # type: ignore[no-untyped-call]
    expected = Demand(4, 4, False, checkpointing, mask=4).of_batch(shape, 2 * POSITIONS, trained)
    assert sum(expected) == pytest.approx(live.peak, rel=0.04)


def test_weights_adapter_and_optimizer_are_counted_as_they_are_held() -> None:
    import bitsandbytes

    config = config_of("llama")
    shape = shape_of(config, lora())
    assert shape is not None
    model = base_of(config, torch.float32)
    whole = sum(value.numel() for value in model.parameters())
    adapted: Any = get_peft_model(model, lora())
    assert (shape.parameters, shape.adapter) == (whole, adapted.get_nb_trainable_parameters()[0])
    # Two matrices of 1,000 x 256 and the norms are not packed.
    assert shape.parameters - shape.quantizable == 2 * 256_000 + 9 * 256
    layers: Any = bitsandbytes.nn
    packed = layers.Linear4bit(256, 704, bias=False, compress_statistics=True, quant_type="nf4").to("cpu")
    state = packed.weight.quant_state
    held = packed.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert pytest.approx(held, rel=1e-3) == NF4_BYTES * 256 * 704

    plain = Demand(2, 2, False, False, 1).estimate(shape, 100, 10)
    four_bit = Demand(2, 2, True, False, 1).estimate(shape, 100, 10)
    assert plain.weights == 2 * shape.parameters
    assert four_bit.weights == round(
        2 * (shape.parameters - shape.quantizable) + NF4_BYTES * shape.quantizable
    )
    assert (plain.adapter, plain.gradients, plain.optimizer) == tuple(shape.adapter * n for n in (4, 4, 8))
    assert Demand(2, 2, False, False, 1, processes=2).estimate(shape, 100, 10).gradients == 8 * shape.adapter
    assert plain.logits == 12 * 10 * 1000
    assert four_bit.activations == plain.activations + 2 * 256 * 704
    assert checkpoint_bytes(shape) == 12 * shape.adapter


def test_no_batch_of_val_takes_more_than_the_largest_of_train() -> None:
    from pathlib import Path

    from mtgdm.rows import Row
    from mtgdm.student.chat import IGNORED, Encoded
    from mtgdm.student.examples import Example
    from mtgdm.student.trainer import _batches

    def example(length: int, trained: int) -> Example:
        labels = [IGNORED] * (length - trained) + [1] * trained
        return Example(Row("id", [], {}, Path("rows.jsonl"), 1), Encoded([1] * length, labels))

    found = [example(100, 90), example(60, 10), example(50, 10), example(40, 10), example(40, 10)]
    batches = list(_batches(found, positions=130, trained=25))
    assert [[one.length for one in batch] for batch in batches] == [[100], [60, 50], [40, 40]]
    assert [one for batch in batches for one in batch] == found


def test_an_architecture_without_attention_is_not_guessed_at() -> None:
    assert shape_of(MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2), lora()) is None


def test_terms_are_told_largest_unit_first_and_small_ones_left_out() -> None:
    memory = Memory(3 * 2**30, 2**20, 10, 10, 5 * 2**20, 2**29)
    assert str(memory) == "3.5 GiB = 3.0 GiB weights + 1 MiB adapter + 5 MiB activations + 512 MiB logits"
    assert memory.in_mib()["total"] == 3590
    assert peak_bytes("cpu") > 100 * 2**20
