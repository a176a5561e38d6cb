"""The composition root: settings in, a gateway that serves out."""

from __future__ import annotations

import asyncio
import importlib.metadata
import time
from types import TracebackType
from typing import Self

from backends.transport import http
from gateway.errors import NotFound
from gateway.gpu.cards import Nvml
from gateway.gpu.handover import Gpu
from gateway.gpu.lease import Lease
from gateway.gpu.memory import Memory
from gateway.http.auth import Keys
from gateway.http.edge import Edge
from gateway.http.metrics_page import MetricsServer
from gateway.http.pages import Pages
from gateway.observe.cost import statement
from gateway.observe.metrics import Metrics
from gateway.observe.request_log import RequestLog
from gateway.observe.snapshot import gpu_status, model_statuses, ready_report
from gateway.observe.status import GatewayStatus, ReadyReport
from gateway.relay.relay import Relay
from gateway.serving import discovery
from gateway.serving.catalogue import Catalogue
from gateway.serving.engines import EnginePool
from gateway.serving.listing import EngineListing
from gateway.serving.loading import Loader
from gateway.serving.operator import Operator
from gateway.serving.placement import acquire_lease, make_gpu
from gateway.serving.publisher import Publisher
from gateway.settings import Settings, SettingsError, Timings

MIB = 2**20


class Gateway:
    """The gateway, from `async with` to its end.

    Entering finds the engines and probes each once; an engine that is down is not fatal. The
    ASGI application to serve is `edge`.

    Args:
        settings: The gateway's configuration.
        ports: Where engines are looked for if the settings name none.
        client: The HTTP client for the engines; closed at the end.
        memory: Where the GPU's memory is read from, in place of its driver.
        nvml: The GPU's driver.
        timings: Intervals and deadlines that no setting names.

    Attributes:
        catalogue: The models that are served.
        edge: The ASGI application.
        engines: The engines' clients and processes.
        gpu: The GPU that the models in exclusive placement share; None without any.
        listing: Keeps the catalogue equal to the engines' lists, where no model is configured.
        metrics: What `/metrics` exposes.
        metrics_server: Serves `/metrics` on its own port; None without one.

    Raises (on entering):
        SettingsError: There is nothing to serve, or a profile cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        ports: discovery.Ports = discovery.USUAL_PORTS,
        *,
        client: http.Client | None = None,
        memory: Memory | None = None,
        nvml: Nvml | None = None,
        timings: Timings | None = None,
    ) -> None:
        self._settings = settings
        self._timings = timings = timings or Timings()
        self._nvml = nvml or Nvml()
        self._memory = memory or self._nvml
        self._lease: Lease | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._began = time.time()
        self._version = importlib.metadata.version("twolane")
        self.gpu: Gpu | None = None
        self.metrics_server: MetricsServer | None = None
        client = client or http.Client()
        self.catalogue = Catalogue()
        self.engines = EnginePool(settings, client, timings)
        self._publisher = Publisher(settings, self.engines, self.catalogue, timings)
        self.listing = EngineListing(
            settings, ports, client, self.engines, self._publisher, self.catalogue, timings
        )
        self._loader = Loader(self.catalogue, timings)
        self._operator = Operator(self.catalogue)
        self.metrics = Metrics(self.catalogue.models, settings.cost, timings)
        self.edge = self._edge()

    def _edge(self) -> Edge:
        """The ASGI application, over the parts."""
        settings = self._settings
        relay = Relay(
            self.catalogue,
            heartbeat_s=settings.limits.heartbeat_s,
            status_events=settings.status_events,
            timings=self._timings,
        )
        pages = Pages(
            self.catalogue,
            self._loader,
            ready=self.ready,
            status=self.status,
            pin=self._operator.pin,
            release=self._operator.release,
            version=self._version,
            metrics=self._exposition,
        )
        logs = [RequestLog()] if settings.log == "json" else []
        return Edge(
            relay,
            pages,
            Keys(settings.keys()),
            Keys(settings.admins()),
            [*logs, self.metrics],
            max_body=int(settings.limits.max_body_mb * MIB),
        )

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._stop()

    async def _start(self) -> None:
        self._serve_metrics()
        await self.listing.find_engines()
        await self._take_gpu()
        self.engines.run_commands(besides=self.gpu.layouts if self.gpu is not None else ())
        for name, model in self._settings.served().items():
            self._publisher.publish(name, model)
        if self.gpu is not None:
            self._tasks.append(asyncio.create_task(self.gpu.run()))
        if not self._settings.models:
            await self.listing.relist()
            self._tasks.append(asyncio.create_task(self.listing.run()))
        self._tasks.append(asyncio.create_task(self.metrics.watch(self._nvml)))
        # The embedded engine is there, however busy the machine: it is worth waiting for.
        timings, embedded = self._timings, self.engines.embedded is not None
        await self._publisher.first_results(
            timings.embedded_start_s if embedded else timings.first_probe_wait_s
        )

    async def _stop(self) -> None:
        await self._loader.close()
        for task in self._tasks:
            task.cancel()
        await self._publisher.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.gpu is not None:
            await self.gpu.stop()
        await self.engines.stop_processes()
        if self._lease is not None:
            self._lease.release()
        if self.metrics_server is not None:
            await self.metrics_server.stop()
        await self.engines.close()

    async def _take_gpu(self) -> None:
        """Own the GPU for the models in exclusive placement, if there are any."""
        exclusive = {
            name: model
            for name, model in self._settings.served().items()
            if model.placement == "exclusive"
        }
        if not exclusive:
            return
        self._lease = acquire_lease(self._settings)
        self.gpu = await make_gpu(
            self._settings, exclusive, self.engines, self._memory, self._timings
        )
        self._publisher.gpu = self._operator.gpu = self.gpu
        self.metrics.follow(self.gpu)

    def _serve_metrics(self) -> None:
        """Serve metrics on their own port, if they have one; raises SettingsError."""
        host, port = self._settings.metrics.host, self._settings.metrics.port
        if port is None:
            return
        try:
            self.metrics_server = MetricsServer(self.metrics.exposition, host, port)
        except OSError as exc:
            raise SettingsError(
                f"metrics: {host}:{port} cannot be listened on ({exc.strerror}): choose another "
                "metrics.port"
            ) from exc
        self.metrics_server.start()

    def _exposition(self, accept: str) -> tuple[bytes, str]:
        """The metrics for the gateway's own port; raises NotFound where they have another."""
        if self.metrics_server is not None:
            raise NotFound(
                f"Metrics are on their own port, {self.metrics_server.port}, without a key."
            )
        return self.metrics.exposition(accept)

    def ready(self) -> ReadyReport:
        """Whether any model can be answered, and what the others wait for."""
        return ready_report(self.catalogue, self.gpu, draining=self.edge.draining)

    def status(self) -> GatewayStatus:
        """The gateway's state for `/status`; it holds no key and no prompt."""
        now = time.time()
        return GatewayStatus(
            version=self._version,
            up_s=round(now - self._began, 1),
            in_flight=self.edge.in_flight,
            draining=self.edge.draining,
            gpu=gpu_status(self.gpu) if self.gpu is not None else None,
            cost=statement(self.metrics.meter, self._settings.cost),
            models=model_statuses(self.catalogue.models, now),
        )
