"""The engines of one gateway: a client for each, and the processes that it starts itself.

An engine that runs already has a client alone. One with a `command` is supervised: started
here, watched, stopped at the end. The embedded engine is started where no other is found.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

from backends.base import Engine, Timeouts
from backends.errors import BackendError
from backends.kinds import EMBEDDED, KINDS, Kind
from backends.processes.supervised import Supervised
from backends.transport import http
from gateway import installation
from gateway.serving import discovery
from gateway.settings import Settings, SettingsError, Timings

log = logging.getLogger("gateway")


class EnginePool:
    """Makes the clients and the processes of the engines, and ends them.

    Args:
        settings: The gateway's configuration.
        client: The HTTP client that all engines share; closed with the pool.
        timings: The deadline of the embedded engine's start.

    Attributes:
        urls: Base URLs by kind, as configured or found; the first of a kind is its main server.
        embedded: The embedded engine's process, where it was started.
    """

    def __init__(self, settings: Settings, client: http.Client, timings: Timings) -> None:
        self.urls: dict[Kind, tuple[str, ...]] = {k: e.urls for k, e in settings.engines.items()}
        self.embedded: Supervised | None = None
        self._settings = settings
        self._client = client
        self._timings = timings
        self._engines: dict[tuple[Kind, str], Engine] = {}
        self._processes: list[Supervised] = []
        self._restarting: dict[asyncio.Task[None], Supervised] = {}
        self._log_folder: Path | None = None

    def engine(self, kind: Kind, url: str) -> Engine:
        """The client for one server, the same at each call."""
        known = self._engines.get((kind, url))
        if known is None:
            limits, configured = self._settings.limits, self._settings.engines.get(kind)
            key = configured.api_key if configured is not None else None
            known = self._engines[kind, url] = KINDS[kind].engine(
                url,
                self._client,
                api_key=key.get_secret_value() if key is not None else None,
                timeouts=Timeouts(
                    limits.connect_s, limits.first_token_s, limits.idle_s, limits.answer_s
                ),
            )
        return known

    def process(self, kind: Kind) -> Supervised | None:
        """The process that runs the operator's command; None where an engine has no command."""
        configured = self._settings.engines[kind]
        if not configured.command:
            return None
        output = configured.log or self._temporary_log(kind)
        log.info("the gateway starts and stops %s (log: %s)", kind, output)
        process = Supervised(configured.command, output, configured.environment)
        self._processes.append(process)
        return process

    def run_commands(self, *, besides: Collection[Kind]) -> None:
        """Run every engine that has a command, except those that wait for the GPU."""
        for kind in self._settings.engines:
            if kind not in besides and (process := self.process(kind)) is not None:
                self._restarting[asyncio.create_task(process.keep_running())] = process

    async def start_embedded(self) -> None:
        """Start the embedded engine; raises SettingsError where that is not possible."""
        own = self._settings.embedded
        gguf = own.model or discovery.packaged_model()
        if not discovery.embedded_installed() or gguf is None:
            *others, last = (f"no {kind.server} on port {kind.ports[0]}" for kind in KINDS.values())
            raise SettingsError(
                f"Found {', '.join(others)} and {last}, and the embedded engine is not "
                "installed. Start one of them, name yours in a configuration file, or install "
                f"the embedded engine: {installation.install('embedded')}"
            )
        if not gguf.is_file():
            raise SettingsError(f"embedded.model: there is no file {gguf}")
        command = [sys.executable, "-m", "backends.llamacpp", str(gguf), "--name", own.name,
                   "--slots", str(own.slots), "--context", str(own.context)]  # fmt: skip
        output = self._temporary_log(EMBEDDED)
        log.info("starting the embedded engine on %s (log: %s)", gguf.name, output)
        self.embedded = Supervised(command, output, reports_url=True)
        self._processes.append(self.embedded)
        try:
            await self.embedded.start(deadline_s=self._timings.embedded_start_s)
        except BackendError as exc:
            raise SettingsError(f"The embedded engine does not start: {exc}") from exc
        self.urls[EMBEDDED] = (self.embedded.url,)

    async def stop_processes(self) -> None:
        """End the processes that do not wait for the GPU; the hand-over ends the others."""
        for task in self._restarting:
            task.cancel()
        await asyncio.gather(*self._restarting, return_exceptions=True)
        ours = list(self._restarting.values())
        ours += [self.embedded] if self.embedded is not None else []
        stops = (process.stop() for process in ours)
        for failure in await asyncio.gather(*stops, return_exceptions=True):
            if failure is not None:
                log.warning("%s", failure)

    async def close(self) -> None:
        """Close every client, and remove the temporary logs unless an engine has failed."""
        for engine in self._engines.values():
            await engine.close()
        self._client.close()
        if self._log_folder is None:
            return
        failed = [p for p in self._processes if p.failed and p.log.parent == self._log_folder]
        if failed:
            logs = ", ".join(str(process.log) for process in failed)
            log.warning("kept the output of an engine that has failed: %s", logs)
        else:
            shutil.rmtree(self._log_folder, ignore_errors=True)

    def _temporary_log(self, kind: Kind) -> Path:
        if self._log_folder is None:
            self._log_folder = Path(tempfile.mkdtemp(prefix="twolane-"))
        return self._log_folder / f"{kind}.log"
