"""A packaged student put into an Ollama server over its API, and asked a first question there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import httpx

from mtgdm.errors import UserError
from mtgdm.evaluation.rendering import by_ollama
from mtgdm.teachers.connections import CONNECT_TIMEOUT_S, proxy_to
from mtgdm.teachers.ollama import Ollama
from mtgdm.teachers.server import server_url

if TYPE_CHECKING:
    from mtgdm.domain import Message
    from mtgdm.stage import Context

_CHUNK = 1 << 20
_LONGEST_WORDS = 300
_SHOWN_LETTERS = 300
SILENCE_S = 600.0
"""A server that says nothing for so long hangs."""
_CREATE_TIMEOUT = httpx.Timeout(3600.0, connect=CONNECT_TIMEOUT_S)
"""While it makes a model: it says nothing between the blocks that it copies and quantizes."""


@dataclass(frozen=True)
class Answer:
    """What the model in Ollama said, and how many tokens it was asked with."""

    text: str
    prompt_tokens: int | None


class OllamaServer:
    """One server; every failure is one line, and none of them touches the package."""

    def __init__(
        self, url: str, *, silence_s: float = SILENCE_S, transport: httpx.BaseTransport | None = None
    ) -> None:
        self._url = server_url(url, Ollama.paths)
        self._client = httpx.Client(
            base_url=self._url,
            transport=transport,
            proxy=None if transport else proxy_to(httpx.URL(self._url)),
            trust_env=False,  # proxies are those that `proxy_to` finds, for teachers too
            timeout=httpx.Timeout(silence_s, connect=CONNECT_TIMEOUT_S),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def check(self) -> str:
        """The server's version; UserError where none answers."""
        with self._failures("was asked its version"):
            reply = self._client.get("/api/version")
        with suppress(ValueError, KeyError, TypeError):
            if reply.status_code == 200:
                return str(reply.json()["version"])
        raise UserError(
            f"what answers at {self._url} is no Ollama server: HTTP {reply.status_code}",
            hint="name the server itself with --url",
        )

    def check_name(self, name: str, request: Mapping[str, Any], jinja: str) -> None:
        """UserError where the server has a model of this name that was not made of such a request.

        `jinja` is the template inside the GGUF, which the server shows where it was given no other.
        """
        with self._failures(f"was asked for {name}"):
            shown = self._client.post("/api/show", json={"model": name})
        if shown.status_code == 404:
            return
        if shown.status_code != 200:
            raise UserError(
                f"the Ollama server at {self._url} cannot say whether it has {name}: {_said(shown.text)}"
            )
        told: Any = None
        with suppress(ValueError):
            told = shown.json()
        if not (isinstance(told, dict) and _is_ours(told, request, jinja)):
            raise UserError(
                f"{name} is in Ollama already, and is no earlier one of this student: it would be replaced",
                hint="another --ollama-create, or --overwrite",
            )

    def create(
        self,
        name: str,
        gguf: Path,
        digest: str,
        request: Mapping[str, Any],
        context: Context,
        *,
        quantize: str | None = None,
    ) -> None:
        """Upload the file, make the model of it, and see that it is there.

        `digest` is the file's SHA-256 in hex, `request` what else `POST /api/create` takes.
        """
        self._upload(gguf, f"sha256:{digest}", context)
        body = {"model": name, "files": {gguf.name: f"sha256:{digest}"}, **request, "stream": True}
        if quantize is not None:
            body["quantize"] = quantize
        self._create(name, body, context)
        with self._failures(f"was asked for {name}"):
            shown = self._client.post("/api/show", json={"model": name})
        if shown.status_code != 200:
            raise UserError(
                f"Ollama said that it made {name}, and does not know it: {_said(shown.text)}",
                hint="look into the server's log, then run the same command again",
            )

    def ask(self, name: str, messages: Sequence[Message], *, max_tokens: int) -> Answer:
        """One question, with the context and the sampling that the model was made with."""
        body = {
            "model": name,
            "messages": list(messages),
            "stream": False,
            "think": False,
            "options": {"num_predict": max_tokens},
        }
        with self._failures(f"answered as {name}"):
            reply = self._client.post("/api/chat", json=body)
        with suppress(ValueError, KeyError, TypeError):
            if reply.status_code == 200:
                value = reply.json()
                return Answer(str(value["message"]["content"]), value.get("prompt_eval_count"))
        raise UserError(
            f"{name} was made, but does not answer: {_said(reply.text)}",
            hint="the server's log tells more; often the context is too long for the memory",
        )

    def rendered(self, name: str, messages: Sequence[Message], think: bool | None = None) -> str | None:
        """The prompt that a model is asked with; None where the server is too old to show it."""
        return by_ollama(self._post, name, messages, think)

    def _post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        with self._failures("was asked what it renders"):
            return self._client.post(path, json=dict(body))

    def introduce(
        self, name: str, asked: Sequence[Message], prompt_tokens: int, context: Context, *, num_ctx: int
    ) -> None:
        """Ask a first question and show the answer; warn where the prompt is not as many tokens as in the training."""
        answer = self.ask(name, asked, max_tokens=max(1, num_ctx - prompt_tokens))
        said = " ".join(answer.text.split())
        context.print(f"{name} in Ollama was asked a first question and says:")
        context.print(said if len(said) <= _SHOWN_LETTERS else f"{said[:_SHOWN_LETTERS]}…")
        if answer.prompt_tokens not in (None, prompt_tokens):
            context.warn(
                f"Ollama read {answer.prompt_tokens:,} tokens where the training had {prompt_tokens:,}: it does not "
                "use the template of the package; `ollama show --template` and OLLAMA_GO_TEMPLATE tell more"
            )

    def _upload(self, path: Path, digest: str, context: Context) -> None:
        address = f"/api/blobs/{digest}"
        with self._failures(f"was asked for {path.name}"):
            if self._client.head(address).status_code == 200:
                context.print(f"Ollama has {path.name} already")
                return
        size = path.stat().st_size
        with context.progress(size, "bytes") as bar:
            bar.note(f"uploading {path.name}")

            def body() -> Iterator[bytes]:
                with path.open("rb") as file:
                    while chunk := file.read(_CHUNK):
                        yield chunk
                        bar.advance(len(chunk))

            with self._failures(f"was sent {path.name}"):
                reply = self._client.post(address, content=body(), headers={"Content-Length": str(size)})
        if reply.status_code in (200, 201):
            return
        said = _said(reply.text)
        if "digest mismatch" in said:
            raise UserError(
                f"the file is no longer the one that was packaged: {said}",
                where=path,
                hint="mtgdm package, which makes it anew where it is damaged",
            )
        raise UserError(
            f"Ollama does not take {path.name}: {said}", hint="is there room on the server's disk?"
        )

    def _create(self, name: str, body: Mapping[str, Any], context: Context) -> None:
        with context.progress(None, "steps") as bar:
            last = ""
            with (
                self._failures(f"made {name}"),
                self._client.stream("POST", "/api/create", json=body, timeout=_CREATE_TIMEOUT) as reply,
            ):
                if reply.status_code != 200:
                    raise _not_made(name, _said(reply.read().decode("utf-8", "replace")))
                for line in reply.iter_lines():
                    if not line.strip():
                        continue
                    status, last = _status(name, line, last)
                    bar.note(status)
                    bar.advance()
                    context.log.info("ollama: %s", status)
        if last != "success":
            raise UserError(
                f"Ollama stopped making {name} without saying why" + (f", after: {last}" if last else ""),
                hint="look into the server's log, then run the same command again",
            )

    @contextmanager
    def _failures(self, doing: str) -> Iterator[None]:
        """A server that is not there, and one that goes away while it is asked, in one line."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise UserError(f"no Ollama server answers at {self._url}", hint=Ollama.start_hint) from error
        except httpx.TimeoutException as error:
            raise UserError(
                f"the Ollama server at {self._url} hangs: it {doing} and said nothing for too long",
                hint="look into its log, start it again, then run the same command: the package is whole",
            ) from error
        except httpx.TransportError as error:
            raise UserError(
                f"the Ollama server at {self._url} went away while it {doing}: {type(error).__name__}",
                hint="start it again, then the same command goes on: the package is whole, nothing is made anew",
            ) from error


def _is_ours(shown: Mapping[str, Any], request: Mapping[str, Any], jinja: str) -> bool:
    """Whether a model has the template and the system text that a student is made with."""

    def told(key: str) -> str:
        return str(shown.get(key) or "").strip()

    templates = {str(request.get("template") or jinja).strip(), jinja.strip()}
    return told("template") in templates and told("system") == str(request.get("system") or "").strip()


def _status(name: str, line: str, last: str) -> tuple[str, str]:
    """What a line of the stream says, to show and as it stands; UserError where it is an error."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"Ollama does not answer in JSON while it makes {name}: {line[:100]}") from error
    if "error" in value:
        raise _not_made(name, _said(line))
    status = str(value.get("status", last))
    total, done = value.get("total"), value.get("completed", 0)
    return (f"{status}, {100 * done // total} %" if total else status), status


def _not_made(name: str, said: str) -> UserError:
    if "architecture" in said:
        return UserError(
            f"this Ollama does not know the model's architecture: {said}",
            hint="update Ollama, then run the same command again",
        )
    return UserError(
        f"Ollama did not make {name}: {said}", hint="the package is whole: mend it, run the same command"
    )


def _said(text: str) -> str:
    """The server's words for what is wrong."""
    words = text
    with suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, dict) and isinstance(value.get("error"), str):
            words = value["error"]
    words = " ".join(words.split())
    return (words if len(words) <= _LONGEST_WORDS else f"{words[:_LONGEST_WORDS]}…") or "nothing"
