"""The vLLM engine with a stand-in for vLLM: what is handed over to it, and what is made of what comes back.

vLLM itself needs a GPU and is not among the pins; its side of the seam is written from its examples.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mtgdm.errors import SettingError, UserError
from mtgdm.stages.eval import run as evaluate
from mtgdm.testing import run as run_stage
from tests.conftest import read_rows
from tests.tiny_student import make_base, teacher_file

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Engine:
    """Echoes the number of prompt tokens, as the adapter or as the base."""

    made: ClassVar[list[dict[str, Any]]] = []
    asked: ClassVar[list[tuple[list[Any], list[Any], Any]]] = []

    def __init__(self, **options: Any) -> None:
        self.made.append(options)

    def generate(self, prompts: Any, sampling: Any, *, lora_request: Any, use_tqdm: bool) -> list[Any]:
        self.asked.append((prompts, sampling, lora_request))
        who = "student" if lora_request else "base"
        return [
            types.SimpleNamespace(
                outputs=[
                    types.SimpleNamespace(
                        text=f"{who} {len(prompt['prompt_token_ids'])}",
                        finish_reason="stop",
                        token_ids=[1, 2],
                    )
                ]
            )
            for prompt in prompts
        ]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    """`import vllm` with the names that are used of it."""

    def keep(**given: Any) -> Any:
        return types.SimpleNamespace(**given)

    names: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": Engine, "SamplingParams": keep},
        "vllm.sampling_params": {"StructuredOutputsParams": keep},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": lambda *given: given},
    }
    for name, values in names.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    Engine.made, Engine.asked = [], []
    return Engine


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    from mtgdm.stages.train import run as train

    make_base(tmp_path / "base")
    teacher_file(tmp_path)
    run_stage(train, tmp_path, student_base="base", device_mode="cpu", max_steps=1, lora_r=4)
    return tmp_path


def test_the_adapter_is_a_request_over_the_base_and_the_tokens_are_ours(
    workspace: Path, vllm: type[Engine]
) -> None:
    run_stage(evaluate, workspace, backend="vllm", compare_base=True)
    found = read_rows(workspace / "data" / "eval_outputs.jsonl")
    for row in found:
        tokens = row["metrics"]["prompt_tokens"]
        assert (row["output"], row["base_output"]) == (f"student {tokens}", f"base {tokens}")
    (made,) = vllm.made
    assert made["model"] == str(workspace / "base")
    assert (made["enable_lora"], made["max_lora_rank"]) == (True, 8)
    (_, sampling, of_base), (_, _, of_student) = vllm.asked
    assert of_base is None
    assert of_student == ("student", 1, str(workspace / "data" / "checkpoints" / "base-lora"))
    assert {one.temperature for one in sampling} == {0.0}
    assert {one.structured_outputs for one in sampling} == {None}
    longest = max(row["metrics"]["prompt_tokens"] for row in found)
    assert made["max_model_len"] == longest + sampling[0].max_tokens


def test_a_whole_model_is_asked_as_it_is_and_compared_with_nothing(
    workspace: Path, vllm: type[Engine]
) -> None:
    ran = run_stage(evaluate, workspace, backend="vllm", model="base", compare_base=True)
    assert any("names no base model, so it is evaluated alone" in line for line in ran.warnings)
    assert "enable_lora" not in vllm.made[0]
    assert read_rows(workspace / "data" / "eval_outputs.jsonl")[0]["output"].startswith("base ")
    with pytest.raises(SettingError, match="compares an adapter with its base"):
        run_stage(evaluate, workspace, backend="vllm", model="base", base_model="base", out="data/x.jsonl")


def test_without_vllm_the_command_that_installs_it_is_told(workspace: Path) -> None:
    with pytest.raises(UserError, match="vllm is not installed") as caught:
        run_stage(evaluate, workspace, backend="vllm")
    assert 'pip install "mtgdm[vllm]"' in str(caught.value.hint)
