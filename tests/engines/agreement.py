"""Compares three load generators on the same servers: `make agreement`.

Ours, guidellm and vLLM's own `bench serve` send the same workload: prompts and answers of the
same length, at the same concurrency. They measure a server of known times at each level, and
then the real vLLM of the rig several times in turn, since no two runs on it are alike. Prints
the figures of each tool; the exit status is 1 if ours deviate too far from the truth or from
the others. guidellm is installed from PyPI into an environment of its own, `bench serve` is
part of the rig's vLLM; neither uses the network otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from loadtests.measure.experiment import ExperimentError, Plan, this_machine
from loadtests.measure.stopwatch import Target
from loadtests.proof import known, known_answers, selfcheck
from loadtests.proof.agreement import (
    AGREEMENT_VERSION,
    KNOWN,
    OURS,
    Agreement,
    AgreementRow,
    Reading,
)
from loadtests.proof.known import QUANTITIES, Times
from tests.engines import rig

GUIDELLM = "guidellm"
GUIDELLM_VERSION = "0.8.1"
GUIDELLM_PYTHON = rig.ENGINES / "guidellm" / "bin" / "python"
BENCH = "vllm bench serve"
VLLM = "vLLM"

#: The `vllm bench` command needs a package named vllm, and on a CPU it has another name.
START_BENCH = (
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\n"
    "add_cli_args(parser)\n"
    "main(parser.parse_args())\n"
)
#: No downloads; the tokenizer is the rig's.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
#: The same request as ours and `bench serve`'s. By default guidellm requests usage in every
#: chunk, which took 5 % of vLLM's time here, and uses its own sampling.
BODY = {
    "temperature": 0,
    "stream_options": {"include_usage": True, "continuous_usage_stats": False},
}
#: Timeout of our own run, seconds.
WITHIN_S = 900.0


@dataclass(frozen=True)
class Run:
    """One run against one server at one level."""

    server: str
    url: str
    model: str
    level: int
    repetition: int
    plan: Plan
    prompt_tokens: int

    @property
    def measured(self) -> int:
        """The number of measured requests."""
        return self.level * self.plan.rounds

    def reading(self, tool: str, medians: Sequence[float], **more: Any) -> Reading:
        """The reading of a tool; `medians` in the order of `QUANTITIES`."""
        by_name = dict(zip(QUANTITIES, medians, strict=True))
        return Reading(tool, self.server, self.level, self.repetition, by_name, **more)


Tool: TypeAlias = Callable[[Run], Reading]
Say: TypeAlias = Callable[[str], None]


# --- the tools ----------------------------------------------------------------------------


def ours(run: Run) -> Reading:
    """Run the load generator of this project."""
    plan = msgspec.structs.replace(run.plan, levels=(run.level,), cooldown_s=0)
    cell, requests = selfcheck.generate(
        Target(run.server, run.url, run.model), plan, WITHIN_S, repetition=run.repetition
    )
    seen = selfcheck.medians(cell, requests)
    good = [one for one in requests if one.phase == "measured" and not one.error]
    return run.reading(
        OURS,
        [seen[name] for name in QUANTITIES],
        requests=len(good),
        failed=sum(1 for one in requests if one.phase == "measured" and one.error),
        tokens_in=_mean([one.tokens_in or 0 for one in good]),
        tokens_out=_mean([one.tokens_out or 0 for one in good]),
    )


def guidellm(run: Run) -> Reading:
    """Run guidellm, the load generator of the vLLM project."""
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch, "guidellm.json")
        options: dict[str, dict[str, object]] = {
            "backend": {
                "kind": "openai_http",
                "target": run.url,
                "model": run.model,
                "extras": {"body": BODY},
            },
            "profile": {
                "kind": "concurrent",
                "streams": run.level,
                "warmup": {"value": run.level * run.plan.warm_up, "mode": "requests"},
            },
            "constraint": {
                "kind": "max_requests",
                "count": run.measured + run.level * run.plan.warm_up,
            },
            "tokenizer": {"kind": "huggingface_auto", "model": str(rig.WEIGHTS)},
            "data": {
                "kind": "synthetic_text",
                "prompt_tokens": run.prompt_tokens,
                "output_tokens": run.plan.tokens_out,
            },
            "seed": {"kind": "static", "value": run.repetition},
            "output": {"kind": "json", "path": str(written)},
        }
        flags = [part for name, it in options.items() for part in (f"--{name}", json.dumps(it))]
        rig.do(
            [str(GUIDELLM_PYTHON), "-m", "guidellm", "run", "--disable-console", *flags],
            rig.environment_without("GUIDELLM_") | OFFLINE,
        )
        return read_guidellm(run, written.read_bytes())


def read_guidellm(run: Run, written: bytes) -> Reading:
    """The reading in guidellm's JSON file."""
    metrics = json.loads(written)["benchmarks"][0]["metrics"]

    def seen(name: str, which: str) -> float:
        return float(metrics[name]["successful"][which])

    return run.reading(
        GUIDELLM,
        [
            seen("time_to_first_token_ms", "median") / 1000,
            seen("inter_token_latency_ms", "median") / 1000,
            seen("request_latency", "median"),
            seen("output_tokens_per_second", "mean"),
        ],
        requests=metrics["request_totals"]["successful"],
        failed=metrics["request_totals"]["errored"],
        tokens_in=seen("prompt_token_count", "mean"),
        tokens_out=seen("output_token_count", "mean"),
    )


def bench(run: Run) -> Reading:
    """Run vLLM's own `bench serve`."""
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch, "bench.json")
        command = [str(rig.VLLM_PYTHON), "-c", START_BENCH, "--disable-tqdm", "--ignore-eos"]
        command += ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]
        command += ["--base-url", run.url, "--model", run.model, "--tokenizer", str(rig.WEIGHTS)]
        command += ["--dataset-name", "random", "--random-input-len", str(run.prompt_tokens)]
        command += ["--random-output-len", str(run.plan.tokens_out), "--temperature", "0"]
        command += ["--max-concurrency", str(run.level), "--num-prompts", str(run.measured)]
        command += ["--num-warmups", str(run.level * run.plan.warm_up)]
        command += ["--seed", str(run.repetition), "--percentile-metrics", "ttft,tpot,e2el"]
        command += ["--save-result", "--result-filename", str(written)]
        rig.do(command, rig.vllm_environment() | OFFLINE)
        return read_bench(run, written.read_bytes())


def read_bench(run: Run, written: bytes) -> Reading:
    """The reading in the JSON file of `bench serve`."""
    result = json.loads(written)
    medians = [result[f"median_{name}_ms"] / 1000 for name in ("ttft", "tpot", "e2el")]
    return run.reading(
        BENCH,
        [*medians, result["output_throughput"]],
        requests=result["completed"],
        failed=result["failed"],
        tokens_in=result["total_input_tokens"] / max(1, result["completed"]),
        tokens_out=result["total_output_tokens"] / max(1, result["completed"]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


TOOLS: dict[str, Tool] = {OURS: ours, GUIDELLM: guidellm, BENCH: bench}


# --- the runs -----------------------------------------------------------------------------


def on_known(plan: Plan, times: Times, say: Say) -> Iterator[Reading]:
    """Measure each level by each tool, each run with a server of known times of its own."""
    for level in plan.levels:
        for name, tool in TOOLS.items():
            say(f"{level} concurrent on the server of known times, by {name}")
            with known.known_server(times) as engine:
                run = Run(
                    KNOWN, engine.url, known_answers.KNOWN_MODEL, level, 1, plan, plan.tokens_in
                )
                seen = tool(run)
                yield msgspec.structs.replace(seen, late_s=engine.lateness().p50)


def on_vllm(plan: Plan, level: int, say: Say) -> Iterator[Reading]:
    """Measure one level by each tool in turn, in every repetition, on one server.

    The server has one half of the cores and the tools the other. On shared cores a tool slows
    the server down, and that is measured: guidellm's TPOT was 28 ms on two cores, that of
    `bench serve` on the same server 23 ms.
    """
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    say("vLLM starts, which takes a minute")
    with ExitStack() as stack:
        with _only(cores[:half]):
            engine = stack.enter_context(rig.vllm())
        stack.enter_context(_only(cores[half:] or cores))
        run = Run(VLLM, engine.url, engine.model, level, plan.repetitions + 1, plan, plan.tokens_in)
        # The first run warms the server up. The other tools' prompts have no question; by the
        # server's own count they are made as long as ours.
        tokens_in = ours(run).tokens_in
        run = replace(run, prompt_tokens=round(plan.tokens_in + tokens_in - bench(run).tokens_in))
        for repetition in range(1, plan.repetitions + 1):
            tools = list(TOOLS.items())
            for name, tool in tools if repetition % 2 else reversed(tools):
                say(f"{level} concurrent on vLLM, by {name}, {repetition} of {plan.repetitions}")
                yield tool(replace(run, repetition=repetition))


@contextmanager
def _only(cores: Sequence[int]) -> Iterator[None]:
    """Processes started in this context run on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def install() -> None:
    """Install guidellm if it is missing; raises `RigError`, also if vLLM is missing."""
    if not (rig.VLLM_PYTHON.exists() and rig.WEIGHTS.exists()):
        raise rig.RigError(f"vLLM is not installed: {rig.GET_ENGINES}")
    rig.ENGINES.mkdir(exist_ok=True)
    rig.Part(
        "guidellm",
        f"guidellm {GUIDELLM_VERSION}, torch {rig.TORCH}",
        _build_guidellm,
        GUIDELLM_PYTHON,
    ).install()


def _build_guidellm() -> None:
    """Install guidellm with vLLM's version of torch, which is in the cache already."""
    overrides = rig.ENGINES / "guidellm-overrides.txt"
    overrides.write_text(f"torch=={rig.TORCH}\n")
    home = GUIDELLM_PYTHON.parents[1]
    rig.do([*rig.uv(), "venv", "--quiet", "--clear", "--python", sys.executable, str(home)])
    command = [*rig.uv(), "pip", "install", "--quiet", "--compile-bytecode"]
    command += ["--python", str(GUIDELLM_PYTHON), "--overrides", str(overrides)]
    rig.do([*command, f"guidellm=={GUIDELLM_VERSION}"])


# --- the command --------------------------------------------------------------------------


def show(found: Agreement, console: Console) -> None:
    """Print every tool's median over the repetitions, and the ratio of ours to it."""
    others = [tool for tool in found.tools if tool != OURS]
    columns = ["concurrent", "", "truth", OURS, "of truth"]
    columns += [column for tool in others for column in (tool, "ours of it")]
    for server, rows in groupby(found.rows(), lambda row: row.server):
        table = Table(*columns, title=server, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for row in rows:
            of_truth = row.share_of_truth(OURS)
            cells = ["", _figure(row, OURS), ""]
            if row.truth is not None and of_truth is not None:
                cells = [_number(row, row.truth), _figure(row, OURS), f"{of_truth:.3f}"]
            for tool in others:
                shared = tool in row.shares
                cells += [_figure(row, tool), _share(row, tool)] if shared else ["-", ""]
            first = row.quantity == QUANTITIES[0]
            table.add_row(str(row.level) if first else "", row.quantity, *cells)
        console.print(table)
    console.print("Milliseconds, and tokens per second.")
    for run in found.readings:
        if run.failed or run.tokens_out < found.tokens_out:
            console.print(
                f"{run.tool} on {run.server}, {run.level} concurrent: {run.failed} failed, "
                f"{run.tokens_out:.1f} tokens per answer"
            )


def _figure(row: AgreementRow, tool: str) -> str:
    """A tool's median, and the spread of its runs."""
    runs = row.by_tool[tool]
    spread = f" ±{(runs.high - runs.low) / 2 / runs.value:.1%}" if runs.high > runs.low else ""
    return _number(row, runs.value) + spread


def _share(row: AgreementRow, tool: str) -> str:
    """Our figure as a share of a tool's, and the range of that over the repetitions."""
    share = row.shares[tool]
    text = f"{share.value:.3f}"
    return text if share.low == share.high else f"{text} {share.low:.2f}-{share.high:.2f}"


def _number(row: AgreementRow, value: float) -> str:
    return f"{value:.1f}" if row.quantity == QUANTITIES[-1] else f"{1000 * value:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the tools; the exit status, 1 if our figures deviate."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left running
    parser = argparse.ArgumentParser(
        prog="python -m tests.engines.agreement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--levels", type=levels_of, default=(1, 4, 8, 16, 32), metavar="N,N,…")
    parser.add_argument("--vllm-level", type=int, default=8, help="concurrency on vLLM; 0: not (8)")
    parser.add_argument("--repetitions", type=int, default=5, help="repetitions on vLLM (5)")
    parser.add_argument("--rounds", type=int, default=10, help="requests per user (10)")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="folder for agreement.json")
    args = parser.parse_args(arguments)
    console = Console()
    plan = Plan(args.levels, args.repetitions, args.rounds)
    times = Times(tokens=plan.tokens_out)
    found = Agreement(
        AGREEMENT_VERSION,
        time.time(),
        this_machine({}),
        times,
        plan.rounds,
        plan.tokens_in,
        plan.tokens_out,
        {OURS: "", GUIDELLM: GUIDELLM_VERSION, BENCH: rig.VLLM_CPU},
    )
    readings: list[Reading] = []
    failure = ""
    try:
        install()
        readings.extend(on_known(plan, times, console.print))
        if args.vllm_level:
            readings.extend(on_vllm(plan, args.vllm_level, console.print))
    except (rig.RigError, ExperimentError) as exc:
        failure = str(exc)  # earlier readings are shown all the same
    found = msgspec.structs.replace(found, readings=tuple(readings))
    show(found, console)
    if args.json:
        found.save(args.json)
    for line in found.outliers():
        console.print(line, style="yellow", markup=False)
    off = [*found.disagreements(), *([failure] if failure else [])]
    for line in off:
        console.print(line, style="red", markup=False)
    return 1 if off else 0


def levels_of(text: str) -> tuple[int, ...]:
    """The numbers of a text like `1,8,32`."""
    try:
        levels = tuple(int(part) for part in text.split(","))
    except ValueError:
        levels = ()
    if not levels or min(levels) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers from 1, as 1,8,32")
    return levels


if __name__ == "__main__":
    sys.exit(main())
