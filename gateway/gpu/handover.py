"""The hand-over: how the GPU passes from one layout to the other.

    free ──────────────────────────────► loading ─► probing ─► held
    held ─► draining ─► unloading ─► freeing ─► loading ─► probing ─► held by the other
              │ too late     └───────────┴─────────┬┴──────────┘ a step fails
              ▼                                    ▼
            held, as before      back: loading ─► probing ─► held, as before
                                                   │ fails, too
                                                   ▼
                                  down: each layout is tried in turn until one holds

One task does all of it, one hand-over at a time, and every step has a deadline. No step
counts as done because an engine says so. An unloaded model must be gone from the engine's list,
the memory must be measured free, and a loaded model must generate a token before it gets requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence

from backends.errors import BackendError
from gateway.gpu.engine import FreeMemoryWait, GpuEngine
from gateway.gpu.memory import Memory
from gateway.gpu.record import Deadlines, HandoverRecord, StepFailed
from gateway.gpu.state import GpuState, GpuStateRef, Move, Step
from gateway.gpu.transitions import GpuTransitions
from gateway.routing.policy_exclusive import ExclusivePolicy
from gateway.settings import Timings

log = logging.getLogger("gateway.handover")

#: What to do when the memory of the previous layout does not become free.
FREEING_HINT = "start vLLM with --enable-sleep-mode; nvidia-smi shows other processes on the GPU"


class Gpu:
    """The one owner of a GPU on which only one layout fits.

    `run()` is its task. The other methods note what is wanted, and the task carries it out.

    Args:
        policy: Decides which layout should hold the GPU.
        layouts: The engine of each layout, by the layout's name.
        deadlines: The longest that each step may take.
        memory: The free GPU memory, where it can be read.
        ref: Where all other parts read the GPU's state.
        idle_release_s: Seconds without a request after which the memory is released. 0: never.
        timings: The interval between two looks, and the pauses between attempts.

    Attributes:
        states: Makes the states; the models on this GPU join it.
        records: The last hand-overs.
        on_record: Called with each at its end.
    """

    def __init__(
        self,
        policy: ExclusivePolicy,
        layouts: Mapping[str, GpuEngine],
        deadlines: Deadlines,
        memory: Memory,
        ref: GpuStateRef,
        *,
        idle_release_s: float = 0.0,
        timings: Timings | None = None,
    ) -> None:
        self.policy = policy
        self.layouts = layouts
        self.deadlines = deadlines
        self.memory = memory
        self.ref = ref
        self.records: deque[HandoverRecord] = deque(maxlen=50)
        self.on_record: Callable[[HandoverRecord], None] = lambda _: None
        self._timings = timings or Timings()
        self._idle_release_s = idle_release_s
        self._unloading: asyncio.Future[bool] | None = None
        self._wake = asyncio.Event()
        self.states = GpuTransitions(ref, policy)
        for engine in layouts.values():
            if engine.process is not None:
                engine.process.on_end = self._wake.set

    def __repr__(self) -> str:
        return f"<Gpu {self.state}>"

    @property
    def state(self) -> GpuState:
        """The GPU's present state."""
        return self.ref.state

    # Requests to the task

    def request(self, move: Move | None) -> None:
        """Carry out the policy's move, or load a layout for requests that wait while none holds.

        After a move nothing starts on the layout that is left.
        """
        if move is not None:
            self.states.enter(Step.DRAINING, target=move.target, move=move)
        self._wake.set()

    def pin(self, layout: str | None) -> None:
        """Pin the GPU to this layout for the operator, or (None) leave it to the policy."""
        self.policy.pin = layout
        self.states.set_released(released=False)
        self._wake.set()

    def release(self) -> None:
        """Release the memory for other programs, until `pin()` is called."""
        self.states.set_released(released=True)
        self._wake.set()

    def unload(self) -> asyncio.Future[bool]:
        """Release the memory for the operator until a request needs the GPU again.

        The result is true once it is released, false where running requests did not end in time.
        """
        result = self._unloading
        if result is None:
            result = asyncio.get_running_loop().create_future()
            if self.state.layout is None and not self.state.moving:
                result.set_result(True)
            else:
                self._unloading = result
                self._wake.set()
        return result

    # The task

    async def run(self) -> None:
        """Own the GPU until cancelled."""
        await self._adopt()
        while True:
            try:
                await self._reconcile()
            except Exception:  # whatever it was, the GPU must not stay without an owner
                log.exception("the hand-over failed because of a fault in the gateway")
                self.states.drop()
                self.states.enter(Step.DOWN, failure="the gateway has failed")
                self._wake.set()
                await asyncio.sleep(self._timings.gpu_retry_min_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._next_look_s()):
                    await self._wake.wait()
            self._wake.clear()

    async def stop(self) -> None:
        """End the engines that the gateway started, after `run()`."""
        stops = [engine.stop() for engine in self.layouts.values()]
        for error in await asyncio.gather(*stops, return_exceptions=True):
            if error is not None:
                log.error("%s", error)

    def _next_look_s(self) -> float | None:
        held = self.state.step is Step.HELD
        if held and self._unloading is not None:
            return 0.0
        if held and self._idle_release_s:
            return max(self._timings.gpu_poll_s, min(5.0, self._idle_release_s / 4))
        return None

    async def _adopt(self) -> None:
        """Begin with what is loaded already, so that a restart costs no load."""
        await asyncio.gather(*(engine.wait_leftover_gone() for engine in self.layouts.values()))
        resident = [
            layout
            for layout, engine in self.layouts.items()
            if engine.process is None and await engine.is_resident()
        ]
        if not resident:
            return
        keep = self.policy.lane if self.policy.lane in resident else resident[0]
        try:
            for layout in resident:
                if layout != keep:
                    await self._do(Step.UNLOADING, layout, self.layouts[layout].release)
            await self._do(Step.PROBING, keep, self.layouts[keep].probe)
        except StepFailed as exc:
            await self._recover(str(exc))
        else:
            log.info("%s holds the GPU already", keep)
            self._open(keep)

    async def _reconcile(self) -> None:
        """Do what the present state and the operator's requests call for."""
        state = self.state
        if state.released:
            if state.layout is not None:
                await self._release(state.layout, "released by the operator")
        elif state.step is Step.DOWN:
            await self._recover(state.failure)
        elif self._unloading is not None:
            await self._unload(self._unloading)
        elif state.layout is None:
            if not state.held_before or any(client.waiting for client in self.states.clients):
                why = "requests wait for it" if state.held_before else "the gateway has started"
                await self._hand_over(None, self.policy.next_layout, why)
        else:
            await self._reconcile_holder(state.layout)

    async def _reconcile_holder(self, layout: str) -> None:
        """Do what is called for while a layout holds the GPU."""
        state = self.state
        if self.layouts[layout].died:
            await self._recover(f"{layout} ended")
        elif state.move is not None:
            await self._hand_over(layout, state.move.target, state.move.reason)
        elif state.step is not Step.HELD:  # released and pinned before anything was done
            self.states.enter(Step.HELD, target=layout)
        elif self._idle_release_s and self._idle_s(state) > self._idle_release_s:
            await self._release(layout, f"no request for {self._idle_release_s:g} s")

    def _idle_s(self, state: GpuState) -> float:
        """Seconds without a request, counted at most since the holder acquired the GPU."""
        layout = state.layout or ""
        if any(client.demand or client.running(layout) for client in self.states.clients):
            return 0.0
        active_at = max((client.active_at for client in self.states.clients), default=0.0)
        return time.monotonic() - max(active_at, state.since)

    async def _hand_over(self, source: str | None, target: str, why: str) -> None:
        """Hand the GPU over, or go back where a step fails."""
        self.records.append(record := HandoverRecord(time.time(), source, target, why))
        waited = self.policy.waited
        log.info("hand-over from %s to %s: %s", source or "no layout", target, why)
        try:
            if source is not None:
                await self._do(Step.DRAINING, source, lambda: self._drained(source), record)
                await self._do(Step.UNLOADING, source, self.layouts[source].release, record)
            await self._acquire(target, record)
        except StepFailed as exc:
            log.warning("hand-over to %s failed: %s", target, exc)
            record.outcome = f"failed: {exc}"
            if source is None:
                await self._recover(str(exc))
            elif exc.step is Step.DRAINING:
                self._open(source)
            else:
                await self._go_back(source, target, str(exc))
        else:
            record.outcome = "done"
            self._open(target)
        record.waited = self.policy.waited - waited
        self.on_record(record)

    async def _acquire(self, layout: str, record: HandoverRecord | None = None) -> None:
        """Load a layout and have it answer a token; raises `StepFailed`."""
        self.states.set_target(layout)
        engine = self.layouts[layout]
        room = FreeMemoryWait(engine, self.memory, self._timings.gpu_poll_s)
        try:
            await self._do(Step.FREEING, layout, room.wait, record)
        except StepFailed as exc:
            why = "; ".join(filter(None, (exc.why, room.shortage, FREEING_HINT)))
            raise StepFailed(Step.FREEING, layout, why) from exc
        await self._do(Step.LOADING, layout, engine.acquire, record)
        await self._do(Step.PROBING, layout, engine.probe, record)

    async def _go_back(self, source: str, target: str, why: str) -> None:
        """Return the GPU to the layout that held it before."""
        try:
            await self._force_release(target)
            await self._acquire(source)
        except StepFailed as exc:
            await self._recover(f"{why}; and {exc}")
        else:
            self._open(source)

    async def _recover(self, why: str) -> None:
        """No layout holds: try each, the quickest to start first, until one does.

        Requests wait for the first attempt. After it all are refused, with a Retry-After, until
        a layout holds.
        """
        self.states.drop()
        pause = self._timings.gpu_retry_min_s
        while not self.state.released:
            for layout in sorted(self.layouts, key=self._start_order):
                try:
                    for other in self.layouts:
                        if other != layout:
                            await self._force_release(other)
                    await self._acquire(layout)
                except StepFailed as exc:
                    why = str(exc)
                else:
                    self._open(layout)
                    return
            self.states.enter(Step.DOWN, failure=why)
            log.error("no engine can be made to serve: %s; again in %g s", why, pause)
            await self._backoff(pause)
            pause = min(self._timings.gpu_retry_max_s, pause * 2)
        await self._release_until_free(list(self.layouts))

    async def _backoff(self, seconds: float) -> None:
        """Return after so long, or as soon as the operator pins or releases."""
        self._wake.clear()  # that an engine has ended meanwhile is no news
        if not self.state.released:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._wake.wait()

    def _start_order(self, layout: str) -> tuple[bool, float]:
        return layout != self.policy.pin, self.layouts[layout].cold_s

    async def _force_release(self, layout: str) -> bool:
        """Free this layout's memory, by force where the gateway started it.

        Returns False where the engine did not release it, and the gateway did not start it.
        """
        engine = self.layouts[layout]
        try:
            await self._do(Step.UNLOADING, layout, engine.release)
        except StepFailed as exc:
            log.warning("%s", exc)
            try:
                await engine.stop()
            except BackendError as error:
                log.warning("%s", error)  # if it matters, the memory will not be seen free
            return engine.process is not None
        return True

    async def _unload(self, result: asyncio.Future[bool]) -> None:
        """Release the memory for the operator, if the running requests end in time."""
        gone, source, move = False, self.state.layout, self.state.move
        try:
            if source is not None:
                self.states.set_target("")
                await self._do(Step.DRAINING, source, lambda: self._drained(source))
                await self._release(source, "unloaded by the operator")
            gone = True
        except StepFailed as exc:
            log.warning("%s stays: %s", source, exc)
            step, target = (Step.DRAINING, move.target) if move else (Step.HELD, source or "")
            self.states.enter(step, target=target)
            self._wake.set()
        finally:
            self._unloading = None
            if not result.done():
                result.set_result(gone)

    async def _release(self, layout: str, why: str) -> None:
        """Release the memory for other programs."""
        move = self.state.move
        self.states.drop(preferred=move.target if move is not None else layout)
        self.states.set_target("")
        log.info("%s releases the GPU: %s", layout, why)
        with contextlib.suppress(StepFailed):  # the release goes on even so
            await self._do(Step.DRAINING, layout, lambda: self._drained(layout))
        await self._release_until_free([layout])

    async def _release_until_free(self, layouts: Sequence[str]) -> None:
        """Try until these layouts have released the memory, or a request needs the GPU."""
        for layout in layouts:
            while not await self._force_release(layout):
                if any(client.waiting for client in self.states.clients):
                    break
                await asyncio.sleep(self._timings.gpu_retry_min_s)
        self.states.enter(Step.FREE, failure="")

    # Steps

    async def _do(
        self,
        step: Step,
        layout: str,
        work: Callable[[], Awaitable[None]],
        record: HandoverRecord | None = None,
    ) -> None:
        """One step within its deadline; raises `StepFailed`."""
        self.states.enter(step)
        deadline_s = self.deadlines.of(step)
        began = time.monotonic()
        log.info("%s %s (at most %g s)", step, layout, deadline_s)
        try:
            async with asyncio.timeout(deadline_s):
                await work()
        except TimeoutError:
            raise StepFailed(step, layout, f"not done after {deadline_s:g} s") from None
        except BackendError as exc:
            raise StepFailed(step, layout, str(exc)) from exc
        finally:
            if record is not None:
                record.steps[step] = round(time.monotonic() - began, 3)

    async def _drained(self, layout: str) -> None:
        """Return when no request runs on a layout."""
        while any(client.running(layout) for client in self.states.clients):  # noqa: ASYNC110 - cheap
            await asyncio.sleep(self._timings.gpu_poll_s)

    def _open(self, layout: str) -> None:
        """This layout holds the GPU: its requests may start."""
        log.info("%s holds the GPU", layout)
        self.states.hold(layout)
