"""The box of compose.yaml, for real: in Docker, with the real engines on the CPU."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.engines import rig
from tests.support import checkout

ROOT = Path(__file__).parents[2]
#: Puts images of this machine's engines in the place of the big ones.
OVERRIDE = Path(__file__).with_name("compose.test.yaml")
KEY = "a-key-of-the-compose-test"
CHAT = "/v1/chat/completions"

#: What the images of the test stand on: Debian with Python, venv, pip, curl, libgomp1, libnuma1.
BASE = os.environ.get("BOX_BASE", "rig/base:bookworm")

GET_DOCKER = (
    "Docker with compose 2.24 or newer is not here: install it "
    "(https://docs.docker.com/engine/install), then run `make test-compose` again"
)
GET_BASE = (
    f"there is no image {BASE}; name one of this machine's Debian with python3, venv, pip, curl, "
    "libgomp1 and libnuma1: BOX_BASE=IMAGE make test-compose"
)


def missing(*, engine: bool = True) -> str:
    """What is not here and what to do about it; empty where all is.

    Args:
        engine: Containers are to be run; compose alone needs no Docker Engine.
    """
    return next(_missing(engine=engine), "")


def _missing(*, engine: bool) -> Iterator[str]:
    if shutil.which("docker") is None or docker("compose", "version").returncode:
        yield GET_DOCKER
    if not engine:
        return
    if docker("version").returncode:
        yield "no Docker Engine answers: start it, or set DOCKER_HOST"
    if docker("image", "inspect", BASE).returncode:
        yield GET_BASE
    if shutil.which("prometheus") is None:
        yield "Prometheus is not here: get it from your package manager (Debian: prometheus)"
    if not all(part.is_complete() for part in rig.parts()):
        yield f"the engines are not there: {rig.GET_ENGINES}"
    if shutil.which("ollama") is None:
        yield rig.GET_OLLAMA


def configuration(*profiles: str, **variables: str) -> dict[str, Any]:
    """The file as compose reads it, with these profiles and variables."""
    chosen = [word for profile in profiles for word in ("--profile", profile)]
    # A contributor's own .env is for his box, not for this one.
    own = ["--file", str(ROOT / "compose.yaml"), "--env-file", os.devnull]
    command = ["docker", "compose", *own, *chosen, "config", "--format", "json"]
    said = _run(command, _environment(variables))
    assert said.returncode == 0, said.stderr
    read: dict[str, Any] = json.loads(said.stdout)
    return read


@dataclass(frozen=True)
class Box:
    """A project of compose that runs, or is to.

    Attributes:
        folder: Where its compose.yaml is.
        project: Its name.
        port: Where the gateway is published.
        page: Where the chat page is.
        prometheus: Where Prometheus is.
        variables: What a person would write into `.env`.
    """

    folder: Path
    project: str
    port: int
    page: int
    prometheus: int
    variables: Mapping[str, str]

    def compose(self, *arguments: str, **variables: str) -> str:
        """What a command said; an AssertionError with all it said where it fails."""
        said = _run(self.command(*arguments), self.environment(**variables))
        assert said.returncode == 0, f"docker compose {arguments}: {said.stdout}{said.stderr}"
        return said.stdout.strip()

    def command(self, *arguments: str) -> list[str]:
        files = ["--file", str(self.folder / "compose.yaml"), "--file", str(OVERRIDE)]
        project = ["--project-directory", str(self.folder), "--project-name", self.project]
        return ["docker", "compose", *files, *project, *arguments]

    def environment(self, **variables: str) -> dict[str, str]:
        return _environment({**self.variables, **variables})

    @contextlib.contextmanager
    def client(self, key: str = KEY) -> Iterator[httpx.Client]:
        """A client of the published port."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        url = f"http://127.0.0.1:{self.port}"
        with httpx.Client(base_url=url, headers=headers, timeout=120, trust_env=False) as client:
            yield client

    def get(self, path: str) -> Any:
        with self.client() as client:
            return client.get(path).json()

    def post(self, path: str, body: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body)

    def chat(self, model: str = "smollm2", **fields: Any) -> httpx.Response:
        """The answer to a short question, streamed and read to its end."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "Say hello in one sentence."}],
            "max_tokens": 16,
            "stream": True,
            **fields,
        }
        return self.post(CHAT, body)

    def container(self, service: str) -> dict[str, Any]:
        """What Docker knows of a service's container."""
        said = docker("inspect", self.compose("ps", "--all", "--quiet", service))
        assert said.returncode == 0, said.stderr
        found: list[dict[str, Any]] = json.loads(said.stdout)
        return found[0]

    def inside(self, service: str, *command: str) -> subprocess.CompletedProcess[str]:
        """A command within a service's container."""
        return _run(self.command("exec", "--no-TTY", service, *command), self.environment())

    def crash(self, service: str) -> None:
        """Kill a service's process from outside.

        Not `docker kill`: Docker takes that for a wish, and does not start it again.
        """
        pid = self.container(service)["State"]["Pid"]
        said = docker("run", "--rm", "--pid", "host", BASE, "sh", "-c", f"kill -9 {pid}")
        assert said.returncode == 0, said.stderr

    def left(self) -> dict[str, list[str]]:
        """What Docker still has of this project, by kind."""
        label = f"label=com.docker.compose.project={self.project}"
        listings = {
            "containers": ["ps", "--all", "--quiet"],
            "networks": ["network", "ls", "--quiet"],
            "volumes": ["volume", "ls", "--quiet"],
        }
        return {
            kind: docker(*listing, "--filter", label).stdout.split()
            for kind, listing in listings.items()
        }

    def logs(self) -> str:
        return self.compose("logs", "--no-color", "--tail", "60")


def clean_clone(folder: Path) -> None:
    """What the README's lines before the first start make of a clean clone."""
    checkout.clone(folder)
    for line in checkout.commands("README.md", naming="docker compose --profile setup up"):
        if not line.startswith(("git ", "docker ")):
            subprocess.run(["/bin/sh", "-ec", line], cwd=folder, check=True)


def box(folder: Path) -> Box:
    """A box on free ports, with one key.

    Args:
        folder: Has compose.yaml and what it mounts.
    """
    with (folder / "secrets" / "api_keys").open("a") as keys:
        keys.write(f"# of the test\n{KEY}\n")
    ollama, prometheus = shutil.which("ollama"), shutil.which("prometheus")
    assert ollama is not None
    assert prometheus is not None
    home = dict(
        line.split(" = ", 1) for line in (rig.ENGINES / "vllm/pyvenv.cfg").read_text().splitlines()
    )["home"]
    port, page, watched = rig.free_port(), rig.free_port(), rig.free_port()
    return Box(
        folder,
        f"twolane-{folder.name}-{os.getpid()}",
        port,
        page,
        watched,
        {
            "BOX_BASE": BASE,
            "BOX_ENGINES": str(rig.ENGINES.resolve()),
            "BOX_OLLAMA": str(Path(ollama).resolve().parents[1]),
            "BOX_PYTHON": str(Path(home).parent),
            "BOX_CPUS": rig.vllm_environment()["VLLM_CPU_OMP_THREADS_BIND"],
            "BOX_PROMETHEUS": str(Path(prometheus).resolve()),
            "BOX_TESTS": str(Path(__file__).parent),
            "MODEL": "smollm2",
            "OLLAMA_MODEL": f"hub:5000/library/{rig.OLLAMA_MODEL}",
            "OLLAMA_SLOTS": "2",
            "OLLAMA_CONTEXT": str(rig.CONTEXT_TOKENS),
            "VLLM_MODEL": f"hub/{rig.VLLM_MODEL}",
            "VLLM_SLOTS": "8",
            "VLLM_CONTEXT": str(rig.CONTEXT_TOKENS),
            "GATEWAY_PORT": str(port),
            "WEBUI_PORT": str(page),
            "PROMETHEUS_PORT": str(watched),
            "ELECTRICITY_PER_KWH": "0.30",
            "RENT_PER_HOUR": "0.70",
            "API_PER_MILLION": "0.60",
            "MACHINE_WATTS": "120",
        },
    )


def docker(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of Docker's own, however it ends."""
    return _run(["docker", *arguments])


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    ours = ("HOME", "PATH", "DOCKER_", "BUILDKIT_", "BUILDX_")
    return {n: v for n, v in os.environ.items() if n.startswith(ours)} | dict(variables)


def _run(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
