"""A student in vLLM, in this process: for thousands of rows on a GPU (`pip install "mtgdm[vllm]"`).

Prompts are made into tokens here, as for every other local student, so that the same tokens are asked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtgdm.contracts import schema_of
from mtgdm.errors import SettingError, UserError
from mtgdm.evaluation.local import Weights
from mtgdm.evaluation.student import Keep, Refuse, Reply, Student, answer_limit, prompt_ids

if TYPE_CHECKING:
    from mtgdm.domain import Domain
    from mtgdm.rows import Row

ROWS_AT_ONCE = 256
"""So many rows are in vLLM's queue at most: it keeps its own batches full, and a kill loses these at most."""
SMALLEST_RANK = 8
"""vLLM knows ranks from 8 on, each twice the one before; an adapter of a lower one fits into it."""


@dataclass
class _Asked:
    """A row that is being answered."""

    row: Row
    texts: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    """Its share of the engine's steps: their shares add up to the time of the run."""

    def add(self, output: Any, seconds: float) -> None:
        """What one step has written, and the share of its time."""
        answer = output.outputs[0]
        self.texts.append(answer.text)
        self.tokens += len(answer.token_ids)
        self.seconds += seconds


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
        chat = generation.load_chat(
            self.weights.source, name, workspace, base_source=self.weights.base_source
        )
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
        self._numbers = 0
        self._in_flight: dict[str, _Asked] = {}
        self.identity = {
            "engine": "vllm",
            "weights": self.weights.states,
            "template": chat.fingerprint,
            "load_in_4bit": load_in_4bit,
            "constrained": constrained,
        }
        self.base_identity = self.weights.base_states

    def ask(self, rows: Sequence[Row], keep: Keep, refuse: Refuse, *, base: bool = False) -> None:
        """Ask for every row, some hundreds in flight; each answer is kept as it ends."""
        # vLLM sets up logging as it is imported, and its way of doing so closes the files of everybody else.
        os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
        from vllm.lora.request import LoRARequest

        if self._engine is None:
            self._engine = self._load().llm_engine
        adapter = (
            LoRARequest("student", 1, self.weights.source) if self.weights.is_adapter and not base else None
        )
        engine, waiting = self._engine, iter(rows)
        in_flight: dict[str, _Asked] = {}
        self._in_flight = in_flight
        since = time.perf_counter()
        while True:
            for row in islice(waiting, ROWS_AT_ONCE - len(in_flight)):
                self._numbers += 1
                in_flight[str(self._numbers)] = _Asked(row)
                # With its type it is what the engine itself works on; without, newer versions warn of it.
                prompt = {"type": "token", "prompt_token_ids": self._prompts[row.id]}
                engine.add_request(str(self._numbers), prompt, self._sampling(row), lora_request=adapter)
            if not in_flight:
                return
            written = engine.step()
            now = time.perf_counter()
            for output in written:
                asked = in_flight[output.request_id]
                asked.add(output, (now - since) / len(written))
                if output.finished:
                    del in_flight[output.request_id]
                    keep(asked.row, self._reply(asked, output, min(ROWS_AT_ONCE, len(rows))))
            since = now if written else since

    def notes(self) -> list[str]:
        """How many rows are in flight, and how much of their answers is written."""
        asked = tuple(self._in_flight.values())
        if not asked:
            return ["the model is being loaded"] if self._engine is None else []
        return [f"{len(asked):,} in flight with {sum(one.tokens for one in asked):,} tokens so far"]

    def _reply(self, asked: _Asked, output: Any, batch_rows: int) -> Reply:
        return Reply(
            "".join(asked.texts),
            output.outputs[0].finish_reason or "unknown",
            len(self._prompts[asked.row.id]),
            asked.tokens,
            asked.seconds,
            batch_rows,
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
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        contract = self._domain.contract(row.type) if self._constrained and row.type is not None else None
        schema = None if contract is None else StructuredOutputsParams(json=schema_of(contract))
        return SamplingParams(
            temperature=0.0,
            max_tokens=self.max_new_tokens,
            stop_token_ids=[self._end_of_turn],
            structured_outputs=schema,
            output_kind=RequestOutputKind.DELTA,
        )


def _rank(adapter: Path) -> int:
    from mtgdm.student import base

    config = base.adapter_config(str(adapter))
    rank = max([config["r"], *config.get("rank_pattern", {}).values()])
    return max(SMALLEST_RANK, 1 << (int(rank) - 1).bit_length())
