"""Builds the Grafana dashboard from Grafana's own types, and writes dashboards/twolane.json.

    .venv/bin/python deploy/grafana/dashboard.py

Change the dashboard here and run this. Tests compare the file with it, and run every query in a
real Prometheus.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias, TypeVar

from grafana_foundation_sdk.builders.common import ReduceDataOptions, StackingConfig
from grafana_foundation_sdk.builders.common import VizLegendOptions as Legend
from grafana_foundation_sdk.builders.dashboard import Dashboard, QueryVariable, Row
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.stat import Panel as Stat
from grafana_foundation_sdk.builders.statetimeline import Panel as StateTimeline
from grafana_foundation_sdk.builders.timeseries import Panel as TimeSeries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    BigValueTextMode,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    Panel,
    ValueMap,
    ValueMappingResult,
    VariableRefresh,
)

FILE = Path(__file__).with_name("dashboards") / "twolane.json"

PROMETHEUS = DataSourceRef(type_val="prometheus", uid="prometheus")
#: Height of a panel in the grid, which is 24 wide.
HEIGHT = 8

#: A query, and the legend of its lines.
Line: TypeAlias = tuple[str, str]
AnyPanel = TypeVar("AnyPanel", Stat, StateTimeline, TimeSeries)

MODEL = 'model=~"$model"'
FOREGROUND = f'{MODEL},background="false"'
INTERVAL = "[$__rate_interval]"


def quantile(share: float, metric: str, labels: str, by: str, interval: str = INTERVAL) -> str:
    """The query for a quantile of a histogram."""
    return (
        f"histogram_quantile({share}, sum by ({by}) (rate({metric}_bucket{{{labels}}}{interval})))"
    )


def quantiles(metric: str) -> list[Line]:
    """The queries for the median and the 95th percentile, by lane."""
    return [
        (quantile(share, metric, MODEL, "le, lane"), f"{{{{lane}}}} {name}")
        for share, name in ((0.5, "p50"), (0.95, "p95"))
    ]


def fill(panel: AnyPanel, title: str, description: str, lines: list[Line], width: int) -> AnyPanel:
    """Give a panel its title, description and queries."""
    panel.title(title).description(description).datasource(PROMETHEUS).span(width)
    for number, (query, name) in enumerate(lines):
        target = Dataquery().expr(query).legend_format(name).ref_id(chr(ord("A") + number))
        panel.with_target(target.datasource(PROMETHEUS))
    return panel


def stat(title: str, description: str, unit: str, *lines: Line, width: int = 4) -> Stat:
    """A panel with the current number, and its history behind it."""
    panel = fill(Stat(), title, description, list(lines), width).height(4).unit(unit).no_value("-")
    panel.graph_mode(BigValueGraphMode.AREA).text_mode(BigValueTextMode.VALUE_AND_NAME)
    return panel.reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))


def chart(
    title: str, description: str, unit: str, *lines: Line, width: int = 8, stacked: bool = False
) -> TimeSeries:
    """A panel with lines over time, from zero."""
    panel = (
        fill(TimeSeries(), title, description, list(lines), width).height(HEIGHT).unit(unit).min(0)
    )
    panel.show_points(VisibilityMode.NEVER).fill_opacity(60 if stacked else 8).line_width(1)
    if stacked:
        panel.stacking(StackingConfig().mode(StackingMode.NORMAL).group("A"))
    return panel.legend(
        Legend()
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
    )


def states(title: str, description: str, yes: str, *lines: Line, width: int = 8) -> StateTimeline:
    """A panel with a bar per line, coloured while its value is 1."""
    panel = fill(StateTimeline(), title, description, list(lines), width).height(HEIGHT)
    values = {
        "0": ValueMappingResult(text=" ", color="transparent"),
        "1": ValueMappingResult(text=yes, color="green"),
    }
    return panel.mappings([ValueMap(options=values)]).show_value(VisibilityMode.NEVER)


def rows() -> dict[str, list[Builder[Panel]]]:
    """Table: the panels by row, from what users notice to what it cost."""
    # fmt: off
    return {
        "Now": [
            stat(
                "Demand", "Foreground requests, running or waiting.", "short",
                (f"sum(twolane_demand{{{MODEL}}})", "requests"),
            ),
            stat(
                "Waiting", "Requests that wait for a slot or for the GPU.", "short",
                (f"sum(twolane_num_requests_waiting{{{MODEL}}})", "waiting"),
            ),
            stat(
                "TTFT", "Median time to first token over five minutes.", "s",
                (quantile(0.5, "twolane_time_to_first_token_seconds", MODEL, "le", "[5m]"), "p50"),
            ),
            stat(
                "Throughput", "Output tokens per second, background requests included.", "short",
                (f"sum(rate(twolane_generation_tokens_total{{{MODEL}}}[1m]))", "tok/s"),
            ),
            stat(
                "Power", "Power draw of the cards, or the watts of the settings.", "watt",
                ("twolane_power_watts", "W"),
            ),
            stat(
                "Cost of a million tokens",
                "Electricity per million output tokens since the start, idle time included.",
                "short",
                ('twolane_cost_per_million_tokens{lane="all",of="electricity"}', "{{currency}}"),
            ),
        ],
        "What users notice": [
            chart(
                "Time to first token", "TTFT of streams, by the lane that answered.", "s",
                *quantiles("twolane_time_to_first_token_seconds"),
            ),
            chart(
                "Time per output token", "TPOT of streams: (last - first) / (tokens - 1).", "s",
                *quantiles("twolane_time_per_output_token_seconds"),
            ),
            chart(
                "E2E latency", "From the request to the end of its answer.", "s",
                *quantiles("twolane_e2e_request_latency_seconds"),
            ),
            chart(
                "Concurrency",
                "Requests that have a slot, by lane, and requests that wait for one.", "short",
                (f"sum by (lane) (twolane_num_requests_running{{{MODEL}}})", "{{lane}}"),
                (f"sum(twolane_num_requests_waiting{{{MODEL}}})", "waiting"),
                stacked=True,
            ),
            chart(
                "Throughput", "Output tokens per second, by lane.", "short",
                (f"sum by (lane) (rate(twolane_generation_tokens_total{{{MODEL}}}{INTERVAL}))",
                 "{{lane}}"),
                stacked=True,
            ),
            chart(
                "Outcomes",
                "Foreground requests per minute; cancelled: the client hung up.", "short",
                (f"60 * sum by (outcome) (rate(twolane_requests_total{{{FOREGROUND}}}{INTERVAL}))",
                 "{{outcome}}"),
                stacked=True,
            ),
        ],
        "Decisions and their reasons": [
            states(
                "Chosen lane and GPU holder",
                "The lane that the policy chooses for a model, and the engine that holds the GPU.",
                "chosen",
                (f"twolane_lane_chosen{{{MODEL}}}", "{{model}}: {{lane}}"),
                ('twolane_gpu_holder{engine!="none"}', "GPU: {{engine}}"),
            ),
            chart(
                "Regret and switch cost",
                "Request-seconds lost by staying, and the cost at which the policy moves.",
                "short",
                (f"twolane_regret_request_seconds{{{MODEL}}}", "{{model}}: regret"),
                (f"twolane_move_price_request_seconds{{{MODEL}}}", "{{model}}: switch cost"),
            ),
            chart(
                "Reasons", "Requests per minute, by lane and reason.", "short",
                (f"60 * sum by (lane, reason) (rate(twolane_requests_total{{{MODEL}}}{INTERVAL}))",
                 "{{lane}}: {{reason}}"),
                stacked=True,
            ),
            chart(
                "Hand-overs",
                "Seconds of hand-overs in five minutes, and the waiting that they caused.",
                "s",
                ("sum by (source,target,outcome) (increase(twolane_gpu_handover_seconds_sum[5m]))",
                 "{{source}} to {{target}}, {{outcome}}"),
                ("sum(increase(twolane_gpu_handover_waited_request_seconds_total[5m]))",
                 "request-seconds waited"),
                width=12,
            ),
            chart(
                "Queue time",
                "From a request to its slot; background: titles, tags and the like.", "s",
                (quantile(0.95, "twolane_request_queue_time_seconds", MODEL, "le, background"),
                 "p95, background {{background}}"),
                width=12,
            ),
        ],
        "Engines and cards": [
            states(
                "Replicas", "Replicas that accept requests.", "up",
                (f"twolane_replica_up{{{MODEL}}}", "{{model}}: {{lane}} {{replica}}"),
            ),
            chart(
                "Slots", "Slots in use, and slots that can be used now.", "short",
                (f"sum by (lane) (twolane_num_requests_running{{{MODEL}}})", "{{lane}} in use"),
                (f"sum by (lane) (twolane_slots_usable{{{MODEL}}})", "{{lane}} usable"),
            ),
            chart(
                "Model and KV cache",
                "Share of Ollama's model in GPU memory; share of vLLM's KV cache in use.",
                "percentunit",
                (f"twolane_engine_model_on_gpu_ratio{{{MODEL}}}", "{{model}} on {{lane}}"),
                ("vllm:kv_cache_usage_perc", "vLLM's KV cache"),
            ),
            chart(
                "GPU memory", "Memory in use and in total, by card.", "bytes",
                ("twolane_gpu_memory_used_bytes", "card {{gpu}}"),
                ("twolane_gpu_memory_total_bytes", "card {{gpu}}, total"),
            ),
            chart(
                "Power by card", "Power draw and power limit of each card.", "watt",
                ("twolane_gpu_power_watts", "card {{gpu}}"),
                ("twolane_gpu_power_limit_watts", "card {{gpu}}, limit"),
            ),
            chart(
                "Temperature and utilization",
                "Degrees Celsius, and percent of the time, by card.", "short",
                ("twolane_gpu_temperature_celsius", "card {{gpu}}, °C"),
                ("100 * twolane_gpu_utilization_ratio", "card {{gpu}}, %"),
            ),
        ],
        "Energy and cost": [
            chart(
                "Power by lane",
                "Mean watts, by the lane that worked; idle: no request ran.", "watt",
                (f"sum by (lane) (rate(twolane_energy_joules_total{INTERVAL}))", "{{lane}}"),
                stacked=True,
            ),
            chart(
                "Tokens per joule",
                "Output tokens per joule since the gateway started, idle energy included.", "short",
                ("twolane_tokens_per_joule", "{{lane}}"),
            ),
            chart(
                "Cost of a million tokens",
                "By lane: its electricity, a rented machine, an external API.",
                "short",
                ("twolane_cost_per_million_tokens", "{{lane}}: {{of}}, {{currency}}"),
            ),
        ],
    }
    # fmt: on


def dashboard() -> Dashboard:
    """The whole dashboard."""
    whole = (
        Dashboard("twolane")
        .uid("twolane")
        .description("Ollama and vLLM behind one gateway: what waits, which lane answers, and why.")
        .tags(["twolane", "llm"])
        .time("now-1h", "now")
        .refresh("10s")
        .timezone("browser")
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(
            QueryVariable("model")
            .label("Model")
            .query("label_values(twolane_model_info, model)")
            .datasource(PROMETHEUS)
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    )
    for title, panels in rows().items():
        whole.with_row(Row(title))
        for panel in panels:
            whole.with_panel(panel)
    return whole


def text() -> str:
    """The text of the file."""
    return JSONEncoder(sort_keys=True, indent=2).encode(dashboard().build()) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
