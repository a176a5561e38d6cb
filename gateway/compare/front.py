"""A gateway in front of the measured lanes, as one more entrant of a comparison."""

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

#: Label of the gateway among the entrants.
GATEWAY = "gateway"
#: Longest time for a gateway to become ready, with the engines that it starts, seconds.
GATEWAY_READY_S = 900.0


def gateway_entrant(
    arguments: Sequence[str], read: Settings, name: str, before: Sequence[str], folder: Path
) -> Entrant:
    """A gateway that serves the measured model, with every feature on.

    Args:
        arguments: Arguments of `twolane serve`.
        read: The settings that these arguments select.
        name: The model's public name.
        before: Labels of the lanes behind the gateway.
        folder: For its log.
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
            await _wait_settled(url, process)
        except BackendError as exc:
            await process.stop()
            raise VisitFailed(f"the gateway did not become ready: {exc}") from exc
        try:
            yield subject
        finally:
            await process.stop()

    return Entrant(subject, Target(GATEWAY, url, name, key), running)


async def _wait_settled(url: str, process: Supervised) -> None:
    """Return when every lane is ready that can be; raises `BackendError` if none becomes so.

    A gateway is ready as soon as one lane is, but an engine that still loads on the same machine
    would change every figure.
    """
    deadline = time.monotonic() + GATEWAY_READY_S
    reason = "it does not answer /ready"
    async with http.Client() as client:
        while process.running:
            with contextlib.suppress(http.HttpError, msgspec.DecodeError):
                answer = await client.request(
                    Origin.of(url), "GET", "/ready", {}, b"", connect_s=2, head_s=5
                )
                readiness = msgspec.json.decode(await answer.read_all(2**20))
                answer.close(reuse=False)
                gpu = readiness.get("gpu")  # only the engine that holds the GPU can be ready
                settled = gpu["step"] == "held" if gpu else not readiness["waiting_for"]
                if readiness["ready"] and settled:
                    return
                reason = f"it waits for {readiness['waiting_for']}"
            if time.monotonic() > deadline:
                raise BackendError(f"after {GATEWAY_READY_S:g} s {reason}")
            await asyncio.sleep(0.2)
    raise BackendError(process.exit_report())


def gateway_arguments(args: argparse.Namespace) -> list[str]:
    """Command-line arguments of a gateway that serves the measured models."""
    arguments = ["--config", str(args.config)] if args.config else []
    for name, lanes in args.pair:
        pairs = ",".join(f"{kind}:{model}" for kind, model in lanes.items())
        arguments += ["--pair", f"{name}={pairs}"]
    return arguments
