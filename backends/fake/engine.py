"""The fake engine: a process behind a port, its scripts, and how its answers are sent.

What it says is decided by its `behaviour`, its state is that of its `process`, and `wire`
sends the bytes.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from types import MappingProxyType, TracebackType
from typing import Self

from backends.fake.behaviour import GENERATING, Behaviour, Job, PlainAnswer, Refusal
from backends.fake.llamacpp import FakeLlamaCpp
from backends.fake.ollama import FakeOllama
from backends.fake.process import FakeProcess, forever
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
    steps,
)
from backends.fake.vllm import FakeVLLM
from backends.fake.wire import Received, Reply, Server, Spent

BEHAVIOURS: Mapping[str, type[Behaviour]] = MappingProxyType(
    {kind.name: kind for kind in (FakeOllama, FakeVLLM, FakeLlamaCpp)}
)


@dataclass(slots=True)
class _Script:
    """Answers for the next requests, and the answer of all after them."""

    answers: deque[Answer] = field(default_factory=deque)
    then: Answer | None = None

    def next(self) -> Answer | None:
        return self.answers.popleft() if self.answers else self.then


@dataclass(eq=False, repr=False)
class FakeEngine(FakeProcess):
    """A process that listens on a port of its own while the context is open.

    Attributes:
        keep_alive_s: Idle connections are closed after so long; None: as its kind does.
        remember: How many requests `received` keeps; None: all.
        own_port: The port to listen on; 0: any free one.
        received: The requests, as they came.
        hang_ups: When clients hung up before their answer was over, monotonic seconds.
        arrived: How many requests there were in all.
    """

    keep_alive_s: float | None = field(default=None, kw_only=True)
    remember: int | None = field(default=None, kw_only=True)
    own_port: int = field(default=0, kw_only=True)

    received: list[Received] = field(default_factory=list, init=False)
    hang_ups: list[float] = field(default_factory=list, init=False)
    arrived: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._behaviour = BEHAVIOURS[self.kind](self)
        if self.keep_alive_s is None:
            self.keep_alive_s = self._behaviour.keep_alive_s
        self._server = Server(
            self._answer,
            self._on_end,
            self.changed,
            keep_alive_s=self.keep_alive_s,
            port=self.own_port,
        )
        self._scripts: dict[str | None, _Script] = {}

    def __repr__(self) -> str:
        state = "up" if self.listening else "down"
        state = "asleep" if self.asleep else state if self.alive else "dead"
        return (
            f"<FakeEngine {self.kind} {self.url} {state} running={self.running}/{self.slots}"
            f" waiting={self.waiting} arrived={self.arrived} hang_ups={len(self.hang_ups)}>"
        )

    async def __aenter__(self) -> Self:
        await self.up()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.cancel_tasks()
        await self._server.close()
        if exc is None and self._server.mistakes:
            raise self._server.mistakes[0]

    # Its connections

    @property
    def url(self) -> str:
        """Its base URL, without /v1."""
        return self._server.url

    @property
    def port(self) -> int:
        """The port that is its own as long as it is open, even while it is down."""
        return self._server.port

    @property
    def listening(self) -> bool:
        """Whether it accepts connections."""
        return self._server.listening

    @property
    def generations(self) -> list[Received]:
        """The requests received that ask a model to generate."""
        return [request for request in self.received if request.path in GENERATING]

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._server.connections)

    @property
    def accepted(self) -> int:
        """Connections accepted so far."""
        return self._server.accepted

    # What can be done to it

    def script(self, *answers: Answer, then: Answer | None = None, path: str | None = None) -> None:
        """Give these answers to the next requests, and `then` to all after them.

        Without `then` normal service follows. It is for requests that generate, unless a
        `path` is given, such as "/health". "/api/generate" of Ollama has two: "load" and
        "unload". A scripted answer waits for no slot but holds one while it lasts.
        """
        script = self._scripts.setdefault(path, _Script())
        script.answers += answers
        if then is not None:
            script.then = then

    def heal(self) -> None:
        """Forget all scripts: normal service from the next request on."""
        self._scripts.clear()

    def down(self) -> None:
        """Refuse connections, and reset the open ones."""
        self._server.down()

    def deaf(self) -> None:
        """Let attempts to connect go unanswered, as behind a firewall that drops them."""
        self._server.deaf()

    async def up(self) -> None:
        """Listen (again), on the same port; a process that has died is started anew.

        Raises:
            OutOfMemory: A new process found the memory taken that it needs.
        """
        if not self.alive:
            self.begin(loads_when_asked=self._behaviour.loads_when_asked)
        await self._server.up()

    def kill(self) -> None:
        """End its process as `kill -9` does, and with it all connections."""
        self._server.down()
        super().kill()

    # One exchange

    async def _answer(self, request: Received, reply: Reply) -> None:
        self.arrived += 1
        self.received.append(request)
        if self.remember is not None and len(self.received) > 2 * self.remember:
            del self.received[: -self.remember]
        self.changed()

        operation = self._behaviour.operation(request)
        script = self._scripts.get(operation) or self._scripts.get(request.path)
        generates = request.path in GENERATING
        if script is None and generates:
            script = self._scripts.get(None)
        answer = script.next() if script else None
        if answer is not None and generates:
            async with self.slot(at_once=True):
                await self._play(answer, request, reply)
        elif answer is not None:
            await self._play(answer, request, reply)
        else:
            await self._serve(request, reply)

    def _on_end(self, request: Received) -> None:
        if request.ended == "hung up":
            self.hang_ups.append(time.monotonic())
        self.changed()

    async def _play(self, answer: Answer, request: Received, reply: Reply) -> None:
        for step in steps(answer):
            await self._step(step, request, reply)
            if reply.over:
                return

    async def _step(  # noqa: C901, PLR0912 - one arm a step
        self, step: Step, request: Received, reply: Reply
    ) -> None:
        match step:
            case Head():
                fields = {"content-type": "text/event-stream", **step.headers}
                await reply.head(step.status, fields, length=step.length, chunked=step.chunked)
            case Send():
                await reply.send(step.data, step.split)
            case Pause():
                await asyncio.sleep(step.seconds)
            case Silence():
                await forever()
            case Kill():
                self.kill()
                await forever()
            case Reset():
                reply.reset()
            case Close():
                reply.close()
            case Serve():
                await self._serve(request, reply, step)
            case Cut():
                reply.allowance = step.after
                try:
                    await self._play(step.answer, request, reply)
                except Spent:
                    reply.allowance = None
            case Repeat():
                rounds = itertools.count() if step.times is None else range(step.times)
                for _ in rounds:
                    await self._play(step.answer, request, reply)
                    if reply.over:
                        return
                    await asyncio.sleep(0)

    async def _serve(self, request: Received, reply: Reply, how: Serve | None = None) -> None:
        """Answer as its kind does; a script that asks for it (`how`) has its slot already."""
        kind = self._behaviour
        try:
            kind.admit(request)
            if request.path not in GENERATING or request.method != "POST":
                await self._send(await kind.control(request), reply)
                return
            job = kind.job(request)
        except Refusal as refusal:
            await self._send(refusal.answer, reply)
            return
        except (AttributeError, LookupError, TypeError, ValueError) as exc:
            # A body of wrong types: the kinds look only at what clients really get wrong.
            await self._send(kind.refuse(400, f"{type(exc).__name__}: {exc}").answer, reply)
            return
        if how is not None:
            await self._generate(job, reply, how)
            return
        if job.stream and kind.head_first:
            await reply.head(200, kind.stream_headers())
        await kind.prepare(job)
        async with self.slot(at_once=False):
            await self._generate(job, reply, Serve())

    async def _send(self, answer: PlainAnswer, reply: Reply) -> None:
        kind = self._behaviour
        close = answer.status >= HTTPStatus.BAD_REQUEST and kind.closes_after_error
        headers = {**kind.headers(), "content-type": answer.type or kind.json_type}
        await reply.whole(answer.status, answer.encoded, headers, close=close)

    async def _generate(self, job: Job, reply: Reply, how: Serve) -> None:
        kind, start = self._behaviour, time.monotonic()
        if not job.stream:
            await _reach(start + self.ttft_s + self.gap_s * max(0, job.tokens - 1))
            body = kind.whole(job)
            headers = {**kind.headers(), "content-type": kind.json_type, **how.headers}
            await reply.head(200, headers, length=len(body))
            await reply.send(body if how.tokens is None else body[: len(body) // 2])
            return

        abortions = self.abortions
        head = {**kind.stream_headers(), **how.headers}
        for index in range(job.tokens if how.tokens is None else how.tokens):
            # Each time counts from the start, so that a late token delays no other.
            await _reach(start + self.ttft_s + self.gap_s * index)
            if abortions != self.abortions:
                job.finish, job.tokens = "abort", index
                break
            if not reply.begun:
                await reply.head(200, head)
            for sent in kind.token(job, index):
                await reply.send(sent)
        if not reply.begun:
            await reply.head(200, head)
        if how.tokens is None:
            for sent in kind.closing(job):
                await reply.send(sent)
            await reply.end(close=kind.closes_after_stream)


async def _reach(when: float) -> None:
    """Return at this time and never before it; let others run in any case."""
    while True:
        await asyncio.sleep(max(0.0, when - time.monotonic()))
        if time.monotonic() >= when:  # uvloop rounds to milliseconds, down as well as up
            return
