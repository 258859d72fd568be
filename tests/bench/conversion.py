"""GGUF conversion in MB of weights a second, next to plain numpy of the same arithmetic, and the memory of the whole.

Merge and conversion hold one tensor at a time beside the adapter and the file that is mapped. The largest tensor of
a model of 32 billion weights, Qwen2.5-32B's embeddings, has 152,064 x 5,120 numbers: 1.6 GB in bfloat16, 3.1 GB in
float32. Read, widened, cast and checked that is 6 GB, with 4 GB of a mapped shard and 0.5 GB of an adapter of rank 16
in float32 (134 million numbers) 11 GB: a machine of 64 GiB has room to spare.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

TYPES = ("f32", "f16", "bf16", "q8_0")
SHAPE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 16}
SHARD = "64MB"
WORK = """
import json, sys
from pathlib import Path
from mtgdm.student.noise import quiet

def resident():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

with quiet():
    from mtgdm.export import merge as merging
    from mtgdm.export.gguf import convert
    from mtgdm.student.base import load_tokenizer
    from mtgdm.student.chat import Chat
    folder = Path(sys.argv[1])
    chat = Chat(load_tokenizer(str(folder / "checkpoint"), "checkpoint"), "checkpoint")
    found = [resident()]
    merging.merge(folder / "checkpoint", str(folder / "base"), "base", chat, "bfloat16", folder / "out",
                  shard_bytes=64 * 10**6)
    found.append(resident())
    convert(folder / "out", folder / "out.gguf", "q8_0", name="x", template=chat.template)
    found.append(resident())
print(json.dumps(found))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_known_args()[0].runs
    if hasattr(os, "getloadavg"):
        print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        numbers = make(folder)
        for quant in TYPES:
            speed(folder, quant, numbers, runs)
        if Path("/proc/self/status").exists():
            memory(folder, numbers)
        else:
            print("peak memory: not measured, this system has no /proc")


def make(folder: Path) -> int:
    """A base in float32 shards with a checkpoint over it; how many weights it has."""
    from mtgdm.export.weights import Weights
    from mtgdm.student.noise import quiet
    from tests.families import make_checkpoint, make_family

    with quiet():
        from transformers import AutoModelForCausalLM

        base = make_family(folder / "whole", "qwen2-untied", shape=SHAPE)
        AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder / "base", max_shard_size=SHARD)
        for path in base.iterdir():
            if path.suffix in (".json", ".jinja") and not (folder / "base" / path.name).exists():
                (folder / "base" / path.name).write_bytes(path.read_bytes())
        make_checkpoint(folder / "checkpoint", base)
    return sum(stored.numbers for stored in Weights(folder / "base").stored.values())


def speed(folder: Path, quant: str, numbers: int, runs: int) -> None:
    from mtgdm.export.gguf import convert
    from tests.families import CHATML

    convert(folder / "base", folder / "ours.gguf", quant, name="x", template=CHATML)  # imports are done now
    pairs = [
        (
            seconds(lambda: convert(folder / "base", folder / "ours.gguf", quant, name="x", template=CHATML)),
            seconds(lambda: plainly(folder / "base", folder / "plain.bin", quant)),
        )
        for _ in range(runs)
    ]
    ours, plain = (4 * numbers / 1e6 / statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(theirs / own for own, theirs in pairs)
    print(
        f"{quant}: {ours:,.0f} MB a second of CPU time, plain numpy {plain:,.0f}, {ratio:.2f} times as fast "
        f"(median of {runs})"
    )


def plainly(folder: Path, out: Path, quant: str) -> None:
    """The same arithmetic without chunks and threads, made durable as ours is."""
    import gguf
    from safetensors.numpy import load_file

    with out.open("wb") as file:
        for path in sorted(folder.glob("*.safetensors")):
            for tensor in load_file(path).values():
                kind = gguf.GGMLQuantizationType[quant.upper() if tensor.ndim > 1 else "F32"]
                gguf.quantize(tensor, kind).tofile(file)
        file.flush()
        os.fsync(file.fileno())


def seconds(work: Callable[[], object]) -> float:
    """Of this process's own time on all cores, so that what else the machine does is left out."""
    started = time.process_time()
    work()
    return time.process_time() - started


def memory(folder: Path, numbers: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WORK, str(folder)],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    libraries, merged, converted = json.loads(ended.stdout.splitlines()[-1])
    print(
        f"peak memory for {4 * numbers / 2**20:,.0f} MiB of float32 weights in shards of {SHARD}: libraries "
        f"{libraries:,.0f} MiB, merge {merged - libraries:+,.0f} MiB, conversion to q8_0 "
        f"{max(0.0, converted - merged):+,.0f} MiB above that"
    )
    print("32 billion weights in bfloat16, by the arithmetic in this file: about 11 GB")


if __name__ == "__main__":
    main()
