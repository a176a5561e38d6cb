"""The models that engines list, served under their own names where none are configured."""

from __future__ import annotations

import asyncio

from backends.errors import BackendError
from backends.kinds import EMBEDDED, KINDS, Kind
from backends.transport import http
from gateway.serving import discovery
from gateway.serving.catalogue import Catalogue
from gateway.serving.engines import EnginePool
from gateway.serving.publisher import Publisher
from gateway.settings import LaneSettings, ModelSettings, Settings, Timings


class EngineListing:
    """Keeps the catalogue equal to what the engines list.

    Args:
        settings: The gateway's configuration.
        ports: Where engines are looked for on this machine.
        client: The HTTP client of the search.
        pool: The engines, and those that are found.
        publisher: Serves the models.
        catalogue: The models that are served.
        timings: The interval between two listings.
    """

    def __init__(
        self,
        settings: Settings,
        ports: discovery.Ports,
        client: http.Client,
        pool: EnginePool,
        publisher: Publisher,
        catalogue: Catalogue,
        timings: Timings,
    ) -> None:
        self._settings = settings
        self._ports = ports
        self._client = client
        self._pool = pool
        self._publisher = publisher
        self._catalogue = catalogue
        self._timings = timings

    async def find_engines(self) -> None:
        """Find the engines of this machine, or start the embedded one where there is none.

        Where the settings name any engine or model, nothing is looked for.

        Raises:
            SettingsError: There is no engine, and the embedded one cannot be started.
        """
        if not self._discovers:
            return
        await self._discover()
        for lanes in self._settings.pair.values():
            for kind in lanes:  # named, so expected: it may only be late
                self._pool.urls.setdefault(kind, (KINDS[kind].usual_url,))
        if not self._pool.urls:
            await self._pool.start_embedded()

    async def run(self) -> None:
        """List the engines' models again and again, until cancelled."""
        while True:
            await asyncio.sleep(self._timings.relist_interval_s)
            if self._discovers and self._pool.embedded is None:
                await self._discover()  # one that was started after us
            await self.relist()

    async def relist(self) -> None:
        """Serve what the engines list, under their own names; equal names are one model."""
        listed, silent = await self._listed_models()
        for name, lanes in listed.items():
            known = self._catalogue.models.get(name)
            configured = name in self._settings.pair
            if known is not None and not configured and set(lanes) - set(known.lanes):
                self._publisher.withdraw(name)  # another engine has it now, too
            if name not in self._catalogue.models:
                self._publisher.publish(name, ModelSettings(lanes=lanes))
        for name, known in list(self._catalogue.models.items()):
            gone = name not in listed and name not in self._settings.pair
            if gone and not silent.intersection(known.lanes):  # one that is down forgets nothing
                self._publisher.withdraw(name)

    @property
    def _discovers(self) -> bool:
        """Whether the settings name no engine and no model."""
        return not self._settings.engines and not self._settings.models

    async def _discover(self) -> None:
        found = await discovery.find(self._client, self._ports, own_port=self._settings.port)
        for kind, url in found.items():
            self._pool.urls.setdefault(kind, (url,))

    async def _listed_models(self) -> tuple[dict[str, dict[Kind, LaneSettings]], set[Kind]]:
        """The lanes by listed name, without those of a pair, and the engines that are silent."""
        paired = {
            (kind, model) for lanes in self._settings.pair.values() for kind, model in lanes.items()
        }
        listed: dict[str, dict[Kind, LaneSettings]] = {}
        silent: set[Kind] = set()
        for kind, urls in self._pool.urls.items():
            try:
                names = await self._pool.engine(kind, urls[0]).models()
            except BackendError:
                silent.add(kind)
                continue
            for name in names:
                if (kind, name) not in paired:
                    lane = LaneSettings(model=name, slots=self._embedded_slots(kind))
                    listed.setdefault(name, {})[kind] = lane
        return listed, silent

    def _embedded_slots(self, kind: Kind) -> int | None:
        if kind != EMBEDDED or self._pool.embedded is None:
            return None
        return self._settings.embedded.slots
