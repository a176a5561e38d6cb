"""One exchange, from the request as read to its last byte.

A request gets a slot, its replica an attempt, the client the bytes as they come. The
type of an engine's error says whether another may be asked; nobody looks at flags. Once
the first byte is out, a failure becomes an event in the stream and never a clean end.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial

import msgspec

from backends import base, errors
from backends.errors import BackendError, Busy, NoAnswer, Refused, Unreachable
from gateway.errors import (
    EngineBusy,
    EngineFailed,
    EngineRefused,
    EngineSilent,
    GatewayError,
    NoLane,
)
from gateway.relay.exchange import Exchange, Request
from gateway.relay.heartbeat import EARLY_S, HEARTBEAT, Heart
from gateway.relay.reply import Reply
from gateway.relay.retry import RetryBudget
from gateway.routing.scheduler import Replica, Ticket
from gateway.serving.catalogue import Catalogue, Model

#: How soon, and how often at most, people read what they wait for.
STATUS_S = 1.0
#: A chat page asks for the title of a chat just before it asks for the answer. Nobody waits for
#: the title, so it is held back for as long: where there is one slot, the answer has it first.
BACKGROUND_S = 0.5


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
                    if exchange.usage is not None and not request.needs.multiple_choices:
                        model.admission.served(ticket, exchange.usage.completion_tokens)
                    return
            except NoLane:
                if failure is not None:
                    raise failure from None  # there was no other: tell what went wrong here
                raise
            except BackendError as exc:
                failed = _translated(exc)
                again = exc.retryable and not reply.begun and failure is None
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
        able, why = model.eligible_lanes(needs)
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
        whole = await engine.fetch_answer(request.call, name)
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
        answer = await engine.open_stream(request.call, name)
        try:
            exchange.dropped += answer.dropped
            while data := await answer.read():
                if answer.filter.content and not exchange.first:
                    exchange.first = time.monotonic()
                await reply.events(data)
        finally:
            exchange.usage = answer.filter.usage
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
        case NoAnswer():
            return EngineSilent("The engine did not answer in time.")
        case errors.BrokeOff():
            return EngineFailed("The engine's answer broke off before its end.")
        case _:
            return EngineFailed("The engine failed to answer.", retry_after=1)
