"""The process of a fake engine: its slots, its models, its memory, its sleep.

Requests wait for a slot in the order they came. A model or a whole vLLM takes memory of
the shared GPU, and gives it back late, as real ones do.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

from backends.fake.gpu import Allocation, FakeGpu, OutOfMemory

#: The two parts of a vLLM's memory: what it keeps while it sleeps, and the rest.
_ASLEEP, _AWAKE = "asleep", "awake"


@dataclass(eq=False, repr=False)
class FakeProcess:
    """A process that serves models. Its fields may be set at any time.

    Attributes:
        kind: Which engine to be: "ollama", "vllm" or "llamacpp".
        models: Names of the models it can chat with.
        embedding: Names of the models made for embeddings.
        ttft_s: From the moment a slot is granted to the first token.
        gap_s: From each token to the next.
        tokens: Length of an answer that has no limit of its own.
        slots: Concurrent requests; all others wait, in order, without limit.
        context: Context length, tokens (a prompt has one for each of its words).
        tools: Whether it takes tools.
        dev_mode: Whether vLLM has its sleep endpoints.
        load_s: How long Ollama takes to load a model. No model is loaded at the start.
        unload_s: How long a model stays in memory after Ollama was asked to unload it.
        sleep_s: How long an idle vLLM takes to fall asleep.
        wake_s: How long it takes to wake.
        settle_s: How long released memory still counts as taken.
        asleep: Whether vLLM begins asleep; later, whether it has released its memory.
        gpu: The GPU it shares with others. By default its own, without limit.
        size: Bytes of GPU memory that a model takes, or all of a vLLM that is awake.
        on_gpu: The largest part of a model that Ollama puts on the GPU, 0.0 to 1.0.
        loading: Whether llama.cpp still reads its model; set it to False later.
        version: The version it reports; empty: the version that is played.
        alive: Whether the process runs. The attributes below hold only then.
        paused: Starts no request: a sleep was requested, and no wake since.
        stuck: Accepts all requests and generates nothing until it is restarted.
        wakes_stuck: Set it: it is stuck after the next wake.
        resident: The models that are loaded.
        running: Requests that hold a slot.
        peak_running: The most that ever did.
    """

    kind: str
    models: Sequence[str] = ("m",)
    embedding: Sequence[str] = field(default=(), kw_only=True)
    ttft_s: float = field(default=0.0, kw_only=True)
    gap_s: float = field(default=0.0, kw_only=True)
    tokens: int = field(default=5, kw_only=True)
    slots: int = field(default=16, kw_only=True)
    context: int = field(default=2048, kw_only=True)
    tools: bool = field(default=False, kw_only=True)
    dev_mode: bool = field(default=False, kw_only=True)
    load_s: float = field(default=0.0, kw_only=True)
    unload_s: float = field(default=0.0, kw_only=True)
    sleep_s: float = field(default=0.0, kw_only=True)
    wake_s: float = field(default=0.0, kw_only=True)
    settle_s: float = field(default=0.0, kw_only=True)
    asleep: bool = field(default=False, kw_only=True)
    gpu: FakeGpu = field(default_factory=lambda: FakeGpu(1 << 60), kw_only=True)
    size: int = field(default=98_000_000, kw_only=True)
    on_gpu: float = field(default=1.0, kw_only=True)
    loading: bool = field(default=False, kw_only=True)

    version: str = field(default="", init=False)
    alive: bool = field(default=False, init=False)
    pid: int = field(default=0, init=False)
    paused: bool = field(default=False, init=False)
    stuck: bool = field(default=False, init=False)
    wakes_stuck: bool = field(default=False, init=False)
    resident: list[str] = field(default_factory=list, init=False)
    running: int = field(default=0, init=False)
    peak_running: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.models = tuple(self.models)
        self.embedding = tuple(self.embedding)
        #: How often a sleep has aborted what ran.
        self.abortions = 0
        # A request's turn: in the queue until it is done, from then on in a slot.
        self._queue: deque[asyncio.Future[None]] = deque()
        self._watchers: list[tuple[Callable[[Any], object], asyncio.Future[None]]] = []
        self._loads: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._allocations: dict[str, Allocation] = {}
        self._sleeping = asyncio.Lock()

    # Its state

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._queue)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes it has of the GPU, by model; a vLLM has them in two parts."""
        return {owner: allocation.size for owner, allocation in self._allocations.items()}

    async def until(self, happened: Callable[[Self], object], *, within_s: float = 5.0) -> None:
        """Return as soon as this holds; it is checked whenever something changes.

        Raises:
            TimeoutError: It did not happen; the text has the engine's state.
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

    def changed(self) -> None:
        """Grant the free slots, and check what is waited for."""
        while self._queue and self.running < self.slots and self._starts_requests:
            if self.asleep:  # woken before it slept: it would run on memory it does not have
                self.kill()
                break
            self._start(self._queue.popleft())
        for happened, future in self._watchers:
            try:
                if not future.done() and happened(self):
                    future.set_result(None)
            except Exception as exc:  # noqa: BLE001 - the watcher's own, to be raised there
                future.set_exception(exc)

    # Its life

    def begin(self, *, loads_when_asked: bool) -> None:
        """Start anew, with the memory that it needs from the start.

        Args:
            loads_when_asked: Memory is taken by the models, when they are requested.

        Raises:
            OutOfMemory: That memory is not free.
        """
        self.pid = self.gpu.new_pid()
        if not loads_when_asked:
            try:
                self._allocate(_ASLEEP)
                if not self.asleep:
                    self._allocate(_AWAKE)
            except OutOfMemory:
                self._lose_memory()
                raise
        self.paused = self.asleep
        self.alive = True

    def kill(self) -> None:
        """End the process as `kill -9` does: its memory is free at once, its work is lost."""
        self.alive = False
        for task in self._tasks:
            task.cancel()
        self._lose_memory()
        self._loads.clear()
        self._sleeping = asyncio.Lock()
        self.asleep = self.paused = self.stuck = False
        self.changed()

    async def cancel_tasks(self) -> None:
        """End what the process does by itself, and free its memory."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.gpu.process_ended(self.pid)  # `memory` still shows what it had

    # Its memory

    async def load(self, model: str) -> None:
        """Return when the model is in memory; given up if the caller is cancelled.

        Where there is no room for all of it, the rest goes to the CPU.
        """
        async with self._loads.setdefault(model, asyncio.Lock()):
            if model in self.resident:
                return
            size = min(int(self.size * self.on_gpu), self.gpu.free())
            allocation = self.gpu.allocate(self.pid, size)
            self._allocations[model] = allocation
            self.changed()
            try:
                await asyncio.sleep(self.load_s)
            except asyncio.CancelledError:
                if self._owns(model, allocation):
                    self._release(model)
                raise
            if self._owns(model, allocation):
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
                    self._release(model)

        self._spawn(leave())

    async def fall_asleep(self, *, abort: bool) -> None:
        """Start no more requests, end the running ones (at once with `abort`), then sleep.

        It sleeps whether the caller waits for it or not, and even if woken before it did.
        """
        self.paused = True
        if abort:
            self.abortions += 1
        self.changed()

        async def doze_off() -> None:
            await self._idle()
            async with self._sleeping:
                if not self.asleep:
                    await asyncio.sleep(self.sleep_s)
                    self.asleep = True
                    self._release(_AWAKE)

        await asyncio.shield(self._spawn(doze_off()))

    async def wake(self) -> None:
        """Start again what waits. The process dies if others have its memory."""

        async def wake_up() -> None:
            async with self._sleeping:
                if self.asleep:
                    try:
                        self._allocate(_AWAKE)
                    except OutOfMemory:
                        self.kill()
                        await forever()
                    await asyncio.sleep(self.wake_s)
                    self.stuck = self.stuck or self.wakes_stuck
                self.asleep = self.paused = False
                self.changed()

        await asyncio.shield(self._spawn(wake_up()))

    def _allocate(self, part: str) -> None:
        """Take one of the two parts of a vLLM's memory; raises `OutOfMemory`."""
        kept = min(self.size, self.gpu.remainder * self.gpu.cards)
        size = kept if part == _ASLEEP else self.size - kept
        self._allocations[part] = self.gpu.allocate(self.pid, size)

    def _owns(self, owner: str, allocation: Allocation) -> bool:
        """Whether the owner still has these bytes; it has not once the process has died."""
        return self._allocations.get(owner) is allocation

    def _release(self, owner: str) -> None:
        """Give back what this owner has; it is free after `settle_s`."""
        allocation = self._allocations.pop(owner)

        async def settle() -> None:
            await asyncio.sleep(self.settle_s)
            self.gpu.release(allocation)
            self.changed()

        if self.settle_s:
            self._spawn(settle())
        else:
            self.gpu.release(allocation)
        self.changed()

    def _lose_memory(self) -> None:
        self.gpu.process_ended(self.pid)
        self._allocations.clear()
        self.resident.clear()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Work that the process goes on with, whether anybody waits for it or not."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _idle(self) -> None:
        await self.until(lambda process: not process.running, within_s=3600.0)

    # Its slots

    @asynccontextmanager
    async def slot(self, *, at_once: bool) -> AsyncIterator[None]:
        """Hold a slot while the context is open; `at_once` waits for none."""
        turn = asyncio.get_running_loop().create_future()
        if at_once:
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

    @property
    def _starts_requests(self) -> bool:
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


async def forever() -> NoReturn:
    """Wait until cancelled."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError
