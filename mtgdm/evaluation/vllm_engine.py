"""A student in vLLM, in this process: for thousands of rows on a GPU (`pip install "mtgdm[vllm]"`).

Prompts are made into tokens here, as for every other local student, so that the same tokens are asked.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtgdm.errors import SettingError, UserError
from mtgdm.evaluation.local import Weights
from mtgdm.evaluation.student import Keep, Refuse, Reply, Student, answer_limit, prompt_ids

if TYPE_CHECKING:
    from mtgdm.domain import Domain
    from mtgdm.rows import Row

ROWS_AT_ONCE = 256
"""So many rows are handed over together: vLLM keeps its own batches full, and a kill loses these at most."""
SMALLEST_RANK = 8
"""vLLM knows ranks from 8 on, each twice the one before; an adapter of a lower one fits into it."""


class Vllm(Student):
    """Greedy; the adapter is a LoRA request over the base, so that one engine answers as both."""

    def __init__(
        self,
        name: str,
        rows: Sequence[Row],
        domain: Domain,
        *,
        workspace: Path,
        base_model: str | None = None,
        load_in_4bit: bool = False,
        constrained: bool = False,
        max_new_tokens: int = 0,
        references: Sequence[str] = (),
    ) -> None:
        if find_spec("vllm") is None:
            raise UserError(
                "vllm is not installed, and this needs it",
                hint='pip install "mtgdm[vllm]", or --backend local',
            )
        from mtgdm.student import generation

        self.weights = Weights(name, base_model, workspace)
        if base_model is not None and not self.weights.is_adapter:
            raise SettingError(
                "--backend vllm compares an adapter with its base alone: one engine holds one model",
                hint="leave out --base-model, or --backend local",
            )
        self.name, self.base_name = self.weights.shown, self.weights.base_model
        chat = generation.load_chat(self.weights.source, name, workspace)
        if self.weights.training is not None:
            self.weights.training.check_chat(chat)
            self.may_think = self.weights.training.thoughts
        self._prompts = {row.id: prompt_ids(chat, row) for row in rows}
        self.max_new_tokens = max_new_tokens or answer_limit(chat, references)
        self._end_of_turn = chat.end_of_turn
        self._tokenizer = chat.tokenizer.name_or_path
        self._domain = domain
        self._load_in_4bit = load_in_4bit
        self._constrained = constrained
        self._engine: Any = None
        self.identity = {
            "engine": "vllm",
            "weights": self.weights.states,
            "template": chat.fingerprint,
            "load_in_4bit": load_in_4bit,
            "constrained": constrained,
        }
        self.base_identity = self.weights.base_states

    def ask(self, rows: Sequence[Row], keep: Keep, refuse: Refuse, *, base: bool = False) -> None:
        """Hand the rows over a few hundred at a time."""
        from vllm.lora.request import LoRARequest

        if self._engine is None:
            self._engine = self._load()
        adapter = (
            LoRARequest("student", 1, self.weights.source) if self.weights.is_adapter and not base else None
        )
        for start in range(0, len(rows), ROWS_AT_ONCE):
            batch = rows[start : start + ROWS_AT_ONCE]
            started = time.perf_counter()
            written = self._engine.generate(
                [{"prompt_token_ids": self._prompts[row.id]} for row in batch],
                [self._sampling(row) for row in batch],
                lora_request=adapter,
                use_tqdm=False,
            )
            seconds = (time.perf_counter() - started) / len(batch)
            for row, output in zip(batch, written, strict=True):
                answer = output.outputs[0]
                keep(
                    row,
                    Reply(
                        answer.text,
                        answer.finish_reason or "unknown",
                        len(self._prompts[row.id]),
                        len(answer.token_ids),
                        seconds,
                        len(batch),
                    ),
                )

    def _load(self) -> Any:
        from vllm import LLM

        weights = self.weights
        longest = max(map(len, self._prompts.values()))
        options: dict[str, Any] = {"quantization": "bitsandbytes"} if self._load_in_4bit else {}
        if weights.is_adapter:
            options |= {"enable_lora": True, "max_lora_rank": _rank(Path(weights.source))}
        return LLM(
            model=weights.base_source if weights.is_adapter else weights.source,
            tokenizer=self._tokenizer,
            max_model_len=longest + self.max_new_tokens,
            seed=0,
            **options,
        )

    def _sampling(self, row: Row) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        contract = self._domain.contract(row.type) if self._constrained and row.type is not None else None
        schema = None if contract is None else StructuredOutputsParams(json=contract.model_json_schema())
        return SamplingParams(
            temperature=0.0,
            max_tokens=self.max_new_tokens,
            stop_token_ids=[self._end_of_turn],
            structured_outputs=schema,
        )


def _rank(adapter: Path) -> int:
    from mtgdm.student import base

    config = base.adapter_config(str(adapter))
    rank = max([config["r"], *config.get("rank_pattern", {}).values()])
    return max(SMALLEST_RANK, 1 << (int(rank) - 1).bit_length())
