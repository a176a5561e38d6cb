"""Makes every state of the GPU, in one place, and notifies policy and models.

The policy counts what the previous state has cost, the new state is assigned, and each model
receives an event. No other module assigns a state.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from gateway.gpu.state import GpuState, GpuStateRef, Step
from gateway.routing.events import EventQueue
from gateway.routing.policy_exclusive import ExclusivePolicy

log = logging.getLogger("gateway.handover")


class GpuClient(Protocol):
    """One model's admission, as the GPU sees it."""

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

    def on_gpu_change(self, before: GpuState, after: GpuState) -> None:
        """The GPU's state has changed."""


class GpuTransitions:
    """The state of one GPU, from one step to the next.

    Args:
        ref: Where all other parts read the state.
        policy: Counts what each state costs, and learns how hand-overs end.

    Attributes:
        clients: The models on this GPU.
        events: The queue of events that they share.
    """

    def __init__(self, ref: GpuStateRef, policy: ExclusivePolicy) -> None:
        self.clients: list[GpuClient] = []
        self.events = EventQueue()
        self._ref = ref
        self._policy = policy
        self._moving_s = 0.0
        self._assign(Step.FREE, target=policy.lane)

    @property
    def state(self) -> GpuState:
        """The GPU's present state."""
        return self._ref.state

    def moving_s(self) -> float:
        """Seconds in which nothing could start, in all; time in a queue does not count them."""
        state = self.state
        return self._moving_s + (time.monotonic() - state.since if state.moving else 0.0)

    def join(self, client: GpuClient) -> None:
        """Add a model that shares this GPU."""
        self.clients.append(client)
        self.events.post(partial(client.on_gpu_change, self.state, self.state))

    def enter(self, step: Step, **changes: Any) -> None:
        """Begin a step; a failure stays until it is changed."""
        before = self.state
        self._assign(step, **changes)
        self._notify(before)

    def set_target(self, target: str) -> None:
        """Set the layout that shall hold the GPU next; empty: it is released."""
        self._assign(target=target)

    def set_released(self, *, released: bool) -> None:
        """Note that the operator has released the GPU, or has pinned it again."""
        before = self.state
        drains = released and before.step is Step.HELD
        self._assign(Step.DRAINING if drains else None, released=released)
        self._notify(before)

    def hold(self, layout: str) -> None:
        """A layout holds the GPU: its requests may start."""
        before = self.state
        self._assign(
            Step.HELD, layout=layout, target=layout, move=None, failure="", held_before=True
        )
        self._policy.on_settled(self.state.since, before.move)
        self._notify(before)

    def drop(self, *, preferred: str | None = None) -> None:
        """Note that no layout holds the GPU; without a preferred next one, a move has failed."""
        before = self.state
        self._assign(layout=None, move=None)
        if before.layout is not None:
            failed = before.move if preferred is None else None
            self._policy.on_freed(time.monotonic(), preferred or before.layout, failed=failed)

    def _assign(self, step: Step | None = None, **changes: Any) -> None:
        """Make the next state; no other place does."""
        now, before = time.monotonic(), self.state
        self._policy.advance(now)
        if step is not None:
            changes |= {"step": step, "since": now}
            if before.moving:
                self._moving_s += now - before.since
        self._ref.state = replace(before, **changes)

    def _notify(self, before: GpuState) -> None:
        for client in self.clients:
            try:
                self.events.post(partial(client.on_gpu_change, before, self.state))
            except Exception:  # the other models, and the GPU's owner, must go on
                log.exception("a model failed to follow the GPU because of a fault in the gateway")
