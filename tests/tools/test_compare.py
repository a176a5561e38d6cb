"""`twolane compare` and `calibrate` as a person runs them, on servers of known times."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, closing, contextmanager
from pathlib import Path

import httpx
import pytest

from gateway import settings
from gateway.compare import command as trial
from gateway.compare import front
from gateway.gpu.memory import Nvml
from gateway.routing import profile
from loadtests.measure import samples
from loadtests.proof.known import Times, known_server
from tests.gpu.test_memory import NotSupported, Told, two_4090
from tests.support.servers import nobody

#: Besides watts: cards that have no other meters.
OTHER_METERS = {
    name: NotSupported()
    for name in ("EnforcedPowerLimit", "UtilizationRates", "TotalEnergyConsumption")
}
#: The stopwatch is checked first, which takes a while.
pytestmark = pytest.mark.timeout(240)


def twolane(
    *arguments: object, within_s: float = 200, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The command, run to its end."""
    return subprocess.run(
        [sys.executable, "-m", "gateway", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
        env={**os.environ, **variables},
    )


@pytest.fixture(scope="module")
def targets() -> Iterator[list[str]]:
    """`--target` of two servers, of which the second is the quicker one."""
    with ExitStack() as stack:
        slow = stack.enter_context(known_server(Times(0.10, 0.01, 16)))
        quick = stack.enter_context(known_server(Times(0.05, 0.005, 16)))
        yield ["--target", f"slow={slow.url}=known", "--target", f"quick={quick.url}=known"]


@pytest.fixture(scope="module")
def folder(targets: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole comparison."""
    out = tmp_path_factory.mktemp("compare") / "out"
    done = twolane(
        "compare", *targets, "--levels", "1,2", "--rounds", 2, "--repetitions", 2,
        "--tokens-out", 16, "--ke", "sk-secret", "--unchecked", "--out", out,
        TWOLANE_COST='{"watts": 500, "per_kwh": 0.3, "currency": "USD"}',
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_a_comparison_measures_everything_and_leaves_a_report(folder: Path) -> None:
    cells = samples.cells(samples.read(folder / "raw.jsonl"))
    said = json.loads((folder / "report.json").read_text())

    assert [(cell.target, cell.level, cell.repetition) for cell in cells] == [
        ("slow", 1, 1), ("slow", 2, 1), ("quick", 1, 1), ("quick", 2, 1),
        ("quick", 1, 2), ("quick", 2, 2), ("slow", 1, 2), ("slow", 2, 2),
    ]  # fmt: skip
    assert {row["target"] for row in said["rows"]} == {"slow", "quick"}
    assert (folder / "report.html").stat().st_size > 1_000_000  # plotly is in it


def test_given_watts_and_prices_are_in_the_experiment_and_in_the_report(folder: Path) -> None:
    known = json.loads((folder / "experiment.json").read_text())
    energy = json.loads((folder / "report.json").read_text())["energy"]

    assert known["cost"] == {"currency": "USD", "per_kwh": 0.3, "watts": 500.0}
    assert [one["watts"]["value"] for one in energy] == [500.0] * 4
    for one in energy:
        assert one["electricity"]["value"] == pytest.approx(
            1e6 / one["tokens_per_joule"]["value"] / 3.6e6 * 0.3, rel=1e-3
        )


async def test_watts_are_read_where_every_card_tells_them() -> None:
    told = await trial.metered(Nvml(library=two_4090(PowerUsage=350_000, **OTHER_METERS)))
    silent = await trial.metered(Nvml(library=two_4090(PowerUsage=NotSupported(), **OTHER_METERS)))
    nobody = await trial.metered(Nvml(library=Told()))

    assert told is not None
    assert await told() == 700
    assert (silent, nobody) == (None, None)


def test_a_key_is_in_none_of_its_files(folder: Path) -> None:
    assert not any(b"sk-secret" in path.read_bytes() for path in folder.iterdir())


def test_a_run_that_was_interrupted_is_gone_on_with(
    folder: Path, targets: list[str], tmp_path: Path
) -> None:
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    lines = (again / "raw.jsonl").read_text().splitlines(keepends=True)
    cut = next(n for n, line in enumerate(lines) if '"type":"cell"' in line and '"slow"' in line)
    (again / "raw.jsonl").write_text("".join(lines[: cut + 1]) + '{"type":"req')

    done = twolane("compare", "--resume", again)

    assert done.returncode == 0, done.stdout + done.stderr
    cells = samples.cells(samples.read(again / "raw.jsonl"))
    assert len(cells) == 8
    assert len({(c.target, c.level, c.repetition) for c in cells}) == 8


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(
    folder: Path, targets: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(folder / "selfcheck.json", out)
    command = [sys.executable, "-m", "gateway", "compare", *targets, "--levels", "1,2", "--rounds",
               "2", "--repetitions", "50", "--unchecked", "--out", str(out)]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        raw = out / "raw.jsonl"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (
            raw.exists() and '"type":"cell"' in raw.read_text()
        ):
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        said, _ = run.communicate(timeout=30)

    assert run.returncode == 130
    assert f"--resume {out}" in " ".join(said.split())
    assert samples.cells(samples.read(raw))[0].outcome == "complete"


def test_a_target_that_is_dead_is_named_and_the_others_are_measured(
    folder: Path, targets: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(folder / "selfcheck.json", out)

    done = twolane(
        "compare", *targets[:2], "--target", f"dead={nobody()}=m", "--levels", "1", "--rounds", 1,
        "--repetitions", 1, "--unchecked", "--out", out,
    )  # fmt: skip

    assert done.returncode == 1
    assert "dead" in done.stdout
    assert "is it running" in " ".join(done.stdout.split())
    assert [cell.target for cell in samples.cells(samples.read(out / "raw.jsonl"))] == ["slow"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--levels", "0"], "from 1 to 1024"),
        (["--levels", "10000"], "from 1 to 1024"),
        (["--rounds", "0"], "a whole number from 1"),
        (["--target", "x"], "LABEL=URL=MODEL"),
        (["--target", "a=http://a=m", "--target", "a=http://b=m"], "label of its own"),
        (["--resume", "no-such-folder"], "is no-such-folder the folder of an experiment"),
        (["--config", "no-such-file"], "no-such-file cannot be read"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_what_to_do(
    arguments: list[str], why: str, tmp_path: Path
) -> None:
    done = twolane("compare", *arguments, *(
        [] if "--resume" in arguments else ["--out", tmp_path / "out"]
    ))  # fmt: skip

    assert done.returncode == 2
    assert why in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_with_an_experiment_is_not_begun_again(folder: Path, targets: list[str]) -> None:
    done = twolane("compare", *targets, "--out", folder)

    assert done.returncode == 2
    assert f"--resume {folder}" in done.stderr


# A gateway in front


async def test_a_gateway_is_asked_when_all_of_its_lanes_serve(tmp_path: Path) -> None:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "twolane.yaml"
    with ExitStack() as stack:
        ollama = stack.enter_context(fake("--kind", "ollama"))
        config.write_text(two_lanes(ollama, f"http://127.0.0.1:{port}"))
        read = settings.load(config, {}, {})
        arguments = ["--config", str(config)]
        entrant = front.in_front(arguments, read, "chat", ("ollama", "vllm"), tmp_path)

        async def entered() -> None:
            await serving.enter_async_context(entrant.running())

        async with AsyncExitStack() as serving, httpx.AsyncClient() as client:
            entering = asyncio.create_task(entered())
            while not await answers(client, f"{entrant.target.url}/ready"):
                await asyncio.sleep(0.05)
            await asyncio.sleep(1)
            early = entering.done()
            stack.enter_context(fake("--kind", "vllm", "--port", str(port)))
            await entering

    assert not early


async def answers(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(url)).is_success
    except httpx.HTTPError:
        return False


def two_lanes(ollama: str, vllm: str) -> str:
    return f"""
        engines: {{ollama: {{urls: ["{ollama}"]}}, vllm: {{urls: ["{vllm}"]}}}}
        models: {{chat: {{lanes: {{ollama: {{model: m}}, vllm: {{model: m}}}}}}}}
        """


# calibrate


def test_a_profile_is_measured_closer_and_closer_to_where_the_lanes_cross(tmp_path: Path) -> None:
    config, out = tmp_path / "twolane.yaml", tmp_path / "profile.json"
    with (
        fake("--kind", "ollama", "--ttft", "0.05", "--slots", "1") as ollama,
        fake("--kind", "vllm", "--ttft", "0.15") as vllm,
    ):
        config.write_text(two_lanes(ollama, vllm))
        done = twolane(
            "calibrate", "--config", config, "--levels", "1,8", "--rounds", 2, "--tokens-out", 4,
            "--minutes", 0.4, "--out", out,
        )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    found = profile.load(out)
    assert found.crossover is not None
    assert 1.5 < found.crossover.level < 5
    levels = found.lanes["ollama"].at_once
    assert levels[0] == 1
    assert levels[-1] == 8
    assert len(levels) > 2
    assert found.lanes["ollama"].on is not None
    assert "let the gateway decide by it" in " ".join(done.stdout.split())


@contextmanager
def fake(*arguments: str) -> Iterator[str]:
    """A fake engine as a program; its URL."""
    with subprocess.Popen(
        [sys.executable, "-m", "backends.fake", "--port", "0", "--gap", "0", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    ) as engine:
        assert engine.stdout is not None
        try:
            yield engine.stdout.readline().split()[-1]
        finally:
            engine.terminate()
