"""The command `twolane`: serve, and see how it stands."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import msgspec
import uvicorn
import uvloop
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from backends import base
from backends.kinds import KINDS, Kind
from backends.transport import http
from gateway import settings
from gateway.app import Gateway
from gateway.compare.arguments import add_commands as add_trials
from gateway.doctor import add_command as add_doctor
from gateway.errors import UsageError
from gateway.http import metrics_page as scrape
from gateway.plan.arguments import add_command as add_plan
from gateway.settings import Settings, SettingsError
from gateway.simulate.command import add_command as add_simulate

#: For the error events of answers that a drain has cut short.
LAST_WORD_S = 2.0

EPILOG = """\
examples:
  twolane serve                              use what runs on this machine, or the embedded engine
  twolane serve --pair chat=ollama:llama3.1:70b,vllm:llama-70b-awq
                                             one name over a model of each engine
  twolane serve --config twolane.yaml        as twolane.example.yaml explains
  twolane plan llama-3.3-70b --cards 2x24    what fits, before anything is downloaded
  twolane doctor --config twolane.yaml       what will fail, before it does
  twolane status --watch                     lanes, demand, queues, last decisions
  twolane compare --config twolane.yaml      which engine is faster here, and from how many on
  twolane calibrate --config twolane.yaml    the same, for the gateway to decide by

Every setting is also a variable: TWOLANE_PORT=9000, TWOLANE_LIMITS__MAX_WAIT_S=30.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 where it is not understood."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except UsageError as exc:
        _fail(str(exc))
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    for line in message.splitlines():
        print(f"twolane: {line}", file=sys.stderr)  # noqa: T201 - a command's way to speak
    sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="twolane",
        description="One OpenAI endpoint over Ollama and vLLM: each request goes to the engine "
        "that is faster at this load, and every answer says why.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        help="start the gateway",
        description="Start the gateway. Without a file it looks for Ollama on port 11434, vLLM on "
        "8001 and llama-server on 8080, serves their models, and starts the embedded engine where "
        "it finds none.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument("--config", type=Path, metavar="FILE", help="settings, YAML")
    serve.add_argument("--host", help="address to listen on (127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on (8000)")
    serve.add_argument(
        "--pair",
        action="append",
        default=[],
        type=_pair,
        metavar="NAME=ollama:MODEL,vllm:MODEL",
        help="serve two engines' models under one name; may be repeated",
    )
    serve.add_argument(
        "--allow-public-without-key",
        action="store_true",
        default=None,
        help="let anybody who reaches this machine use it",
    )
    serve.set_defaults(run=_serve)

    pin = commands.add_parser(
        "pin",
        help="keep the work at one engine, or leave it to the policy",
        description="Keep the work of a running gateway at one engine; in an exclusive placement "
        "the GPU is handed over to it. `auto` leaves the choice to the policy again.",
    )
    pin.add_argument("lane", choices=[*KINDS, "auto"])
    pin.set_defaults(run=_pin, path="/admin/pin")

    release = commands.add_parser(
        "release",
        help="give the GPU's memory to others, a training job perhaps",
        description="Drain, and have the engine that holds the GPU give its memory back. Requests "
        "are refused with 503 until `twolane pin auto`.",
    )
    release.set_defaults(run=_pin, path="/admin/release", lane=None)

    add_simulate(commands)
    add_plan(commands)
    add_doctor(commands)
    add_trials(commands, _pair)

    status = commands.add_parser(
        "status",
        help="show lanes, demand, queues, health and the last decisions",
        description="Show how a running gateway stands.",
    )
    for command in (pin, release, status):
        command.add_argument("--url", default="http://127.0.0.1:8000", help="the gateway")
        command.add_argument(
            "--key",
            help="key (or TWOLANE_ADMIN_KEYS, TWOLANE_API_KEYS, of which the first is sent)",
        )
    status.add_argument("--json", action="store_true", help="as JSON, once")
    status.add_argument("--watch", action="store_true", help="every second, until Ctrl-C")
    status.set_defaults(run=_status)
    return parser


def _pair(text: str) -> tuple[str, dict[Kind, str]]:
    """`name=ollama:MODEL,vllm:MODEL` taken apart; model names may have colons themselves."""
    name, _, rest = text.partition("=")
    lanes: dict[Kind, str] = {}
    for part in rest.split(","):
        said, _, model = part.strip().partition(":")
        if said not in KINDS or not model:
            message = (
                f"{part!r} is no ENGINE:MODEL with one of {', '.join(KINDS)}; "
                "write NAME=ollama:MODEL,vllm:MODEL"
            )
            raise argparse.ArgumentTypeError(message)
        lanes[said] = model
    if not name:
        raise argparse.ArgumentTypeError("the name before = is missing")
    return name, lanes


# serve


def _serve(args: argparse.Namespace) -> None:
    overrides: dict[str, Any] = {
        name: value
        for name in ("host", "port", "allow_public_without_key")
        if (value := getattr(args, name)) is not None
    }
    if args.pair:
        overrides["pair"] = dict(args.pair)
    read = settings.load(args.config, overrides, settings.environment())
    read.check_exposure()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # the probes of Ollama, twice a second
    listener = listen(read)
    uvloop.run(_run(read, listener))


def listen(read: Settings) -> socket.socket:
    """Take the port before anything else is started."""
    family = socket.AF_INET6 if ":" in read.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((read.host, read.port))
    except OSError as exc:
        listener.close()
        raise SettingsError(
            f"{read.host}:{read.port} cannot be listened on ({exc.strerror}). Something else may "
            "run there, a vLLM perhaps: choose another with --port."
        ) from exc
    return listener


async def _run(read: Settings, listener: socket.socket) -> None:
    async with Gateway(read) as gateway:
        url = f"http://{read.host}:{listener.getsockname()[1]}"
        server = GracefulServer(gateway, read)
        listener.listen()  # who reads the welcome may come at once
        _welcome(gateway, url, keyed=bool(read.keys()))
        # What was made up to here stays: the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        await server.serve(sockets=[listener])


class GracefulServer(uvicorn.Server):
    """Drains on SIGTERM or Ctrl-C: lets what runs end, then ends it, and exits with 0."""

    def __init__(self, gateway: Gateway, read: Settings) -> None:
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
        self._drain_s = read.limits.drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second signal ends at once."""
        edge = self._gateway.edge
        if self.should_exit or sig not in (signal.SIGTERM, signal.SIGINT):
            self.force_exit = True
            edge.cut_all()
            return
        edge.draining = True
        self.should_exit = True
        logging.getLogger("gateway").info(
            "draining: %d requests run, up to %g s; again to end now", edge.in_flight, self._drain_s
        )
        loop = asyncio.get_running_loop()
        loop.call_later(self._drain_s, edge.cut_all)
        # A client that does not read takes no error event either.
        loop.call_later(self._drain_s + LAST_WORD_S, setattr, self, "force_exit", True)


def _welcome(gateway: Gateway, url: str, *, keyed: bool) -> None:
    """What is served, and what to do next."""
    names = list(gateway.catalogue.models)
    served = "\n".join(
        f"  {name}  on {', '.join(model.lanes)}" for name, model in gateway.catalogue.models.items()
    )
    key = " -H 'Authorization: Bearer YOUR_KEY'" if keyed else ""
    body = (
        f'{{"model":"{names[0] if names else "MODEL"}","stream":true,'
        '"messages":[{"role":"user","content":"Hello"}]}'
    )
    print(  # noqa: T201 - a command's way to speak
        f"""
twolane serves at {url}
{served or "  no model yet: an engine is expected, see /ready"}

Try it:
  curl -N {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'

Open WebUI: OPENAI_API_BASE_URL={url}/v1 OPENAI_API_KEY={"YOUR_KEY" if keyed else "none"}
API docs:   {url}/docs
Status:     twolane status --watch{"" if url.endswith(":8000") else f" --url {url}"}
Metrics:    {gateway.scraped.url if gateway.scraped else f"{url}{scrape.PATH}"}
""",
        flush=True,
    )


# status


def _status(args: argparse.Namespace) -> None:
    key = args.key or _first_key("TWOLANE_API_KEYS")
    console = Console()
    if args.json:
        console.print_json(data=asyncio.run(_fetch(args.url, key)))
    elif not args.watch:
        console.print(_drawn(asyncio.run(_fetch(args.url, key))))
    else:
        with Live(console=console, refresh_per_second=4) as live:
            while True:
                live.update(_drawn(asyncio.run(_fetch(args.url, key))))
                time.sleep(1)


def _pin(args: argparse.Namespace) -> None:
    key = args.key or _first_key("TWOLANE_ADMIN_KEYS") or _first_key("TWOLANE_API_KEYS")
    wish = None if args.lane is None else {"lane": args.lane}
    Console().print(_drawn(asyncio.run(_fetch(args.url, key, "POST", args.path, wish))))


def _first_key(variable: str) -> str | None:
    try:
        said = settings.environment().get(variable, "[]")
        keys = msgspec.json.decode(said, type=list[str])
    except msgspec.DecodeError:
        return None
    return keys[0] if keys else None


async def _fetch(
    url: str, key: str | None, method: str = "GET", path: str = "/status", wish: Any = None
) -> dict[str, Any]:
    """The gateway's own account of itself, after it has done what is wished.

    Raises:
        SettingsError: There is none, or it does not let us in.
    """
    headers = {"authorization": f"Bearer {key}"} if key else {}
    headers["content-type"] = "application/json"
    body = b"" if wish is None else msgspec.json.encode(wish)
    try:
        async with http.Client() as client:
            origin = http.Origin.of(url)
            answer = await client.request(
                origin, method, path, headers, body, connect_s=2, head_s=5
            )
            told = await answer.read_all(16 * 1024 * 1024)
            answer.close(reuse=False)
    except (http.HttpError, ValueError) as exc:
        raise SettingsError(f"no gateway answers at {url} ({exc}); is it running?") from exc
    if answer.status == 401:
        raise SettingsError("this gateway wants a key of its own: give it with --key KEY")
    if answer.status == 400:
        raise SettingsError(base.read_fault(told).message)
    if answer.status != 200:
        raise SettingsError(f"{url} answers {answer.status}: is this a twolane gateway?")
    said: dict[str, Any] = msgspec.json.decode(told)
    return said


def _drawn(said: Mapping[str, Any]) -> Group:
    """The status as people read it."""
    head = f"twolane {said['version']}, up {said['up_s']:.0f} s, {said['in_flight']} in flight"
    parts: list[Any] = [head + (", draining" if said["draining"] else "")]
    if said["gpu"] is not None:
        parts.append(Panel(_drawn_gpu(said["gpu"]), title="GPU", title_align="left"))
    if said["cost"] is not None:
        parts.append(Panel(_drawn_cost(said["cost"]), title="Cost", title_align="left"))
    for name, model in said["models"].items():
        lanes = Table("lane", "running", "slots", "mean s", "replicas", box=None, pad_edge=False)
        for lane, state in model["lanes"].items():
            states = ", ".join(
                f"{replica['state']} {replica['running']}/{replica['room']}"
                for replica in state["replicas"]
            )
            mark = "→ " if lane == model["lane"] else "  "
            lanes.add_row(
                mark + lane, str(state["running"]), str(state["slots"]),
                f"{state['service_s']:.2f}", states,
            )  # fmt: skip
        told = f"{model['reason']}\ndemand {model['demand']}, waiting {model['waiting']}"
        last = Table("when", "lane", "demand", "reason", box=None, pad_edge=False)
        for decision in model["decisions"][-5:]:
            at = time.strftime("%H:%M:%S", time.localtime(decision["at"]))
            last.add_row(at, decision["lane"], str(decision["demand"]), decision["reason"])
        title = f"{name} ({model['profile']['source']} profile)"
        body = Group(told, *_drawn_profile(model["profile"]), lanes, "", last)
        parts.append(Panel(body, title=title, title_align="left"))
    return Group(*parts)


def _drawn_profile(profile: Mapping[str, Any]) -> list[Text]:
    """How old what is decided by is, what the requests have made of it, what speaks against it."""
    if profile["source"] != "measured":
        return []
    refined, told = profile["refined"], f"profile {profile['told']}"
    if refined is not None and refined["requests"]:
        lanes = [f"{lane} {_percent(by.values())}" for lane, by in refined["factors"].items()]
        many = refined["requests"]
        told += f", refined by {many} request{'s' * (many > 1)}: {', '.join(lanes)}"
    return [Text(told), *(Text(warning, style="yellow") for warning in profile["warnings"])]


def _percent(factors: Iterable[float]) -> str:
    """Factors as what they add: `+12 %`, `-3 to +12 %`."""
    added = sorted({round(100 * (factor - 1)) for factor in factors})
    first, last = f"{added[0]:+d}", f"{added[-1]:+d} %"
    return last if len(added) == 1 else f"{first} to {last}"


def _drawn_cost(cost: Mapping[str, Any]) -> Group:
    """What tokens have cost since the start; what is not known is a dash."""
    idle, whole = cost["idle"], cost["whole"]
    watts = cost["watts"]
    now = "watts not known" if watts is None else f"{watts:.0f} W {cost['watts_are']}"
    if whole["joules"]:
        now += f", {whole['joules'] / 3.6e6:.3f} kWh since the start"
    if whole["seconds"]:
        now += f", idle {idle['seconds'] / whole['seconds']:.0%} of the time"
    head = f"{cost['currency']} a million tokens out, idle time included"
    table = Table("", "tokens", "tokens/J", "electricity", "rented", "an API", box=None,
                  pad_edge=False, title=head, title_justify="left", title_style="")  # fmt: skip
    for name, account in [*cost["lanes"].items(), ("all", whole)]:
        bill = account["per_million"]
        figures = (account["tokens_per_joule"], bill["electricity"], bill["rent"], bill["api"])
        shown = ("-" if value is None else f"{value:.3g}" for value in figures)
        table.add_row(name, f"{account['tokens']:,}", *shown)
    return Group(now, table)


def _drawn_gpu(gpu: Mapping[str, Any]) -> Group:
    """Who has the GPU, whether it moves, and what the moves were."""
    holder = gpu["holder"] or "nobody"
    if gpu["step"] == "held":
        now = f"held by {holder} for {gpu['since_s']:.0f} s"
    elif gpu["deadline_s"]:
        now = f"{gpu['step']} for {gpu['to']}, {gpu['since_s']:.0f} of {gpu['deadline_s']:g} s"
    else:
        now = f"{gpu['step']} {gpu['trouble']}".strip()
    if gpu["released"]:
        now += ", released by the operator"
    if gpu["pin"]:
        now += f", pinned to {gpu['pin']} by the operator"
    rent = f"regret {gpu['regret']:.1f} of {gpu['price']:.1f} request-seconds"
    last = Table("when", "from", "to", "s", "waited", "outcome", "why", box=None, pad_edge=False)
    for passage in gpu["passages"][-5:]:
        at = time.strftime("%H:%M:%S", time.localtime(passage["at"]))
        last.add_row(
            at, passage["from"] or "-", passage["to"], f"{sum(passage['steps'].values()):.1f}",
            f"{passage['waited']:.1f}", passage["outcome"], passage["why"],
        )  # fmt: skip
    return Group(f"{now}\n{rent}, {gpu['moves']} moves", last)
