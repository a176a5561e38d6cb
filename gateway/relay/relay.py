"""One exchange, from the request as read to its last byte.

A request waits for a slot, is sent to its replica, and the client receives the bytes as they
come. The type of an engine's error alone says whether another replica may be tried. Once the
first byte is out, a failure becomes an event in the stream and never a clean end.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial

import msgspec

from backends import errors
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
from gateway.relay.heartbeat import COMMENT, Heartbeat
from gateway.relay.reply import Reply
from gateway.relay.retry import RetryBudget
from gateway.routing.lanes import Ticket
from gateway.serving.admission import TIMER_SLACK_S, Grant
from gateway.serving.catalogue import Catalogue, Model
from gateway.settings import Timings


class Relay:
    """Relays requests to the models of a catalogue, and the answers to the clients.

    Args:
        catalogue: The models.
        heartbeat_s: Silence after which a waiting stream receives a comment, seconds.
        status_events: Whether a stream that waits for the GPU receives Open WebUI's status events.
        timings: When the first status event is due, and how long a background call is held back.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        heartbeat_s: float,
        status_events: bool = False,
        timings: Timings | None = None,
    ) -> None:
        self._catalogue = catalogue
        self._timings = timings or Timings()
        self._heartbeat_s = heartbeat_s
        # A status event should not wait for the heartbeat.
        status_s = min(heartbeat_s, self._timings.status_event_s)
        self._tick_s = status_s if status_events else heartbeat_s
        self._status_events = status_events
        self._budget = RetryBudget()

    async def serve(
        self, request: Request, pin: str | None, exchange: Exchange, reply: Reply
    ) -> None:
        """Answer a request.

        Args:
            request: The request.
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
        ticket, stripped = _make_ticket(model, request, named or pin, exchange.key)
        self._budget.earn(model.most_slots)
        with contextlib.ExitStack() as stack:
            if request.call.stream:
                message = partial(self._heartbeat, model, ticket, exchange, reply)
                stack.enter_context(Heartbeat(reply, self._tick_s, message))
            if request.background:
                await asyncio.sleep(self._timings.background_hold_s)
            await self._attempts(model, ticket, stripped, request, exchange, reply)

    def _heartbeat(self, model: Model, ticket: Ticket, exchange: Exchange, reply: Reply) -> bytes:
        """What keeps a stream alive now; empty while it may still be refused.

        In the queue it may still receive 429 or 503. So before it has its slot, heartbeats are
        sent during a hand-over only. The first one sends the headers, which name the lane.
        After it no other lane is tried, so it is sent as late as possible.
        """
        silent_s = time.monotonic() - reply.last
        message = COMMENT if silent_s > self._heartbeat_s - TIMER_SLACK_S else b""
        outlook = model.admission.outlook(ticket)
        if outlook.granted:
            if message and not reply.begun:  # granted, but `_attempts` has not run since
                exchange.lane, exchange.reason = outlook.lane, outlook.reason
            return message
        if not outlook.reason:
            return b""
        if self._status_events and not (reply.begun and outlook.reason == exchange.reason):
            message = _status_event(outlook.reason, done=False)
        if message:
            exchange.reason = outlook.reason
            if not reply.begun:
                exchange.lane = outlook.lane
        return message

    async def _attempts(
        self,
        model: Model,
        ticket: Ticket,
        stripped: tuple[str, ...],
        request: Request,
        exchange: Exchange,
        reply: Reply,
    ) -> None:
        """Send to one replica, and to another if it fails before a byte is out; see `serve`."""
        failure: GatewayError | None = None
        while True:
            try:
                async with model.admission.slot(ticket) as grant:
                    exchange.attempts += 1
                    exchange.lane = grant.lane
                    exchange.cause = grant.cause
                    exchange.reason = grant.reason
                    exchange.dropped = stripped
                    exchange.sent = time.monotonic()
                    if reply.begun and self._status_events and failure is None:
                        await reply.events(_status_event("The GPU is ready.", done=True))
                    await self._attempt(grant, request, exchange, reply)
                    return
            except NoLane:
                if failure is not None:
                    raise failure from None  # no other lane: what went wrong here is the reason
                raise
            except BackendError as exc:
                translated = _translate(exc)
                again = exc.retryable and not reply.begun and failure is None
                if not again or not self._budget.spend():
                    raise translated from exc
                failure = translated

    async def _attempt(
        self, grant: Grant, request: Request, exchange: Exchange, reply: Reply
    ) -> None:
        """Send the request to one replica; raises `BackendError`."""
        try:
            if request.call.stream:
                await self._stream(grant, request, exchange, reply)
            else:
                await self._ask(grant, request, exchange, reply)
        except BackendError as exc:
            grant.failed(exc)
            raise
        usage = None if request.needs.multiple_choices else exchange.usage
        grant.answered(usage.completion_tokens if usage is not None else None)

    async def _ask(self, grant: Grant, request: Request, exchange: Exchange, reply: Reply) -> None:
        answer = await grant.engine.fetch_answer(request.call, grant.model)
        exchange.first = time.monotonic()
        exchange.usage = answer.usage
        exchange.dropped += answer.dropped
        await reply.whole(200, answer.body)

    async def _stream(
        self, grant: Grant, request: Request, exchange: Exchange, reply: Reply
    ) -> None:
        answer = await grant.engine.open_stream(request.call, grant.model)
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


def _make_ticket(
    model: Model, request: Request, pin: str | None, key: str
) -> tuple[Ticket, tuple[str, ...]]:
    """The request's place in the queue, and the fields that no lane can take."""
    needs = request.needs
    stripped: tuple[str, ...] = ()
    if needs.tools and not needs.forced_tools and model.offers("tools") is False:
        # A chat page sends its tools with every message: an answer without them is better.
        stripped = tuple(
            name
            for name in ("tools", "tool_choice", "parallel_tool_calls")
            if request.call.body.pop(name, None) is not None
        )
        needs.tools = False
    if pin is not None and pin not in model.lanes:
        pin = None
    eligible, exclusion_reason = model.eligible_lanes(needs)
    return Ticket(key, request.background, pin, eligible, exclusion_reason), stripped


def _status_event(text: str, *, done: bool) -> bytes:
    """Open WebUI's status line over an answer. It is not part of OpenAI's API."""
    status = {"type": "status", "data": {"description": text, "done": done}}
    return b"data: " + msgspec.json.encode({"event": status}) + b"\n\n"


def _translate(error: BackendError) -> GatewayError:
    """An engine's failure in public words: no address, and no engine's text but a refusal's."""
    match error:
        case Refused():
            return EngineRefused(
                str(error), status=error.status, kind=error.type, param=error.param, code=error.code
            )
        case Busy():
            return EngineBusy(
                "The engine is busy. Try again later.", retry_after=error.retry_after or 1
            )
        case Unreachable():
            return NoLane("The engine cannot be reached. Try again later.", retry_after=5)
        case NoAnswer():
            return EngineSilent("The engine did not answer in time.")
        case errors.BrokeOff():
            return EngineFailed("The engine's answer broke off before its end.")
        case _:
            return EngineFailed("The engine failed to answer.", retry_after=1)
