"""What was measured, on what, and how: the half of a report that no stopwatch tells.

An experiment lives in a folder of its own: `experiment.json` (this), `raw.jsonl` (every
request, see `samples`), `selfcheck.json` (what the stopwatch was held to), and the report
that is made of them and can be made again.
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
    """A folder holds no experiment, or another one; the text says what to do."""


class _Versioned(msgspec.Struct):
    version: int


def write(path: Path, what: msgspec.Struct) -> None:
    """Write a file of an experiment, whole or not at all; its folder is made if need be.

    Raises:
        ExperimentError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".new")
        whole.write_bytes(msgspec.json.format(msgspec.json.encode(what), indent=1))
        whole.replace(path)
    except OSError as exc:
        raise ExperimentError(f"{path} cannot be written: {exc.strerror}") from exc


def read(path: Path, kind: type[_File], version: int, *, else_do: str) -> _File:
    """What `write` wrote.

    Args:
        path: The file.
        kind: What is in it; has a field `version`.
        version: The one this program reads.
        else_do: What to do where it is of another version.

    Raises:
        ExperimentError: It is not there, of another version, or something else.
    """
    try:
        said = path.read_bytes()
        found = msgspec.json.decode(said, type=_Versioned).version
        if found != version:
            raise ExperimentError(
                f"{path} has version {found}, this program reads {version}: {else_do}"
            )
        return msgspec.json.decode(said, type=kind)
    except OSError as exc:
        raise ExperimentError(
            f"{path} cannot be read ({exc.strerror}): is {path.parent} the folder of an experiment?"
        ) from exc
    except msgspec.DecodeError as exc:
        raise ExperimentError(f"{path} is no {path.stem}: {exc}") from exc


class Machine(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where it ran.

    Attributes:
        gpus: Name, memory and power limit of each, as the driver tells them.
        packages: Versions of what made the load.
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
    """One target, and what has to be known of it to call a comparison fair.

    Attributes:
        label: As in the raw file.
        engine: `ollama`, `vllm`, `llamacpp` or `gateway`; empty where nobody knows.
        version: The engine's own.
        weights: Their precision.
        slots: Requests it answers at once; None where it was not told.
        context: Tokens of context of each request.
        command: Its command line, where we started it.
        before: For a gateway: labels of the targets behind it.
        digest: What its name of the model stands for: a checksum, a repository, a file.
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
    """How it is measured.

    Attributes:
        levels: Requests at once.
        repetitions: Of the whole matrix, in alternating order.
        rounds: Measured requests of each user in a cell, after `warm_up` of them.
        at_least: Measured requests of a cell; where users are few each has more rounds.
        tokens_in: Of a prompt, about.
        tokens_out: Most of an answer.
        cell_s: Longest a cell may take, seconds.
        cooldown_s: Pause before a target is asked, seconds.
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
    """What a request must keep to count as good, seconds; None: any will do."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None


class Prices(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was said of prices; None: nothing.

    Attributes:
        currency: Of all of them.
        per_kwh: Of electricity.
        rent_per_hour: Of a rented machine like this one.
        api_per_million: Of a million output tokens from somebody's API.
        watts: Of the whole machine, in place of what its cards draw.
    """

    currency: str = "EUR"
    per_kwh: float | None = None
    rent_per_hour: float | None = None
    api_per_million: float | None = None
    watts: float | None = None


class Experiment(msgspec.Struct, frozen=True, omit_defaults=True):
    """All of it; `at` is Unix time, `command` how it was asked for, keys left out."""

    version: int
    at: float
    machine: Machine
    plan: Plan
    subjects: tuple[Subject, ...]
    limits: Limits = Limits()
    command: str = ""
    cost: Prices = Prices()

    def save(self, folder: Path) -> None:
        """Write it into its folder, which is made if it is not there.

        Raises:
            ExperimentError: It cannot be written.
        """
        write(folder / EXPERIMENT, self)


def load(folder: Path) -> Experiment:
    """The experiment of a folder.

    Raises:
        ExperimentError: There is none, or not one of this version.
    """
    return read(
        folder / EXPERIMENT, Experiment, EXPERIMENT_VERSION,
        else_do="use the one that wrote it, or measure again",
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
    """Names and driver, as nvidia-smi tells them; nothing where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return (), ""
    asked = "--query-gpu=name,memory.total,power.limit,driver_version"
    told = subprocess.run(
        [program, asked, "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    rows = [[cell.strip() for cell in line.split(",")] for line in told.stdout.splitlines()]
    cards = tuple(", ".join(row[:3]) for row in rows if len(row) == 4)
    return cards, rows[0][3] if cards else ""
