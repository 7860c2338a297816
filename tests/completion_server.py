"""A double of an OpenAI-compatible server: answers after the documented forms of vLLM and of text servers."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    """Serves /v1/models, and /v1/completions and everything else by the server's `replies`, one after the
    other and the last one for ever."""

    server: "Double"

    def do_GET(self) -> None:
        if self.server.models is None:
            return self.send(500, {"detail": "no models offline"})
        self.send(200, {"object": "list", "data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, body))
            replies = self.server.replies
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
        reply(self, body)

    def send(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        self.raw(status, json.dumps(answer).encode(), headers)

    def raw(self, status: int, text: bytes, headers: dict[str, str] | None = None, length: int = 0) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length or len(text)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: Any) -> None:
        pass


class Double(ThreadingHTTPServer):
    """Args: replies: see `Handler`. models: names that are served; None: listing them fails."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, *replies: Reply, models: list[str] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.models = list(replies), models
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> "Double":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


def completion(text: str, finish_reason: str = "length", **choice: Any) -> dict[str, Any]:
    """The answer of every server."""
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason, **choice}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


def vllm(
    ids: list[int], logprobs: list[float], finish_reason: str = "length", spelled: bool = False
) -> Reply:
    """vLLM: token ids beside the text, or `spelled` as "token_id:N" in the log-probabilities' tokens."""

    def reply(handler: Handler, body: dict[str, Any]) -> None:
        size = body["max_tokens"]
        tokens = [f"token_id:{i}" for i in ids[:size]]
        found = {"tokens": tokens, "token_logprobs": logprobs[:size], "text_offset": [], "top_logprobs": None}
        more = {} if spelled else {"token_ids": ids[:size], "prompt_token_ids": None, "stop_reason": None}
        handler.send(200, completion("?", finish_reason, logprobs=found, **more))

    return reply


def llama_cpp(ids: list[int], logprobs: list[float], finish_reason: str = "length") -> Reply:
    """llama.cpp's own server: a list of tokens with their ids in the place of the log-probabilities."""

    def reply(handler: Handler, body: dict[str, Any]) -> None:
        pairs = list(zip(ids, logprobs, strict=True))[: body["max_tokens"]]
        content = [
            {"id": i, "token": "?", "bytes": [63], "logprob": lp, "top_logprobs": []} for i, lp in pairs
        ]
        handler.send(200, completion("?", finish_reason, logprobs={"content": content}))

    return reply


def text(answer: str, finish_reason: str = "stop", logprobs: dict[str, Any] | None = None) -> Reply:
    """A server that takes texts alone and refuses token ids, as llama-cpp-python does."""

    def reply(handler: Handler, body: dict[str, Any]) -> None:
        if not isinstance(body["prompt"], str) or "repetition_penalty" in body:
            return handler.send(422, {"detail": [{"loc": ["body", "prompt"], "msg": "must be a string"}]})
        handler.send(200, completion(answer, finish_reason, logprobs=logprobs))

    return reply


def failing(status: int, message: str = "busy", **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, body: handler.send(status, {"error": {"message": message}}, named)
