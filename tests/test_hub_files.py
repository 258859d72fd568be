"""Models of the Hub: taken from the cache without a network, fetched otherwise, and what goes wrong in one line."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from mtgdm import remarks
from mtgdm.errors import UserError
from mtgdm.student import base, hub_files
from mtgdm.student.noise import quiet
from mtgdm.testing import QuietTerminal
from tests.tiny_student import make_base

NAME = "me/tiny"
COMMIT = "0" * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def snapshot(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in a cache as huggingface_hub lays it out, on a machine that reaches nothing."""
    repo = tmp_path / "hub" / "models--me--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    shutil.copytree(model, repo / "snapshots" / COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", _nobody)
    monkeypatch.setattr(socket, "getaddrinfo", _nobody)
    return repo / "snapshots" / COMMIT


def _nobody(*_: Any, **__: Any) -> Any:
    raise OSError("no network in this test")


def test_a_model_in_the_cache_is_loaded_without_a_word_of_the_network(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:7891")
    monkeypatch.setattr(hub_files, "snapshot_download", _nobody)
    listener = QuietTerminal()
    with quiet(), remarks.heard_by(listener):
        assert base.load_tokenizer(NAME, NAME).chat_template
        model = base.load_model(NAME, NAME, base.place("cpu"))
        assert base.load_config(NAME, NAME).vocab_size == model.config.vocab_size
        assert base.folder_of(NAME, NAME) == base.at_hand(NAME) == snapshot
    assert model.name_or_path == NAME  # an adapter names its base by it
    assert listener.printed == []


def test_what_the_cache_lacks_is_fetched_and_that_is_said(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(source: str, *, allow_patterns: list[str], etag_timeout: float) -> str:
        asked.append(allow_patterns)
        if len(asked) == 2:
            (snapshot / "pytorch_model.bin").write_bytes(b"")
        return str(snapshot)

    monkeypatch.setattr(hub_files, "snapshot_download", download)
    (snapshot / "model.safetensors").unlink()
    listener = QuietTerminal()
    with remarks.heard_by(listener):
        assert hub_files.cached(NAME, "tokenizer") == snapshot
        assert hub_files.fetched(NAME, "weights") == snapshot
    assert listener.printed == [f"loading {NAME} from the Hugging Face Hub"]
    assert [any("pytorch_model" in one for one in patterns) for patterns in asked] == [False, True]


def test_a_model_is_whole_with_all_its_shards_and_its_template(snapshot: Path) -> None:
    (snapshot / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (snapshot / "model-1.safetensors").touch()
    assert not hub_files.is_whole(snapshot, "weights")
    (snapshot / "model-2.safetensors").touch()
    assert hub_files.is_whole(snapshot, "weights")
    assert hub_files.is_whole(snapshot, "tokenizer")
    (snapshot / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((snapshot / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("chat_template", None)
    (snapshot / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert not hub_files.is_whole(snapshot, "tokenizer")
    assert hub_files.is_whole(snapshot, "config")


def test_a_hub_that_cannot_be_reached_is_one_line_with_the_variable_that_leads_there(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://127.0.0.1:1")
    with pytest.raises(UserError, match="cannot be fetched from the Hugging Face Hub") as caught:
        base.load_config("me/other", "me/other")
    assert "HF_ENDPOINT=https://127.0.0.1:1" in caught.value.message


def test_a_variable_that_cannot_work_is_named_before_the_hub_is_asked(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.example")
    with pytest.raises(UserError, match=r"HF_ENDPOINT is 'hf-mirror.example'"):
        base.load_tokenizer("me/other", "me/other")
