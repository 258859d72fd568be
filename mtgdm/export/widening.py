"""Exact float32 from weights that stay as they are stored: a layer holds them wider only while it computes.

Loaded in the dtype of its files a model takes hardly any memory of its own: its weights are the mapped files. So a
model far larger than the memory gives its logits in float32, at the price of one reading for each forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from mtgdm.export.weights import Weights
from mtgdm.student.base import Placement, folder_of

Make = Callable[[str, torch.Tensor], torch.Tensor]


def as_they_are(_: str, stored: torch.Tensor) -> torch.Tensor:
    """The numbers that the model has, in float32."""
    return stored.float()


@contextmanager
def computing_in_float32(model: Any, make: Make = as_they_are) -> Iterator[None]:
    """Let each layer take its weights from `make`, by their names in the model, for as long as it computes.

    The adapter of a PeftModel is part of its layers.
    """
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    hooks = []
    for name, layer in _layers(whole):
        held = _Held(name, layer, make)
        hooks.append(layer.register_forward_pre_hook(held.widen))
        hooks.append(layer.register_forward_hook(held.restore, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _layers(model: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """The parts of a model that compute one after another: embeddings, each decoder layer, norm, output."""
    for name, child in model.named_children():
        if isinstance(child, PreTrainedModel | torch.nn.ModuleList):
            yield from _layers(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def as_stored(source: str, name: str) -> Placement:
    """The dtype that most weights of a model are stored in, on the CPU: loaded so, they stay where they lie."""
    return Placement("cpu", Weights(folder_of(source, name)).main_dtype or torch.float32, None)


class _Held:
    """The weights of a layer as they are stored, while it computes with others."""

    def __init__(self, name: str, layer: torch.nn.Module, make: Make) -> None:
        self._make = make
        self._stored = [
            (f"{name}.{inner}.{key}" if inner else f"{name}.{key}", module, key, weight)
            for inner, module in layer.named_modules()
            for key, weight in module.named_parameters(recurse=False)
        ]

    def widen(self, *_: Any) -> None:
        for name, module, key, weight in self._stored:
            wide = self._make(name, weight.data)
            module.register_parameter(key, torch.nn.Parameter(wide, requires_grad=False))

    def restore(self, *_: Any) -> None:
        for _name, module, key, weight in self._stored:
            module.register_parameter(key, weight)
