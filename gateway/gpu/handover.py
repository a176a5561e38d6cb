"""Who has the GPU, and how it passes from one engine to the other.

    free ──────────────────────────────► loading ─► probing ─► held
    held ─► draining ─► unloading ─► freeing ─► loading ─► probing ─► held by the other
              │ too late     └───────────┴─────────┬┴──────────┘ a step fails
              ▼                                    ▼
            held, as before      back: loading ─► probing ─► held, as before
                                                   │ fails, too
                                                   ▼
                                  down: each engine is tried in turn until one holds

One task does all of it, one hand-over at a time, and every step has a deadline. Nothing
is taken for done because an engine said so: what unloads is seen gone, memory is seen
free, and what was loaded has to answer a token before anybody is sent there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import msgspec

from backends.base import Engine
from backends.calls import CHAT, Call
from backends.errors import BackendError, Broken, Refused, Unreachable, Unsupported
from backends.kinds import KINDS, Kind
from backends.processes.supervised import Supervised
from backends.reports import Readiness
from gateway.gpu.memory import Memory, MemoryUnknown
from gateway.routing.policy import Policy

log = logging.getLogger("gateway.handover")

#: How often an engine, or the memory, is looked at while a step waits for it.
LOOK_S = 0.1
#: How long the engines of a gateway that was killed may take to end.
LEFTOVER_S = 15.0
#: Pauses between attempts while no engine can be made to hold.
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
#: Grace between SIGTERM and SIGKILL.
STOP_S = 15.0


class Step(StrEnum):
    """Where the GPU is on its way."""

    FREE = "free"
    HELD = "held"
    DRAINING = "draining"
    UNLOADING = "unloading"
    FREEING = "freeing"
    LOADING = "loading"
    PROBING = "probing"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Deadlines:
    """The longest each step may take, seconds."""

    drain_s: float = 60.0
    unload_s: float = 120.0
    free_s: float = 30.0
    load_s: float = 900.0
    probe_s: float = 60.0

    def of(self, step: Step) -> float:
        """The deadline of one step."""
        return {
            Step.DRAINING: self.drain_s,
            Step.UNLOADING: self.unload_s,
            Step.FREEING: self.free_s,
            Step.LOADING: self.load_s,
            Step.PROBING: self.probe_s,
        }[step]


class StepFailed(Exception):
    """A step did not come to its end; the text is for people."""

    def __init__(self, step: Step, kind: str, why: str) -> None:
        super().__init__(f"{step} {kind}: {why}")
        self.step = step


class Tenant(Protocol):
    """One model's way into its lanes, as the GPU sees it."""

    @property
    def demand(self) -> int:
        """Foreground requests that run or wait."""

    @property
    def waiting(self) -> int:
        """Requests in the queue, background calls included."""

    @property
    def active_at(self) -> float:
        """When a request last came or went, seconds on the monotonic clock."""

    def running(self, lane: str) -> int:
        """Requests that run on a lane."""

    def hold(self, lane: str | None, *, barred: str = "") -> None:
        """The GPU is this lane's from now on.

        None: nothing may start. `barred`: nothing will for a while, so say so to who asks.
        """


class Occupant:
    """One engine that can take the GPU and give it back.

    Args:
        engine: The engine.
        models: Its own names of the models it serves, the first to be loaded first.
        process: The engine's process, where it is ours to start and stop.
        needs: Bytes that must be free before it loads, if that is known.
        away_s: How long it may be away where it is not ours to start, as when its container
            restarts.
    """

    def __init__(
        self,
        engine: Engine,
        models: Sequence[str],
        *,
        process: Supervised | None = None,
        needs: int | None = None,
        away_s: float = 30.0,
    ) -> None:
        self.engine = engine
        self.models = tuple(models)
        self.process = process
        self.needs = needs
        self.away_s = away_s
        # To choose which engine to start when the holder has died; the last start replaces it.
        self.cold_s = KINDS[engine.kind].cold_start_s

    @property
    def kind(self) -> Kind:
        return self.engine.kind

    async def resident(self) -> bool:
        """Whether it has any of the GPU's memory now, as far as it can be asked."""
        try:
            return bool(await self.engine.resident())
        except BackendError:
            return False

    async def leftover_gone(self) -> None:
        """Return when what a gateway before us has started is gone: its keepers are ending it.

        Somebody else's server at our address is not waited for longer than that can take.
        """
        if self.process is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEFTOVER_S):
                while await self.engine.ready(self.models[0]) is not Readiness.DOWN:  # noqa: ASYNC110
                    await asyncio.sleep(LOOK_S)

    async def take(self) -> None:
        """Return when its first model is in memory; raises `BackendError`."""
        cold = self.process is not None and not (self.process.wanted and self.process.running)
        began = time.monotonic()
        if cold:
            assert self.process is not None  # noqa: S101 - it is what makes it cold
            await self.process.start()
        await self._there()
        await self.engine.load(self.models[0])
        if cold:
            self.cold_s = time.monotonic() - began
        part = await self.engine.on_gpu(self.models[0])
        if part is not None and 0 < part < 1:  # none of it: there is no GPU
            told = "only %.0f %% of %s are on the GPU, the rest on the CPU, which is slow"
            log.warning(told, part * 100, self.models[0])

    async def _there(self) -> None:
        """Return when it can be spoken to."""
        began = time.monotonic()
        while True:
            readiness = await self.engine.ready(self.models[0])
            if readiness in (Readiness.READY, Readiness.ASLEEP):
                return
            if readiness is Readiness.ABSENT:
                raise Unsupported(f"{self.engine} does not have the model {self.models[0]}")
            if self.process is not None and not self.process.running:
                raise Unreachable(f"{self.engine} ended: {self.process.exit_report()}")
            if self.process is None and time.monotonic() - began > self.away_s:
                raise Unreachable(f"{self.engine} cannot be reached")
            await asyncio.sleep(LOOK_S)

    async def give(self) -> None:
        """Return when its models have left the memory; raises `BackendError`."""
        try:
            for model in await self.engine.resident():
                await self.engine.unload(model)
        except (Unreachable, Broken):
            # Whoever is gone has nothing; the memory is looked at next.
            if await self.engine.ready(self.models[0]) is not Readiness.DOWN:
                raise
        except Unsupported:
            if self.process is None:
                raise
            await self.stop()

    async def probe(self) -> None:
        """Return when it has generated a token; raises `BackendError`."""
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in body.items()}
        with contextlib.suppress(Refused):  # it answers, only not to this
            await self.engine.fetch_answer(Call(CHAT, raw), self.models[0])

    async def stop(self) -> None:
        """End its process, where it is ours."""
        if self.process is not None:
            await self.process.stop(STOP_S)


@dataclass(slots=True)
class Passage:
    """One hand-over: what it took, step by step, and how it ended."""

    at: float  # seconds since the epoch
    source: str | None
    target: str
    why: str
    steps: dict[str, float] = field(default_factory=dict)  # seconds
    outcome: str = "under way"
    waited: float = 0.0  # request-seconds


class Gpu:
    """The one owner of a GPU on which only one engine fits.

    `run()` is its task. All else is plain: it changes what is wanted, and the task sees to it.

    Args:
        policy: Where the GPU should be.
        occupants: The engines, by kind.
        deadlines: Of each step.
        memory: What is free, where that can be told.
        idle_release_s: Without demand for so long, the memory is given back. 0: never.
    """

    def __init__(
        self,
        policy: Policy,
        occupants: Mapping[str, Occupant],
        deadlines: Deadlines,
        memory: Memory,
        *,
        idle_release_s: float = 0.0,
    ) -> None:
        self.policy = policy
        self.occupants = occupants
        self.deadlines = deadlines
        self.memory = memory
        self.holder: str | None = None
        self.step = Step.FREE
        self.toward = policy.lane  # who has it, or is to have it next; nobody: ""
        self.trouble = ""  # why no engine can be made to hold it
        self.released = False  # by the operator
        self.held_once = False
        self.passages: deque[Passage] = deque(maxlen=50)
        self.on_passage: Callable[[Passage], None] = lambda _: None  # is told of each that is over
        self._idle_release_s = idle_release_s
        self._tenants: list[Tenant] = []
        self._unloading: asyncio.Future[bool] | None = None
        self._since = time.monotonic()
        self._moving_s = 0.0
        self._wake = asyncio.Event()
        policy.freed(self._since)
        for occupant in occupants.values():
            if occupant.process is not None:
                occupant.process.on_end = self._wake.set

    def join(self, tenant: Tenant) -> None:
        """One more model lives on this GPU."""
        self._tenants.append(tenant)
        self._tell()

    @property
    def moving(self) -> bool:
        """Whether people wait for the GPU now, rather than for a slot."""
        return self.step not in (Step.HELD, Step.FREE, Step.DOWN) and not self.trouble

    @property
    def movement(self) -> str:
        """Where the GPU is on its way, for people; empty where it is not."""
        if not self.moving:
            return ""
        way = f"goes to {self.toward}" if self.toward else "is given back"
        return f"The GPU {way}: {self.step}"

    def moving_s(self) -> float:
        """Seconds in which nothing could start, in all; time in a queue does not count them."""
        return self._moving_s + (time.monotonic() - self._since if self.moving else 0.0)

    # What is wanted

    def wanted(self) -> None:
        """The policy has moved, or somebody asks while nobody holds: see to it.

        From now on nothing starts on the lane that is left.
        """
        if self.step is Step.HELD and self.policy.lane != self.holder:
            self.toward = self.policy.lane
            self._enter(Step.DRAINING)
        self._wake.set()

    def pin(self, lane: str | None) -> None:
        """The operator wants the GPU at this lane, or (None) leaves it to the policy."""
        self.policy.pin = lane
        self.released = False
        self._tell()
        self._wake.set()

    def release(self) -> None:
        """The operator wants the memory for something else, until `pin()` is called."""
        self.released = True
        if self.step is Step.HELD:
            self._enter(Step.DRAINING)
        self._tell()
        self._wake.set()

    def unload(self) -> asyncio.Future[bool]:
        """The operator wants the memory back until somebody asks for the GPU again.

        Becomes true when it is, and false where who ran did not end in time and goes on.
        """
        wish = self._unloading
        if wish is None:
            wish = asyncio.get_running_loop().create_future()
            if self.holder is None and not self.moving:
                wish.set_result(True)
            else:
                self._unloading = wish
                self._wake.set()
        return wish

    # The task

    async def run(self) -> None:
        """Own the GPU until cancelled."""
        await self._adopt()
        while True:
            try:
                await self._see_to_it()
            except Exception:  # whatever it was, the GPU must not stay without an owner
                log.exception("the hand-over failed, and that is our own fault")
                self.holder = None
                self._enter(Step.DOWN, "the gateway has failed")
                self._wake.set()
                await asyncio.sleep(FIRST_PAUSE_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._next_look_s()):
                    await self._wake.wait()
            self._wake.clear()

    async def stop(self) -> None:
        """End the engines that are ours; `run()` is over."""
        stops = (occupant.stop() for occupant in self.occupants.values())
        for failed in await asyncio.gather(*stops, return_exceptions=True):
            if failed is not None:
                log.error("%s", failed)

    def _next_look_s(self) -> float | None:
        if self._unloading is not None and self.step is Step.HELD:
            return 0.0
        if self._idle_release_s and self.step is Step.HELD:
            return max(LOOK_S, min(5.0, self._idle_release_s / 4))
        return None

    async def _adopt(self) -> None:
        """Begin with what is loaded already, so that a restart costs nobody a load."""
        await asyncio.gather(*(who.leftover_gone() for who in self.occupants.values()))
        resident = [
            kind
            for kind, who in self.occupants.items()
            if who.process is None and await who.resident()
        ]
        if not resident:
            return
        keep = self.policy.lane if self.policy.lane in resident else resident[0]
        try:
            for kind in resident:
                if kind != keep:
                    await self._do(Step.UNLOADING, kind, self.occupants[kind].give)
            await self._do(Step.PROBING, keep, self.occupants[keep].probe)
        except StepFailed as exc:
            await self._recover(str(exc))
        else:
            log.info("%s has the GPU already", keep)
            self._open(keep)

    async def _see_to_it(self) -> None:
        """Whatever is to be done now."""
        if self.released:
            if self.holder is not None:
                await self._give_up("released by the operator")
        elif self.step is Step.DOWN:
            await self._recover(self.trouble)
        elif self._unloading is not None:
            await self._unload(self._unloading)
        elif self.holder is None:
            if not self.held_once or any(tenant.waiting for tenant in self._tenants):
                why = "somebody asks for it" if self.held_once else "to be there for the first"
                await self._pass(None, self.policy.pin or self.policy.lane, why)
        elif self._died(self.holder):
            await self._recover(f"{self.holder} ended")
        elif self.policy.lane != self.holder:
            await self._pass(self.holder, self.policy.lane, self.policy.why)
        elif self._idle_release_s and self._idle_s() > self._idle_release_s:
            await self._give_up(f"nobody asked for {self._idle_release_s:g} s")

    def _idle_s(self) -> float:
        """For how long nobody has asked, since the GPU came to its holder at the most."""
        if any(tenant.demand or tenant.running(self.holder or "") for tenant in self._tenants):
            return 0.0
        active_at = max((tenant.active_at for tenant in self._tenants), default=0.0)
        return time.monotonic() - max(active_at, self._since)

    def _died(self, kind: str) -> bool:
        process = self.occupants[kind].process
        return process is not None and process.wanted and not process.running

    async def _pass(self, source: str | None, target: str, why: str) -> None:
        """Hand the GPU over, or go back where a step fails."""
        passage = Passage(time.time(), source, target, why)
        self.passages.append(passage)
        waited = self.policy.waited
        log.info("hand-over from %s to %s: %s", source or "nobody", target, why)
        try:
            if source is not None:
                await self._do(Step.DRAINING, source, lambda: self._drained(source), passage)
                await self._do(Step.UNLOADING, source, self.occupants[source].give, passage)
            await self._take(target, passage)
        except StepFailed as exc:
            log.warning("hand-over to %s failed: %s", target, exc)
            passage.outcome = f"failed: {exc}"
            if source is None:
                await self._recover(str(exc))
            elif exc.step is Step.DRAINING:
                self._open(source)
            else:
                await self._back(source, target, str(exc))
        else:
            passage.outcome = "done"
            self._open(target)
        passage.waited = self.policy.waited - waited
        self.on_passage(passage)

    async def _take(self, kind: str, passage: Passage | None = None) -> None:
        self.toward = kind
        occupant = self.occupants[kind]
        await self._do(Step.FREEING, kind, lambda: self._freed(occupant), passage)
        await self._do(Step.LOADING, kind, occupant.take, passage)
        await self._do(Step.PROBING, kind, occupant.probe, passage)

    async def _back(self, source: str, target: str, why: str) -> None:
        """The engine before has the GPU again."""
        try:
            await self._clear(target)
            await self._take(source)
        except StepFailed as exc:
            await self._recover(f"{why}; and {exc}")
        else:
            self._open(source)

    async def _recover(self, why: str) -> None:
        """No engine holds: try each, the quickest to start first, until one does.

        Who waits is let wait for the first attempt. After that everybody is refused, and
        told to come again, until one holds.
        """
        if self.holder is not None:  # a hand-over to whoever it may be has failed
            self.policy.settled(time.monotonic(), self.holder)
            self.holder = None
        self.policy.freed(time.monotonic())
        pause = FIRST_PAUSE_S
        while not self.released:
            for kind in sorted(self.occupants, key=self._reluctance):
                try:
                    for other in self.occupants:
                        if other != kind:
                            await self._clear(other)
                    await self._take(kind)
                except StepFailed as exc:
                    why = str(exc)
                else:
                    self._open(kind)
                    return
            self._enter(Step.DOWN, why)
            log.error("no engine can be made to serve: %s; again in %g s", why, pause)
            await self._rest(pause)
            pause = min(LONGEST_PAUSE_S, pause * 2)
        await self._empty(list(self.occupants))

    async def _rest(self, seconds: float) -> None:
        """Return after so long, or as soon as the operator wants something else."""
        self._wake.clear()  # that an engine has ended meanwhile is no news
        if not self.released:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._wake.wait()

    def _reluctance(self, kind: str) -> tuple[bool, float]:
        return kind != self.policy.pin, self.occupants[kind].cold_s

    async def _clear(self, kind: str) -> bool:
        """Whatever it takes that this engine has none of the memory; by force where it is ours.

        False: it would not, and is not ours to end.
        """
        occupant = self.occupants[kind]
        try:
            await self._do(Step.UNLOADING, kind, occupant.give)
        except StepFailed as exc:
            log.warning("%s", exc)
            try:
                await occupant.stop()
            except BackendError as error:
                log.warning("%s", error)  # if it matters, the memory will not be seen free
            return occupant.process is not None
        return True

    async def _unload(self, wish: asyncio.Future[bool]) -> None:
        """Give the memory back as was asked, if who runs there ends in time."""
        gone, source = False, self.holder
        try:
            if source is not None:
                self.toward = ""
                await self._do(Step.DRAINING, source, lambda: self._drained(source))
                await self._give_up("unloaded by the operator")
            gone = True
        except StepFailed as exc:
            log.warning("%s stays: %s", source, exc)
            self.toward = source or ""
            self._enter(Step.HELD)
            self._wake.set()  # the policy may have moved meanwhile
        finally:
            self._unloading = None
            if not wish.done():
                wish.set_result(gone)

    async def _give_up(self, why: str) -> None:
        """Give the memory back to whoever wants it."""
        assert self.holder is not None  # noqa: S101 - seen by the caller
        source, self.holder = self.holder, None
        self.toward = ""
        log.info("%s gives the GPU back: %s", source, why)
        with contextlib.suppress(StepFailed):  # an engine that is ours ends with who still runs
            await self._do(Step.DRAINING, source, lambda: self._drained(source))
        await self._empty([source])
        self.policy.freed(time.monotonic())

    async def _empty(self, kinds: Sequence[str]) -> None:
        """Have these engines give the memory back, until they have or somebody asks again."""
        for kind in kinds:
            while not await self._clear(kind):
                if any(tenant.waiting for tenant in self._tenants):
                    break
                await asyncio.sleep(FIRST_PAUSE_S)
        self._enter(Step.FREE, "")

    # Steps

    async def _do(
        self,
        step: Step,
        kind: str,
        work: Callable[[], Awaitable[None]],
        passage: Passage | None = None,
    ) -> None:
        """One step within its deadline; raises `StepFailed`."""
        self._enter(step)
        deadline_s = self.deadlines.of(step)
        began = time.monotonic()
        log.info("%s %s (at most %g s)", step, kind, deadline_s)
        try:
            async with asyncio.timeout(deadline_s):
                await work()
        except TimeoutError:
            why = f"not done after {deadline_s:g} s"
            if step is Step.FREEING:
                why += "; does vLLM run with --enable-sleep-mode, and is nobody else at the GPU?"
            raise StepFailed(step, kind, why) from None
        except BackendError as exc:
            raise StepFailed(step, kind, str(exc)) from exc
        finally:
            if passage is not None:
                passage.steps[step] = round(time.monotonic() - began, 3)

    async def _drained(self, kind: str) -> None:
        while any(tenant.running(kind) for tenant in self._tenants):  # noqa: ASYNC110 - cheap
            await asyncio.sleep(LOOK_S)

    async def _freed(self, occupant: Occupant) -> None:
        """Return when there is room for an engine, as far as anybody can tell."""
        if occupant.needs is None:
            return
        if await occupant.resident():
            return  # what it needs, it has
        while True:
            try:
                free = await asyncio.to_thread(self.memory.free)
            except MemoryUnknown as exc:
                log.warning("cannot see the memory: %s", exc)
                return
            if free >= occupant.needs:
                return
            await asyncio.sleep(LOOK_S)

    # Telling

    def _enter(self, step: Step, trouble: str | None = None) -> None:
        """The next step; what is the trouble stays the trouble until that is over."""
        now = time.monotonic()
        if self.moving:
            self._moving_s += now - self._since
        self.step, self._since = step, now
        if trouble is not None:
            self.trouble = trouble
        self._tell()

    def _open(self, kind: str) -> None:
        """This engine has the GPU: everybody may start."""
        self.holder = kind
        self.held_once = True
        self.policy.settled(time.monotonic(), kind)
        log.info("%s has the GPU", kind)
        self.toward = kind
        self._enter(Step.HELD, "")

    def _tell(self) -> None:
        for tenant in self._tenants:  # what one does about it may change it for the next
            holder = self.holder if self.step is Step.HELD and not self.released else None
            tenant.hold(holder, barred=self._barred())

    def _barred(self) -> str:
        if self.released:
            return "is not loaded: the operator has released the GPU"
        if self.trouble:
            return "could not be loaded; it is tried again"
        return ""

    def progress(self) -> dict[str, object]:
        """Where it is on its way, as JSON."""
        return {
            "holder": self.holder,
            "step": self.step.value,
            "to": self.toward,
            "since_s": round(time.monotonic() - self._since, 1),
            "deadline_s": self.deadlines.of(self.step) if self.moving else None,
            "trouble": self.trouble,
        }

    def status(self) -> dict[str, object]:
        """How it stands, as JSON."""
        return {
            **self.progress(),
            "pin": self.policy.pin,
            "released": self.released,
            "regret": round(self.policy.regret, 2),
            "price": round(self.policy.price, 2),
            "moves": self.policy.moves,
            "passages": [
                {
                    "at": passage.at,
                    "from": passage.source,
                    "to": passage.target,
                    "why": passage.why,
                    "steps": passage.steps,
                    "outcome": passage.outcome,
                    "waited": round(passage.waited, 2),
                }
                for passage in self.passages
            ],
        }
