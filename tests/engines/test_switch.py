"""The GPU goes from the real Ollama to the real vLLM and back; see `tests.engines.switch`."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.engines import rig, switch

#: The scenario waits for engines and moves, by deadlines of its own.
pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    missing = [part.name for part in rig.parts() if not part.is_complete()]
    if missing and os.environ.get("CI") != "true":
        pytest.skip(f"not installed: {', '.join(missing)}; {rig.GET_ENGINES}")


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> switch.Record:
    """The scenario, played once for all tests that look at it."""
    scratch = tmp_path_factory.mktemp("switch")
    played = switch.run(scratch)
    switch.draw(played, Path(scratch, "switch.svg"))
    return played


def test_load_rises_and_falls_and_the_gpu_goes_there_and_comes_back(
    record: switch.Record,
) -> None:
    ways = [(passage["from"], passage["to"], passage["outcome"]) for passage in record.passages]

    assert ways == [
        (None, "ollama", "done"),
        ("ollama", "vllm", "done"),
        (None, "ollama", "done"),  # from nobody: it had been given back
    ]


def test_every_request_is_answered_once_and_to_its_end(record: switch.Record) -> None:
    assert [a for a in record.requests if a.error or a.status != 200 or not a.finish] == []
    assert [line["outcome"] for line in record.log] == ["ok"] * len(record.requests)
    assert {line["attempts"] for line in record.log} == {1}


def test_both_lanes_were_used_and_the_headers_say_so(record: switch.Record) -> None:
    lanes = [asked.lane for asked in record.requests]

    assert lanes[:3] == lanes[-3:] == ["ollama"] * 3
    assert lanes.count("vllm") > switch.CROWD


def test_the_two_were_never_in_memory_together(record: switch.Record) -> None:
    together = [m for m in record.moments if len(m["resident"]) > 1]
    alone = {engine for m in record.moments for engine in m["resident"]}

    assert together == []
    assert alone == {"ollama", "vllm"}


def test_streams_that_waited_for_the_gpu_got_heartbeats(record: switch.Record) -> None:
    waited = [a for a in record.requests if a.pings]

    assert len(waited) >= switch.CROWD
    assert any("The GPU goes to vllm" in asked.reason for asked in waited)


def test_what_the_moves_cost_is_measured(record: switch.Record) -> None:
    there, back = record.passages[1:]

    assert list(there["steps"]) == ["draining", "unloading", "freeing", "loading", "probing"]
    assert there["waited"] > there["steps"]["loading"]  # more than one has waited for it
    assert there["steps"]["loading"] > back["steps"]["loading"] > 0  # a start, and a load
    assert there["waited"] > back["waited"] > 0


def test_nothing_is_left_of_it(record: switch.Record) -> None:
    assert record.exit_code == 0
    assert record.left == []


def test_a_gateway_killed_with_9_leaves_nothing_and_the_next_one_goes_on(
    tmp_path: Path,
) -> None:
    with switch.staged(tmp_path) as first:
        asyncio.run(first_answer(first))
        second = subprocess.run(
            [sys.executable, "-m", "gateway", "serve", "--config", tmp_path / "twolane.yaml",
             "--port", str(rig.free_port())],
            stderr=subprocess.PIPE, text=True, timeout=120, check=False,
        )  # fmt: skip
        first.process.kill()
        first.process.wait()
        deadline = time.monotonic() + 30
        while switch.processes_of(first, "ollama") and time.monotonic() < deadline:
            time.sleep(0.2)
        left = switch.processes_of(first, "ollama")
    with switch.staged(tmp_path) as after:
        lane = asyncio.run(first_answer(after))

    assert second.returncode == 2
    assert f"process {first.process.pid}" in second.stderr
    assert left == []
    assert lane == "ollama"


async def first_answer(stage: switch.Stage) -> str:
    """The lane of a request, once the GPU is held."""
    record = switch.Record()
    async with httpx.AsyncClient(base_url=stage.url, timeout=60) as client:
        await switch.until_gpu(client, lambda gpu: gpu["step"] == "held", within_s=120)
        await switch.ask(stage, client, record, 0)
    return record.requests[0].lane
