"""One replica, monitored: the results of its probes reach admission, catalogue and log.

Each probe updates the breaker and what the engine reports of itself. When a replica becomes
ready, its capabilities are read. Then, and every ten minutes, it is compared with the engine
that the profile was measured on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import shlex
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from backends.errors import BackendError
from backends.kinds import KINDS, Kind
from backends.reports import Capabilities, Readiness
from gateway.routing import profile
from gateway.routing.lanes import Replica
from gateway.serving.catalogue import Model
from gateway.settings import EngineSettings, LaneSettings, Timings

log = logging.getLogger("gateway")


class ReplicaMonitor:
    """Probes one replica of a model for as long as it is served.

    Args:
        model: The model.
        replica: The replica, one of the model's.
        kind: The kind of its engine.
        lane: The settings of its lane.
        engine: The settings of its engine, where there are any.
        timings: How often the engine's identity is checked.

    Attributes:
        first_result: Set when the first probe has a result.
        misfit: Why the engine cannot do what the settings promise; empty where it can.
    """

    def __init__(
        self,
        model: Model,
        replica: Replica,
        kind: Kind,
        lane: LaneSettings,
        engine: EngineSettings | None,
        timings: Timings,
    ) -> None:
        self.first_result = asyncio.Event()
        self.misfit = ""
        self._model = model
        self._replica = replica
        self._server = model.admission.servers[replica]
        self._kind = kind
        self._lane = lane
        self._command = engine.command if engine is not None else ()
        self._timings = timings
        self._last: Readiness | None = None
        self._identified_at = -math.inf

    async def run(self) -> None:
        """Probe until cancelled."""
        await self._server.prober.run(self.on_probe)

    async def on_probe(self, readiness: Readiness) -> None:
        """Pass on the result of one probe."""
        server = self._server
        ready = readiness is Readiness.READY
        if ready and self._last is not readiness:
            self._identified_at = -math.inf
            await self._read_capabilities()
        self._last = readiness
        self._model.admission.on_probe(self._replica, readiness)
        self.first_result.set()
        server.loaded = server.loaded and ready
        if not ready:
            return
        with contextlib.suppress(BackendError):
            server.activity = await server.engine.activity(server.model)
            server.loaded = server.activity.loaded
        if time.monotonic() - self._identified_at > self._timings.identity_interval_s:
            self._identified_at = time.monotonic()
            await self._compare_with_profile()

    async def _read_capabilities(self) -> None:
        """Read what the engine can serve, and check that its context is as long as promised."""
        with contextlib.suppress(BackendError):
            reported = await self._server.engine.capabilities(self._server.model)
            self._model.can[self._kind] = stated_capabilities(reported, self._lane)
            promised, actual = self._lane.context or 0, reported.context or math.inf
            if KINDS[self._kind].engine.fixed_context and promised > actual:
                self.misfit = (
                    f"models.{self._model.name}.lanes.{self._kind}.context: {promised} tokens are "
                    f"more than the {actual} its engine was started with; start the engine with "
                    "more, or set a smaller context"
                )
                log.error(self.misfit)

    async def _compare_with_profile(self) -> None:
        """Warn where the engine is not the one that the profile was measured on."""
        model, kind, lane = self._model, self._kind, self._lane
        measured = model.profile.lanes.get(kind)
        if measured is None or measured.on is None:
            return
        try:
            identity = await self._server.engine.identity(lane.model)
        except BackendError as exc:
            log.info("%s did not report its identity: %s", kind, exc)
            return
        present = profile.MeasuredSetup(
            kind,
            lane.model,
            identity.version,
            identity.weights,
            identity.slots or lane.slots or KINDS[kind].slots,
            model.can[kind].context,
            shlex.join(self._command),
            identity.digest,
        )
        changes = "; ".join(model.profile.changed(kind, present))
        warning = f"{kind}: {changes}: run `twolane calibrate` again" if changes else ""
        if warning and model.changed.get(self._replica.url) != warning:
            log.warning("%s: the profile may be out of date: %s", model.name, warning)
        model.changed[self._replica.url] = warning


def stated_capabilities(reported: Capabilities, lane: LaneSettings) -> Capabilities:
    """What an engine reports that it can take, corrected by the lane's settings."""
    stated: Mapping[str, Any] = {
        name: value
        for name in ("context", "tools", "images", "embeddings")
        if (value := getattr(lane, name)) is not None
    }
    return replace(reported, **stated)
