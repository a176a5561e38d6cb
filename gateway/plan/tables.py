"""A plan as the terminal shows it."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.table import Table

from gateway.plan.text import (
    assumptions,
    by_type,
    describe_cards,
    pinned_ram,
    rate,
    round_up,
    start_command,
    thousands_by_type,
)
from gateway.sizing.assumptions import ALL_REDUCE_S
from gateway.sizing.cards import Cards
from gateway.sizing.figures import LanePlan, Plan


def render(name: str, plan: Plan) -> Iterator[RenderableType]:
    """The parts of the answer, in order; strings hold commands and must not be wrapped."""
    verdict = "[red]does not fit[/] as" if plan.faults else "[green]fits[/],"
    yield (
        f"[bold]{name}[/] on {describe_cards(plan.cards)}: {verdict} "
        f"[bold]{plan.placement}[/]: {plan.placement_why}"
    )
    yield ""
    yield _memory_table(plan)
    yield _load_table(plan)
    if plan.cards.gbs is None:
        yield (
            "[dim]no bounds on speed: only the size of these cards is known. Name their kind: "
            f"--cards {plan.cards.count}x{plan.cards.gib:.4g}@4090[/]\n"
        )
    else:
        yield _speed_table(plan)
    pinned = pinned_ram(plan)
    if pinned:
        yield f"RAM: a sleeping vLLM pins {pinned}, and keeps it after waking\n"
    for lane in plan.lanes.values():
        yield f"[bold]{lane.engine}[/]"
        yield f"  {start_command(lane)}\n"
    for note in plan.notes:
        yield f"[yellow]note[/] {note}"
    for fault in plan.faults:
        yield f"[red]does not fit[/] {fault}"
    yield "[dim]" + "\n".join(assumptions(plan)) + "[/]"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
                  pad_edge=False)  # fmt: skip
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _memory_table(plan: Plan) -> Table:
    lanes = list(plan.lanes.values())
    table = _table("memory", "", *(lane.engine for lane in lanes))
    table.add_row("model", *(lane.weights.name for lane in lanes))
    table.add_row("quantization", *(lane.weights.scheme for lane in lanes))
    table.add_row("weights, GiB", *(f"{lane.weights_gib:.1f}" for lane in lanes))
    table.add_row("  on each card", *(_weights_on_card(lane) for lane in lanes))
    table.add_row("KV a token, KiB", *(_kv_by_type(lane) for lane in lanes))
    table.add_row(
        "KV tokens that fit, alone", *(thousands_by_type(lane.tokens_alone) for lane in lanes)
    )
    if any(lane.tokens_beside for lane in lanes):
        table.add_row(
            "  beside a sleeping vLLM",
            *(thousands_by_type(lane.tokens_beside) or "-" for lane in lanes),
        )
    table.add_row("planned: KV type", *(lane.kv for lane in lanes))
    table.add_row("  KV tokens in all", *(f"{lane.tokens:,}" for lane in lanes))
    table.add_row(
        "  slots x context",
        *(f"{'up to ' if lane.engine == 'vllm' else ''}{lane.slots} x {lane.context:,}"
          for lane in lanes),
    )  # fmt: skip
    table.add_row(
        "  GPU memory that must be free, GiB",
        *(f"{round_up(lane.memory_gib):.1f}" for lane in lanes),
    )
    if any(lane.on_cpu_gib for lane in lanes):
        table.add_row("  would run on the CPU, GiB", *(f"{lane.on_cpu_gib:.1f}" for lane in lanes))
    return table


def _weights_on_card(lane: LanePlan) -> str:
    if lane.engine == "ollama":
        return f"{lane.weights_card_gib:.1f} (layers)"
    return f"{lane.weights_card_gib:.1f} (TP {lane.tensor}, PP {lane.pipeline})"


def _kv_by_type(lane: LanePlan) -> str:
    return by_type({kind: f"{round(size, 1):g}" for kind, size in lane.kv_kib.items()})


def _load_table(plan: Plan) -> Table:
    table = _table(
        f"concurrent requests of {plan.requirements.tokens:,} tokens each",
        "concurrent", "engine", "KV needed", "KV that fits", "running", "waiting", "tok/s at most",
    )  # fmt: skip
    for number, concurrent in enumerate(plan.requirements.concurrency):
        for lane in plan.lanes.values():
            point = lane.load_points[number]
            bound = "?" if point.bound_tokens_s is None else rate(point.bound_tokens_s)
            table.add_row(
                str(concurrent), lane.engine, f"{point.needed_tokens:,}",
                f"{point.resident_tokens:,}", str(point.running),
                str(point.queued) if point.queued else "-", bound,
            )  # fmt: skip
    return table


def _speed_table(plan: Plan) -> Table:
    table = _table("upper bounds by the cards' data sheets, not a promise", "", "tok/s", "because")
    cards = plan.cards
    for lane in plan.lanes.values():
        speed = lane.speed
        if speed is None:
            continue
        gbs = lane.tensor * (cards.gbs or 0)
        turns = " (cards take turns)" if cards.count > lane.tensor else ""
        table.add_row(
            f"{lane.engine}, one stream", rate(speed.one_stream),
            f"{gbs:,.0f} GB/s / {lane.weights.read / 1e9:.1f} GB read a token{turns}",
        )  # fmt: skip
        if speed.one_stream_all_reduce < 0.97 * speed.one_stream and lane.tensor > 1:
            table.add_row(
                "  with all-reduces", rate(speed.one_stream_all_reduce),
                f"2 x {lane.weights.shape.layers} layers x {ALL_REDUCE_S * 1e6:.0f} us, "
                "without P2P (assumed)",
            )  # fmt: skip
        table.add_row(
            f"{lane.engine}, prefill", f"{speed.prefill:,.0f}",
            f"{_cards_in_prefill(lane, cards) * (cards.tflops or 0):,.0f} TFLOPS / "
            f"{2 * lane.weights.active / 1e9:.0f} GFLOP a token",
        )  # fmt: skip
    return table


def _cards_in_prefill(lane: LanePlan, cards: Cards) -> int:
    """Cards that can work on a long prompt at the same time."""
    return lane.tensor * lane.pipeline if lane.engine == "vllm" else cards.count
