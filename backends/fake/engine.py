"""The engine that is played: its slots, its clock, its memory, and the scripts for it.

What it says is the business of its kind (`kinds`), how it is sent that of `wire`. Here
is what all engines have in common: requests that wait for a slot in the order they came,
and tokens that come at fixed times.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from types import TracebackType
from typing import Any, NoReturn, Self

from backends.fake.gpu import FakeGpu, NoRoom, Taken
from backends.fake.kinds import GENERATING, Job, Kind, Name, Refusal, Told
from backends.fake.llamacpp import LlamaCpp
from backends.fake.ollama import Ollama
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
from backends.fake.vllm import VLLM
from backends.fake.wire import Received, Reply, Server, Spent

KINDS: dict[Name, type[Kind]] = {"ollama": Ollama, "vllm": VLLM, "llamacpp": LlamaCpp}

#: What a vLLM has of the GPU: this much at any time, and this while it is awake.
_ASLEEP, _AWAKE = "asleep", "awake"


@dataclass(slots=True)
class _Script:
    """Answers for the next requests, and what comes when they are used up."""

    answers: deque[Answer] = field(default_factory=deque)
    then: Answer | None = None

    def next(self) -> Answer | None:
        return self.answers.popleft() if self.answers else self.then


class FakeEngine:
    """An engine of one kind on a port of its own, open for as long as the context is.

    Args:
        kind: Which engine to be: "ollama", "vllm" or "llamacpp".
        models: Names of the models it can chat with.
        embedding: Names of the models made for embeddings.
        ttft_s: From the moment a slot is granted to the first token.
        gap_s: From each token to the next.
        tokens: Length of an answer that has no limit of its own.
        slots: How many it answers at once; all others wait, in order, without limit.
        context: Context length, in tokens (a prompt has one for each of its words).
        tools: Whether it takes tools.
        dev_mode: Whether vLLM has its sleep endpoints.
        load_s: How long Ollama takes to load a model (none is loaded at the start).
        unload_s: … and how long the model stays after it was told to go.
        sleep_s: How long vLLM takes to fall asleep, once idle …
        wake_s: … and to wake; None is the same.
        settle_s: How long memory that was let go still counts as taken.
        asleep: Whether vLLM begins asleep.
        gpu: The GPU it shares with others; None is one of its own, without limit.
        size: Bytes of it that a model takes, or a vLLM that is awake in all.
        on_gpu: Which part of a model Ollama puts there at most.
        loading: Whether llama.cpp still reads its model; set it to False later.
        keep_alive_s: Idle connections are closed after so long; None is the kind's own.
        remember: How many requests `received` keeps; None is all.
    """

    def __init__(
        self,
        kind: Name,
        models: Sequence[str] = ("m",),
        *,
        embedding: Sequence[str] = (),
        ttft_s: float = 0.0,
        gap_s: float = 0.0,
        tokens: int = 5,
        slots: int = 16,
        context: int = 2048,
        tools: bool = False,
        dev_mode: bool = False,
        load_s: float = 0.0,
        unload_s: float = 0.0,
        sleep_s: float = 0.0,
        wake_s: float | None = None,
        settle_s: float = 0.0,
        asleep: bool = False,
        gpu: FakeGpu | None = None,
        size: int = 98_000_000,
        on_gpu: float = 1.0,
        loading: bool = False,
        keep_alive_s: float | None = None,
        remember: int | None = None,
        port: int = 0,
    ) -> None:
        self.models = tuple(models)
        self.embedding = tuple(embedding)
        self.ttft_s = ttft_s
        self.gap_s = gap_s
        self.tokens = tokens
        self.slots = slots
        self.context = context
        self.tools = tools
        self.dev_mode = dev_mode
        self.load_s = load_s
        self.unload_s = unload_s
        self.sleep_s = sleep_s
        self.wake_s = sleep_s if wake_s is None else wake_s
        self.settle_s = settle_s
        self.gpu = gpu or FakeGpu(1 << 60)
        self.size = size
        self.on_gpu = on_gpu
        self.loading = loading

        self.received: list[Received] = []
        self.hang_ups: list[float] = []
        self.arrived = 0
        self.running = 0
        self.peak_running = 0
        #: Set it: the version that it says it has, in place of the one that is played.
        self.version = ""
        #: Whether the process runs; what the rest of it says is then true.
        self.alive = False
        self.pid = 0
        #: Starts no request: it was told to sleep, and has not been woken.
        self.paused = False
        #: Has let go of its memory.
        self.asleep = asleep
        #: Accepts all and generates nothing until it is started anew.
        self.stuck = False
        #: Set it: the next time it wakes it is stuck.
        self.wakes_stuck = False
        #: The models that are loaded.
        self.resident: list[str] = []

        self.kind = kind
        self._kind: Kind = KINDS[kind](self)
        if keep_alive_s is None:
            keep_alive_s = self._kind.keep_alive_s
        self._server = Server(
            self._answer, self._ended, self.changed, keep_alive_s=keep_alive_s, port=port
        )
        # A request's turn: in the queue until it is done, from then on in a slot.
        self._queue: deque[asyncio.Future[None]] = deque()
        self._scripts: dict[str | None, _Script] = {}
        self._remember = remember
        self._watchers: list[tuple[Callable[[FakeEngine], object], asyncio.Future[None]]] = []
        self._loads: dict[str, asyncio.Lock] = {}
        self._chores: set[asyncio.Task[None]] = set()
        self._taken: dict[str, Taken] = {}
        self._dozing = asyncio.Lock()
        self._abortions = 0

    def __repr__(self) -> str:
        state = "up" if self.listening else "down"
        state = "asleep" if self.asleep else state if self.alive else "dead"
        return (
            f"<FakeEngine {self._kind.name} {self.url} {state} running={self.running}/{self.slots}"
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
        chores = list(self._chores)
        for chore in chores:
            chore.cancel()
        await asyncio.gather(*chores, return_exceptions=True)
        self.gpu.ended(self.pid)  # what it had can still be seen here
        await self._server.close()
        if exc is None and self._server.mistakes:
            raise self._server.mistakes[0]

    # What can be seen

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
        """The requests received that ask for an answer of a model."""
        return [request for request in self.received if request.path in GENERATING]

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._queue)

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._server.connections)

    @property
    def accepted(self) -> int:
        """Connections there have been in all."""
        return self._server.accepted

    async def until(
        self, happened: Callable[[FakeEngine], object], *, within_s: float = 5.0
    ) -> None:
        """Return as soon as this holds, which is looked at whenever something changes.

        Raises:
            TimeoutError: It did not happen; the text tells the engine's state.
        """
        if happened(self):
            return
        watcher = (happened, asyncio.get_running_loop().create_future())
        self._watchers.append(watcher)
        try:
            async with asyncio.timeout(within_s):
                await watcher[1]
        except TimeoutError:
            msg = f"did not happen within {within_s:g} s: {self!r}"
            raise TimeoutError(msg) from None
        finally:
            self._watchers.remove(watcher)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes it has of the GPU, by model; a vLLM has them in two parts."""
        return {owner: taken.size for owner, taken in self._taken.items()}

    # What can be done to it

    def script(self, *answers: Answer, then: Answer | None = None, path: str | None = None) -> None:
        """Answer the next requests like this, and all after them as `then` says.

        Without `then` normal service follows. It is for requests that generate, unless a
        `path` is given, such as "/health". Of "/api/generate" Ollama has two: "load" and
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
        """Refuse connections, and reset those there are."""
        self._server.down()

    def deaf(self) -> None:
        """Let attempts to connect go unanswered, as behind a firewall that drops them."""
        self._server.deaf()

    async def up(self) -> None:
        """Listen (again), on the same port; a process that has died is started anew.

        Raises:
            NoRoom: A new process found the memory taken that it wants.
        """
        if not self.alive:
            self._begin()
        await self._server.up()

    def kill(self) -> None:
        """End its process as `kill -9` does: its memory is free at once, what it did is lost."""
        self.alive = False
        self._server.down()
        for chore in self._chores:
            chore.cancel()
        self._lose_memory()
        self._loads.clear()
        self._dozing = asyncio.Lock()
        self.asleep = self.paused = self.stuck = False
        self.changed()

    # Its memory: what its kind may ask for

    async def load(self, model: str) -> None:
        """Return when the model is in memory; given up if the caller is cancelled.

        Where there is no room for all of it, the rest goes to the CPU.
        """
        async with self._loads.setdefault(model, asyncio.Lock()):
            if model in self.resident:
                return
            taken = self.gpu.take(self.pid, min(int(self.size * self.on_gpu), self.gpu.free()))
            self._taken[model] = taken
            self.changed()
            try:
                await asyncio.sleep(self.load_s)
            except asyncio.CancelledError:
                if self._has(model, taken):
                    self._let_go(model)
                raise
            if self._has(model, taken):
                self.resident.append(model)
                self.changed()

    def unload(self, model: str) -> None:
        """Let the model go, some time after the last request has ended."""

        async def leave() -> None:
            async with self._loads.setdefault(model, asyncio.Lock()):
                await self._idle()
                await asyncio.sleep(self.unload_s)
                if model in self.resident:
                    self.resident.remove(model)
                    self._let_go(model)

        self._chore(leave())

    async def fall_asleep(self, *, abort: bool) -> None:
        """Start nothing more, end what runs (at once, if told to), then sleep.

        It sleeps whether the caller waits for it or not, and even if woken before it did.
        """
        self.paused = True
        if abort:
            self._abortions += 1
        self.changed()

        async def doze_off() -> None:
            await self._idle()
            async with self._dozing:
                if not self.asleep:
                    await asyncio.sleep(self.sleep_s)
                    self.asleep = True
                    self._let_go(_AWAKE)

        await asyncio.shield(self._chore(doze_off()))

    async def wake(self) -> None:
        """Start again what waits. It does not survive if others have its memory."""

        async def wake_up() -> None:
            async with self._dozing:
                if self.asleep:
                    try:
                        self._take(_AWAKE)
                    except NoRoom:
                        self.kill()
                        await _forever()
                    await asyncio.sleep(self.wake_s)
                    self.stuck = self.stuck or self.wakes_stuck
                self.asleep = self.paused = False
                self.changed()

        await asyncio.shield(self._chore(wake_up()))

    def _begin(self) -> None:
        """A new process, with the memory that it wants from the start; raises `NoRoom`."""
        self.pid = self.gpu.new_pid()
        if not self._kind.loads_when_asked:
            try:
                self._take(_ASLEEP)
                if not self.asleep:
                    self._take(_AWAKE)
            except NoRoom:
                self._lose_memory()
                raise
        self.paused = self.asleep
        self.alive = True

    def _take(self, part: str) -> None:
        """Take one of the two parts of what a vLLM has; raises `NoRoom`."""
        kept = min(self.size, self.gpu.remainder * self.gpu.cards)
        size = kept if part == _ASLEEP else self.size - kept
        self._taken[part] = self.gpu.take(self.pid, size)

    def _has(self, owner: str, taken: Taken) -> bool:
        """Whether these are the bytes of this owner, which is over when the process has died."""
        return self._taken.get(owner) is taken

    def _let_go(self, owner: str) -> None:
        """Give back what this part has, to be free after a while."""
        taken = self._taken.pop(owner)

        async def settle() -> None:
            await asyncio.sleep(self.settle_s)
            self.gpu.give(taken)
            self.changed()

        if self.settle_s:
            self._chore(settle())
        else:
            self.gpu.give(taken)
        self.changed()

    def _lose_memory(self) -> None:
        self.gpu.ended(self.pid)
        self._taken.clear()
        self.resident.clear()

    def _chore(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Something that the process goes on with, whoever waits for it."""
        chore = asyncio.get_running_loop().create_task(work)
        self._chores.add(chore)
        chore.add_done_callback(self._chores.discard)
        return chore

    async def _idle(self) -> None:
        await self.until(lambda engine: not engine.running, within_s=3600.0)

    # Who is served

    def changed(self) -> None:
        """Give out the slots that are free, and tell those who watch."""
        while self._queue and self.running < self.slots and self._starts:
            if self.asleep:  # woken before it slept, it runs on memory that it has not
                self.kill()
                break
            self._start(self._queue.popleft())
        for happened, told in self._watchers:
            try:
                if not told.done() and happened(self):
                    told.set_result(None)
            except Exception as exc:  # noqa: BLE001 - the watcher's own, to be raised there
                told.set_exception(exc)

    @property
    def _starts(self) -> bool:
        return self.alive and not (self.paused or self.stuck)

    def _start(self, turn: asyncio.Future[None]) -> None:
        self.running += 1
        self.peak_running = max(self.peak_running, self.running)
        turn.set_result(None)

    def _leave(self, turn: asyncio.Future[None]) -> None:
        if turn.done():
            self.running -= 1
        else:
            self._queue.remove(turn)
        self.changed()

    @asynccontextmanager
    async def _slot(self, *, scripted: bool) -> AsyncIterator[None]:
        """Hold a slot for as long as the context is open; a scripted answer gets one at once."""
        turn = asyncio.get_running_loop().create_future()
        if scripted:
            self._start(turn)
        else:
            self._queue.append(turn)
        self.changed()
        try:
            # Shielded: if this task is cancelled, the turn must not look as if it were done.
            await asyncio.shield(turn)
            yield
        finally:
            self._leave(turn)

    # One exchange

    async def _answer(self, request: Received, reply: Reply) -> None:
        self.arrived += 1
        self.received.append(request)
        if self._remember is not None and len(self.received) > 2 * self._remember:
            del self.received[: -self._remember]
        self.changed()

        script = self._scripts.get(self._kind.deed(request)) or self._scripts.get(request.path)
        generates = request.path in GENERATING
        if script is None and generates:
            script = self._scripts.get(None)
        answer = script.next() if script else None
        if answer is not None and generates:
            async with self._slot(scripted=True):
                await self._play(answer, request, reply)
        elif answer is not None:
            await self._play(answer, request, reply)
        else:
            await self._serve(request, reply)

    def _ended(self, request: Received) -> None:
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
                await _forever()
            case Kill():
                self.kill()
                await _forever()
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
        """Answer as the kind does. `how` is given where a script asks, which has its slot."""
        kind = self._kind
        try:
            kind.admit(request)
            if request.path not in GENERATING or request.method != "POST":
                await self._tell(await kind.control(request), reply)
                return
            job = kind.job(request)
        except Refusal as refusal:
            await self._tell(refusal.told, reply)
            return
        except (AttributeError, LookupError, TypeError, ValueError) as exc:
            # A body of wrong types: the kinds look only at what clients really get wrong.
            await self._tell(kind.refuse(400, f"{type(exc).__name__}: {exc}").told, reply)
            return
        if how is not None:
            await self._generate(job, reply, how)
            return
        if job.stream and kind.head_first:
            await reply.head(200, kind.stream_headers())
        await kind.ready(job)
        async with self._slot(scripted=False):
            await self._generate(job, reply, Serve())

    async def _tell(self, told: Told, reply: Reply) -> None:
        close = told.status >= HTTPStatus.BAD_REQUEST and self._kind.closes_after_error
        headers = {**self._kind.headers(), "content-type": told.type or self._kind.json_type}
        await reply.whole(told.status, told.encoded, headers, close=close)

    async def _generate(self, job: Job, reply: Reply, how: Serve) -> None:
        kind, start = self._kind, time.monotonic()
        if not job.stream:
            await _reach(start + self.ttft_s + self.gap_s * max(0, job.tokens - 1))
            body = kind.whole(job)
            headers = {**kind.headers(), "content-type": kind.json_type, **how.headers}
            await reply.head(200, headers, length=len(body))
            await reply.send(body if how.tokens is None else body[: len(body) // 2])
            return

        abortions = self._abortions
        head = {**kind.stream_headers(), **how.headers}
        for index in range(job.tokens if how.tokens is None else how.tokens):
            # Each time is reckoned from the start: a late token makes no other one late.
            await _reach(start + self.ttft_s + self.gap_s * index)
            if abortions != self._abortions:
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


async def _forever() -> NoReturn:
    await asyncio.get_running_loop().create_future()
    raise AssertionError
