"""`mtgdm train` beside TRL's SFTTrainer and training scripts on Trainer: trained tokens a second, the same loss curve.

Without arguments: on one CPU thread, with the tiny base that ships with mtgdm, in CPU-seconds of the training
loop alone. `--device cuda` measures models of the shape of Qwen2.5 with random weights on a GPU instead;
`--device cpu --shape tiny` runs the same path without one, and its figures are no claim.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

CHILD = Path(__file__).parent / "peers" / "train_once.py"
TINY_BASE = Path(__file__).parents[2] / "mtgdm" / "student" / "tiny_base"
JsonObject = dict[str, Any]

CONTENDERS = {
    "ours": "mtgdm train",
    "ours_packed": "mtgdm train --packing",
    "sft": "SFTTrainer, answers only",
    "sft_grouped": "SFTTrainer, group_by_length",
    "sft_packed": "SFTTrainer, packing bfd",
    "plain": "Trainer, answers only, group_by_length",
    "original": "Trainer, batch 1, padded to full length, all tokens",
}
SFT = ("sft", "sft_grouped", "sft_packed")

FASTER_THAN_SFT = 1.3
FASTER_THAN_ORIGINAL = 2.0
SAME_LOSS = 1e-4

LORA_RANK = 16
MAX_LEN = 2048
SHORTEST, LONGEST = 20, 1279
"""Tokens of the rows of the skewed set."""


class Shape(NamedTuple):
    """A Qwen2 model by its measures, from the config.json of the published model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    tied: bool

    @property
    def linear_layers(self) -> list[tuple[int, int]]:
        """In and out of the matrices of one layer, all of which carry an adapter."""
        narrow = self.hidden * self.kv_heads // self.heads
        attention = [(self.hidden, self.hidden), (self.hidden, narrow), (self.hidden, narrow)]
        attention.append((self.hidden, self.hidden))
        return [*attention, *[(self.hidden, self.feed_forward)] * 2, (self.feed_forward, self.hidden)]

    def training_flops(self, lengths: Sequence[int], trained: int) -> float:
        """Operations that a LoRA step over rows of these lengths cannot do without; nothing computed twice counts.

        A frozen matrix of n weights costs 2n forward and 2n backward a token (no gradient of its own), an adapter
        6n; attention costs 2 x hidden x length^2 a layer and row forward (two products, half of each masked),
        three times that with the way back; the output layer 4n at the positions that the loss reads.
        """
        tokens = sum(lengths)
        frozen = self.layers * sum(inner * outer for inner, outer in self.linear_layers)
        adapter = self.layers * LORA_RANK * sum(inner + outer for inner, outer in self.linear_layers)
        attention = 6 * self.layers * self.hidden * sum(length**2 for length in lengths)
        head = 4 * self.hidden * self.vocabulary * trained
        return (4 * frozen + 6 * adapter) * tokens + attention + head


SHAPES = {
    "tiny": Shape(64, 2, 2, 1, 128, 5_442, True),
    "0.5b": Shape(896, 24, 14, 2, 4_864, 151_936, True),
    "7b": Shape(3_584, 28, 28, 4, 18_944, 152_064, False),
}

PEAK_TFLOPS = {
    "H200": 989.4,
    "H100 PCIe": 756.5,
    "H100": 989.4,
    "A100": 312.0,
    "4090": 165.2,
    "L4": 121.0,
}
"""Dense bfloat16 with float32 sums, by a part of the card's name; half of a figure given "with sparsity".

NVIDIA's data sheets of H200, H100 (SXM 1,979 with sparsity, PCIe 1,513), A100 (312) and L4 (242 with
sparsity); for the RTX 4090 the appendix of the Ada architecture's white paper.
"""


# --- rows ----------------------------------------------------------------------------------------


def teacher_rows(folder: Path) -> list[JsonObject]:
    """The offline teacher's rows of the shipped sample, shuffled, all of them to train on."""
    for stage in ("prompts", "teacher"):
        command = [sys.executable, "-m", "mtgdm", stage, "--profile", "quickstart"]
        subprocess.run(
            command,
            cwd=folder,
            env=environment(),
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    lines = (folder / "data" / "teacher.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    random.Random(0).shuffle(found)
    return [row | {"meta": row["meta"] | {"split": "train"}} for row in found]


def skewed_rows(rows: Sequence[JsonObject], count: int) -> list[JsonObject]:
    """Rows of SHORTEST to LONGEST tokens, half of them below 180: slices of the teacher rows' own Chinese texts."""
    texts = (message["content"] for row in rows for message in row["messages"])
    text = "".join(letter for content in texts for letter in content if is_common(letter))
    lengths = [SHORTEST + round((LONGEST - SHORTEST) * (place / (count - 1)) ** 3) for place in range(count)]
    random.Random(1).shuffle(lengths)
    return list(cut_rows(text, lengths))


def is_common(letter: str) -> bool:
    """Whether it is on the first level of GB2312: the tiny base has one token for each of those."""
    return b"\xb0" <= letter.encode("gb2312", "ignore")[:1] < b"\xd8"


def cut_rows(text: str, lengths: Iterable[int]) -> Iterator[JsonObject]:
    """A third of a row is answer, as with the teacher's rows; a character is a token."""
    place = 0
    for number, length in enumerate(lengths):
        content = length - 10  # the ten tokens of the chat template
        text_of_row = (text[place:] + text)[:content]
        place = (place + content) % len(text)
        prompt, answer = text_of_row[: content * 2 // 3], text_of_row[content * 2 // 3 :]
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        yield {"messages": messages, "meta": {"spot": f"row {number}", "split": "train"}}


def write(path: Path, rows: Iterable[JsonObject]) -> str:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return str(path)


# --- runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What one contender's training loop took over one set of rows."""

    seconds: float
    steps: int
    losses: list[float]
    trained: int | None
    """Trained tokens, as this contender counts them; the original's way has no such number."""
    lengths: list[int]
    peak_memory_mib: float | None


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MTGDM_")}
    return kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(
    contender: str, before: JsonObject, sets: dict[str, JsonObject], folder: Path
) -> dict[str, Run] | None:
    """A contender in a process of its own; None where the memory did not suffice."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if before["device"] == "cpu" else {}
    job, result = folder / "job.json", folder / "result.json"
    job.write_text(json.dumps({"contender": contender, "before": before, "sets": sets}), encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, str(CHILD), str(job), str(result)],
        env=environment() | threads,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        check=False,
    )
    if ended.returncode and "out of memory" in ended.stderr.lower():
        return None
    if ended.returncode:
        sys.exit(f"{CONTENDERS[contender]}: {ended.stderr}")
    return {name: Run(**found) for name, found in json.loads(result.read_text(encoding="utf-8")).items()}


def described(name: str, found: Run, rows_a_step: int) -> str:
    lengths = found.lengths
    return (
        f"{name}: {len(lengths):,} rows of {min(lengths):,}-{max(lengths):,} tokens (median "
        f"{statistics.median(lengths):,.0f}, mean {statistics.mean(lengths):,.0f}), {sum(lengths):,} tokens, "
        f"{found.trained:,} of them trained; {rows_a_step} rows a step"
    )


# --- one CPU thread ------------------------------------------------------------------------------


def compare(rounds: int) -> bool:
    """All contenders in turn, so often; whether every claim is met."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = teacher_rows(folder)
        same: JsonObject = {
            "base": str(TINY_BASE),
            "device": "cpu",
            "max_len": MAX_LEN,
            "batch": 2,
            "grad_accum": 4,
            "steps": 0,
            "lr": 2e-3,
            "lora_r": LORA_RANK,
            "load_in_4bit": False,
            "checkpointing": False,
        }
        sets = {
            "uniform": same | {"rows": write(folder / "uniform.jsonl", rows[:24]), "pad_to": 768},
            "skewed": same | {"rows": write(folder / "skewed.jsonl", skewed_rows(rows, 40)), "pad_to": 1280},
        }
        short = [row for row in skewed_rows(rows, 40) if len(row["messages"][0]["content"]) < 120]
        before = same | {"rows": write(folder / "before.jsonl", short[:8]), "pad_to": 256}
        # Every step takes all 16 rows, so that the order in which a contender takes them plays no part.
        curve = same | {
            "rows": write(folder / "curve.jsonl", short[:16]),
            "pad_to": 256,
            "grad_accum": 8,
            "steps": 10,
        }
        found: dict[str, dict[str, list[Run]]] = {set_: {one: [] for one in CONTENDERS} for set_ in sets}
        curves: dict[str, Run] = {}
        for number in range(rounds):
            for contender in CONTENDERS:
                with_curve = number == 0 and contender in ("ours", "ours_packed", "sft", "plain")
                wanted = sets | ({"curve": curve} if with_curve else {})
                runs = run(contender, before, wanted, folder)
                assert runs is not None, "out of memory"
                if with_curve:
                    curves[contender] = runs.pop("curve")
                for set_, one in runs.items():
                    found[set_][contender].append(one)
    print(
        f"One CPU thread, the tiny base of mtgdm in float32, LoRA rank {LORA_RANK} on all linear layers. CPU-seconds "
        f"of the training loop alone; each contender in a process of its own, in turn, the least of {rounds} rounds."
    )
    print(
        "Without Triton, so on every CPU, SFTTrainer computes the output layer at all positions, on a GPU at the "
        "trained ones alone: how far it is behind here says nothing about a GPU."
    )
    for set_, of_contender in found.items():
        print()
        print_comparison(set_, of_contender, rows_a_step=8, pad_to=sets[set_]["pad_to"])
    print()
    return all([*speed_claims(found), *curve_claims(curves)])


def print_comparison(set_: str, found: dict[str, list[Run]], *, rows_a_step: int, pad_to: int) -> None:
    one = found["ours"][0]
    assert one.trained is not None
    assert max(one.lengths) <= pad_to, "the original's way would cut rows"
    print(f"{described(set_, one, rows_a_step)}; the original's way pads to {pad_to:,}")
    print(f"  {'':52} trained tok/s    all tok/s  steps  seconds (spread)  time / ours")
    for contender, runs in found.items():
        assert runs[0].trained in (None, one.trained), f"{contender} trains {runs[0].trained} tokens"
        seconds = [each.seconds for each in runs]
        fewest = min(seconds)
        print(
            f"  {CONTENDERS[contender]:52} {one.trained / fewest:13,.0f} {sum(one.lengths) / fewest:12,.0f}  "
            f"{runs[0].steps:5}  {fewest:7.2f} ({max(seconds) / fewest - 1:4.0%})    {ratio(found, contender):8.2f} x"
        )


def ratio(found: dict[str, list[Run]], contender: str) -> float:
    return min(one.seconds for one in found[contender]) / min(one.seconds for one in found["ours"])


def speed_claims(found: dict[str, dict[str, list[Run]]]) -> Iterator[bool]:
    for set_, runs in found.items():
        fastest = min(SFT, key=lambda contender: ratio(runs, contender))
        yield claim(
            f"{set_}: {FASTER_THAN_SFT} x as fast as SFTTrainer in its fastest setting here "
            f"({CONTENDERS[fastest]})",
            ratio(runs, fastest) >= FASTER_THAN_SFT,
            f"{ratio(runs, fastest):.2f} x",
        )
    yield claim(
        f"skewed: {FASTER_THAN_ORIGINAL} x as fast as the original's way",
        ratio(found["skewed"], "original") >= FASTER_THAN_ORIGINAL,
        f"{ratio(found['skewed'], 'original'):.2f} x",
    )


def curve_claims(curves: dict[str, Run]) -> Iterator[bool]:
    ours = curves["ours"]
    print(
        f"loss curves: {len(ours.losses)} steps over all {len(ours.lengths)} rows ({sum(ours.lengths):,} tokens), "
        f"the same seed, dropout 0: {ours.losses[0]:.4f} .. {ours.losses[-1]:.4f}"
    )
    for contender, one in curves.items():
        if contender == "ours":
            continue
        apart = max(abs(mine - theirs) for mine, theirs in zip(ours.losses, one.losses, strict=True))
        yield claim(
            f"the same loss at every step as {CONTENDERS[contender]}, to {SAME_LOSS:g}",
            apart <= SAME_LOSS,
            f"at most {apart:.1e} apart",
        )


def claim(text: str, met: bool, figure: str) -> bool:
    print(f"{'met    ' if met else 'NOT MET'}  {text}: {figure}")
    return met


# --- models of real shape ------------------------------------------------------------------------


def measure_shapes(arguments: argparse.Namespace) -> None:
    """LoRA in bfloat16 and QLoRA of random weights, packed, beside SFTTrainer in the same run."""
    cuda = arguments.device == "cuda"
    card = card_name() if cuda else "CPU, one thread"
    peak = arguments.peak_tflops or (peak_tflops(card) if cuda else None)
    unit = "second" if cuda else "CPU-second"
    print(f"{card}; peak {f'{peak:g} TFLOPS' if peak else 'not known: --peak-tflops tells it'}")
    if not cuda:
        print("without a GPU: this shows that the path runs, its figures are no claim")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = teacher_rows(folder)
        count = arguments.rows
        files = {
            "uniform": write(folder / "uniform.jsonl", rows[:count]),
            "skewed": write(folder / "skewed.jsonl", skewed_rows(rows, count)),
        }
        before_rows = write(folder / "before.jsonl", rows[-arguments.batch * arguments.grad_accum :])
        for shape_name in arguments.shape or ["0.5b", "7b"]:
            base = make_base(folder / shape_name, SHAPES[shape_name])
            for mode, quantised in (
                ("LoRA, bfloat16", False),
                ("QLoRA, 4-bit, gradient checkpointing", True),
            ):
                same: JsonObject = {
                    "base": base,
                    "device": arguments.device,
                    "max_len": MAX_LEN,
                    "pad_to": MAX_LEN,
                    "batch": arguments.batch,
                    "grad_accum": arguments.grad_accum,
                    "steps": 0,
                    "lr": 2e-4,
                    "lora_r": LORA_RANK,
                    "load_in_4bit": quantised,
                    "checkpointing": quantised,
                }
                sets = {set_: same | {"rows": file} for set_, file in files.items()}
                found: dict[str, list[dict[str, Run] | None]] = {}
                for _ in range(arguments.rounds):
                    for contender in ("ours_packed", "sft", "sft_packed"):
                        runs = run(contender, same | {"rows": before_rows}, sets, folder)
                        found.setdefault(contender, []).append(runs)
                for set_ in sets:
                    print(f"\nQwen2 {shape_name}, {mode if cuda else mode.replace('bfloat16', 'float32')}")
                    of_set = {one: [runs[set_] for runs in all_ if runs] for one, all_ in found.items()}
                    print_shape(set_, of_set, SHAPES[shape_name], arguments, unit, peak)


def print_shape(
    set_: str,
    found: dict[str, list[Run]],
    shape: Shape,
    arguments: argparse.Namespace,
    unit: str,
    peak: float | None,
) -> None:
    one = next((runs[0] for runs in found.values() if runs), None)
    if one is None:
        print("  out of memory, every contender")
        return
    assert one.trained is not None
    print(described(set_, one, arguments.batch * arguments.grad_accum))
    print(f"  {'a ' + unit:30} trained tok    all tok  steps  seconds (spread)  peak MiB    MFU")
    for contender, runs in found.items():
        if not runs:
            print(f"  {CONTENDERS[contender]:30} out of memory")
            continue
        seconds = [each.seconds for each in runs]
        fewest = min(seconds)
        memory = max((each.peak_memory_mib or 0.0) for each in runs)
        flops = shape.training_flops(one.lengths, one.trained)
        print(
            f"  {CONTENDERS[contender]:30} {one.trained / fewest:11,.0f} {sum(one.lengths) / fewest:10,.0f}  "
            f"{runs[0].steps:5}  {fewest:7.2f} ({max(seconds) / fewest - 1:4.0%})  "
            f"{f'{memory:10,.0f}' if memory else '         -'} "
            f"{f'{flops / fewest / (peak * 1e12):6.1%}' if peak else '     -'}"
        )


def make_base(folder: Path, shape: Shape) -> str:
    """Random weights of a shape with the tokenizer of the tiny base: its ids are a part of the vocabulary."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from mtgdm.student.noise import quiet
    from mtgdm.student.tiny import build_tokenizer

    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.feed_forward,
        max_position_embeddings=32_768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6,
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(0)
    with quiet():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
        model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def card_name() -> str:
    import torch

    if not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch sees no GPU here")
    return str(torch.cuda.get_device_name(0))


def peak_tflops(card: str) -> float | None:
    return next((peak for part, peak in PEAK_TFLOPS.items() if part.lower() in card.lower()), None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="may be given several times")
    parser.add_argument("--rows", type=int, default=256, help="rows of a set, with --shape")
    parser.add_argument("--batch", type=int, default=2, help="with --shape; bins or rows at once")
    parser.add_argument("--grad-accum", type=int, default=8, help="with --shape")
    parser.add_argument("--peak-tflops", type=float, help="of the device, where its name tells nothing")
    arguments = parser.parse_args()
    if hasattr(os, "getloadavg"):
        print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if arguments.device == "cuda" or arguments.shape:
        measure_shapes(arguments)
    elif not compare(arguments.rounds):
        sys.exit("a claim is not met")


if __name__ == "__main__":
    main()
