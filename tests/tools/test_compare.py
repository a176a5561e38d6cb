"""`twolane compare`, on servers of known times."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gateway.compare import command
from gateway.gpu.cards import Nvml
from loadtests.measure import samples
from loadtests.proof.known import Times, known_server
from tests.gpu.test_memory import NotSupported, Told, two_4090
from tests.support.command import run_command
from tests.support.servers import unused_url
from tests.support.waiting import wait_until

#: Cards that report their power draw, and nothing else.
OTHER_METERS = {
    name: NotSupported()
    for name in ("EnforcedPowerLimit", "UtilizationRates", "TotalEnergyConsumption")
}
#: Programs of their own. The stopwatch is checked first, which takes a while.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def targets() -> Iterator[list[str]]:
    """`--target` arguments for two servers, of which the second is faster.

    Their times are long beside the lag of a load generator that shares the machine with tests.
    """
    with ExitStack() as stack:
        slow = stack.enter_context(known_server(Times(0.4, 0.01, 16)))
        quick = stack.enter_context(known_server(Times(0.2, 0.005, 16)))
        yield ["--target", f"slow={slow.url}=known", "--target", f"quick={quick.url}=known"]


@pytest.fixture(scope="module")
def folder(targets: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished comparison."""
    out = tmp_path_factory.mktemp("compare") / "out"
    done = run_command(
        "compare", *targets, "--levels", "1,2", "--rounds", 2, "--repetitions", 2,
        "--tokens-out", 16, "--ke", "sk-secret", "--unchecked", "--out", out,
        TWOLANE_COST='{"watts": 500, "per_kwh": 0.3, "currency": "USD"}',
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_a_comparison_measures_everything_and_leaves_a_report(folder: Path) -> None:
    cells = samples.cells(samples.read(folder / "raw.jsonl"))
    report = json.loads((folder / "report.json").read_text())

    assert [(cell.target, cell.level, cell.repetition) for cell in cells] == [
        ("slow", 1, 1), ("slow", 2, 1), ("quick", 1, 1), ("quick", 2, 1),
        ("quick", 1, 2), ("quick", 2, 2), ("slow", 1, 2), ("slow", 2, 2),
    ]  # fmt: skip
    assert {row["target"] for row in report["rows"]} == {"slow", "quick"}
    assert (folder / "report.html").stat().st_size > 1_000_000  # plotly is in it


def test_configured_watts_and_prices_are_in_the_experiment_and_in_the_report(folder: Path) -> None:
    experiment = json.loads((folder / "experiment.json").read_text())
    energy = json.loads((folder / "report.json").read_text())["energy"]

    assert experiment["cost"] == {"currency": "USD", "per_kwh": 0.3, "watts": 500.0}
    assert [row["watts"]["value"] for row in energy] == [500.0] * 4
    for row in energy:
        # Of each of the two repetitions: the less efficient one is the more expensive one.
        tokens_per_joule, electricity = row["tokens_per_joule"], row["electricity"]
        low, high = (1e6 / tokens_per_joule[end] / 3.6e6 * 0.3 for end in ("high", "low"))
        expected = {"value": (low + high) / 2, "low": low, "high": high}
        assert electricity == pytest.approx(expected, rel=1e-3)


async def test_the_power_draw_is_read_where_every_card_reports_it() -> None:
    readable = await command.power_meter(Nvml(library=two_4090(PowerUsage=350_000, **OTHER_METERS)))
    silent = await command.power_meter(
        Nvml(library=two_4090(PowerUsage=NotSupported(), **OTHER_METERS))
    )
    absent = await command.power_meter(Nvml(library=Told()))

    assert readable is not None
    assert await readable() == 700
    assert (silent, absent) == (None, None)


def test_the_key_is_in_no_file(folder: Path) -> None:
    assert not any(b"sk-secret" in path.read_bytes() for path in folder.iterdir())


def test_an_interrupted_run_is_resumed(folder: Path, targets: list[str], tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    lines = (again / "raw.jsonl").read_text().splitlines(keepends=True)
    cut = [n for n, line in enumerate(lines) if '"type":"cell"' in line][-2]
    (again / "raw.jsonl").write_text("".join(lines[: cut + 1]) + '{"type":"req')

    done = run_command("compare", "--resume", again)

    assert done.returncode == 0, done.stdout + done.stderr
    cells = samples.cells(samples.read(again / "raw.jsonl"))
    assert len(cells) == 8
    assert len({(c.target, c.level, c.repetition) for c in cells}) == 8


def test_ctrl_c_keeps_the_results_and_says_how_to_resume(
    folder: Path, targets: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(folder / "selfcheck.json", out)
    program = [sys.executable, "-m", "gateway", "compare", *targets, "--levels", "1,2", "--rounds",
               "2", "--repetitions", "50", "--unchecked", "--out", str(out)]  # fmt: skip
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as run:
        raw = out / "raw.jsonl"
        wait_until(lambda: raw.exists() and '"type":"cell"' in raw.read_text(), 60)
        run.send_signal(signal.SIGINT)
        output, _ = run.communicate(timeout=30)

    assert run.returncode == 130
    assert f"--resume {out}" in " ".join(output.split())
    assert samples.cells(samples.read(raw))[0].outcome == "complete"


def test_an_unreachable_target_is_named_and_the_others_are_measured(
    folder: Path, targets: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(folder / "selfcheck.json", out)

    done = run_command(
        "compare", *targets[:2], "--target", f"dead={unused_url()}=m", "--levels", "1",
        "--rounds", 1, "--repetitions", 1, "--unchecked", "--out", out,
    )  # fmt: skip

    assert done.returncode == 1
    assert "dead" in done.stdout
    assert "is it running" in done.words
    assert [cell.target for cell in samples.cells(samples.read(out / "raw.jsonl"))] == ["slow"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--levels", "0"], "from 1 to 1024"),
        (["--levels", "10000"], "from 1 to 1024"),
        (["--rounds", "0"], "a whole number from 1"),
        (["--target", "x"], "LABEL=URL=MODEL"),
        (["--target", "a=http://a=m", "--target", "a=http://b=m"], "needs its own label"),
        (["--resume", "no-such-folder"], "is no-such-folder the folder of an experiment"),
        (["--config", "no-such-file"], "no-such-file cannot be read"),
    ],
)
def test_a_mistake_is_reported_with_what_to_do(
    arguments: list[str], why: str, tmp_path: Path
) -> None:
    out = [] if "--resume" in arguments else ["--out", tmp_path / "out"]

    done = run_command("compare", *arguments, *out)

    assert done.returncode == 2
    assert why in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_with_an_experiment_is_not_overwritten(folder: Path, targets: list[str]) -> None:
    done = run_command("compare", *targets, "--out", folder)

    assert done.returncode == 2
    assert f"--resume {folder}" in done.stderr
