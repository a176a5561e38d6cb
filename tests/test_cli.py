"""The command, as a person runs it: its own process, a real terminal's worth of output."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from backends.fake import FakeEngine, status
from tests.support.gateways import StartGateway
from tests.support.models import alone, chat

KEY = "a-long-secret"


async def twolane(*arguments: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command to its end."""
    return await anyio.run_process(
        [sys.executable, "-m", "gateway", *arguments],
        check=False,
        env={**os.environ, "COLUMNS": "120", **variables},
    )


async def test_status_draws_lanes_and_decisions(start_gateway: StartGateway) -> None:
    async with (
        FakeEngine("vllm", ["Small-1B"]) as vllm,
        start_gateway(**alone(vllm)) as running,
    ):
        await running.http.post("/v1/chat/completions", json=chat())
        drawn = await twolane("status", "--url", running.url)
        told = await twolane("status", "--url", running.url, "--json")

    assert drawn.returncode == 0
    for word in (b"vllm", b"assumed profile", b"demand 0", b"the model's only lane"):
        assert word in drawn.stdout
    assert json.loads(told.stdout)["models"]["m"]["lane"] == "vllm"


HEAVY = {"fastapi", "ollama", "pydantic", "uvicorn"}
#: Runs a command, then says which heavy packages it has imported.
PROBE = f"""
import sys
from gateway.cli import main
try:
    main(sys.argv[1:])
finally:
    print("heavy:", sorted({HEAVY} & sys.modules.keys()), file=sys.stderr)
"""


async def test_what_must_start_fast_imports_nothing_of_the_server(
    start_gateway: StartGateway,
) -> None:
    async def imported(*arguments: str) -> str:
        command = [sys.executable, "-c", PROBE, *arguments]
        ended = await anyio.run_process(command, check=False)
        assert ended.returncode == 0, ended.stderr
        return ended.stderr.decode()

    async with (
        FakeEngine("vllm", ["Small-1B"]) as vllm,
        start_gateway(**alone(vllm)) as running,
    ):
        said = [
            await imported("--help"),
            await imported("--version"),
            await imported("status", "--url", running.url),
            await imported("status", "--url", running.url, "--json"),
            await imported("pin", "vllm", "--url", running.url),
        ]

    assert set(said) == {"heavy: []\n"}


async def test_status_shows_names_with_brackets_as_they_are(start_gateway: StartGateway) -> None:
    async with FakeEngine("vllm", ["Small-1B"]) as vllm:
        settings = alone(vllm)
        settings["models"] = {"a[/b]": settings["models"]["m"]}
        async with start_gateway(**settings) as running:
            drawn = await twolane("status", "--url", running.url)

    assert (drawn.returncode, drawn.stderr) == (0, b"")
    assert b"a[/b] (assumed profile)" in drawn.stdout


async def test_status_of_something_else_says_so() -> None:
    async with FakeEngine("vllm", ["Small-1B"]) as other:
        said = await twolane("status", "--url", f"{other.url}/v1/models?")
        other.script(status(200, body={"hello": "world"}), path="/status")
        strange = await twolane("status", "--url", other.url)

    assert (said.returncode, strange.returncode) == (2, 2)
    assert b"is this a twolane gateway?" in strange.stderr
    assert b"Traceback" not in said.stderr + strange.stderr


async def test_status_sends_the_key(start_gateway: StartGateway) -> None:
    async with (
        FakeEngine("vllm", ["Small-1B"]) as vllm,
        start_gateway(**alone(vllm), api_keys=[KEY]) as running,
    ):
        without = await twolane("status", "--url", running.url)
        given = await twolane("status", "--url", running.url, "--key", KEY)
        variable = await twolane("status", "--url", running.url, TWOLANE_API_KEYS=json.dumps([KEY]))

    assert (without.returncode, given.returncode, variable.returncode) == (2, 0, 0)
    assert b"--key" in without.stderr


async def test_status_of_nothing_says_so() -> None:
    said = await twolane("status", "--url", "http://127.0.0.1:9")

    assert said.returncode == 2
    assert b"no gateway answers at http://127.0.0.1:9" in said.stderr
    assert b"Traceback" not in said.stderr


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (["--pair", "chat"], {}, "write NAME=ollama:MODEL,vllm:MODEL"),
        (["--pair", "chat=olama:a"], {}, "one of ollama, vllm, llamacpp"),
        (["--config", "/no/such.yaml"], {}, "/no/such.yaml cannot be read"),
        (["--host", "0.0.0.0"], {}, "no API key is set"),  # noqa: S104 - it is refused
        ([], {"TWOLANE_PROT": "1"}, "did you mean TWOLANE_PORT?"),
        ([], {"TWOLANE_PORT": "many"}, "port: "),
    ],
)
async def test_a_mistake_stops_the_start_and_says_what_to_do(
    arguments: list[str], variables: dict[str, str], said: str
) -> None:
    ended = await twolane("serve", *arguments, **variables)

    assert ended.returncode == 2
    assert said in ended.stderr.decode()
    assert b"Traceback" not in ended.stderr


async def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = await twolane("serve", "--port", str(port))

    assert ended.returncode == 2
    assert f"127.0.0.1:{port} cannot be listened on" in ended.stderr.decode()
    assert b"--port" in ended.stderr
