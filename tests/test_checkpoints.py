"""What models are called, and how it is noticed that they changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mtgdm import checkpoints
from mtgdm.checkpoints import checkpoint_name, hub_id


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-3B-Instruct"),
        (" 'Qwen/Qwen2.5-3B' ", "Qwen/Qwen2.5-3B"),
        ("Qwen\\Qwen2.5-3B", "Qwen/Qwen2.5-3B"),
        ("https://huggingface.co/Qwen/Qwen2.5-3B-Instruct/tree/main?x=1", "Qwen/Qwen2.5-3B-Instruct"),
        ("hf.co/Qwen/Qwen2.5-3B/", "Qwen/Qwen2.5-3B"),
        ("qwen2.5-3b-instruct", "Qwen/Qwen2.5-3B-Instruct"),
        ("qwen3-30b-a3b-instruct-2507", "Qwen/Qwen3-30B-A3B-Instruct-2507"),
        ("qwen2.5:32b-instruct-q4_K_M", "Qwen/Qwen2.5-32B-Instruct"),
        ("qwen2.5:7b", "Qwen/Qwen2.5-7B-Instruct"),
        ("qwen3:0.6b", "Qwen/Qwen3-0.6B"),
        ("Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"),
        ("mtgdm-tiny", "mtgdm-tiny"),
        ("my-own/qwen2.5-3b", "my-own/qwen2.5-3b"),
    ],
)
def test_a_sloppy_name_of_a_model_is_understood(written: str, meant: str) -> None:
    assert hub_id(written) == meant


def test_the_folder_of_a_checkpoint_is_named_after_its_base() -> None:
    assert checkpoint_name(hub_id("qwen2.5:32b-instruct-q4_K_M")) == "qwen2.5-32b-lora"
    assert checkpoint_name("models\\mine\\") == "mine-lora"


def test_weights_that_changed_in_one_place_in_a_thousand_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_WHOLE_BYTES", 0)
    file = tmp_path / "model.safetensors"
    weights = bytearray(os.urandom(8 * 2**20))
    file.write_bytes(weights)
    before = checkpoints.model_state(str(tmp_path))
    assert checkpoints.model_state(str(tmp_path)) == before
    weights[::1000] = bytes(len(weights[::1000]))
    file.write_bytes(weights)
    assert checkpoints.model_state(str(tmp_path)) != before
