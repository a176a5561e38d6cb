"""A kind of engine is one entry, and the environment cannot break the import of any."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import anyio
import httpx
import pytest

from backends.base import Engine
from backends.fake import FakeEngine
from backends.kinds import KINDS
from backends.transport import http
from tests.support.program import gateway_program

ROOT = Path(__file__).parents[2]

#: The module of a fourth kind: an engine that speaks OpenAI's API and nothing else.
TOY = '''
"""An engine that is made up for a test."""

from backends.base import Engine
from backends.calls import BridgedRequest, Call, body_for
from backends.errors import BackendError, Unsupported
from backends.reports import Activity, Capabilities, Identity, Readiness


class Toy(Engine):
    """One toy server."""

    kind = "toy"
    sign_path = "/v1/models"
    sign_field = "object"

    async def models(self) -> list[str]:
        return [model.id for model in await self.listed_models()]

    async def ready(self, model: str) -> Readiness:
        try:
            return Readiness.READY if model in await self.models() else Readiness.ABSENT
        except BackendError:
            return Readiness.DOWN

    async def capabilities(self, model: str) -> Capabilities:
        return Capabilities(chat=True)

    async def identity(self, model: str) -> Identity:
        return Identity("1.0")

    async def load(self, model: str) -> None:
        return

    async def unload(self, model: str) -> None:
        raise Unsupported("a toy keeps its model")

    async def activity(self, model: str) -> Activity:
        return Activity()

    def bridge(self, call: Call, model: str) -> BridgedRequest:
        return BridgedRequest(body_for(call, model))
'''
ENTRY = """
        EngineKind(
            engine=Toy,
            title="Toy",
            server="toy-server",
            ports=(4711,),
            slots=7,
            cold_start_s=1.0,
            colour="cyan",
        ),
    )
})"""

#: What people have in their shells, and what the `ollama` package cannot read (B02).
HOSTILE = {
    "ALL_PROXY": "socks://127.0.0.1:9",
    "all_proxy": "socks5://127.0.0.1:9",
    "NO_PROXY": "fd00::/8,[::1]",
    "SSL_CERT_FILE": "/nope",
    "OLLAMA_HOST": "::1",
}


@pytest.fixture
def with_toy(tmp_path: Path) -> Path:
    """A folder with a copy of `backends` that has a fourth kind: one module and one entry more."""
    package = tmp_path / "backends"
    shutil.copytree(
        ROOT / "backends", package, ignore=shutil.ignore_patterns("fake", "__pycache__")
    )
    (package / "toy.py").write_text(TOY)
    table = (package / "kinds.py").read_text()
    for old, new in (
        ("from backends.vllm", "from backends.toy import Toy\nfrom backends.vllm"),
        ("\n    )\n})", ENTRY),
    ):  # fmt: skip
        assert table.count(old) == 1
        table = table.replace(old, new)
    (package / "kinds.py").write_text(table)
    return tmp_path


async def test_a_fourth_kind_takes_its_module_and_one_entry(with_toy: Path) -> None:
    async with (
        FakeEngine("vllm", ["small"]) as toy,
        FakeEngine("vllm", ["small"]) as vllm,
        gateway_program(
            with_toy,
            {
                "engines": {"toy": {"urls": [toy.url]}, "vllm": {"urls": [vllm.url]}},
                "models": {
                    "m": {
                        "lanes": {"toy": {"model": "small"}, "vllm": {"model": "small"}},
                        "pin": "toy",
                    }
                },
            },
        ) as url,
        httpx.AsyncClient(base_url=url, trust_env=False) as client,
    ):
        chat = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
        pinned = await client.post("/v1/chat/completions", json=chat)
        streamed = await client.post("/v1/chat/completions", json={**chat, "stream": True})
        moved = await client.post("/admin/pin", json={"lane": "vllm"})
        other = await client.post("/v1/chat/completions", json=chat)
        await client.post("/admin/pin", json={"lane": "auto"})
        decided = await client.post("/v1/chat/completions", json=chat)
        status = (await client.get("/status")).json()

    answers = (pinned, streamed, moved, other, decided)
    assert [answer.status_code for answer in answers] == [200] * 5
    assert pinned.headers["x-gateway-lane"] == "toy"
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert other.headers["x-gateway-lane"] == "vllm"
    assert status["models"]["m"]["lanes"]["toy"]["slots"] == 7


async def test_a_fourth_kind_is_known_to_settings_and_commands(with_toy: Path) -> None:
    config = with_toy / "twolane.yaml"
    config.write_text("engines: {toy: {urls: ['http://127.0.0.1:9']}, toys: {urls: []}}")

    async def command(*arguments: str) -> str:
        program = [sys.executable, "-m", "gateway", *arguments]
        ended = await anyio.run_process(
            program, cwd=with_toy, check=False, stderr=subprocess.STDOUT
        )
        return ended.stdout.decode()

    assert "'llamacpp' or 'toy'" in await command("serve", "--config", str(config))
    assert "llamacpp, toy" in await command("serve", "--pair", "m=nothing:m")


async def test_no_variable_of_the_environment_stops_a_command_or_a_gateway(
    tmp_path: Path,
) -> None:
    program = "import sys, backends.kinds; print({'ollama', 'httpx'} & set(sys.modules))"
    environment = {**os.environ, **HOSTILE}
    imported = await anyio.run_process([sys.executable, "-c", program], env=environment)
    async with (
        FakeEngine("ollama", ["small:1b"]) as ollama,
        gateway_program(
            tmp_path, {"engines": {"ollama": {"urls": [ollama.url]}}}, **HOSTILE
        ) as url,
        httpx.AsyncClient(base_url=url, trust_env=False) as client,
    ):
        chat = {"model": "small:1b", "messages": [{"role": "user", "content": "Hi"}]}
        answer = await client.post("/v1/chat/completions", json=chat)
        commands = [
            await anyio.run_process(
                [sys.executable, "-m", "gateway", *arguments], env=environment, check=False
            )
            for arguments in (["--help"], ["status", "--url", url])
        ]

    assert imported.stdout == b"set()\n"
    assert answer.status_code == 200
    assert [command.returncode for command in commands] == [0, 0]
    assert b"small:1b" in commands[1].stdout


@pytest.mark.parametrize("kind", KINDS)
async def test_an_engine_knows_its_own_kind_from_the_others(kind: str) -> None:
    async with FakeEngine(kind) as fake, http.Client() as client:
        engines: list[Engine] = [entry.engine(fake.url, client) for entry in KINDS.values()]

        assert [engine.kind for engine in engines if await engine.is_own_kind()] == [kind]


def test_a_process_is_an_engine_by_its_name_or_its_command_line() -> None:
    assert KINDS["ollama"].is_process("ollama", "/usr/bin/ollama serve")
    assert not KINDS["ollama"].is_process("docker-proxy", "/usr/bin/docker-proxy -host-port 11434")
    assert KINDS["vllm"].is_process("python3", "python3 -m vLLM.entrypoints.openai.api_server")
    assert not KINDS["vllm"].is_process("python3", "python3 -m http.server")
    assert KINDS["llamacpp"].is_process("anything", "at all")


@pytest.mark.parametrize(
    ("command", "cards"),
    [
        ("vllm serve m", None),
        ("vllm serve m --tensor-parallel-size 2", 2),
        ("vllm serve m -tp=4 --pipeline-parallel-size 2", 8),
        ("vllm serve m --tensor-parallel-size 1 --pipeline-parallel-size 3", 3),
        ("vllm serve m -pp 2", 2),
        ("vllm serve m -tp auto", None),
        ("vllm serve m -tp 0", None),
    ],
)
def test_a_command_line_says_over_how_many_cards_a_model_is_spread(
    command: str, cards: int | None
) -> None:
    assert KINDS["vllm"].cards(command.split()) == cards
    assert KINDS["ollama"].cards(command.split()) is None
