"""The sections of a report that show why its figures can be trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loadtests.analysis.rows import Row
from loadtests.measure.experiment import Experiment
from loadtests.proof import agreement, selfcheck
from loadtests.proof.agreement import Agreement
from loadtests.report.findings import Findings
from loadtests.report.page import Block, Bullets, Code, Grid, Text
from loadtests.report.wording import _day, _each, spread


def _achieved(table: Sequence[Row]) -> Iterator[Block]:
    yield Grid(
        ("", "at once, achieved", "busiest process, of a core", "late p50, ms", "late p99, ms"),
        [
            *_each(
                table,
                lambda row: (
                    spread(row.at_once),
                    f"{max(one.cpu for one in row.repetitions):.2f}",
                    f"{1000 * max(one.lag_p50_s for one in row.repetitions):.1f}",
                    f"{1000 * max(one.lag_p99_s for one in row.repetitions):.1f}",
                ),
            )
        ],
    )
    yield Text("Of the generator the worst repetition is shown.", "small")


def _machine(known: Experiment) -> Iterator[Block]:
    machine, plan = known.machine, known.plan
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    told = {
        "processor": f"{machine.cpu}, {machine.cores} cores",
        "memory": f"{machine.memory_gib:g} GiB",
        "GPU": "; ".join(machine.gpus) or "none",
        "driver": machine.driver,
        "system": machine.system,
        "Python": machine.python,
        "load by": packages,
        "levels": ", ".join(map(str, plan.levels)),
        "repetitions": str(plan.repetitions),
        "requests of a user": f"{plan.rounds} measured, after {plan.warm_up} to warm up",
        "tokens": f"about {plan.tokens_in} in, at most {plan.tokens_out} out",
        "prompts": plan.prompts,
    }
    yield Grid(("", ""), [(what, how) for what, how in told.items() if how], numbers=False)
    yield Grid(
        ("target", "engine", "version", "model", "weights", "slots", "context"),
        [
            (
                one.label,
                one.engine or "not known",
                one.version or "not known",
                one.model or "not known",
                one.weights or ("as its lanes" if one.before else "not known"),
                str(one.slots or ("as its lanes" if one.before else "not known")),
                str(one.context or ("as its lanes" if one.before else "not known")),
            )
            for one in known.subjects
        ],
        numbers=False,
    )
    commands = [f"# {one.label}\n{one.command}" for one in known.subjects if one.command]
    if known.command:
        commands.insert(0, f"# all of this\n{known.command}")
    if commands:
        yield Code("\n\n".join(commands))


def _selfcheck(found: Findings) -> Iterator[Block]:
    seen = found.selfcheck
    if seen is None:
        return
    passed = "It passed." if seen.passed else f"It did not pass: {seen.why}."
    yield Text(
        f"{seen.level} at once, {seen.requests} requests, {seen.errors} failed, on "
        f"{_day(seen.at)}. {passed} A median may be off by {selfcheck.WITHIN:.0%}."
    )
    yield Grid(
        ("", "truth", "measured", "ratio"),
        [
            (
                one.name,
                selfcheck.written(one.name, one.expected),
                selfcheck.written(one.name, one.measured),
                f"{one.ratio:.4f}",
            )
            for one in seen.quantities
        ],
    )
    yield Text(
        f"The generator used {seen.cpu:.2f} of a core in its busiest process and was late by "
        f"{1000 * seen.lag_p50_s:.1f} ms in the median, {1000 * seen.lag_p99_s:.1f} ms in the 99th "
        f"percentile; the server of known times was late itself by {1000 * seen.engine.p50:.1f} ms "
        f"and {1000 * seen.engine.p99:.1f} ms.",
        "small",
    )


def _agreement(seen: Agreement | None) -> Iterator[Block]:
    table = seen.rows() if seen else []
    if seen is None or not table:
        return
    tools = list(seen.tools)
    versions = ", ".join(f"{tool} {version}".strip() for tool, version in seen.tools.items())
    yield Text(f"Same servers, same workload, {_day(seen.at)}, on {seen.machine.cpu}: {versions}.")
    yield Grid(
        ("", "truth", *tools),
        [
            (
                f"{row.quantity}, {row.server} at {row.level}",
                "-" if row.truth is None else selfcheck.written(row.quantity, row.truth),
                *(_seen_by(row, tool) for tool in tools),
            )
            for row in table
        ],
    )
    disagreements = seen.disagreements()
    if disagreements:
        yield Text("Where ours is off by more than it may be:")
        yield Bullets(disagreements)
    else:
        yield Text(
            f"Ours is within {agreement.OF_TRUTH:.0%} of the truth and {agreement.OF_OTHERS:.0%} "
            "of the others, or, on a real server, within the spread of the runs."
        )
    strays = seen.strays()
    if strays:
        yield Text("Who is too far from the truth to hold ours against:")
        yield Bullets(strays)
    yield Text(
        "guidellm's inter-token latency is what is called TPOT here; its own TPOT has the wait "
        "for the first token in it. bench serve begins TTFT at the first event that has choices, "
        "even an empty one.",
        "small",
    )


def _seen_by(row: agreement.Row, tool: str) -> str:
    """A tool's median, the spread of its runs, and its share of the truth or else of ours."""
    seen = row.by_tool.get(tool)
    if seen is None:
        return "-"
    value = selfcheck.written(row.quantity, seen.value)
    if seen.high > seen.low:
        value += f" ±{(seen.high - seen.low) / 2 / seen.value:.1%}"
    share = row.to_truth(tool)
    if share is None and tool != agreement.OURS:
        share = 1 / row.shares[tool].value
    return value if share is None else f"{value} ({share:.3f})"
