"""What models are called."""

from __future__ import annotations

import pytest

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
