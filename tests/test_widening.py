"""Exact float32 from weights that stay as they are stored, a layer at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtgdm.export import widening
from mtgdm.student.noise import quiet
from tests.families import make_checkpoint, make_family

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in bfloat16 with a DoRA checkpoint, which looks into the weights of its base."""
    folder = tmp_path_factory.mktemp("narrow")
    with quiet():
        import torch
        from transformers import AutoModelForCausalLM

        whole = make_family(folder / "whole", "qwen2-tied")
        model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.bfloat16)
        model.save_pretrained(folder / "base")
    make_checkpoint(folder / "checkpoint", whole, use_dora=True)
    return folder


def adapted(folder: Path, placement: Any) -> Any:
    from mtgdm.student.base import load_model
    from mtgdm.student.generation import ready, with_adapter

    with quiet():
        model = load_model(str(folder / "base"), "base", placement)
        return ready(with_adapter(model, str(folder / "checkpoint"), "base"))


def test_the_logits_are_those_of_the_model_in_float32_and_one_layer_at_a_time_is_wide(narrow: Path) -> None:
    import torch

    from mtgdm.student.base import place

    tokens = torch.arange(1, 120, 3).unsqueeze(0)
    model, wide = adapted(narrow, widening.as_stored(str(narrow / "base"), "base")), []

    def look(*_: Any) -> None:
        layers = model.get_base_model().model.layers
        wide.append([layer.mlp.up_proj.base_layer.weight.dtype == torch.float32 for layer in layers])

    for layer in model.get_base_model().model.layers:
        layer.mlp.register_forward_hook(look)
    assert model.dtype == torch.bfloat16
    with torch.inference_mode():
        expected = adapted(narrow, place("cpu"))(input_ids=tokens).logits
        with widening.computing_in_float32(model):
            found = model(input_ids=tokens).logits
        after = model.get_base_model().model.embed_tokens.weight.dtype
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
    assert wide == [[True, False], [False, True]]
    assert after == torch.bfloat16


def test_weights_can_be_others_than_the_model_has(narrow: Path) -> None:
    import torch

    from mtgdm.student.base import load_model

    base = str(narrow / "base")
    with quiet():
        model = load_model(base, "base", widening.as_stored(base, "base"))
    asked = []

    def nothing(name: str, stored: Any) -> Any:
        asked.append(name)
        return torch.zeros_like(stored, dtype=torch.float32)

    tokens = torch.tensor([[1, 2]])
    with torch.inference_mode(), widening.computing_in_float32(model, nothing):
        assert not model(input_ids=tokens).logits.any()
    assert model(input_ids=tokens).logits.any()
    assert {name for name, _ in model.named_parameters()} <= set(asked)
