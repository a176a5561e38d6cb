"""The description of an experiment: targets, plan, SLO, machine and prices.

An experiment has a folder of its own: `experiment.json` (this), `raw.jsonl` (every request,
see `samples`), `selfcheck.json` (the check of the stopwatch), and the report, which can be
written again from them.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import TypeVar

import msgspec

EXPERIMENT_VERSION = 1
EXPERIMENT = "experiment.json"
RAW = "raw.jsonl"
SELFCHECK = "selfcheck.json"


_File = TypeVar("_File", bound=msgspec.Struct)


class ExperimentError(Exception):
    """A folder has no experiment, or another one; the message says what to do."""


class _Versioned(msgspec.Struct):
    version: int


def write(path: Path, what: msgspec.Struct) -> None:
    """Write a file of an experiment, whole or not at all; its folder is created if missing.

    Raises:
        ExperimentError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".new")
        whole.write_bytes(msgspec.json.format(msgspec.json.encode(what), indent=1))
        whole.replace(path)
    except OSError as exc:
        raise ExperimentError(f"{path} cannot be written: {exc.strerror}") from exc


def read(path: Path, kind: type[_File], version: int, *, else_do: str) -> _File:
    """The content of a file that `write` wrote.

    Args:
        path: The file.
        kind: The type of its content, which has a field `version`.
        version: The version that this program reads.
        else_do: What the user should do if it is of another version.

    Raises:
        ExperimentError: The file is missing, of another version, or something else.
    """
    try:
        content = path.read_bytes()
        found = msgspec.json.decode(content, type=_Versioned).version
        if found != version:
            raise ExperimentError(
                f"{path} has version {found}, this program reads {version}: {else_do}"
            )
        return msgspec.json.decode(content, type=kind)
    except OSError as exc:
        raise ExperimentError(
            f"{path} cannot be read ({exc.strerror}): is {path.parent} the folder of an experiment?"
        ) from exc
    except msgspec.DecodeError as exc:
        raise ExperimentError(f"{path} is not a valid {path.stem} file: {exc}") from exc


class Machine(msgspec.Struct, frozen=True, omit_defaults=True):
    """The machine that an experiment ran on.

    Attributes:
        gpus: Name, memory and power limit of each card, by the driver.
        packages: Versions of the load generator's packages.
    """

    cpu: str
    cores: int
    memory_gib: float
    system: str
    python: str
    gpus: tuple[str, ...] = ()
    driver: str = ""
    packages: dict[str, str] = {}


class Subject(msgspec.Struct, frozen=True, omit_defaults=True):
    """One target, and the facts that decide whether a comparison with it is fair.

    Attributes:
        label: Its label in the raw file.
        engine: `ollama`, `vllm`, `llamacpp` or `gateway`; empty if not known.
        version: The engine's version.
        weights: Precision of the weights.
        slots: Requests it processes concurrently; None if not known.
        context: Context length of a request, tokens.
        command: Its command line, if it was started for the experiment.
        before: For a gateway: labels of the targets behind it.
        digest: What the model's name stands for: a checksum, a repository, a file.
    """

    label: str
    url: str
    model: str
    engine: str = ""
    version: str = ""
    weights: str = ""
    slots: int | None = None
    context: int | None = None
    command: str = ""
    before: tuple[str, ...] = ()
    digest: str = ""


class Plan(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the targets are measured.

    Attributes:
        levels: Numbers of concurrent requests.
        repetitions: Runs of the whole matrix, in alternating order.
        rounds: Measured requests per user in a cell.
        warm_up: Requests per user before the measured ones.
        at_least: Measured requests of a cell at least: with few users, each has more rounds.
        tokens_in: Tokens of a prompt, about.
        tokens_out: Most tokens of an answer.
        cell_s: Longest time of a cell, seconds.
        cooldown_s: Pause between two cells, seconds.
        prompts: A file of prompts; empty: generated ones.
    """

    levels: tuple[int, ...] = (1, 4, 8, 16, 32)
    repetitions: int = 3
    rounds: int = 10
    warm_up: int = 1
    tokens_in: int = 80
    tokens_out: int = 64
    cell_s: float = 600.0
    cooldown_s: float = 2.0
    prompts: str = ""
    at_least: int = 7


class Limits(msgspec.Struct, frozen=True, omit_defaults=True):
    """The SLO of a request: its highest TTFT, TPOT and E2E, seconds; None: no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None


class Prices(msgspec.Struct, frozen=True, omit_defaults=True):
    """The configured prices and power; None: not configured.

    Attributes:
        currency: The currency of all prices.
        per_kwh: Price of a kWh of electricity.
        rent_per_hour: Price of an hour of a rented machine like this one.
        api_per_million: Price of a million output tokens of an API.
        watts: Power of the whole machine, instead of the measured power of its cards.
    """

    currency: str = "EUR"
    per_kwh: float | None = None
    rent_per_hour: float | None = None
    api_per_million: float | None = None
    watts: float | None = None


class Experiment(msgspec.Struct, frozen=True, omit_defaults=True):
    """An experiment; `at` is Unix time, `command` its command line without keys."""

    version: int
    at: float
    machine: Machine
    plan: Plan
    subjects: tuple[Subject, ...]
    limits: Limits = Limits()
    command: str = ""
    cost: Prices = Prices()

    def save(self, folder: Path) -> None:
        """Write `experiment.json` into a folder, which is created if missing.

        Raises:
            ExperimentError: The file cannot be written.
        """
        write(folder / EXPERIMENT, self)


def load(folder: Path) -> Experiment:
    """The experiment in a folder.

    Raises:
        ExperimentError: There is none, or it is of another version.
    """
    return read(
        folder / EXPERIMENT, Experiment, EXPERIMENT_VERSION,
        else_do="read it with the program that wrote it, or measure again",
    )  # fmt: skip


def this_machine(packages: dict[str, str]) -> Machine:
    """The machine this runs on."""
    name = platform.processor() or platform.machine()
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    gpus, driver = _gpus()
    return Machine(
        cpu=name,
        cores=os.cpu_count() or 1,
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        gpus=gpus,
        driver=driver,
        packages=packages,
    )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _gpus() -> tuple[tuple[str, ...], str]:
    """The cards and the driver's version, from nvidia-smi; empty without it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return (), ""
    query = "--query-gpu=name,memory.total,power.limit,driver_version"
    answer = subprocess.run(
        [program, query, "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()]
    cards = tuple(", ".join(row[:3]) for row in rows if len(row) == 4)
    return cards, rows[0][3] if cards else ""
