"""One exchange, from the request as read to its last byte.

A request gets a slot, its replica an attempt, the client the bytes as they come. The
type of an engine's error says whether another may be asked; nobody looks at flags. Once
the first byte is out, a failure becomes an event in the stream and never a clean end.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeAlias

import msgspec

from backends import base
from backends.base import BackendError, Busy, Refused, Silent, Unreachable
from backends.transport import sse
from gateway.errors import (
    ClientGone,
    EngineBusy,
    EngineFailed,
    EngineRefused,
    EngineSilent,
    GatewayError,
    NoLane,
)
from gateway.http.request import Request
from gateway.routing.scheduler import Replica, Ticket
from gateway.serving.catalogue import Catalogue, Model

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Headers: TypeAlias = list[tuple[bytes, bytes]]

HEARTBEAT = b": ping\n\n"
#: How soon, and how often at most, people read what they wait for.
STATUS_S = 1.0
#: A timer may be as early.
EARLY_S = 0.001
#: A chat page asks for the title of a chat just before it asks for the answer. Nobody waits for
#: the title, so it is held back for as long: where there is one slot, the answer has it first.
BACKGROUND_S = 0.5

#: Of all requests, how many may be tried a second time (case: an engine dies under
#: load, and every request to it is sent again to the one that is left), and how many
#: such attempts may be saved up, if no server has more slots.
RETRY_SHARE = 0.2
RETRY_SAVED = 10.0


@dataclass(slots=True)
class Exchange:
    """What is known of one exchange; filled on its way, logged at its end.

    Times are seconds on the monotonic clock, zero where it never came to it.
    """

    id: str
    path: str = ""
    key: str = ""
    model: str = ""
    stream: bool = False
    background: bool = False
    lane: str = ""
    cause: str = ""
    reason: str = ""
    dropped: tuple[str, ...] = ()
    attempts: int = 0
    outcome: str = ""
    status: int = 0
    began: float = 0.0
    sent: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    usage: sse.Usage | None = None


class Lifeline:
    """Ends the block when the client hangs up, or when somebody cuts it.

    The client is watched from the first moment: while its request waits, before the
    engine has answered, and between any two bytes.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._cause: BaseException | None = None

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - we run in one
        self._task = task
        self._watcher = asyncio.get_running_loop().create_task(self._watch())
        return self

    def cut(self, cause: BaseException) -> None:
        """End the block with this exception."""
        if self._cause is None:
            self._cause = cause
            self._task.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.cut(ClientGone())

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._watcher.cancel()
        if self._cause is not None and kind is asyncio.CancelledError:
            self._task.uncancel()
            raise self._cause from None


class Reply:
    """The answer on its way to the client; knows whether it has begun."""

    def __init__(self, send: Send, exchange: Exchange) -> None:
        self.begun = False
        self.last = 0.0
        self._send = send
        self._exchange = exchange

    async def whole(self, status: int, body: bytes, extra: Headers | None = None) -> None:
        """An answer in one piece, JSON."""
        self.begun = True
        self._exchange.status = status
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *self._told(),
            *(extra or ()),
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def events(self, data: bytes) -> None:
        """Some events of a stream, which begins with the first of them."""
        if not self.begun:
            self.begun = True
            self._exchange.status = 200
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
                *self._told(),
            ]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        self.last = time.monotonic()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """The stream is over."""
        await self._send({"type": "http.response.body", "body": b""})

    async def error(self, error: GatewayError) -> None:
        """Tell the client of a failure: as an answer, or as an event where one has begun."""
        if not self.begun:
            await self.whole(error.status, error.envelope(), error.headers())
            return
        await self.events(b"data: " + error.envelope() + b"\n\n" + sse.DONE)
        await self.end()

    def _told(self) -> Headers:
        return told(self._exchange)


def told(exchange: Exchange) -> Headers:
    """The headers that every answer carries: its id, its lane and why."""
    headers = [
        (b"x-request-id", exchange.id.encode()),
        (b"x-gateway-lane", exchange.lane.encode() or b"none"),
        (b"x-gateway-reason", exchange.reason.encode("ascii", "replace") or b"the gateway's own"),
    ]
    if exchange.dropped:
        names = ",".join(exchange.dropped)[:512]
        safe = "".join(c if c.isprintable() else "?" for c in names)
        headers.append((b"x-gateway-dropped", safe.encode("ascii", "replace")))
    return headers


class Heart:
    """Keeps a waiting stream alive: sends what `beat` says whenever nothing was sent for a while.

    An empty beat is none.
    """

    def __init__(self, reply: Reply, period_s: float, beat: Callable[[], bytes]) -> None:
        self._reply = reply
        self._period_s = period_s
        self._beat = beat
        self._beating: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._reply.last = time.monotonic()
        self._timer = self._loop.call_later(self._period_s, self._due)

    def __exit__(self, *exc: object) -> None:
        self._timer.cancel()
        if self._beating is not None:
            self._beating.cancel()

    def _due(self) -> None:
        left = self._reply.last + self._period_s - time.monotonic()
        if left <= EARLY_S:
            if (self._beating is None or self._beating.done()) and (beat := self._beat()):
                self._beating = self._loop.create_task(self._reply.events(beat))
            left = self._period_s
        self._timer = self._loop.call_later(left, self._due)


class RetryBudget:
    """Second attempts as a share of all requests, so that no failure is multiplied.

    What is saved up is enough for all that one server may have at once: its death is one
    fault, and none of those that it had not begun to answer shall be lost to it.
    """

    def __init__(self) -> None:
        self._most = self._saved = RETRY_SAVED

    def earn(self, slots: int) -> None:
        """A request came, for servers of so many slots at most."""
        if slots > self._most:
            self._saved += slots - self._most
            self._most = slots
        self._saved = min(self._most, self._saved + RETRY_SHARE)

    def spend(self) -> bool:
        """Whether one may be tried again."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True


class Relay:
    """Serves requests from the models of a catalogue.

    Args:
        catalogue: The models.
        heartbeat_s: Silence before a waiting stream is sent a comment.
        status_events: Whether one that waits for the GPU is told so in Open WebUI's way.
    """

    def __init__(
        self, catalogue: Catalogue, *, heartbeat_s: float, status_events: bool = False
    ) -> None:
        self._catalogue = catalogue
        self._heartbeat_s = heartbeat_s
        # Who reads what it waits for should not wait for that.
        self._look_s = min(heartbeat_s, STATUS_S) if status_events else heartbeat_s
        self._status_events = status_events
        self._budget = RetryBudget()

    async def serve(
        self, request: Request, pin: str | None, exchange: Exchange, reply: Reply
    ) -> None:
        """Answer a request.

        Args:
            request: What was asked.
            pin: A lane named in a header.
            exchange: Filled on the way.
            reply: Where the answer goes.

        Raises:
            GatewayError: It was not answered, or not to its end.
        """
        model, named = self._catalogue.find(request.model)
        exchange.model = model.name
        exchange.stream = request.call.stream
        exchange.background = request.background
        ticket, stripped = self._ticket(model, request, named or pin, exchange.key)
        self._budget.earn(model.admission.scheduler.largest)
        with contextlib.ExitStack() as stack:
            if request.call.stream:
                beat = partial(self._beat, model, ticket, exchange, reply)
                stack.enter_context(Heart(reply, self._look_s, beat))
            if request.background:
                await asyncio.sleep(BACKGROUND_S)
            await self._attempts(model, ticket, stripped, request, exchange, reply)

    def _beat(self, model: Model, ticket: Ticket, exchange: Exchange, reply: Reply) -> bytes:
        """What keeps a stream alive now; nothing while it may still be refused.

        In the queue it may still be told 429 or 503; only a hand-over is worth its silence.
        And a comment names the lane, after which no other is asked: it is sent no sooner
        than it must be.
        """
        silent_s = time.monotonic() - reply.last
        beat = HEARTBEAT if silent_s > self._heartbeat_s - EARLY_S else b""
        if ticket.lane is not None:
            if beat and not reply.begun:  # it may have its slot, and not have been told yet
                exchange.lane, exchange.reason = ticket.lane.name, ticket.reason
            return beat
        movement = model.admission.movement
        if not movement:
            return b""
        if self._status_events and not (reply.begun and movement == exchange.reason):
            beat = _status_event(movement, done=False)
        if beat:
            exchange.reason = movement
            if not reply.begun:
                exchange.lane = model.admission.heading(ticket)
        return beat

    async def _attempts(
        self,
        model: Model,
        ticket: Ticket,
        stripped: tuple[str, ...],
        request: Request,
        exchange: Exchange,
        reply: Reply,
    ) -> None:
        """Ask one replica, and another where that failed and nothing is out; as `serve`."""
        failure: GatewayError | None = None
        while True:
            try:
                async with model.admission.slot(ticket, again=failure is not None) as replica:
                    exchange.attempts += 1
                    assert ticket.lane is not None  # noqa: S101 - admitted
                    exchange.lane = ticket.lane.name
                    exchange.cause = ticket.cause
                    exchange.reason = ticket.reason
                    exchange.dropped = stripped
                    exchange.sent = time.monotonic()
                    if reply.begun and self._status_events and failure is None:
                        await reply.events(_status_event("The GPU is there.", done=True))
                    await self._attempt(model, replica, request, exchange, reply)
                    if exchange.usage is not None and not request.needs.many:
                        model.admission.served(ticket, exchange.usage.completion_tokens)
                    return
            except NoLane:
                if failure is not None:
                    raise failure from None  # there was no other: tell what went wrong here
                raise
            except BackendError as exc:
                failed = _translated(exc)
                again = exc.elsewhere and not reply.begun and failure is None
                if not again or not self._budget.spend():
                    raise failed from exc
                failure = failed
                ticket.without.add(replica)

    def _ticket(
        self, model: Model, request: Request, pin: str | None, key: str
    ) -> tuple[Ticket, tuple[str, ...]]:
        """The request's place in the queue, and the fields that no lane can take."""
        needs = request.needs
        stripped: tuple[str, ...] = ()
        if needs.tools and not needs.forced_tools and model.offers("tools") is False:
            # A chat page sends its tools with every hello: better an answer without them.
            stripped = tuple(
                name
                for name in ("tools", "tool_choice", "parallel_tool_calls")
                if request.call.body.pop(name, None) is not None
            )
            needs.tools = False
        if pin is not None and pin not in model.lanes:
            pin = None
        able, why = model.able(needs)
        return Ticket(key, request.background, pin, able, why), stripped

    async def _attempt(
        self, model: Model, replica: Replica, request: Request, exchange: Exchange, reply: Reply
    ) -> None:
        """Ask one replica; raises `BackendError`."""
        server = model.admission.servers[replica]
        try:
            if request.call.stream:
                await self._stream(server.engine, server.model, request, exchange, reply)
            else:
                await self._ask(server.engine, server.model, request, exchange, reply)
        except BackendError as exc:
            model.admission.failed(replica, exc)
            raise
        model.admission.answered(replica)

    async def _ask(
        self,
        engine: base.Engine,
        name: str,
        request: Request,
        exchange: Exchange,
        reply: Reply,
    ) -> None:
        whole = await engine.ask(request.call, name)
        exchange.first = time.monotonic()
        exchange.usage = whole.usage
        exchange.dropped += whole.dropped
        await reply.whole(200, whole.body)

    async def _stream(
        self,
        engine: base.Engine,
        name: str,
        request: Request,
        exchange: Exchange,
        reply: Reply,
    ) -> None:
        answer = await engine.open(request.call, name)
        try:
            exchange.dropped += answer.dropped
            watch = answer.watch
            while data := await answer.read():
                if watch.content and not exchange.first:
                    exchange.first = time.monotonic()
                await reply.events(data)
        finally:
            exchange.usage = answer.watch.usage
            answer.close()
        await reply.end()


def _status_event(text: str, *, done: bool) -> bytes:
    """What Open WebUI shows over an answer; not OpenAI's, so only where it was asked for."""
    status = {"type": "status", "data": {"description": text, "done": done}}
    return b"data: " + msgspec.json.encode({"event": status}) + b"\n\n"


def _translated(error: BackendError) -> GatewayError:
    """An engine's failure in public words: no address, no text of the engine but a refusal's."""
    match error:
        case Refused():
            return EngineRefused(
                str(error), status=error.status, kind=error.type, param=error.param, code=error.code
            )
        case Busy():
            return EngineBusy("The engine has too much to do.", retry_after=error.retry_after or 1)
        case Unreachable():
            return NoLane("The engine cannot be reached.", retry_after=5)
        case Silent():
            return EngineSilent("The engine did not answer in time.")
        case base.BrokeOff():
            return EngineFailed("The engine's answer broke off before its end.")
        case _:
            return EngineFailed("The engine failed to answer.", retry_after=1)
