"""The vLLM engine with a stand-in for vLLM: what is handed over to it, and what is made of what comes back.

vLLM itself is not among the pins; 0.32 was run by hand on the CPU (12 rows, 2026-11-28), and this stands in for it.
"""

from __future__ import annotations

import importlib.machinery
import logging.config
import os
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
    """Echoes the number of prompt tokens, as the adapter or as the base: one word a step, two rows at once."""

    made: ClassVar[list[dict[str, Any]]] = []
    asked: ClassVar[list[tuple[str, Any, Any, Any]]] = []
    most_in_queue: ClassVar[int] = 0
    dies_after: ClassVar[int | None] = None

    def __init__(self, **options: Any) -> None:
        self.made.append(options)
        self.queue: dict[str, list[str]] = {}
        self.steps = 0
        # What the real one does unless VLLM_CONFIGURE_LOGGING is 0.
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})

    @property
    def llm_engine(self) -> Engine:
        return self

    def add_request(self, request_id: str, prompt: Any, params: Any, *, lora_request: Any) -> str:
        type(self).asked.append((request_id, prompt, params, lora_request))
        who = "student" if lora_request else "base"
        self.queue[request_id] = [who, f" {len(prompt['prompt_token_ids'])}"]
        type(self).most_in_queue = max(self.most_in_queue, len(self.queue))
        return f"{request_id}-inner"

    def step(self) -> list[Any]:
        self.steps += 1
        if self.steps == 1:
            return []  # the prompts are read
        if self.dies_after is not None and self.steps > self.dies_after:
            raise RuntimeError("the engine died")
        written = []
        for request_id in list(self.queue)[:2]:
            word = self.queue[request_id].pop(0)
            finished = not self.queue[request_id]
            if finished:
                del self.queue[request_id]
            answer = types.SimpleNamespace(
                text=word, token_ids=[1], finish_reason="stop" if finished else None
            )
            written.append(types.SimpleNamespace(request_id=request_id, outputs=[answer], finished=finished))
        return written


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    """`import vllm` with the names that are used of it."""

    def keep(**given: Any) -> Any:
        return types.SimpleNamespace(**given)

    names: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": Engine, "SamplingParams": keep},
        "vllm.sampling_params": {
            "StructuredOutputsParams": keep,
            "RequestOutputKind": types.SimpleNamespace(DELTA="delta"),
        },
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": lambda *given: given},
    }
    for name, values in names.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("VLLM_CONFIGURE_LOGGING", "")
    monkeypatch.delenv("VLLM_CONFIGURE_LOGGING")
    Engine.made, Engine.asked, Engine.most_in_queue, Engine.dies_after = [], [], 0, None
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
    adapter = ("student", 1, str(workspace / "data" / "checkpoints" / "base-lora"))
    assert [lora for _, _, _, lora in vllm.asked] == [None] * len(found) + [adapter] * len(found)
    assert len({number for number, _, _, _ in vllm.asked}) == 2 * len(found)
    sampling = [params for _, _, params, _ in vllm.asked]
    assert {one.temperature for one in sampling} == {0.0}
    assert {one.structured_outputs for one in sampling} == {None}
    assert {row["metrics"]["output_tokens"] for row in found} == {2}
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


def test_the_log_goes_on_though_the_engine_sets_up_logging_anew(workspace: Path, vllm: type[Engine]) -> None:
    run_stage(evaluate, workspace, backend="vllm")
    assert os.environ["VLLM_CONFIGURE_LOGGING"] == "0"
    log = next((workspace / "log").glob("eval-*.log")).read_text(encoding="utf-8")
    behind = log.partition("to ask")[2].splitlines()
    assert any("stop" in line or "char_f1" in line or "rows" in line for line in behind[1:]), log


def test_each_answer_is_on_disk_as_it_ends_and_the_next_run_goes_on(
    workspace: Path, vllm: type[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtgdm.evaluation.vllm_engine.ROWS_AT_ONCE", 4)
    vllm.dies_after = 5
    with pytest.raises(RuntimeError, match="the engine died"):
        run_stage(evaluate, workspace, backend="vllm", split="all", allow_leak=True)
    finished = read_rows(workspace / "data" / "eval_outputs.jsonl")
    assert len(finished) == 4
    assert vllm.most_in_queue == 4
    asked, vllm.dies_after = len(vllm.asked), None
    run_stage(evaluate, workspace, backend="vllm", split="all", allow_leak=True)
    rows = read_rows(workspace / "data" / "eval_outputs.jsonl")
    assert len(vllm.asked) - asked == len(rows) - 4 > 4
    assert all(row in rows for row in finished)


def test_without_vllm_the_command_that_installs_it_is_told(workspace: Path) -> None:
    with pytest.raises(UserError, match="vllm is not installed") as caught:
        run_stage(evaluate, workspace, backend="vllm")
    assert 'pip install "mtgdm[vllm]"' in str(caught.value.hint)
