"""Servers with scripted answers, for tests of the clients that call them."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DONE = "[DONE]"


def delta(**fields: Any) -> dict[str, Any]:
    """An event of a streamed answer."""
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def finish(reason: str = "length") -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}


def usage(tokens_in: int, tokens_out: int) -> dict[str, Any]:
    return {
        "choices": [],
        "usage": {"prompt_tokens": tokens_in, "completion_tokens": tokens_out},
    }


#: A whole answer of three tokens.
WHOLE: list[Any] = [
    delta(role="assistant", content=""), delta(content="a"), delta(content="b"),
    delta(content="c"), finish(), usage(7, 3), DONE,
]  # fmt: skip


class Scripted(ThreadingHTTPServer):
    """Answers each request as `answer` scripts it: a status and a body, or events.

    Attributes:
        received: Headers and body of each request.
    """

    daemon_threads = True

    def __init__(self, answer: Callable[[int], tuple[int, Any]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.received: list[tuple[dict[str, str], Any]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self) -> None:
        body = b'{"object":"list","data":[{"id":"first"},{"id":"second"}]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append(
            ({name.lower(): value for name, value in self.headers.items()}, json.loads(body))
        )
        status, said = self.server.answer(len(self.server.received))
        self.send_response(status)
        self.send_header("x-gateway-lane", "vllm")
        self.send_header("Connection", "close")
        self.end_headers()
        if status != 200:
            self.wfile.write(json.dumps(said).encode())
            return
        for event in said:
            text = event if isinstance(event, str) else json.dumps(event)
            self.wfile.write(f"data: {text}\n\n".encode())

    def log_message(self, *_: Any) -> None:
        """Nothing: a test asserts what matters."""


@contextmanager
def scripted(answer: Callable[[int], tuple[int, Any]]) -> Iterator[Scripted]:
    """A scripted server that runs as long as the context is open."""
    with Scripted(answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def always(*events: Any) -> Callable[[int], tuple[int, Any]]:
    """A script that answers each request with these events."""
    return lambda _: (200, list(events))


def unused_url() -> str:
    """A URL at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"
