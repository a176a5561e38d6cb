"""A second port, to watch a fake engine and to script it from another process.

    GET /           its state
    POST /script    an answer for the next generating request: a list of steps
    DELETE /script  normal service again
    POST /down      refuse connections, reset the open ones
    POST /kill      end its process as `kill -9` does: its memory is free
    POST /up        listen again; a process that has died is started anew

Steps are written as `"reset"`, `"close"`, `"kill"`, `"silence"`, `"serve"`, or as an object:
`{"serve": {"tokens": 3}}`, `{"pause": 0.5}`, `{"event": {…}}`, `{"send": "text", "split": 1}`,
`{"head": {"status": 200, "headers": {…}, "length": 5}}`, `{"cut": 1000, "answer": […]}`,
`{"repeat": […], "times": 3}`, `{"status": 503, "message": "…", "retry_after": 2}`.
Instead of the list, `{"answer": […], "times": 3, "path": "/health"}` queues an answer
several times (`null`: for ever) or for another path.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import msgspec

from backends.fake.engine import FakeEngine
from backends.fake.gpu import OutOfMemory
from backends.fake.script import (
    Answer,
    Close,
    Cut,
    Head,
    Kill,
    Pause,
    Repeat,
    Reset,
    Send,
    Serve,
    Silence,
    Step,
    event,
    status,
    steps,
)
from backends.fake.wire import Received, Reply, Server

WORDS: dict[str, Step] = {
    "reset": Reset(),
    "close": Close(),
    "kill": Kill(),
    "silence": Silence(),
    "serve": Serve(),
}


def read_answer(described: Any) -> Answer:  # noqa: C901, PLR0911 - a table
    """The answer that this JSON describes; raises ValueError where it describes none."""
    match described:
        case list():
            return [step for part in described for step in steps(read_answer(part))]
        case str() as word if word in WORDS:
            return WORDS[word]
        case {"serve": fields}:
            return msgspec.convert(fields, Serve)
        case {"head": fields}:
            return msgspec.convert(fields, Head)
        case {"pause": int() | float() as seconds}:
            return Pause(seconds)
        case {"event": data}:
            return Send(event(data))
        case {"send": str() as text}:
            return Send(text.encode(), described.get("split"))
        case {"cut": int() as after}:
            return Cut(after, read_answer(described.get("answer", "serve")))
        case {"repeat": repeated}:
            return Repeat(read_answer(repeated), described.get("times"))
        case {"status": int() as code}:
            message = described.get("message", "scripted")
            return status(code, message, retry_after=described.get("retry_after"))
    msg = f"not a step: {described!r}"
    raise ValueError(msg)


class _Queued(msgspec.Struct, forbid_unknown_fields=True):
    """An answer, and the requests that it is for."""

    answer: Any
    times: int | None = 1
    path: str | None = None


class Control:
    """The control port of one engine, open for as long as the context is."""

    def __init__(self, engine: FakeEngine, port: int = 0) -> None:
        self._engine = engine
        self._server = Server(self._answer, port=port)

    async def __aenter__(self) -> Self:
        await self._server.up()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._server.close()

    @property
    def url(self) -> str:
        """Its base URL."""
        return self._server.url

    async def _answer(self, request: Received, reply: Reply) -> None:
        code, body = 200, self.state()
        match request.method, request.path:
            case "GET", "/":
                pass
            case "POST", "/script":
                try:
                    self._script(request.body)
                except (ValueError, TypeError) as exc:
                    code, body = 400, {"error": str(exc)}
            case "DELETE", "/script":
                self._engine.heal()
            case "POST", "/down":
                self._engine.down()
            case "POST", "/kill":
                self._engine.kill()
            case "POST", "/up":
                try:
                    await self._engine.up()
                except OutOfMemory as exc:
                    code, body = 409, {"error": str(exc)}
            case _:
                code, body = 404, {"error": "there is no such control path"}
        headers = {"content-type": "application/json"}
        await reply.whole(code, msgspec.json.encode(body), headers)

    def _script(self, described: object) -> None:
        queued = (
            _Queued(described)
            if isinstance(described, list)
            else msgspec.convert(described, _Queued)
        )
        answer = read_answer(queued.answer)
        if queued.times is None:
            self._engine.script(then=answer, path=queued.path)
        else:
            self._engine.script(*[answer] * queued.times, path=queued.path)

    def state(self) -> dict[str, object]:
        """The state of the engine."""
        engine = self._engine
        return {
            "url": engine.url,
            "alive": engine.alive,
            "up": engine.listening,
            "received": engine.arrived,
            "running": engine.running,
            "waiting": engine.waiting,
            "peak_running": engine.peak_running,
            "hang_ups": len(engine.hang_ups),
            "connections": engine.connections,
            "asleep": engine.asleep,
            "resident": engine.resident,
            "memory": engine.memory,
        }
