"""`twolane serve`: the settings, the port, the gateway on it, and the banner."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import signal
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn
import uvloop

from gateway import installation, settings
from gateway.app import Gateway
from gateway.errors import UsageError
from gateway.http import metrics_page
from gateway.settings import Settings

log = logging.getLogger("gateway")

#: How long answers that a drain has cut short have for their error event, seconds.
LAST_WORD_S = 2.0

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def serve(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        UsageError: The settings cannot be used, or the port is taken.
    """
    overrides: dict[str, Any] = {
        name: value
        for name in ("host", "port", "allow_public_without_key")
        if (value := getattr(args, name)) is not None
    }
    if args.pair:
        overrides["pair"] = dict(args.pair)
    configuration = settings.load(args.config, overrides, settings.environment())
    configuration.check_exposure()
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Ollama's probes, twice a second
    listener = listen(configuration)
    try:
        uvloop.run(_run(configuration, listener))
    except asyncio.CancelledError:
        log.info("stopped before it served")


def listen(configuration: Settings) -> socket.socket:
    """The bound port; it is taken before anything else is started.

    Raises:
        UsageError: The address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in configuration.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((configuration.host, configuration.port))
    except OSError as exc:
        listener.close()
        raise UsageError(
            f"{configuration.host}:{configuration.port} cannot be listened on ({exc.strerror}). "
            "Another server may use this port, vLLM perhaps: choose another with --port."
        ) from exc
    return listener


async def _run(configuration: Settings, listener: socket.socket) -> None:
    starting = asyncio.current_task()
    assert starting is not None  # noqa: S101 - we run in one
    loop = asyncio.get_running_loop()
    # Until there is a server to drain, SIGTERM undoes what was started.
    loop.add_signal_handler(signal.SIGTERM, starting.cancel)
    async with Gateway(configuration) as gateway:
        loop.remove_signal_handler(signal.SIGTERM)
        port = listener.getsockname()[1]
        host = f"[{configuration.host}]" if ":" in configuration.host else configuration.host
        server = GracefulServer(gateway, configuration)
        listener.listen()  # a client that reads the banner may connect at once
        print(  # noqa: T201 - a command's way to speak
            banner(gateway, f"http://{host}:{port}", keyed=bool(configuration.keys())), flush=True
        )
        # What was made up to here stays: the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        await server.serve(sockets=[listener])


class GracefulServer(uvicorn.Server):
    """Drains on SIGTERM or Ctrl-C: running answers end, or are ended; then it exits with 0."""

    def __init__(self, gateway: Gateway, configuration: Settings) -> None:
        super().__init__(
            uvicorn.Config(
                gateway.edge,
                loop="uvloop",
                http="httptools",
                lifespan="off",
                access_log=False,
                log_config=None,
                log_level="warning",
                server_header=False,
                proxy_headers=False,  # anybody can send X-Forwarded-For
                timeout_keep_alive=75,
                backlog=2048,
            )
        )
        self._gateway = gateway
        self._drain_s = configuration.limits.drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second signal ends at once."""
        edge = self._gateway.edge
        if self.should_exit or sig not in (signal.SIGTERM, signal.SIGINT):
            self.force_exit = True
            edge.cut_all()
            return
        edge.draining = True
        self.should_exit = True
        log.info(
            "draining: %d requests in flight have up to %g s to end; a second signal ends them now",
            edge.in_flight,
            self._drain_s,
        )
        loop = asyncio.get_running_loop()
        loop.call_later(self._drain_s, edge.cut_all)
        # A client that does not read takes no error event either.
        loop.call_later(self._drain_s + LAST_WORD_S, setattr, self, "force_exit", True)


def banner(gateway: Gateway, url: str, *, keyed: bool) -> str:
    """What is served where, and commands to try next."""
    models = gateway.catalogue.models
    served = "\n".join(f"  {name}  on {', '.join(model.lanes)}" for name, model in models.items())
    key = " -H 'Authorization: Bearer YOUR_KEY'" if keyed else ""
    body = (
        f'{{"model":"{next(iter(models), "MODEL")}","stream":true,'
        '"messages":[{"role":"user","content":"Hello"}]}'
    )
    at = "" if url == "http://127.0.0.1:8000" else f" --url {url}"
    return f"""
twolane serves at {url}
{served or "  no model yet: it waits for an engine, see /ready"}

Try it:
  curl -N {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'

Open WebUI: OPENAI_API_BASE_URL={url}/v1 OPENAI_API_KEY={"YOUR_KEY" if keyed else "none"}
API docs:   {url}/docs
Status:     {installation.program()} status --watch{at}{" --key YOUR_KEY" if keyed else ""}
Metrics:    {gateway.metrics_server.url if gateway.metrics_server else f"{url}{metrics_page.PATH}"}
"""
