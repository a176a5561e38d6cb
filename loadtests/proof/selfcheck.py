r"""The stopwatch proves itself: the real load generator against an engine of known times.

    python -m loadtests.proof.selfcheck --level 32

A load generator that cannot keep up sees slow servers everywhere. So before a report the
generator measures, at the highest level of the run, an engine whose every token has its
moment (`known`), and what it finds is held to the truth: medians of TTFT, TPOT and E2E, and
output tokens a second. Where they are off, or where the generator or the engine had no time
to spare, there is no report, and it is said why.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from loadtests.analysis import rows
from loadtests.measure import experiment, samples
from loadtests.measure.experiment import RAW, SELFCHECK, ExperimentError, Plan
from loadtests.measure.generator import locust_command
from loadtests.measure.itinerary import Visit
from loadtests.measure.stopwatch import Target
from loadtests.proof import known
from loadtests.proof.known import Lateness, Times

VERSION = 1

#: How far what is measured may be from the truth.
WITHIN = 0.02
#: How late the generator or the engine may be in the median, as a share of the TTFT, and
#: in the 99th percentile, as a share of the gap: more of either shows in the figures.
LATE_P50 = 0.01
LATE_P99 = 1.0

#: Measured requests of each user; with fewer than ten a median is ill-defined.
ROUNDS = 10
WARM_UP = 1
#: What the generator may take beyond the requests themselves, seconds.
SPARE_S = 90.0
#: How much of what it said last is shown when it fails, characters.
TOLD = 600


class SelfCheckError(ExperimentError):
    """There is no self-check to be had; the text says why and what to do."""


class Quantity(msgspec.Struct, frozen=True):
    """What was measured, and what it is in truth; seconds, or tokens a second."""

    name: str
    expected: float
    measured: float

    @property
    def ratio(self) -> float:
        return self.measured / self.expected

    @property
    def is_off(self) -> bool:
        """Whether it is further from the truth than allowed."""
        return abs(self.ratio - 1) > WITHIN


def written(name: str, value: float) -> str:
    """A quantity for people."""
    return f"{value:.1f} tok/s" if name == "output tok/s" else f"{1000 * value:.2f} ms"


class SelfCheck(msgspec.Struct, frozen=True):
    """What the stopwatch was held to, and whether it passed.

    Attributes:
        at: Unix time.
        level: Requests at once.
        times: What the engine kept to.
        processes: Of the load generator.
        asked: How many requests were to be measured.
        quantities: Medians, and tokens a second.
        requests: How many were.
        errors: How many of them went wrong.
        first_error: How the first of those did.
        cpu: CPU seconds a second of the generator's busiest process.
        lag_p50_s: How late the generator was where it wanted to be on time, median.
        lag_p99_s: The same, 99th percentile.
        engine: How late the engine was itself.
        why: Why it did not pass, and what to do; empty if it did.
    """

    version: int
    at: float
    level: int
    times: Times
    processes: int
    asked: int
    quantities: tuple[Quantity, ...] = ()
    requests: int = 0
    errors: int = 0
    first_error: str = ""
    cpu: float = 0.0
    lag_p50_s: float = 0.0
    lag_p99_s: float = 0.0
    engine: Lateness = Lateness()
    why: str = ""

    @property
    def passed(self) -> bool:
        return not self.why

    def save(self, folder: Path) -> None:
        """Write it into the folder of an experiment.

        Raises:
            ExperimentError: It cannot be written.
        """
        experiment.write(folder / SELFCHECK, self)


def load(folder: Path) -> SelfCheck:
    """The self-check of an experiment's folder.

    Raises:
        ExperimentError: There is none, or not one of this version.
    """
    return experiment.read(folder / SELFCHECK, SelfCheck, VERSION, else_do="check again")


def check(level: int, *, python: str = sys.executable, processes: int = 1) -> SelfCheck:
    """Hold the load generator to an engine of known times, at so many requests at once.

    Raises:
        SelfCheckError: The generator did not run.
    """
    times = Times()
    with known.running(times) as engine:
        return against(engine, times, level, python=python, processes=processes)


def against(
    engine: known.Running,
    times: Times,
    level: int,
    *,
    python: str = sys.executable,
    processes: int = 1,
    rounds: int = ROUNDS,
) -> SelfCheck:
    """Hold the generator to what this engine is said to keep to.

    Raises:
        SelfCheckError: The generator did not run.
    """
    at = time.time()
    plan = Plan((level,), 1, rounds, WARM_UP, tokens_out=times.tokens, cooldown_s=0)
    target = Target(known.MODEL, engine.url, known.MODEL)
    within_s = SPARE_S + 5 * times.e2e_s * (rounds + WARM_UP)
    cell, requests = generated(target, plan, within_s, python=python, processes=processes)
    asked = SelfCheck(VERSION, at, level, times, processes, level * rounds)
    return judged(asked, cell, requests, engine.lateness())


def generated(
    target: Target,
    plan: Plan,
    within_s: float,
    *,
    repetition: int = 1,
    python: str = sys.executable,
    processes: int = 1,
) -> tuple[samples.Cell, list[samples.Request]]:
    """What the generator writes down of the last level of a plan.

    Raises:
        SelfCheckError: It did not run, or not to its end.
    """
    visit = Visit(target.label, repetition, plan.levels)
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch, RAW)
        _, *arguments = locust_command(target, plan, visit, raw, processes=processes)
        try:
            locust = subprocess.run(
                [python, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=within_s,
                check=False,
            )
        except subprocess.TimeoutExpired as exc:
            raise SelfCheckError(
                f"the load generator did not end within {within_s:.0f} s: is this machine busy "
                "with something else?"
            ) from exc
        found = samples.by_cell(samples.read(raw)) if raw.exists() else []
    if locust.returncode or not found:
        told = [line for line in locust.stdout.splitlines() if line.startswith("twolane: ")]
        before_its_tables, _, _ = locust.stdout.partition("Type     Name")
        last = "\n".join(told) or before_its_tables[-TOLD:].strip()
        raise SelfCheckError(f"the load generator did not run to its end, and said:\n{last}")
    return found[-1]


def judged(
    asked: SelfCheck, cell: samples.Cell, requests: Sequence[samples.Request], engine: Lateness
) -> SelfCheck:
    """The same with what was measured, and the verdict."""
    measured = [one for one in requests if one.phase == "measured"]
    wrong = [one.error for one in measured if one.error]
    found = medians(cell, requests)
    seen = msgspec.structs.replace(
        asked,
        quantities=tuple(
            Quantity(name, truth, found[name])
            for name, truth in asked.times.truth(asked.level).items()
        ),
        requests=len(measured),
        errors=len(wrong),
        first_error=wrong[0] if wrong else "",
        cpu=cell.cpu,
        lag_p50_s=cell.lag_p50_s,
        lag_p99_s=cell.lag_p99_s,
        engine=engine,
    )
    return msgspec.structs.replace(seen, why="; ".join(complaints(seen)))


def medians(cell: samples.Cell, requests: Sequence[samples.Request]) -> dict[str, float]:
    """What the generator measured, by `known.QUANTITIES`; zero is nothing."""
    good = [one for one in requests if one.phase == "measured" and not one.error]
    ttft, tpot, e2e, rate = known.QUANTITIES
    return {
        ttft: _median(one.ttft_s for one in good),
        tpot: _median(one.tpot_s for one in good),
        e2e: _median(one.e2e_s for one in good),
        rate: rows.tokens_per_s(cell, requests),
    }


def _median(values: Iterable[float | None]) -> float:
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else 0.0


def complaints(seen: SelfCheck) -> list[str]:
    """What keeps it from passing, and what to do; nothing if nothing does."""
    said = []
    if seen.requests < seen.asked:
        said.append(f"only {seen.requests} of {seen.asked} requests were measured")
    if seen.errors:
        said.append(
            f"{seen.errors} of {seen.requests} requests failed, the first with: {seen.first_error}"
        )
    said += [
        f"{one.name} was measured as {written(one.name, one.measured)}, in truth it was "
        f"{written(one.name, one.expected)}: {one.ratio:.3f} of it, and {WITHIN:.0%} is what it "
        "may be off"
        for one in seen.quantities
        if one.is_off
    ]
    engine_late = _late(seen.engine.p50, seen.engine.p99, seen.times)
    saturated = seen.cpu > rows.CPU_MOST or _late(seen.lag_p50_s, seen.lag_p99_s, seen.times)
    if engine_late:
        said.append(
            "the engine of known times was late itself, by "
            f"{_spread(seen.engine.p50, seen.engine.p99)}: something else keeps this machine "
            "busy; end that, and check again"
        )
    if saturated:
        said.append(
            f"the load generator is saturated: {seen.cpu:.2f} of a core in its busiest process, "
            f"late by {_spread(seen.lag_p50_s, seen.lag_p99_s)}; give it more processes "
            f"(--processes {2 * seen.processes}), or measure from another machine"
        )
    if said and not engine_late and not saturated:
        said.append(
            "neither the load generator nor the engine was overloaded: if other load came and "
            "went on this machine, check again; otherwise lower the highest level"
        )
    return said


def _late(p50: float, p99: float, times: Times) -> bool:
    return p50 > LATE_P50 * times.ttft_s or p99 > LATE_P99 * times.gap_s


def _spread(p50: float, p99: float) -> str:
    return f"{1000 * p50:.1f} ms in the median, {1000 * p99:.1f} ms in the 99th percentile"


def show(seen: SelfCheck, console: Console) -> None:
    """Print it."""
    table = Table("", "truth", "measured", "ratio", title=f"{seen.level} at once")
    for one in seen.quantities:
        style = "red" if one.is_off else ""
        both = written(one.name, one.expected), written(one.name, one.measured)
        table.add_row(one.name, *both, f"{one.ratio:.4f}", style=style)
    console.print(table)
    console.print(
        f"{seen.requests} requests, {seen.errors} failed; the generator used "
        f"{seen.cpu:.2f} of a core ({seen.processes} processes, the busiest), and was late by "
        f"{_spread(seen.lag_p50_s, seen.lag_p99_s)}; the engine was late by "
        f"{_spread(seen.engine.p50, seen.engine.p99)}"
    )
    for why in complaints(seen):
        console.print(why, style="red", markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, and print the table; 1 where the stopwatch is not to be trusted."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.proof.selfcheck",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--level", type=int, default=32, help="requests at once (32)")
    parser.add_argument("--processes", type=int, default=1, help="of the generator (1)")
    parser.add_argument("--out", type=Path, help=f"folder to write {SELFCHECK} into")
    args = parser.parse_args(arguments)
    console = Console()
    try:
        seen = check(args.level, processes=args.processes)
        show(seen, console)
        if args.out:
            seen.save(args.out)
    except ExperimentError as exc:
        console.print(str(exc), style="red", markup=False)
        return 1
    return 0 if seen.passed else 1


if __name__ == "__main__":
    sys.exit(main())
