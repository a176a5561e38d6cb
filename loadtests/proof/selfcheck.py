r"""The check of the stopwatch: the real load generator against a server of known times.

    python -m loadtests.proof.selfcheck --level 32

A load generator that cannot keep up measures every server as slow. So before a report it
measures a server that sends every token at a known time (`known`), at the highest level of
the run. Medians of TTFT, TPOT and E2E, and output tokens/s, are compared with the truth. If
they deviate, or the generator or the server was overloaded, no report is written.
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
from loadtests.measure.generator import EXCERPT_CHARS, locust_command
from loadtests.measure.itinerary import Visit
from loadtests.measure.stopwatch import Target
from loadtests.proof import known, known_answers
from loadtests.proof.known import Lateness, Times

SELFCHECK_VERSION = 1

#: How far a measured median may deviate from the truth.
TOLERANCE = 0.02
#: Lag that the generator or the server may have: at the median as a share of the TTFT, and at
#: the 99th percentile as a share of the gap. More of either shows in the figures.
MAX_LATE_P50 = 0.01
MAX_LATE_P99 = 1.0

#: Measured requests per user; with fewer than ten a median is ill-defined.
ROUNDS = 10
WARM_UP = 1
#: Seconds that the generator may take beyond the requests themselves.
SPARE_S = 90.0


class SelfCheckError(ExperimentError):
    """The check could not run; the message says why and what to do."""


class CheckedQuantity(msgspec.Struct, frozen=True):
    """A measured quantity beside its true value; seconds, or tokens per second."""

    name: str
    expected: float
    measured: float

    @property
    def ratio(self) -> float:
        return self.measured / self.expected

    @property
    def is_off(self) -> bool:
        """Whether it deviates from the truth by more than allowed."""
        return abs(self.ratio - 1) > TOLERANCE


def format_quantity(name: str, value: float) -> str:
    """A value with its unit, by the name of its quantity."""
    return f"{value:.1f} tok/s" if name == "output tok/s" else f"{1000 * value:.2f} ms"


class SelfCheck(msgspec.Struct, frozen=True):
    """A check of the stopwatch, and whether it passed.

    Attributes:
        at: Unix time of its start.
        level: Concurrent requests.
        times: The true times of the server.
        processes: Processes of the load generator.
        asked: Requests that were to be measured.
        quantities: Medians, and tokens per second.
        requests: Requests that were measured.
        errors: Measured requests that failed.
        first_error: The error of the first of them.
        cpu: CPU share of one core of the generator's busiest process.
        lag_p50_s: Scheduling lag of the generator, median.
        lag_p99_s: Scheduling lag of the generator, 99th percentile.
        engine: Lag of the server of known times itself.
        why: The reason why it did not pass, and what to do; empty if it passed.
    """

    version: int
    at: float
    level: int
    times: Times
    processes: int
    asked: int
    quantities: tuple[CheckedQuantity, ...] = ()
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
        """Write the check into the folder of an experiment.

        Raises:
            ExperimentError: The file cannot be written.
        """
        experiment.write(folder / SELFCHECK, self)


def load(folder: Path) -> SelfCheck:
    """The self-check in an experiment's folder.

    Raises:
        ExperimentError: There is none, or it is of another version.
    """
    return experiment.read(folder / SELFCHECK, SelfCheck, SELFCHECK_VERSION, else_do="check again")


def check(level: int, *, python: str = sys.executable, processes: int = 1) -> SelfCheck:
    """Check the load generator against a server of known times with `level` concurrent requests.

    Raises:
        SelfCheckError: The generator did not run.
    """
    times = Times()
    with known.known_server(times) as engine:
        return check_against(engine, times, level, python=python, processes=processes)


def check_against(
    engine: known.KnownServer,
    times: Times,
    level: int,
    *,
    python: str = sys.executable,
    processes: int = 1,
    rounds: int = ROUNDS,
) -> SelfCheck:
    """Check the load generator against a server that claims to send at these times.

    Raises:
        SelfCheckError: The generator did not run.
    """
    at = time.time()
    plan = Plan((level,), 1, rounds, WARM_UP, tokens_out=times.tokens, cooldown_s=0)
    target = Target(known_answers.KNOWN_MODEL, engine.url, known_answers.KNOWN_MODEL)
    within_s = SPARE_S + 5 * times.e2e_s * (rounds + WARM_UP)
    cell, requests = generate(target, plan, within_s, python=python, processes=processes)
    check = SelfCheck(SELFCHECK_VERSION, at, level, times, processes, level * rounds)
    return with_verdict(check, cell, requests, engine.lateness())


def generate(
    target: Target,
    plan: Plan,
    within_s: float,
    *,
    repetition: int = 1,
    python: str = sys.executable,
    processes: int = 1,
) -> tuple[samples.Cell, list[samples.Request]]:
    """The last cell of a plan that the generator measures, with its requests.

    Raises:
        SelfCheckError: The generator did not run, or failed.
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
                f"the load generator did not finish within {within_s:.0f} s: stop other load on "
                "this machine, and check again"
            ) from exc
        found = samples.by_cell(samples.read(raw)) if raw.exists() else []
    if locust.returncode or not found:
        messages = [line for line in locust.stdout.splitlines() if line.startswith("twolane: ")]
        before_tables, _, _ = locust.stdout.partition("Type     Name")
        excerpt = "\n".join(messages) or before_tables[-EXCERPT_CHARS:].strip()
        raise SelfCheckError(f"the load generator failed:\n{excerpt}")
    return found[-1]


def with_verdict(
    check: SelfCheck, cell: samples.Cell, requests: Sequence[samples.Request], engine: Lateness
) -> SelfCheck:
    """The check with its measured figures and its verdict."""
    measured = [one for one in requests if one.phase == "measured"]
    wrong = [one.error for one in measured if one.error]
    found = medians(cell, requests)
    seen = msgspec.structs.replace(
        check,
        quantities=tuple(
            CheckedQuantity(name, truth, found[name])
            for name, truth in check.times.truth(check.level).items()
        ),
        requests=len(measured),
        errors=len(wrong),
        first_error=wrong[0] if wrong else "",
        cpu=cell.cpu,
        lag_p50_s=cell.lag_p50_s,
        lag_p99_s=cell.lag_p99_s,
        engine=engine,
    )
    return msgspec.structs.replace(seen, why="; ".join(failures(seen)))


def medians(cell: samples.Cell, requests: Sequence[samples.Request]) -> dict[str, float]:
    """The measured medians by name, see `known.QUANTITIES`; 0 if there is no value."""
    good = [one for one in requests if one.phase == "measured" and not one.error]
    ttft, tpot, e2e, rate = known.QUANTITIES
    return {
        ttft: _median(one.ttft_s for one in good),
        tpot: _median(one.tpot_s for one in good),
        e2e: _median(one.e2e_s for one in good),
        rate: rows.tokens_per_s(cell, requests),
    }


def _median(values: Iterable[float | None]) -> float:
    known_values = [value for value in values if value is not None]
    return statistics.median(known_values) if known_values else 0.0


def failures(check: SelfCheck) -> list[str]:
    """The reasons why a check does not pass, and what to do; empty if it passes."""
    found = []
    if check.requests < check.asked:
        found.append(f"only {check.requests} of {check.asked} requests were measured")
    if check.errors:
        found.append(
            f"{check.errors} of {check.requests} requests failed, the first with: "
            f"{check.first_error}"
        )
    found += [
        f"{one.name} was measured as {format_quantity(one.name, one.measured)} and is "
        f"{format_quantity(one.name, one.expected)} in truth: the ratio is {one.ratio:.3f}, and "
        f"{TOLERANCE:.0%} of deviation is allowed"
        for one in check.quantities
        if one.is_off
    ]
    engine_late = _late(check.engine.p50, check.engine.p99, check.times)
    saturated = check.cpu > rows.MAX_CPU or _late(check.lag_p50_s, check.lag_p99_s, check.times)
    if engine_late:
        found.append(
            "the server of known times lagged itself, by "
            f"{_lags(check.engine.p50, check.engine.p99)}: other load keeps this machine busy; "
            "stop it and check again"
        )
    if saturated:
        found.append(
            f"the load generator is saturated: its busiest process used {check.cpu:.2f} of a core "
            f"and lagged by {_lags(check.lag_p50_s, check.lag_p99_s)}; give it more processes "
            f"(--processes {2 * check.processes}), or measure from another machine"
        )
    if found and not engine_late and not saturated:
        found.append(
            "neither the load generator nor the server was overloaded: if other load came and "
            "went on this machine, check again; otherwise lower the highest level"
        )
    return found


def _late(p50: float, p99: float, times: Times) -> bool:
    return p50 > MAX_LATE_P50 * times.ttft_s or p99 > MAX_LATE_P99 * times.gap_s


def _lags(p50: float, p99: float) -> str:
    return f"{1000 * p50:.1f} ms (p50) and {1000 * p99:.1f} ms (p99)"


def show(check: SelfCheck, console: Console) -> None:
    """Print a check and the reasons why it did not pass."""
    table = Table("", "truth", "measured", "ratio", title=f"{check.level} concurrent")
    for one in check.quantities:
        style = "red" if one.is_off else ""
        both = format_quantity(one.name, one.expected), format_quantity(one.name, one.measured)
        table.add_row(one.name, *both, f"{one.ratio:.4f}", style=style)
    console.print(table)
    console.print(
        f"{check.requests} requests, {check.errors} failed; the busiest of the generator's "
        f"processes ({check.processes}) used {check.cpu:.2f} of a core and lagged by "
        f"{_lags(check.lag_p50_s, check.lag_p99_s)}; the server lagged by "
        f"{_lags(check.engine.p50, check.engine.p99)}"
    )
    for why in failures(check):
        console.print(why, style="red", markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and print the table; the exit status, 1 if the stopwatch did not pass."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.proof.selfcheck",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--level", type=int, default=32, help="concurrent requests (32)")
    parser.add_argument(
        "--processes", type=int, default=1, help="processes of the load generator (1)"
    )
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
