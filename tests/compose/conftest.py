"""Where there is no Docker the tests say what to install; in CI they fail."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import compose
from tests.support.requirements import unavailable
from tests.support.waiting import wait_until


@pytest.fixture(scope="session")
def compose_itself() -> None:
    """`docker compose`, which reads files without any Docker Engine."""
    if what := compose.missing(engine=False):
        unavailable(what)


@dataclass
class Up:
    """A box that has come up, and what an early visitor saw.

    Attributes:
        box: It.
        setup: What `docker compose --profile setup up` said until Ctrl-C.
        waited: The states of /ready before it was ready, each once.
        early: The answer to a chat that was sent before any engine was there.
    """

    box: compose.Box
    setup: str = ""
    waited: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    early: Future[httpx.Response] = field(default_factory=Future)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """The README's way: the models, Ctrl-C, then `docker compose up`; engines in turn."""
    if what := compose.missing():
        unavailable(what)
    folder = tmp_path_factory.mktemp("clone")
    compose.clean_clone(folder)
    box = compose.box(folder)
    came = Up(box)
    started = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        try:
            came.setup = _set_up(box, tmp_path_factory.mktemp("setup") / "log")
            watching = pool.submit(_watch, came, started, pool)
            command = box.command("--profile", "metrics", "up", "--detach", "--build", "--wait")
            said = subprocess.run(
                command, env=box.environment(), capture_output=True, text=True, check=False
            )
            started.set()
            if said.returncode:
                pytest.fail(f"{said.stdout}{said.stderr}\n{box.logs()}")
            watching.result()
            wait_until(
                lambda: box.get("/ready")["ready"],
                120,
                describe=lambda: (box.get("/ready"), box.logs()),
            )
            yield came
        finally:
            started.set()
            box.compose("--profile", "*", "down", "--volumes", "--timeout", "40")


def _set_up(box: compose.Box, log: Path) -> str:
    """What it says until both models are there; then it is ended, and all it has started."""
    command = box.command("--profile", "setup", "up", "--build")
    with log.open("w") as output:
        running = subprocess.Popen(
            command, env=box.environment(), stdout=output, stderr=subprocess.STDOUT
        )
        try:
            wait_until(
                lambda: (
                    running.poll() is not None or log.read_text().count("downloaded: done") == 2
                ),
                180,
                describe=log.read_text,
            )
        finally:
            ended = running.poll()
            running.send_signal(signal.SIGINT)
            running.wait(90)
    assert ended is None, log.read_text()
    return log.read_text()


def _watch(came: Up, started: threading.Event, pool: ThreadPoolExecutor) -> None:
    """Ask whether it is ready from the first moment on, and one question as soon as it hears."""
    asked = False
    while not started.wait(0.2):
        with suppress(httpx.TransportError), came.box.client() as client:
            answer = client.get("/ready")
            state = (answer.status_code, answer.json())
            seen = [(status, said["gpu"]["step"]) for status, said in came.waited]
            if answer.status_code != 200 and (state[0], state[1]["gpu"]["step"]) not in seen:
                came.waited.append(state)
            if not asked:
                asked = True
                pool.submit(came.box.chat).add_done_callback(
                    lambda done: came.early.set_result(done.result())
                )
