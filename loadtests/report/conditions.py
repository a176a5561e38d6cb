"""The sections of a report that show why its figures can be trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loadtests.analysis.rows import Row
from loadtests.measure.experiment import Experiment, Machine, Plan, Subject
from loadtests.proof import agreement, selfcheck
from loadtests.proof.agreement import Agreement, AgreementRow
from loadtests.proof.selfcheck import SelfCheck
from loadtests.report.page import Block, Bullets, Code, Grid, Text
from loadtests.report.wording import format_day, format_spread, grid_rows

UNKNOWN = "not known"


def load_generator(table: Sequence[Row]) -> Iterator[Block]:
    """The concurrency achieved, and how busy the generator was."""
    yield Grid(
        (
            "target at concurrency", "concurrency achieved", "generator CPU, cores",
            "generator lag p50, ms", "generator lag p99, ms",
        ),
        [
            *grid_rows(
                table,
                lambda row: (
                    format_spread(row.concurrency),
                    f"{max(one.cpu for one in row.repetitions):.2f}",
                    f"{1000 * max(one.lag_p50_s for one in row.repetitions):.1f}",
                    f"{1000 * max(one.lag_p99_s for one in row.repetitions):.1f}",
                ),
            )
        ],
    )  # fmt: skip
    yield Text(
        "CPU is that of the generator's busiest process; lag is how late a timer of 10 ms fires "
        "in it. The worst repetition is shown.",
        "small",
    )


def setup(experiment: Experiment) -> Iterator[Block]:
    """The machine, the plan, the targets and their command lines."""
    plan = _plan_and_machine(experiment.machine, experiment.plan)
    yield Grid(("", ""), [(name, value) for name, value in plan.items() if value], numbers=False)
    yield Grid(
        ("target", "engine", "version", "model", "weights", "slots", "context"),
        [_subject(subject) for subject in experiment.subjects],
        numbers=False,
    )
    commands = [f"# {one.label}\n{one.command}" for one in experiment.subjects if one.command]
    if experiment.command:
        commands.insert(0, f"# the whole experiment\n{experiment.command}")
    if commands:
        yield Code("\n\n".join(commands))


def _plan_and_machine(machine: Machine, plan: Plan) -> dict[str, str]:
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    return {
        "processor": f"{machine.cpu}, {machine.cores} cores",
        "memory": f"{machine.memory_gib:g} GiB",
        "GPU": "; ".join(machine.gpus) or "none",
        "driver": machine.driver,
        "system": machine.system,
        "Python": machine.python,
        "load generator": packages,
        "concurrent requests": ", ".join(map(str, plan.levels)),
        "repetitions": str(plan.repetitions),
        "requests per user": f"{plan.rounds} measured, after {plan.warm_up} of warm-up",
        "tokens": f"about {plan.tokens_in} in, at most {plan.tokens_out} out",
        "prompts": plan.prompts,
    }


def _subject(subject: Subject) -> tuple[str, ...]:
    unknown = "as its lanes" if subject.before else UNKNOWN
    return (
        subject.label,
        subject.engine or UNKNOWN,
        subject.version or UNKNOWN,
        subject.model or UNKNOWN,
        subject.weights or unknown,
        str(subject.slots or unknown),
        str(subject.context or unknown),
    )


def self_check(check: SelfCheck | None) -> Iterator[Block]:
    """The stopwatch against a server of known times; nothing if it was not checked."""
    if check is None:
        return
    verdict = "It passed." if check.passed else f"It did not pass: {check.why}."
    yield Text(
        f"{check.level} concurrent requests, {check.requests} in total, {check.errors} failed, on "
        f"{format_day(check.at)}. {verdict} A median may deviate by {selfcheck.TOLERANCE:.0%}."
    )
    yield Grid(
        ("", "truth", "measured", "ratio"),
        [
            (
                one.name,
                selfcheck.format_quantity(one.name, one.expected),
                selfcheck.format_quantity(one.name, one.measured),
                f"{one.ratio:.4f}",
            )
            for one in check.quantities
        ],
    )
    yield Text(
        f"The generator's busiest process used {check.cpu:.2f} of a core and lagged by "
        f"{1000 * check.lag_p50_s:.1f} ms (p50) and {1000 * check.lag_p99_s:.1f} ms (p99). The "
        f"server of known times lagged by {1000 * check.engine.p50:.1f} ms (p50) and "
        f"{1000 * check.engine.p99:.1f} ms (p99).",
        "small",
    )


def tool_agreement(compared: Agreement | None) -> Iterator[Block]:
    """The figures of other load generators beside ours; nothing if none were run."""
    table = compared.rows() if compared else []
    if compared is None or not table:
        return
    tools = list(compared.tools)
    versions = ", ".join(f"{tool} {version}".strip() for tool, version in compared.tools.items())
    day = format_day(compared.at)
    yield Text(f"The same servers and workload, {day}, on {compared.machine.cpu}: {versions}.")
    yield Grid(
        ("", "truth", *tools),
        [
            (
                f"{row.quantity}, {row.server} at {row.level}",
                "-" if row.truth is None else selfcheck.format_quantity(row.quantity, row.truth),
                *(_tool_median(row, tool) for tool in tools),
            )
            for row in table
        ],
    )
    disagreements = compared.disagreements()
    if disagreements:
        yield Text("Where our figures deviate by more than they may:")
        yield Bullets(disagreements)
    else:
        yield Text(
            f"Our figures are within {agreement.TRUTH_TOLERANCE:.0%} of the truth and "
            f"{agreement.TOOL_TOLERANCE:.0%} of the other tools' or, on a real server, within the "
            "spread of the runs."
        )
    outliers = compared.outliers()
    if outliers:
        yield Text("Tools that deviate too far from the truth to be a reference for ours:")
        yield Bullets(outliers)
    yield Text(
        "guidellm's inter-token latency is TPOT here; its own TPOT includes the wait for the "
        "first token. vLLM's bench serve starts TTFT at the first event with choices, even an "
        "empty one.",
        "small",
    )


def _tool_median(row: AgreementRow, tool: str) -> str:
    """A tool's median, the spread of its runs, and its share of the truth or else of ours."""
    spread = row.by_tool.get(tool)
    if spread is None:
        return "-"
    value = selfcheck.format_quantity(row.quantity, spread.value)
    if spread.high > spread.low:
        value += f" ±{(spread.high - spread.low) / 2 / spread.value:.1%}"
    share = row.share_of_truth(tool)
    if share is None and tool != agreement.OURS:
        share = 1 / row.shares[tool].value
    return value if share is None else f"{value} ({share:.3f})"
