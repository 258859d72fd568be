"""What an adapter adds to each tensor of its base, by the arithmetic of PEFT; what is not known is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import torch

from mtgdm.errors import UserError
from mtgdm.student import adapter_files
from mtgdm.student.base import adapter_config, names_base, training_settings

_PART = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<embedding>embedding_)?(?P<half>[AB])(?:\.weight)?"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?)"
)
_INNOCENT: tuple[Any, ...] = (None, False, [], {}, "", "none")
_REFUSED = {
    "fan_in_fan_out": "layers that hold their weights transposed (Conv1D)",
    "lora_bias": "biases inside LoRA",
    "layer_replication": "replicated layers",
    "megatron_config": "Megatron layers",
    "target_parameters": "LoRA on bare parameters",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "arrow_config": "Arrow",
    "use_bdlora": "block-diagonal LoRA",
    "ensure_weight_tying": "tied adapters of embeddings and output",
}
"""Settings of PEFT under which the sum W + s·BA is not the whole truth."""
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""How A and B may begin; PiSSA, OLoRA, CorDA, LoftQ and their like change the base as well."""
_SCALING = {"r": "lora_r", "lora_alpha": "lora_alpha", "use_rslora": "lora_rslora"}
"""What the sum is scaled by, and the settings of `mtgdm train` it came from."""


@dataclass(frozen=True)
class Pair:
    """The two factors of a layer, in float32: A (rank, in) and B (out, rank), and DoRA's magnitudes (out)."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """How many numbers lie between the factors."""
        return self.a.shape[0]

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """W + s·BA, with DoRA each row brought to its trained length."""
        total = torch.addmm(weight, self.b, self.a, alpha=self.scale)
        if self.magnitude is not None:
            total *= (self.magnitude / torch.linalg.norm(total, dim=1)).unsqueeze(1)
        return total


@dataclass(frozen=True)
class Lora:
    """A finished adapter: pairs by the tensor they change, and tensors that were trained as a whole."""

    config: Mapping[str, Any]
    pairs: Mapping[str, Pair]
    replaced: Mapping[str, torch.Tensor]
    tokens: Mapping[str, tuple[list[int], torch.Tensor]] = field(default_factory=dict)
    """Rows that were trained alone, by the tensor they take a place in."""

    def tensor(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A tensor of the base as it was trained to be, in float32; with rows of zeros where it had fewer of them."""
        weight = self.replaced.get(name, weight).float()
        if name in self.tokens:
            places, values = self.tokens[name]
            missing = max(0, max(places) + 1 - len(weight))
            weight = torch.nn.functional.pad(weight, (0, 0, 0, missing))
            weight[places] = values.float()
        return self.pairs[name].added_to(weight) if name in self.pairs else weight

    def part_ways(self, one: str, other: str) -> bool:
        """Whether two tensors that are one in the base are two after the training."""
        if one in self.pairs or other in self.pairs:
            return True
        first, second = self.replaced.get(one), self.replaced.get(other)
        if first is None and second is None:
            return False
        return first is None or second is None or not torch.equal(first, second)

    def check(self, shapes: Mapping[str, tuple[int, ...]], base: str, where: Path) -> None:
        """UserError where a tensor of the adapter has no counterpart of its shape in the base."""
        for name, pair in self.pairs.items():
            _check_shape(name, (pair.b.shape[0], pair.a.shape[1]), shapes, base, where)
        for name, tensor in self.replaced.items():
            _check_shape(name, tuple(tensor.shape), shapes, base, where)
        for name, (_, values) in self.tokens.items():
            _check_shape(name, (shapes.get(name, (0,))[0], values.shape[1]), shapes, base, where)


def _check_shape(
    name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], base: str, where: Path
) -> None:
    if shapes.get(name) != shape:
        found = f"has the shape {shapes[name]} there" if name in shapes else "is not there"
        raise UserError(
            f"the adapter does not fit its base {base}: {name}, for which it holds {shape}, {found}",
            where=where,
            hint=f"was it trained on another model? {names_base(str(where))}",
        )


def read(folder: Path) -> Lora:
    """The adapter of a folder; UserError where it is of a kind whose sum is not known here."""
    path = folder / "adapter_config.json"
    config = config_of(folder)
    if problems := config_problems(config):
        raise UserError(
            f"an adapter with {' and '.join(problems)} cannot be merged piece by piece",
            where=path,
            hint="merge it with PEFT's merge_and_unload()",
        )
    return _sorted(config, adapter_files.tensors(folder), path)


def config_of(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder; UserError where its factors would be scaled otherwise than in the training.

    No weight would tell.
    """
    config, where = adapter_config(str(folder)), folder / "adapter_config.json"
    trained = training_settings(str(folder))
    for key, setting in _SCALING.items():
        if setting in trained and config.get(key, False) != trained[setting]:
            raise UserError(
                f"`{key}` is {config.get(key)}, and the training had {trained[setting]}: training.json says so",
                where=where,
                hint="put the file of the training back",
            )
    if not isinstance(config.get("lora_alpha"), int | float):
        raise UserError(f"`lora_alpha` is {config.get('lora_alpha')!r}, which is no number", where=where)
    return config


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """What an adapter's configuration asks for that the merge does not do."""
    problems = [what for key, what in _REFUSED.items() if config.get(key) not in _INNOCENT]
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        problems.append(f"the start {config['init_lora_weights']!r}, which changes the base too")
    return problems


def _sorted(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], where: Path) -> Lora:
    halves: dict[str, dict[str, torch.Tensor]] = {}
    replaced: dict[str, torch.Tensor] = {}
    tokens: dict[str, tuple[list[int], torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if trained := adapter_files.tokens_of(key, config):
            tokens[trained[0]] = trained[1], tensor
            continue
        name = adapter_files.plain_name(key)
        if name is None:
            continue
        if part := _PART.fullmatch(name):
            # The factors of an embedding stand the other way round: A is (rank, tokens), B is (width, rank).
            kind = "magnitude" if part["magnitude"] else f"{part['embedding'] or ''}{part['half']}"
            halves.setdefault(part["module"], {})[kind] = tensor.float()
        elif "lora_" in name or "token_adapter" in name:
            raise UserError(f"the adapter holds a tensor of an unknown kind: {key}", where=where)
        else:
            replaced[name] = tensor
    pairs = {f"{module}.weight": _pair(module, found, config, where) for module, found in halves.items()}
    return Lora(config, pairs, replaced, tokens)


def _pair(module: str, found: Mapping[str, torch.Tensor], config: Mapping[str, Any], where: Path) -> Pair:
    if found.keys() == {"embedding_A", "embedding_B"}:
        a, b = found["embedding_B"].T, found["embedding_A"].T
        rank = a.shape[0]
    elif found.keys() - {"magnitude"} == {"A", "B"}:
        a, b = found["A"], found["B"]
        rank = a.shape[0]
    else:
        raise UserError(f"the adapter of {module} is not whole or of an unknown kind", where=where)
    alpha = _pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    scale = alpha / (sqrt(rank) if config.get("use_rslora") else rank)
    return Pair(a.contiguous(), b.contiguous(), scale, found.get("magnitude"))


def _pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The first pattern that the end of a module's name matches, as PEFT looks it up."""
    fitting: Iterable[float] = (
        value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)
    )
    return next(iter(fitting), default)
