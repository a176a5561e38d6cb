"""`twolane calibrate`, and a gateway put in front of what is measured."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, closing, contextmanager
from pathlib import Path

import httpx
import pytest

from backends.fake import FakeEngine
from gateway import settings
from gateway.compare import front
from gateway.routing import profile
from tests.support.command import run_command
from tests.support.waiting import wait_until

#: Programs of their own.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]


# A gateway in front


async def test_a_gateway_is_measured_once_all_of_its_lanes_are_ready(tmp_path: Path) -> None:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "twolane.yaml"
    async with AsyncExitStack() as stack, httpx.AsyncClient() as client:
        ollama = await stack.enter_async_context(FakeEngine("ollama", ["m"]))
        config.write_text(two_lanes(ollama.url, f"http://127.0.0.1:{port}"))
        read = settings.load(config, {}, {})
        arguments = ["--config", str(config)]
        entrant = front.gateway_entrant(arguments, read, "chat", ("ollama", "vllm"), tmp_path)

        async def enter() -> None:
            await stack.enter_async_context(entrant.running())

        entering = asyncio.create_task(enter())
        while not await answers(client, f"{entrant.target.url}/ready"):
            await asyncio.sleep(0.05)
        await asyncio.sleep(1)
        early = entering.done()
        await stack.enter_async_context(FakeEngine("vllm", ["m"], own_port=port))
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


def test_a_profile_is_measured_in_smaller_steps_around_the_crossover(tmp_path: Path) -> None:
    config, out = tmp_path / "twolane.yaml", tmp_path / "profile.json"
    with (
        fake("--kind", "ollama", "--ttft", "0.05", "--slots", "1") as ollama,
        fake("--kind", "vllm", "--ttft", "0.15") as vllm,
    ):
        config.write_text(two_lanes(ollama, vllm))
        done = run_command(
            "calibrate", "--config", config, "--levels", "1,8", "--rounds", 2, "--tokens-out", 4,
            "--minutes", 0.6, "--out", out,
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
    assert "let the gateway decide by it" in done.words


def test_sigterm_leaves_no_temporary_folder(tmp_path: Path) -> None:
    config, scratch = tmp_path / "twolane.yaml", tmp_path / "scratch"
    scratch.mkdir()
    with fake("--kind", "ollama") as ollama, fake("--kind", "vllm") as vllm:
        config.write_text(two_lanes(ollama, vllm))
        program = [sys.executable, "-m", "gateway", "calibrate", "--config", str(config)]
        variables = {**os.environ, "TMPDIR": str(scratch)}
        with subprocess.Popen(program, env=variables, stdout=subprocess.DEVNULL) as run:
            wait_until(lambda: list(scratch.glob("*/locust.log")), 60)
            begun = [path.name for path in scratch.iterdir()]
            run.terminate()
            run.wait(timeout=30)

    assert begun
    assert run.returncode == 130
    assert list(scratch.iterdir()) == []


@contextmanager
def fake(*arguments: str) -> Iterator[str]:
    """The URL of a fake engine in a process of its own."""
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
