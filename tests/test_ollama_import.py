"""A packaged student put into Ollama: uploaded once, made, asked; one clear line for all that can go wrong."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from mtgdm.errors import UserError
from mtgdm.export.modelfile import Modelfile
from mtgdm.export.ollama import OllamaServer as Client
from mtgdm.stage import Context
from mtgdm.testing import QuietTerminal
from tests.ollama_server import Fault, OllamaServer

CHATML = '{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}<{{ .Content }}>{{ end }}{{ end }}'
JINJA = "{{ messages[0].content }}"
MODELFILE = Modelfile("guide-f16.gguf", CHATML, "<|im_end|>", 512, "你是讲解员。", "mit")
QUESTION = [{"role": "user", "content": "西湖在哪里？"}]


@pytest.fixture
def server() -> Iterator[OllamaServer]:
    with OllamaServer(lambda question: "在杭州。") as server:
        yield server


@pytest.fixture
def terminal() -> QuietTerminal:
    return QuietTerminal()


@pytest.fixture
def context(tmp_path: Path, terminal: QuietTerminal) -> Iterator[Context]:
    context = Context(
        stage="package",
        workspace=tmp_path,
        terminal=terminal,
        domain="tourism",
        profile="testing",
        started=datetime.now().astimezone(),
    )
    yield context
    context.close()


def gguf_file(folder: Path, *, architecture: str = "qwen2", file_type: int = 1) -> Path:
    """A GGUF of two keys and no tensor."""
    path = folder / "guide-f16.gguf"
    keys = [
        (b"general.architecture", struct.pack("<IQ", 8, len(architecture)) + architecture.encode()),
        (b"general.file_type", struct.pack("<II", 4, file_type)),
    ]
    body = b"".join(struct.pack("<Q", len(key)) + key + value for key, value in keys)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys)) + body + b"\0" * 3_000_000)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def create(url: str, context: Context, path: Path, *, quantize: str | None = None) -> None:
    with Client(url) as client:
        client.create("guide", path, digest(path), MODELFILE.request(), context, quantize=quantize)


def test_it_is_uploaded_made_and_answers(server: OllamaServer, context: Context, tmp_path: Path) -> None:
    path = gguf_file(tmp_path)
    server.count = lambda text: 17 if text == "<西湖在哪里？>" else 0
    with Client(server.url) as client:
        assert client.check() == "0.13.1"
        client.create("guide", path, digest(path), MODELFILE.request(), context, quantize=None)
        answer = client.ask("guide", QUESTION, max_tokens=64)
    assert (answer.text, answer.prompt_tokens) == ("在杭州。", 17)
    made = server.made["guide"].request
    assert made["files"] == {"guide-f16.gguf": f"sha256:{digest(path)}"}
    assert made["parameters"] == {
        "temperature": 0,
        "repeat_penalty": 1,
        "num_ctx": 512,
        "stop": ["<|im_end|>"],
    }
    assert (made["system"], made["license"], made["template"]) == ("你是讲解员。", "mit", CHATML)
    assert server.made["guide"].file == path.read_bytes()


def test_a_file_that_the_server_has_is_not_sent_again(
    server: OllamaServer, context: Context, terminal: QuietTerminal, tmp_path: Path
) -> None:
    path = gguf_file(tmp_path)
    create(server.url, context, path)
    create(server.url, context, path)
    assert server.uploads == 1
    assert "Ollama has guide-f16.gguf already" in terminal.printed


def test_ollama_quantizes_itself(server: OllamaServer, context: Context, tmp_path: Path) -> None:
    create(server.url, context, gguf_file(tmp_path), quantize="q4_K_M")
    assert server.made["guide"].request["quantize"] == "q4_K_M"
    with pytest.raises(UserError, match="only supported for F16, BF16 and F32"):
        create(server.url, context, gguf_file(tmp_path, file_type=7), quantize="q4_K_M")


def test_a_file_that_changed_since_it_was_packaged(
    server: OllamaServer, context: Context, tmp_path: Path
) -> None:
    path = gguf_file(tmp_path)
    packaged = digest(path)
    with path.open("r+b") as file:
        file.seek(2_000_000)
        file.write(b"?")
    with (
        Client(server.url) as client,
        pytest.raises(UserError, match="no longer the one that was") as caught,
    ):
        client.create("guide", path, packaged, MODELFILE.request(), context, quantize=None)
    assert "digest mismatch" in caught.value.message
    assert not server.made


def test_an_architecture_that_the_server_does_not_know(
    server: OllamaServer, context: Context, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"does not know the model's architecture.*'qwen9'") as caught:
        create(server.url, context, gguf_file(tmp_path, architecture="qwen9"))
    assert "update Ollama" in (caught.value.hint or "")


@pytest.mark.parametrize("place", ["uploading", "creating"])
def test_a_server_that_goes_down_half_way(
    place: str, server: OllamaServer, context: Context, tmp_path: Path
) -> None:
    server.dies = place  # type: ignore[assignment]
    with pytest.raises(UserError, match="went away while it") as caught:
        create(server.url, context, gguf_file(tmp_path))
    assert "nothing is made anew" in (caught.value.hint or "")
    server.dies = ""
    create(server.url, context, gguf_file(tmp_path))
    assert "guide" in server.made


def test_a_server_that_says_success_and_has_no_model(
    server: OllamaServer, context: Context, tmp_path: Path
) -> None:
    server.forgets = True
    with pytest.raises(UserError, match="said that it made guide, and does not know it"):
        create(server.url, context, gguf_file(tmp_path))


def test_a_server_that_is_not_there() -> None:
    with (
        Client("http://127.0.0.1:9") as client,
        pytest.raises(UserError, match="no Ollama server answers"),
    ):
        client.check()


def test_a_model_that_is_no_earlier_one_of_the_student_is_not_replaced(
    server: OllamaServer, context: Context, tmp_path: Path
) -> None:
    with Client(server.url) as client:
        client.check_name("guide", MODELFILE.request(), JINJA)
        create(server.url, context, gguf_file(tmp_path))
        client.check_name("guide", MODELFILE.request(), JINJA)
        for other in (replace(MODELFILE, system="Be kind."), replace(MODELFILE, template=None)):
            with pytest.raises(UserError, match="guide is in Ollama already") as caught:
                client.check_name("guide", other.request(), JINJA)
        assert "--overwrite" in (caught.value.hint or "")
        with pytest.raises(UserError, match="teacher:7b is in Ollama already"):
            client.check_name("teacher:7b", MODELFILE.request(), JINJA)
        server.busy_shows = 1
        with pytest.raises(UserError, match="cannot say whether it has guide: server busy"):
            client.check_name("guide", MODELFILE.request(), JINJA)


def test_a_server_that_hangs_is_not_waited_for_for_ever(
    server: OllamaServer, context: Context, tmp_path: Path
) -> None:
    create(server.url, context, gguf_file(tmp_path))
    server.fault = lambda question: Fault(hang_s=1.0)
    with (
        Client(server.url, silence_s=0.1) as client,
        pytest.raises(UserError, match="hangs: it answered as guide and said nothing"),
    ):
        client.ask("guide", QUESTION, max_tokens=8)


def test_every_request_ends_where_the_server_says_nothing(context: Context, tmp_path: Path) -> None:
    import httpx

    asked: dict[str, float | None] = {}

    def silent(request: httpx.Request) -> httpx.Response:
        if request.method == "HEAD":
            return httpx.Response(200)
        asked[request.url.path] = request.extensions["timeout"]["read"]
        raise httpx.ReadTimeout("silence", request=request)

    with Client("http://localhost:1", transport=httpx.MockTransport(silent)) as client:
        for ask in (
            client.check,
            lambda: client.check_name("guide", {}, JINJA),
            lambda: client.create("guide", gguf_file(tmp_path), "0" * 64, {}, context),
            lambda: client.ask("guide", QUESTION, max_tokens=1),
        ):
            with pytest.raises(UserError, match="hangs"):
                ask()
    assert asked.keys() == {"/api/version", "/api/show", "/api/create", "/api/chat"}
    assert all(asked.values()), asked


def test_another_server_is_told_apart() -> None:
    import httpx

    page = httpx.MockTransport(lambda request: httpx.Response(200, text="<html>hello</html>"))
    with (
        Client("http://localhost:1", transport=page) as client,
        pytest.raises(UserError, match="no Ollama server: HTTP 200"),
    ):
        client.check()


def test_what_is_no_gguf_is_said_in_the_servers_words(
    server: OllamaServer, context: Context, tmp_path: Path
) -> None:
    path = tmp_path / "guide-f16.gguf"
    path.write_bytes(b"not one")
    with pytest.raises(UserError, match="did not make guide: unknown type"):
        create(server.url, context, path)
