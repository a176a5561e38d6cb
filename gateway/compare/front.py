"""A gateway of our own in front of the measured lanes."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shlex
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib import metadata
from pathlib import Path

import msgspec

from backends.errors import BackendError
from backends.processes.supervised import Supervised
from backends.transport import http
from backends.transport.origin import Origin
from gateway import settings
from gateway.settings import Settings
from loadtests.measure.experiment import Subject
from loadtests.measure.generator import VisitFailed
from loadtests.measure.matrix import Entrant
from loadtests.measure.options import shareable_command
from loadtests.measure.stopwatch import Target

GATEWAY = "gateway"
#: How long a gateway may take to be ready, engines that it starts included, seconds.
READY_S = 900.0


def in_front(
    arguments: Sequence[str], read: Settings, name: str, before: Sequence[str], folder: Path
) -> Entrant:
    """A gateway of our own in front of the lanes, with everything on.

    Args:
        arguments: Of `twolane serve`, to serve what is measured.
        read: The settings that these lead to.
        name: The model's public name.
        before: Labels of the lanes behind it.
        folder: For what it says.
    """
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "gateway", "serve", *arguments, "--port", str(port)]
    environment = {k: v for k, v in settings.environment().items() if k.startswith("TWOLANE_")}
    process = Supervised(command, folder / "gateway.log", environment)
    subject = Subject(
        label=GATEWAY,
        url=url,
        model=name,
        engine=GATEWAY,
        version=metadata.version("twolane"),
        command=shlex.join(shareable_command(["twolane", "serve", *arguments])),
        before=tuple(before),
    )
    key = next(iter(read.keys()), None)

    @asynccontextmanager
    async def running() -> AsyncIterator[Subject]:
        try:
            await process.start()
            await _until_settled(url, process)
        except BackendError as exc:
            await process.stop()
            raise VisitFailed(f"the gateway does not serve: {exc}") from exc
        try:
            yield subject
        finally:
            await process.stop()

    return Entrant(subject, Target(GATEWAY, url, name, key), running)


async def _until_settled(url: str, process: Supervised) -> None:
    """Return when every lane serves that can, not just any; raises `BackendError`.

    A gateway answers as soon as one lane does; an engine that still loads beside it would be
    in every figure.
    """
    deadline = time.monotonic() + READY_S
    waits = "it says nothing"
    async with http.Client() as client:
        while process.running:
            with contextlib.suppress(http.HttpError, msgspec.DecodeError):
                answer = await client.request(
                    Origin.of(url), "GET", "/ready", {}, b"", connect_s=2, head_s=5
                )
                said = msgspec.json.decode(await answer.read_all(2**20))
                answer.close(reuse=False)
                gpu = said.get("gpu")  # who has it serves, and the other cannot
                settled = gpu["step"] == "held" if gpu else not said["waiting_for"]
                if said["ready"] and settled:
                    return
                waits = f"it waits for {said['waiting_for']}"
            if time.monotonic() > deadline:
                raise BackendError(f"after {READY_S:g} s {waits}")
            await asyncio.sleep(0.2)
    raise BackendError(process.exit_report())


def gateway_arguments(args: argparse.Namespace) -> list[str]:
    """Of a gateway that serves what is measured."""
    arguments = ["--config", str(args.config)] if args.config else []
    for name, lanes in args.pair:
        pairs = ",".join(f"{kind}:{model}" for kind, model in lanes.items())
        arguments += ["--pair", f"{name}={pairs}"]
    return arguments
