"""What models are called, and how it is noticed that they changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtgdm import checkpoints
from mtgdm.checkpoints import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    FINAL,
    checkpoint_name,
    chosen_checkpoint,
    hub_id,
    settle,
)


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


class Killed(BaseException):
    """The process ends here."""


def a_folder(folder: Path, version: str, *more: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in (ADAPTER_CONFIG, ADAPTER_FILE, "tokenizer.json", "training.json", *more):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(version, encoding="utf-8")
    return folder


def held(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in folder.rglob("*")
        if path.is_file()
    }


TEMPLATE = "additional_chat_templates/tool_use.jinja"


def a_finished_one(folder: Path) -> Path:
    """An earlier checkpoint, and beside it a new one that is whole and not yet in its place."""
    a_folder(folder, "old", TEMPLATE, "merges.txt")
    a_folder(folder / FINAL, "new", TEMPLATE)
    (folder / "checkpoint-4").mkdir()
    (folder / "checkpoint-4" / "notes").write_text("kept", encoding="utf-8")
    return folder


WANTED = {
    **dict.fromkeys((ADAPTER_CONFIG, ADAPTER_FILE, "tokenizer.json", "training.json", TEMPLATE), "new"),
    "checkpoint-4/notes": "kept",
}


def test_a_finished_adapter_takes_the_place_of_the_earlier_one_folders_too(tmp_path: Path) -> None:
    folder = a_finished_one(tmp_path / "ck")
    settle(folder)
    assert held(folder) == WANTED
    assert not (folder / FINAL).exists()


def test_one_that_is_not_whole_stays_where_it_is(tmp_path: Path) -> None:
    folder = a_finished_one(tmp_path / "ck")
    (folder / FINAL / ADAPTER_CONFIG).unlink()
    before = held(folder)
    settle(folder)
    assert held(folder) == before


def test_a_kill_at_any_moment_leaves_the_new_one_to_whoever_opens_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for moment in range(100):
        folder = a_finished_one(tmp_path / f"ck{moment}")
        left = moment

        def or_killed(real: Callable[..., Any]) -> Callable[..., Any]:
            def act(*arguments: Any, **named: Any) -> Any:
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return real(*arguments, **named)

            return act

        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", or_killed(Path.replace))
            patched.setattr(Path, "unlink", or_killed(Path.unlink))
            patched.setattr(shutil, "rmtree", or_killed(shutil.rmtree))
            try:
                settle(folder)
            except Killed:
                pass
            else:
                assert moment > 15
                return
        assert chosen_checkpoint(str(folder), tmp_path) == str(folder)
        assert held(folder) == WANTED, f"killed at {moment}"
    pytest.fail("it never came to an end")
