"""An Ollama server for tests: the HTTP API as its source has it, an answer of our choosing, faults on request.

As seen of the real one on 2026-11-28 (source of 2026-08-21): answers are streamed as `application/x-ndjson`, a line a
token, where `stream` is not false; `slots` of them are written at once, and the others get neither a header nor a
token until their turn; the keys of a JSON schema are sorted, as it goes through a map; the context is rounded up to
a multiple of 256; a schema with a bound of 2,000 is no grammar; an answer of 30 equal tokens is ended without `done`.

Durations are nanoseconds; counts of zero and empty reasons are left out of replies; wrong types of options
are errors, unknown options are not; a prompt that does not fit is refused only where `truncate` and `shift`
are off, and otherwise cut without a word. Models are made as there: a blob is kept where its SHA-256 is what its
address says, and a model of it where the architecture is known and a type that is to be quantized allows it.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

from tests.go_template import render

CONTEXT_STEP = 256
"""A context is rounded up to a multiple of this."""
REPEATED = 30
"""So many equal tokens, and an answer is ended without a word."""
TOO_LONG_A_BOUND = 2000

JsonObject = dict[str, Any]

_OPTION_TYPES: dict[str, type | tuple[type, ...]] = {
    "num_ctx": int,
    "num_predict": int,
    "num_gpu": int,
    "seed": int,
    "temperature": (int, float),
    "top_p": (int, float),
}


_NAME = re.compile(
    r"([a-zA-Z0-9_][\w.:-]*/)?([a-zA-Z0-9_][\w-]*/)?[a-zA-Z0-9_][\w.-]*(:[a-zA-Z0-9_][\w.-]*)?", re.ASCII
)


@dataclass
class Question:
    """One chat request: what was asked and how often the same words came before."""

    body: JsonObject
    number: int
    times: int

    @property
    def text(self) -> str:
        """The last message."""
        content: str = self.body["messages"][-1]["content"]
        return content


@dataclass(frozen=True)
class Fault:
    """What to do instead of answering."""

    status: int = 200
    body: bytes | JsonObject | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    """Close the connection without a word."""
    half: bool = False
    """Promise a whole body and close in its middle."""
    hang_s: float = 0.0
    change: Callable[[JsonObject], JsonObject] | None = None
    """Answer, but change the reply."""


@dataclass(frozen=True)
class MadeModel:
    """What `POST /api/create` made."""

    request: JsonObject
    file: bytes

    def rendered(self, messages: list[JsonObject], think: bool | None = None) -> str:
        """The prompt of a chat, SYSTEM put before those that bring none.

        TEMPLATE is passed over where there is none, or where the template inside the GGUF offers more than it.
        """
        if "system" in self.request and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.request["system"]}, *messages]
        key = b"tokenizer.chat_template"
        template, jinja = self.request.get("template"), _text_of(self.file, key) if key in self.file else ""
        offered = {"tools"} if "tools" in jinja or "tool_call" in jinja else set()
        offered |= {"thinking"} if "<think>" in jinja and "</think>" in jinja else set()
        if template is not None and not offered:
            return render(template, messages)
        return _render_jinja(jinja, messages, thinks=think is not False if "thinking" in offered else None)


@dataclass
class OllamaServer:
    """Serves while used as a context manager; everything may be changed while it runs."""

    answer: Callable[[Question], str]
    fault: Callable[[Question], Fault | None] = lambda question: None
    busy_shows: int = 0
    """So many requests to /api/show are answered with 503 first."""
    models: dict[str, int] = field(default_factory=lambda: {"teacher:7b": 32768})
    """Names with the length of their context."""
    latency_s: float = 0.0
    token_s: float = 0.0
    """Between two tokens of a stream."""
    slots: int = 256
    """Answers that are written at once (OLLAMA_NUM_PARALLEL, which is 1 by default)."""
    streams: bool = True
    """Whether it knows `stream`; a proxy may not."""
    loop_breaker: bool = True
    knows_think: bool = True
    shows_prompts: bool = True
    """Whether it knows `_debug_render_only`, as servers since 2025 do."""
    cuts_prompts: bool = False
    """Like servers before `truncate` and `shift`: what does not fit is cut unseen."""
    port: int = 0
    """Where it listens; 0 takes one that is free."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Uploaded files by `sha256:...`."""
    made: dict[str, MadeModel] = field(default_factory=dict)
    """Models that were created, by name."""
    architectures: tuple[str, ...] = ("llama", "qwen2", "qwen3")
    uploads: int = 0
    dies: Literal["", "uploading", "creating"] = ""
    """Where it closes the connection without a word."""
    forgets: bool = False
    """Say `success` and have no model."""
    count: Callable[[str], int] | None = None
    """How a made model counts the tokens of a rendered prompt."""
    questions: list[Question] = field(default_factory=list)
    tokens_written: int = 0
    """Tokens that were sent, of answers that were given up too."""
    in_flight: int = 0
    most_in_flight: int = 0

    def __enter__(self) -> Self:
        self._lock = threading.Lock()
        self.turn = threading.Semaphore(self.slots)
        self._times: Counter[str] = Counter()
        self._server = _Server(("127.0.0.1", self.port), type("Handler", (_Handler,), {"server_of": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def asked(self) -> list[str]:
        """The last message of every chat request, in the order they came."""
        return [question.text for question in self.questions]

    def question(self, body: JsonObject) -> Question:
        """Count a request."""
        with self._lock:
            words = json.dumps(body.get("messages"))
            question = Question(body, len(self.questions), self._times[words])
            self._times[words] += 1
            self.questions.append(question)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        return question

    def left(self) -> None:
        """A request is over."""
        with self._lock:
            self.in_flight -= 1

    def chat(self, question: Question) -> tuple[int, JsonObject]:
        """`POST /api/chat`: the status, and the whole reply or what is wrong."""
        body = question.body
        refusal = self._refusal(body)
        if refusal is not None:
            return refusal
        if body.get("_debug_render_only") and self.shows_prompts and (made := self.made.get(body["model"])):
            text = made.rendered(body["messages"], body.get("think"))
            return 200, {"model": body["model"], "_debug_info": {"rendered_template": text}}
        options = body.get("options", {})
        num_ctx = -(-options.get("num_ctx", 4096) // CONTEXT_STEP) * CONTEXT_STEP
        num_ctx = min(num_ctx, self.models[body["model"]])
        prompt_tokens = self._prompt_tokens(body)
        if prompt_tokens > num_ctx:
            if not self.cuts_prompts and body.get("truncate") is False and body.get("shift") is False:
                said = (
                    f"request ({prompt_tokens} tokens) exceeds the available context size ({num_ctx} tokens)"
                )
                said += ", try increasing it"
                error = {"code": 400, "message": said, "type": "exceed_context_size_error"}
                return 400, _of_runner({**error, "n_prompt_tokens": prompt_tokens, "n_ctx": num_ctx})
            prompt_tokens = num_ctx // 2
        content = self.answer(question)
        if isinstance(body.get("format"), dict):
            content = _sorted_keys(content)
        room, predict = num_ctx - prompt_tokens, options.get("num_predict", -1)
        limit = room if predict < 0 else min(predict, room)
        cut = tokens(content) > limit
        if cut:
            content = content[: int(limit / 0.7)]
        return 200, _reply(body["model"], content, prompt_tokens, "length" if cut else "stop")

    def _prompt_tokens(self, body: JsonObject) -> int:
        made = self.made.get(body["model"])
        if made is not None and self.count is not None:
            return self.count(made.rendered(body["messages"]))
        return sum(tokens(message["content"]) + 4 for message in body["messages"])

    def create(self, body: JsonObject) -> tuple[int, list[JsonObject]]:
        """`POST /api/create`: the status, and the lines of the stream."""
        if not _NAME.fullmatch(body["model"]):
            return 400, [{"error": "invalid model name"}]
        files = body.get("files") or {}
        if not files:
            return 400, [{"error": "neither 'from' or 'files' was specified"}]
        ((name, digest),) = files.items()
        if "/" in name or "\\" in name:
            return 400, [{"error": "file path must be relative"}]
        if digest not in self.blobs:
            return 400, [{"error": f'blob "{digest}" not found'}]
        data = self.blobs[digest]
        if not data.startswith(b"GGUF"):
            return 400, [{"error": "unknown type"}]
        lines: list[JsonObject] = [{"status": "parsing GGUF"}]
        architecture = _text_of(data, b"general.architecture")
        if architecture not in self.architectures:
            return 200, [*lines, {"error": f"unknown model architecture: '{architecture}'"}]
        if wanted := body.get("quantize"):
            if _number_of(data, b"general.file_type") not in (0, 1, 32):
                said = "quantization is only supported for F16, BF16 and F32 models"
                return 200, [*lines, {"error": said}]
            for done in (0, len(data) // 2, len(data)):
                status = f"quantizing F16 model to {wanted.upper()}"
                lines.append({"status": status, "digest": digest, "total": len(data), "completed": done})
        lines += [{"status": f"creating new layer {digest}"}, {"status": "writing manifest"}]
        if not self.forgets:
            self.made[body["model"]] = MadeModel(body, data)
            self.models[body["model"]] = body["parameters"]["num_ctx"]
        return 200, [*lines, {"status": "success"}]

    def _refusal(self, body: JsonObject) -> tuple[int, JsonObject] | None:
        if body.get("model") not in self.models:
            return 404, {"error": f"model '{body.get('model')}' not found"}
        if "think" in body and (not self.knows_think or body["think"] is True):
            return 400, {"error": f'"{body["model"]}" does not support thinking'}
        if isinstance(body.get("keep_alive"), bool | dict):
            return 400, {"error": "time: invalid duration"}
        for name, value in body.get("options", {}).items():
            kinds = _OPTION_TYPES.get(name)
            if kinds is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
                return 500, {"error": f'option "{name}" must be of type integer'}
        wanted = body.get("format")
        if wanted not in (None, "", "json") and not (
            isinstance(wanted, dict) and wanted.get("type") == "object"
        ):
            return 500, {
                "error": f'invalid format: {wanted!r}; expected "json" or a valid JSON Schema object'
            }
        if re.search(rf'"max(?:Length|Items)": {TOO_LONG_A_BOUND}\b', json.dumps(wanted)):
            return 400, _of_runner(
                {"code": 400, "message": "Failed to initialize samplers: failed to parse grammar"}
            )
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away (tests kill them) is nothing to print."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_of: ClassVar[OllamaServer]

    def do_GET(self) -> None:
        replies: dict[str, JsonObject] = {
            "/api/version": {"version": "0.13.1"},
            "/api/tags": {"models": [{"name": name, "model": name} for name in self.server_of.models]},
        }
        if self.path == "/":
            self._send(200, b"Ollama is running", {"Content-Type": "text/plain; charset=utf-8"})
        elif self.path in replies:
            self._send(200, replies[self.path])
        else:
            self._send(404, b"404 page not found", {"Content-Type": "text/plain"})

    def do_HEAD(self) -> None:
        known = self.path.removeprefix("/api/blobs/") in self.server_of.blobs
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        if self.path.startswith("/api/blobs/"):
            self._upload(self.path.removeprefix("/api/blobs/"))
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/api/show":
            self._show(body)
        elif self.path == "/api/create":
            self._create(body)
        elif self.path == "/api/chat":
            question = self.server_of.question(body)
            try:
                self._chat(question)
            finally:
                self.server_of.left()
        else:
            self._send(404, b"404 page not found", {"Content-Type": "text/plain"})

    def _upload(self, digest: str) -> None:
        self.server_of.uploads += 1
        length = int(self.headers["Content-Length"])
        if self.server_of.dies == "uploading":
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        data = self.rfile.read(length)
        got = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if got != digest:
            self._send(400, {"error": f'digest mismatch, expected "{digest}", got "{got}"'})
            return
        self.server_of.blobs[digest] = data
        self._send(201, b"")

    def _create(self, body: JsonObject) -> None:
        status, lines = self.server_of.create(body)
        if status != 200:
            self._send(status, lines[0])
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if self.server_of.dies == "creating":
            lines = lines[:1]
        for line in lines:
            data = json.dumps(line).encode("utf-8") + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        if self.server_of.dies == "creating":
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def _show(self, body: JsonObject) -> None:
        if self.server_of.busy_shows > 0:
            self.server_of.busy_shows -= 1
            self._send(503, {"error": "server busy, please try again.  maximum pending requests exceeded"})
            return
        if not _NAME.fullmatch(body["model"]):
            self._send(400, {"error": "invalid model name"})
            return
        context = self.server_of.models.get(body["model"])
        if context is None:
            self._send(404, {"error": f"model '{body['model']}' not found"})
            return
        info = {"general.architecture": "qwen2", "qwen2.context_length": context}
        made = self.server_of.made.get(body["model"])
        texts: JsonObject = (
            {key: made.request[key] for key in ("template", "system") if key in made.request} if made else {}
        )
        told: JsonObject = {
            "details": {"family": "qwen2"},
            "model_info": info,
            "capabilities": ["completion"],
        }
        self._send(200, {"template": "{{ .Prompt }}", **texts, **told})

    def _chat(self, question: Question) -> None:
        fault = self.server_of.fault(question) or Fault()
        time.sleep(fault.hang_s or self.server_of.latency_s)
        if fault.drop:
            self.close_connection = True
            return
        if fault.body is not None or fault.status != 200:
            self._send(
                fault.status, fault.body if fault.body is not None else {"error": "boom"}, fault.headers
            )
            return
        with self.server_of.turn:
            status, reply = self.server_of.chat(question)
            if fault.change is not None:
                reply = fault.change(reply)
            if status == 200 and self.server_of.streams and question.body.get("stream", True) is not False:
                self._stream(reply, half=fault.half)
            else:
                time.sleep(self.server_of.token_s * len(_pieces(reply)))
                self._send(status, reply, half=fault.half)

    def _stream(self, reply: JsonObject, *, half: bool) -> None:
        """A line for each token, and the last with the counts; from 30 equal ones on there is nothing more."""
        server = self.server_of
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        pieces = _pieces(reply)
        equal, before = 0, ""
        shared = {"model": reply.get("model"), "created_at": "2026-11-23T14:30:00.000000000Z"}
        for number, piece in enumerate(pieces):
            if half and number >= len(pieces) // 2:
                self.close_connection = True
                return
            equal = equal + 1 if piece == before else 1
            before = piece
            self._line({**shared, "message": {"role": "assistant", "content": piece}, "done": False})
            server.tokens_written += 1
            if equal >= REPEATED and server.loop_breaker:
                self.wfile.write(b"0\r\n\r\n")
                return
            if server.token_s:
                time.sleep(server.token_s)
        if half and not pieces:
            self.close_connection = True
            return
        message = reply.get("message")
        last = {**message, "content": ""} if isinstance(message, dict) else message
        self._line({**reply, "message": last} if "message" in reply else reply)
        self.wfile.write(b"0\r\n\r\n")

    def _line(self, value: JsonObject) -> None:
        data = json.dumps(value, ensure_ascii=False).encode("utf-8") + b"\n"
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _send(
        self,
        status: int,
        body: bytes | JsonObject,
        headers: dict[str, str] | None = None,
        *,
        half: bool = False,
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode("utf-8")
        self.send_response(status)
        for name, value in {"Content-Type": "application/json; charset=utf-8", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if half:
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        else:
            self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet."""


def tokens(text: str) -> int:
    """As many tokens as a vocabulary that knows Chinese would make, about."""
    return int(len(text) * 0.7) + 1


def _render_jinja(template: str, messages: list[JsonObject], *, thinks: bool | None) -> str:
    """The prompt as llama.cpp's server renders it: asked to think or not where the template offers that."""
    from transformers.utils.chat_template_utils import render_jinja_template

    switch = {} if thinks is None else {"enable_thinking": thinks}
    texts: Any = render_jinja_template(
        conversations=[messages], chat_template=template, add_generation_prompt=True, **switch
    )[0]
    return str(texts[0])


def _text_of(gguf: bytes, key: bytes) -> str:
    """The text of a GGUF's key: type 8, length in 8 bytes, UTF-8."""
    found = re.search(re.escape(key) + rb"\x08\0\0\0(.{8})", gguf, re.DOTALL)
    assert found is not None, key
    length = int.from_bytes(found[1], "little")
    return gguf[found.end() : found.end() + length].decode("utf-8")


def _number_of(gguf: bytes, key: bytes) -> int:
    """The unsigned number of a GGUF's key: type 4, 4 bytes."""
    found = re.search(re.escape(key) + rb"\x04\0\0\0(.{4})", gguf, re.DOTALL)
    assert found is not None, key
    return int.from_bytes(found[1], "little")


def _pieces(reply: JsonObject) -> list[str]:
    """The tokens of an answer, about."""
    message = reply.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    return re.findall(r"[a-zA-Z]{1,4}|\s+|.", content, re.DOTALL) if isinstance(content, str) else []


def _sorted_keys(content: str) -> str:
    """A JSON answer in the order in which the grammar of its schema has the keys."""
    try:
        spaced = (", ", ": ") if '": ' in content else (",", ":")
        return json.dumps(json.loads(content), ensure_ascii=False, sort_keys=True, separators=spaced)
    except ValueError:
        return content


def _of_runner(error: JsonObject) -> JsonObject:
    """What the runner says is handed on as JSON inside a text."""
    return {"error": json.dumps({"error": error}, separators=(",", ":"))}


def _reply(model: str, content: str, prompt_tokens: int, reason: str) -> JsonObject:
    counts = {"prompt_eval_count": prompt_tokens, "eval_count": tokens(content) if content else 0}
    durations = {"total_duration": 5_000_000, "load_duration": 1_000, "eval_duration": 4_000_000}
    return {
        "model": model,
        "created_at": "2026-11-23T14:30:00.000000000Z",
        "message": {"role": "assistant", "content": content},
        "done": True,
        "done_reason": reason,
        **{key: value for key, value in {**counts, **durations}.items() if value},
    }
