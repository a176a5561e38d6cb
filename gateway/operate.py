"""`twolane status`, `pin` and `release`: send a request to a running gateway, show its status.

These commands start in a fraction of a second: nothing of the server is imported here.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Iterable
from typing import Any

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from backends.transport import http
from backends.transport.origin import Origin
from gateway import installation
from gateway.errors import UsageError
from gateway.observe.status import (
    CostStatement,
    GatewayStatus,
    GpuStatus,
    ModelStatus,
    ProfileStatus,
)

#: The status of a gateway with many models is some hundred kilobytes.
MAX_ANSWER_BYTES = 16 * 1024 * 1024
REFRESH_S = 1.0


def status(args: argparse.Namespace) -> None:
    """Print the status: as tables, as JSON, or as tables that are redrawn every second."""
    key = args.key or _first_key("TWOLANE_API_KEYS")
    if args.json:
        answer = asyncio.run(fetch(args.url, key))
        sys.stdout.write(msgspec.json.format(answer, indent=2).decode() + "\n")
    elif args.watch:
        _watch(args.url, key)
    else:
        _console().print(draw(read_status(args.url, asyncio.run(fetch(args.url, key)))))


def pin(args: argparse.Namespace) -> None:
    """Pin a lane, or let the policy decide again; print the status after it."""
    _change(args, "/admin/pin", {"lane": args.lane})


def release(args: argparse.Namespace) -> None:
    """Give the GPU's memory to others; print the status after it."""
    _change(args, "/admin/release", None)


def _change(args: argparse.Namespace, path: str, body: Any) -> None:
    key = args.key or _first_key("TWOLANE_ADMIN_KEYS") or _first_key("TWOLANE_API_KEYS")
    answer = asyncio.run(fetch(args.url, key, "POST", path, body))
    _console().print(draw(read_status(args.url, answer)))


def _watch(url: str, key: str | None) -> None:
    with Live(console=_console(), refresh_per_second=4) as live:
        while True:
            live.update(draw(read_status(url, asyncio.run(fetch(url, key)))))
            time.sleep(REFRESH_S)


def _first_key(variable: str) -> str | None:
    """The first key in a variable that holds a JSON list of them; None without one."""
    try:
        keys = msgspec.json.decode(os.environ.get(variable, "[]"), type=list[str])
    except msgspec.DecodeError:
        return None
    return keys[0] if keys else None


async def fetch(
    url: str, key: str | None, method: str = "GET", path: str = "/status", body: Any = None
) -> bytes:
    """The status of a running gateway as JSON, after the request has been carried out.

    Raises:
        UsageError: No gateway answers at this URL, or it refuses the request.
    """
    headers = {"authorization": f"Bearer {key}"} if key else {}
    headers["content-type"] = "application/json"
    content = b"" if body is None else msgspec.json.encode(body)
    try:
        async with http.Client() as client:
            origin = Origin.of(url)
            answer = await client.request(
                origin, method, path, headers, content, connect_s=2, head_s=5
            )
            text = await answer.read_all(MAX_ANSWER_BYTES)
            answer.close(reuse=False)
    except (http.HttpError, ValueError) as exc:
        raise UsageError(
            f"no gateway answers at {url} ({exc}): start it with `{installation.program()} "
            "serve`, or name its address with --url"
        ) from exc
    if answer.status == 401:
        raise UsageError(
            "this gateway requires a valid key: give it with --key KEY. `status` needs an API key, "
            "`pin` and `release` an admin key where there are any"
        )
    if answer.status == 400:
        raise UsageError(_message(text))
    if answer.status != 200:
        raise UsageError(f"{url} answers {answer.status}: is this a twolane gateway?")
    read_status(url, text)
    return text


def read_status(url: str, text: bytes) -> GatewayStatus:
    """The status that a gateway has sent; raises UsageError where it is none."""
    try:
        return msgspec.json.decode(text, type=GatewayStatus)
    except msgspec.DecodeError as exc:
        raise UsageError(
            f"{url} answers, but not with a status ({exc}): is this a twolane gateway?"
        ) from exc


def _message(envelope: bytes) -> str:
    """The message of the gateway's error response."""
    try:
        return str(msgspec.json.decode(envelope)["error"]["message"])
    except (msgspec.DecodeError, LookupError, TypeError):
        return "the gateway refuses this request, without a reason"


# Drawing


def _console() -> Console:
    # Names of models and reasons are shown as they are, brackets included.
    return Console(markup=False, highlight=False, emoji=False)


def _table(*columns: str, title: str | None = None) -> Table:
    return Table(
        *columns, box=None, pad_edge=False, title=title, title_justify="left", title_style=""
    )


def draw(status: GatewayStatus) -> Group:
    """The status for a terminal of 80 columns or more."""
    count = status.in_flight
    head = (
        f"twolane {status.version}, up {_duration(status.up_s)}, "
        f"{count} request{'s' * (count != 1)} in flight"
    )
    if status.draining:
        head += ", draining: it ends when they have ended"
    parts: list[RenderableType] = [Text(head)]
    if status.gpu is not None:
        parts.append(Panel(_draw_gpu(status.gpu), title="GPU", title_align="left"))
    if status.cost is not None:
        parts.append(Panel(_draw_cost(status.cost), title="Cost", title_align="left"))
    for name, model in status.models.items():
        title = Text(f"{name} ({model.profile.source} profile)")
        parts.append(Panel(_draw_model(model), title=title, title_align="left"))
    return Group(*parts)


def _draw_model(model: ModelStatus) -> Group:
    """Where the next request goes and why, the lanes, the last decisions."""
    lanes = _table("lane", "running", "slots", "mean s", "replicas: state running/slots")
    for name, lane in model.lanes.items():
        replicas = ", ".join(
            f"{replica.state} {replica.running}/{replica.room}" for replica in lane.replicas
        )
        lanes.add_row(
            ("→ " if name == model.lane else "  ") + name,
            str(lane.running),
            str(lane.slots),
            f"{lane.service_s:.2f}",
            replicas,
        )
    decisions = _table("decided", "lane", "demand", "reason")
    for decision in model.decisions[-5:]:
        decisions.add_row(_clock(decision.at), decision.lane, str(decision.demand), decision.reason)
    now = f"{model.reason}\ndemand {model.demand} requests, of which {model.waiting} wait"
    return Group(Text(now), *_draw_profile(model.profile), lanes, "", decisions)


def _draw_profile(profile: ProfileStatus) -> list[Text]:
    """The age of the profile, how live requests have refined it, and what speaks against it."""
    if profile.source != "measured":
        return []
    refined, summary = profile.refined, f"profile {profile.told}"
    if refined is not None and refined.requests:
        lanes = [f"{lane} {_percent(by.values())}" for lane, by in refined.factors.items()]
        count = refined.requests
        summary += f", refined by {count} request{'s' * (count > 1)}: {', '.join(lanes)}"
    return [Text(summary), *(Text(warning, style="yellow") for warning in profile.warnings)]


def _percent(factors: Iterable[float]) -> str:
    """Factors as what they add: `+12 %`, `-3 to +12 %`."""
    added = sorted({round(100 * (factor - 1)) for factor in factors})
    first, last = f"{added[0]:+d}", f"{added[-1]:+d} %"
    return last if len(added) == 1 else f"{first} to {last}"


def _draw_cost(cost: CostStatement) -> Group:
    """What tokens have cost since the start; a dash stands for what is not known."""
    idle, whole = cost.idle, cost.whole
    watts = cost.watts
    now = "watts not known" if watts is None else f"{watts:.0f} W {cost.watts_are}"
    if whole.joules:
        now += f", {whole.joules / 3.6e6:.3f} kWh since the start"
    if whole.seconds:
        now += f", idle {idle.seconds / whole.seconds:.0%} of the time"
    table = _table(
        "", "tokens", "tokens/J", "electricity", "rented", "an API",
        title=f"{cost.currency} per million output tokens, idle time included",
    )  # fmt: skip
    for name, account in [*cost.lanes.items(), ("all", whole)]:
        bill = account.per_million
        figures = (account.tokens_per_joule, bill.electricity, bill.rent, bill.api)
        shown = ("-" if value is None else f"{value:.3g}" for value in figures)
        table.add_row(name, f"{account.tokens:,}", *shown)
    return Group(now, table)


def _draw_gpu(gpu: GpuStatus) -> Group:
    """Which engine holds the GPU, whether it moves, and what the last moves cost."""
    if gpu.step == "held":
        lines = [f"{gpu.holder} holds the GPU, for {_duration(gpu.since_s)}"]
    elif gpu.deadline_s:
        elapsed = f"{gpu.since_s:.0f} of {gpu.deadline_s:g} s"
        lines = [f"hand-over to {gpu.to}: {gpu.step}, {elapsed}"]
    else:
        lines = [f"no engine holds the GPU: {gpu.step} {gpu.trouble or ''}".strip()]
    if gpu.released:
        lines.append("released by `twolane release`: 503 until `twolane pin auto`")
    if gpu.pin:
        lines.append(f"pinned to {gpu.pin}; `twolane pin auto` lets the policy decide again")
    lines.append(f"regret {gpu.regret:.1f} of {gpu.price:.1f} request-seconds, {gpu.moves} moves")
    legend = (
        "Regret: request-seconds lost because the GPU stays where it is. The GPU moves when it "
        "reaches the second figure, the cost of a hand-over. Waited: request-seconds that requests "
        "waited because of the move."
    )
    passages = _table("moved", "from", "to", "seconds", "waited", "outcome", "why")
    for passage in gpu.passages[-5:]:
        passages.add_row(
            _clock(passage.at), passage.source or "-", passage.target,
            f"{sum(passage.steps.values()):.1f}", f"{passage.waited:.1f}",
            passage.outcome, passage.why,
        )  # fmt: skip
    return Group(Text("\n".join(lines)), Text(legend, style="dim"), passages)


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def _duration(seconds: float) -> str:
    """`42 s`, `12 min`, `3 h`, `2 d`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
