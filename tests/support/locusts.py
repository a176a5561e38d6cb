"""Runs our Locust files to their end, without Locust's page."""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import urlsplit

from tests.support.servers import unused_url

Done = subprocess.CompletedProcess[str]


class RunLocust(Protocol):
    """Runs one of our Locust files; `file` is its name without a suffix."""

    def __call__(self, file: str, *arguments: object, within_s: float = 50) -> Done: ...


def command_line(file: str, *arguments: object) -> list[str]:
    """Locust's arguments for one of our files."""
    usual = ["--headless", "--only-summary", "--loglevel", "WARNING", "--exit-code-on-error", "0"]
    several = master_port() if "--processes" in arguments else []
    return ["-f", f"loadtests/{file}.py", *usual, *several, *map(str, arguments)]


def master_port() -> list[str]:
    """The options for a master of several processes at a port of its own."""
    port = str(urlsplit(unused_url()).port)
    return ["--master-port", port, "--master-bind-port", port]


def locust_process(file: str, *arguments: object, within_s: float = 50, **how: Any) -> Done:
    """Locust as a process of its own, which may be started in a special way."""
    command = [sys.executable, "-m", "locust", *command_line(file, *arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=within_s, check=False, **how
    )


@contextmanager
def forking_locust(folder: Path) -> Iterator[RunLocust]:
    """Runs Locust as forks of one process, see `locust_server`; its output goes to `folder`."""
    command = [sys.executable, "-m", "tests.support.locust_server"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        stdin, stdout = server.stdin, server.stdout
        out, err = folder / "stdout", folder / "stderr"

        def run(file: str, *arguments: object, within_s: float = 50) -> Done:
            asked = command_line(file, *arguments)
            print(json.dumps([asked, str(out), str(err)]), file=stdin, flush=True)
            status = int(_line(stdout, within_s))
            return Done(asked, status, out.read_text(), err.read_text())

        try:
            yield run
        finally:
            server.terminate()


def _line(stream: IO[str], within_s: float) -> str:
    """The next line, if it comes in time."""
    with selectors.DefaultSelector() as waiting:
        waiting.register(stream, selectors.EVENT_READ)
        assert waiting.select(within_s), f"Locust did not end within {within_s:g} s"
    return stream.readline()
