"""The engines that a gateway starts, and the logs that it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import anyio
import pytest

from gateway.settings import SettingsError, Timings
from tests.support.gateways import StartGateway
from tests.support.servers import unused_url
from tests.support.waiting import until

AT_ONCE = Timings(first_probe_wait_s=0.05)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def left_in(folder: Path) -> list[Path]:
    """All that is in a folder."""
    return list(folder.iterdir())


def logs(folder: Path) -> list[Path]:
    """The logs in temporary folders."""
    return list(folder.glob("*/*.log"))


def started_by(command: list[str], url: str, **engine: Any) -> dict[str, Any]:
    """Settings of a gateway that starts its only engine by this command."""
    return {
        "engines": {"ollama": {"urls": [url], "command": command, **engine}},
        "models": {"m": {"lanes": {"ollama": {"model": "m"}}}},
    }


async def test_the_log_of_an_engine_goes_with_the_gateway(
    start_gateway: StartGateway, temporary: Path
) -> None:
    url = unused_url()
    port = url.rpartition(":")[2]
    command = [sys.executable, "-m", "backends.fake", "--kind", "ollama", "--port", port]
    async with start_gateway(**started_by(command, url), timings=AT_ONCE) as running:
        await running.until(lambda gateway: gateway.ready().ready, 20)
        during = logs(temporary)

    assert len(during) == 1
    assert left_in(temporary) == []


async def test_the_log_of_an_engine_that_failed_stays_and_is_named(
    start_gateway: StartGateway, temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    async with start_gateway(**started_by(command, unused_url()), timings=AT_ONCE) as running:
        await running.until(lambda _: "started again" in caplog.text, 20)

    [log] = logs(temporary)
    assert "no such model" in log.read_text()
    assert f"kept the output of an engine that has failed: {log}" in caplog.text


async def test_a_log_named_in_the_settings_stays(
    start_gateway: StartGateway, temporary: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    log = tmp_path / "mine.log"
    how = started_by(command, unused_url(), log=str(log))
    async with start_gateway(**how, timings=AT_ONCE) as running:
        await running.until(lambda _: log.exists() and "no such model" in log.read_text(), 20)

    assert left_in(temporary) == []


async def test_the_log_of_an_embedded_engine_that_does_not_start_is_named(
    start_gateway: StartGateway, temporary: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no model")

    with pytest.raises(SettingsError) as caught:
        async with start_gateway(embedded={"model": str(broken)}):
            pass

    [log] = logs(temporary)
    assert str(log) in str(caught.value)


async def test_sigterm_during_the_start_leaves_nothing_behind(
    tmp_path: Path, temporary: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings = {"port": 0, **started_by(["sleep", "60"], url)}
        file = tmp_path / "twolane.yaml"
        file.write_text(json.dumps(settings))
        gateway = await anyio.open_process(
            [sys.executable, "-m", "gateway", "serve", "--config", str(file)],
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        async with gateway:
            await until(lambda: logs(temporary))
            gateway.send_signal(signal.SIGTERM)
            code = await gateway.wait()

    assert code == 0
    assert left_in(temporary) == []
