"""Generation in `mtgdm eval`: batches against one row at a time, at equal answers, on one thread of a CPU."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from mtgdm.rows import read_rows
from mtgdm.student.noise import quiet

with quiet():
    from peft import PeftModel

    from mtgdm.student.chat import Chat

ROWS = 48
MAX_NEW_TOKENS = 120
HIDDEN, LAYERS, HEADS = 256, 4, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_known_args()[0].runs
    if hasattr(os, "getloadavg"):
        print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with quiet(), tempfile.TemporaryDirectory() as folder:
        import torch

        torch.set_num_threads(1)
        measure(Path(folder), runs)


def measure(folder: Path, runs: int) -> None:
    from mtgdm.student import generation

    prompts, chat = asked(folder)
    apart = generation.ready(student(len(chat.tokenizer)))
    whole = generation.merged(student(len(chat.tokenizer)))

    def ours(batch: int) -> list[str]:
        found: dict[int, str] = {}
        for part in generation.answers(whole, chat, prompts, batch=batch, max_new_tokens=MAX_NEW_TOKENS):
            found |= {place: answer.text for place, answer in part}
        return [found[place] for place in range(len(prompts))]

    ways: dict[str, Callable[[], list[str]]] = {
        "one row at a time, the adapter apart": lambda: one_at_a_time(apart, chat, prompts),
        "one row at a time, the adapter merged": lambda: ours(1),
        "batches of as many rows as fit": lambda: ours(0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    texts = ours(0)
    tokens = sum(len(chat.tokens(text)) for text in texts)
    for _ in range(runs):
        for name, way in ways.items():
            started = time.perf_counter()
            written = way()
            seconds[name].append(time.perf_counter() - started)
            assert written == texts, f"{name}: other answers"
    print(
        f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, {tokens:,} tokens "
        f"written by a model of {LAYERS} layers of {HIDDEN} in float32, one thread; the same answers each way"
    )
    for name, taken in seconds.items():
        print(f"  {name}: {tokens / statistics.median(taken):,.0f} tokens/s")
    *others, batches = seconds
    for name in others:
        ratios = [one / two for one, two in zip(seconds[name], seconds[batches], strict=True)]
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"  batches against {name}: {statistics.median(ratios):.2f} times as fast ({shown})")


def asked(folder: Path) -> tuple[list[list[int]], Chat]:
    """Prompts of the shipped sample, of all three types, as tokens of the tiny base."""
    from mtgdm.student.base import TINY, load_tokenizer, locate
    from mtgdm.student.chat import Chat

    command = [sys.executable, "-m", "mtgdm", "prompts", "--profile", "quickstart"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    chat = Chat(load_tokenizer(locate(TINY, folder), TINY), TINY)
    rows = islice(read_rows(folder / "data" / "prompts.jsonl"), ROWS)
    return [chat.prompt(row.prompt) for row in rows], chat


def student(vocabulary: int) -> PeftModel:
    """Random weights with an adapter that is not zero: what is written means nothing, how long it takes does."""
    import torch
    from peft import LoraConfig, get_peft_model

    from mtgdm.student.tiny import build_model

    torch.manual_seed(1)
    base = build_model(vocabulary, hidden=HIDDEN, layers=LAYERS, heads=HEADS, feed_forward=4 * HIDDEN)
    adapted = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
    assert isinstance(adapted, PeftModel)
    return adapted


def one_at_a_time(model: Any, chat: Chat, prompts: list[list[int]]) -> list[str]:
    """As it is usually written: `model.generate` for each row, nothing else set."""
    import torch
    from transformers import GenerationConfig

    from mtgdm.student.generation import answer_of, end_tokens

    ends = end_tokens(model, chat)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=ends, pad_token_id=chat.pad
    )
    texts = []
    for prompt in prompts:
        with torch.inference_mode():
            written = model.generate(input_ids=torch.tensor([prompt]), generation_config=config)
        texts.append(answer_of(chat, written[0, len(prompt) :].tolist(), ends, len(prompt), 0.0).text)
    return texts


if __name__ == "__main__":
    main()
