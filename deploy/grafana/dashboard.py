"""The dashboard, in Grafana's own types: writes dashboards/twolane.json.

    .venv/bin/python deploy/grafana/dashboard.py

Change it here and run it; tests hold the file to it, and every query to a real Prometheus.
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
HEIGHT = 8  # of a panel in the grid, which is 24 wide

#: A query, and what its lines are called.
Line: TypeAlias = tuple[str, str]
AnyPanel = TypeVar("AnyPanel", Stat, StateTimeline, TimeSeries)

MODEL = 'model=~"$model"'
PEOPLE = f'{MODEL},background="false"'
OVER = "[$__rate_interval]"


def quantile(share: float, metric: str, of: str, by: str, over: str = OVER) -> str:
    """A query for it, of a histogram."""
    return f"histogram_quantile({share}, sum by ({by}) (rate({metric}_bucket{{{of}}}{over})))"


def quantiles(metric: str) -> list[Line]:
    """The median and the 95th percentile, by lane."""
    return [
        (quantile(share, metric, MODEL, "le, lane"), f"{{{{lane}}}} {name}")
        for share, name in ((0.5, "p50"), (0.95, "p95"))
    ]


def filled(panel: AnyPanel, title: str, about: str, lines: list[Line], width: int) -> AnyPanel:
    """What every panel has."""
    panel.title(title).description(about).datasource(PROMETHEUS).span(width)
    for number, (query, name) in enumerate(lines):
        asked = Dataquery().expr(query).legend_format(name).ref_id(chr(ord("A") + number))
        panel.with_target(asked.datasource(PROMETHEUS))
    return panel


def stat(title: str, about: str, unit: str, *lines: Line, width: int = 4) -> Stat:
    """A number as it is now, with its way there behind it."""
    panel = filled(Stat(), title, about, list(lines), width).height(4).unit(unit).no_value("-")
    panel.graph_mode(BigValueGraphMode.AREA).text_mode(BigValueTextMode.VALUE_AND_NAME)
    return panel.reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))


def chart(
    title: str, about: str, unit: str, *lines: Line, width: int = 8, stacked: bool = False
) -> TimeSeries:
    """Lines over time, from zero."""
    panel = filled(TimeSeries(), title, about, list(lines), width).height(HEIGHT).unit(unit).min(0)
    panel.show_points(VisibilityMode.NEVER).fill_opacity(60 if stacked else 8).line_width(1)
    if stacked:
        panel.stacking(StackingConfig().mode(StackingMode.NORMAL).group("A"))
    return panel.legend(
        Legend()
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
    )


def states(title: str, about: str, yes: str, *lines: Line, width: int = 8) -> StateTimeline:
    """A bar for each line, coloured where it is 1."""
    panel = filled(StateTimeline(), title, about, list(lines), width).height(HEIGHT)
    named = {
        "0": ValueMappingResult(text=" ", color="transparent"),
        "1": ValueMappingResult(text=yes, color="green"),
    }
    return panel.mappings([ValueMap(options=named)]).show_value(VisibilityMode.NEVER)


def rows() -> dict[str, list[Builder[Panel]]]:
    """From what people feel, by what was decided and why, to what it took."""
    # fmt: off
    return {
        "Now": [
            stat(
                "People", "Foreground requests that run or wait.", "short",
                (f"sum(twolane_demand{{{MODEL}}})", "requests"),
            ),
            stat(
                "Of them wait", "For a slot, or for the GPU.", "short",
                (f"sum(twolane_num_requests_waiting{{{MODEL}}})", "waiting"),
            ),
            stat(
                "First token", "Median TTFT of the last five minutes.", "s",
                (quantile(0.5, "twolane_time_to_first_token_seconds", MODEL, "le", "[5m]"), "p50"),
            ),
            stat(
                "Tokens", "Of answers, a second, background's too.", "short",
                (f"sum(rate(twolane_generation_tokens_total{{{MODEL}}}[1m]))", "tok/s"),
            ),
            stat(
                "Power", "Of the cards, or as given in the settings.", "watt",
                ("twolane_power_watts", "W"),
            ),
            stat(
                "A million tokens", "Electricity since the gateway's start, idle time included.",
                "short",
                ('twolane_cost_per_million_tokens{lane="all",of="electricity"}', "{{currency}}"),
            ),
        ],
        "What people feel": [
            chart(
                "Time to first token", "Streams in the foreground, by the lane that answered.", "s",
                *quantiles("twolane_time_to_first_token_seconds"),
            ),
            chart(
                "Time per output token", "(last - first) / (tokens - 1) of streams.", "s",
                *quantiles("twolane_time_per_output_token_seconds"),
            ),
            chart(
                "Whole answers", "From the request to the end of its answer.", "s",
                *quantiles("twolane_e2e_request_latency_seconds"),
            ),
            chart(
                "Requests at work", "That have a slot, by lane; and who waits for one.", "short",
                (f"sum by (lane) (twolane_num_requests_running{{{MODEL}}})", "{{lane}}"),
                (f"sum(twolane_num_requests_waiting{{{MODEL}}})", "waiting"),
                stacked=True,
            ),
            chart(
                "Tokens a second", "Of answers.", "short",
                (f"sum by (lane) (rate(twolane_generation_tokens_total{{{MODEL}}}{OVER}))",
                 "{{lane}}"),
                stacked=True,
            ),
            chart(
                "How requests ended", "Chats, a minute; `cancelled` is who hung up.", "short",
                (f"60 * sum by (outcome) (rate(twolane_requests_total{{{PEOPLE}}}{OVER}))",
                 "{{outcome}}"),
                stacked=True,
            ),
        ],
        "What was decided, and why": [
            states(
                "Lane, and who has the GPU",
                "Where the policy sends a model's requests, and whom the cards belong to.", "here",
                (f"twolane_lane_chosen{{{MODEL}}}", "{{model}}: {{lane}}"),
                ('twolane_gpu_holder{engine!="none"}', "GPU: {{engine}}"),
            ),
            chart(
                "Regret and price",
                "Request-seconds that staying loses, and the price at which it moves.",
                "short",
                (f"twolane_regret_request_seconds{{{MODEL}}}", "{{model}}: regret"),
                (f"twolane_move_price_request_seconds{{{MODEL}}}", "{{model}}: price"),
            ),
            chart(
                "Why a lane answered", "Requests a minute, by reason.", "short",
                (f"60 * sum by (lane, reason) (rate(twolane_requests_total{{{MODEL}}}{OVER}))",
                 "{{lane}}: {{reason}}"),
                stacked=True,
            ),
            chart(
                "Hand-overs", "Of the last five minutes: how long they took, what people waited.",
                "s",
                ("sum by (source,target,outcome) (increase(twolane_gpu_handover_seconds_sum[5m]))",
                 "{{source}} to {{target}}, {{outcome}}"),
                ("sum(increase(twolane_gpu_handover_waited_request_seconds_total[5m]))",
                 "request-seconds waited"),
                width=12,
            ),
            chart(
                "Queue", "From a request to its slot; chats and their titles.", "s",
                (quantile(0.95, "twolane_request_queue_time_seconds", MODEL, "le, background"),
                 "p95, background {{background}}"),
                width=12,
            ),
        ],
        "Engines and cards": [
            states(
                "Servers", "Which may be given work.", "up",
                (f"twolane_replica_up{{{MODEL}}}", "{{model}}: {{lane}} {{replica}}"),
            ),
            chart(
                "Slots", "Taken, and usable now.", "short",
                (f"sum by (lane) (twolane_num_requests_running{{{MODEL}}})", "{{lane}} taken"),
                (f"sum by (lane) (twolane_slots_usable{{{MODEL}}})", "{{lane}} usable"),
            ),
            chart(
                "In GPU memory", "How much of Ollama's model; how full vLLM's KV cache is.",
                "percentunit",
                (f"twolane_engine_model_on_gpu_ratio{{{MODEL}}}", "{{model}} on {{lane}}"),
                ("vllm:kv_cache_usage_perc", "vLLM's KV cache"),
            ),
            chart(
                "GPU memory", "Of each card.", "bytes",
                ("twolane_gpu_memory_used_bytes", "card {{gpu}}"),
                ("twolane_gpu_memory_total_bytes", "card {{gpu}}, all"),
            ),
            chart(
                "Power", "Of each card, and what it may draw.", "watt",
                ("twolane_gpu_power_watts", "card {{gpu}}"),
                ("twolane_gpu_power_limit_watts", "card {{gpu}}, limit"),
            ),
            chart(
                "Temperature and load", "Of each card: °C, and % of the time.", "short",
                ("twolane_gpu_temperature_celsius", "card {{gpu}}, °C"),
                ("100 * twolane_gpu_utilization_ratio", "card {{gpu}}, %"),
            ),
        ],
        "What it took": [
            chart(
                "Energy by who ran", "Watts, on average; `idle` while nobody did.", "watt",
                (f"sum by (lane) (rate(twolane_energy_joules_total{OVER}))", "{{lane}}"),
                stacked=True,
            ),
            chart(
                "Tokens a joule", "Since the gateway's start, idle energy included.", "short",
                ("twolane_tokens_per_joule", "{{lane}}"),
            ),
            chart(
                "A million tokens", "By lane: its electricity, a rented machine, somebody's API.",
                "short",
                ("twolane_cost_per_million_tokens", "{{lane}}: {{of}}, {{currency}}"),
            ),
        ],
    }
    # fmt: on


def dashboard() -> Dashboard:
    """All of it."""
    made = (
        Dashboard("twolane")
        .uid("twolane")
        .description("Ollama and vLLM behind one gateway: who waits, who answers, and why.")
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
        made.with_row(Row(title))
        for panel in panels:
            made.with_panel(panel)
    return made


def text() -> str:
    """The file's."""
    return JSONEncoder(sort_keys=True, indent=2).encode(dashboard().build()) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
