"""The ways to the engine: the processes of a run, and the timing of client disconnects.

A proxy is observed from outside, by its command line, port and pid. Every process ends with
its context.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec

from loadtests.bench.fast_client import Job, JobFailed, Result
from loadtests.bench.fast_engine import ENGINE_LOG_PATH, EngineLog, MarkedRequest
from loadtests.bench.script import (
    API_KEY,
    BENCH_MODEL,
    BenchError,
    BrokenAnswer,
    Script,
    chat_request,
)

DIRECT, NGINX, GATEWAY = "direct", "nginx", "gateway"
WAYS = (DIRECT, NGINX, GATEWAY)
CASES = ("queued", "before headers", "mid-stream", "non-stream")

# --- the processes ------------------------------------------------------------------------

NGINX_CONF = """\
# A usual nginx in front of a streaming engine: it checks no key, has no queue and no log.
daemon off;
worker_processes 1;
pid {scratch}/nginx.pid;
error_log stderr error;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path {scratch}/body;
  proxy_temp_path {scratch}/proxy;
  fastcgi_temp_path {scratch}/fastcgi;
  uwsgi_temp_path {scratch}/uwsgi;
  scgi_temp_path {scratch}/scgi;
  keepalive_requests 100000000;
  upstream engine {{
    server 127.0.0.1:{engine};
    keepalive 1024;
    keepalive_requests 100000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engine;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 3600s;
    }}
  }}
}}
"""

NARROW = "narrow"  # the same lane with a single slot, so that a second request must queue
# Everything is on: keys, admission, telemetry, health. (JSON is valid YAML.)
GATEWAY_LANES = {BENCH_MODEL: {"slots": 1024, "queue": 1024}, NARROW: {"slots": 1, "queue": 16}}


@dataclass(frozen=True)
class Way:
    """A way to the engine: the port to ask, and the proxy's process, if there is one."""

    name: str
    port: int
    proxy: int | None = None


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fetch(port: int, path: str, timeout_s: float = 5.0) -> tuple[int, bytes]:
    """Status and body of a GET."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path, headers={"authorization": f"Bearer {API_KEY}"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def engine_log(engine: int) -> EngineLog:
    """The engine's log so far: its connections, and marked requests."""
    return msgspec.json.decode(fetch(engine, ENGINE_LOG_PATH)[1], type=EngineLog)


def wait_until(happened: Callable[[], bool], what: str, within_s: float = 5.0) -> None:
    """Return when `happened` is true; raises `BenchError` after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while not happened():
        if time.monotonic() > deadline:
            raise BenchError(f"{what}: not within {within_s:g} s")
        time.sleep(0.001)


@contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A child process while the context is open."""
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        if process.stdin is not None:
            process.stdin.close()
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def engine_running() -> Iterator[tuple[int, int]]:
    """The fake engine in a process of its own: its port and its pid."""
    command = [sys.executable, "-m", "loadtests.bench.overhead", "engine"]
    with running(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None  # noqa: S101 - for the type checker
        port = process.stdout.readline()
        if not port:
            raise BenchError("the fake engine did not start; its output is above")
        yield int(port), process.pid


@contextmanager
def client_running() -> Iterator[Callable[[Job], Result]]:
    """The load generator in a process of its own, as a function that does a job.

    The function raises `BrokenAnswer` if an answer was broken.
    """
    command = [sys.executable, "-m", "loadtests.bench.overhead", "client"]
    with running(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None  # noqa: S101 - for the type checker
        assert stdout is not None  # noqa: S101 - for the type checker

        def give(job: Job) -> Result:
            stdin.write(msgspec.json.encode(job) + b"\n")
            stdin.flush()
            line = stdout.readline()
            if not line:
                raise BenchError("the load generator died; its output is above")
            result: Result = msgspec.json.decode(line, type=Result)
            if isinstance(result, JobFailed):
                raise BrokenAnswer(result.why)
            return result

        yield give


@contextmanager
def proxy_running(
    name: str, command: Sequence[str], port: int, path: str, scratch: Path
) -> Iterator[Way]:
    """A proxy in a process of its own, as soon as it answers 200 at `path`.

    Raises:
        BenchError: It did not start; with the end of its output.
    """
    log = scratch / f"{name}.log"

    def is_ready() -> bool:
        if process.poll() is not None:
            raise BenchError(f"{name} ended with {process.returncode}:\n{_tail(log)}")
        with suppress(OSError, http.client.HTTPException):
            return fetch(port, path)[0] == 200
        return False

    with (
        log.open("wb") as output,
        running(
            command, cwd=scratch, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        ) as process,
    ):
        try:
            wait_until(is_ready, f"200 from {name} at {path}", within_s=30)
        except BenchError as exc:
            raise BenchError(f"{exc}\n{_tail(log)}") from exc
        yield Way(name, port, process.pid)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:].strip()


def nginx_running(engine: int, scratch: Path) -> contextlib.AbstractContextManager[Way]:
    """The engine behind nginx, which has one worker."""
    port = free_port()
    conf = scratch / "nginx.conf"
    conf.write_text(NGINX_CONF.format(scratch=scratch, engine=engine, port=port))
    command = [find_nginx(), "-c", str(conf), "-p", str(scratch)]
    return proxy_running(NGINX, command, port, "/health", scratch)


def find_nginx(path: str | None = None) -> str:
    """The nginx on this path, by default PATH; raises `BenchError` if there is none."""
    if path is None:  # Debian keeps it in /usr/sbin, which is not on everybody's
        path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin"))
    found = shutil.which("nginx", path=path)
    if found is None:
        raise BenchError(
            "nginx is not on PATH, and the gateway is compared with it: install it "
            "(apt-get install nginx), or leave it out with --only direct,gateway"
        )
    return found


def gateway_running(engine: int, scratch: Path) -> contextlib.AbstractContextManager[Way]:
    """The engine behind the gateway, started by `twolane serve`."""
    port = free_port()
    config = {
        "host": "127.0.0.1",
        "port": port,
        "api_keys": [API_KEY],
        "engines": {"vllm": {"urls": [f"http://127.0.0.1:{engine}"]}},
        "models": {
            name: {"lanes": {"vllm": {"model": BENCH_MODEL, **lane}}}
            for name, lane in GATEWAY_LANES.items()
        },
    }
    path = scratch / "gateway.yaml"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(config)))
    command = [sys.executable, "-m", "gateway", "serve", "--config", str(path)]
    return proxy_running(GATEWAY, command, port, "/ready", scratch)


# --- client disconnects -------------------------------------------------------------------

#: The time of a proxy that has not closed its connection by then.
NEVER_MS = 2000.0


class RawClient:
    """A client of one request on a plain socket, which can disconnect at an exact time."""

    def __init__(self, port: int, request: bytes) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=5)
        self._socket.sendall(request)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def read_events(self, events: int) -> None:
        """Return when `events` events have arrived; raises `BenchError` if they do not."""
        received = b""
        while received.count(b"data: ") < events:
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                data = b""
            if not data:
                raise BenchError(f"a stream went silent before its event {events}: {received!r}")
            received += data

    def disconnect(self) -> float:
        """Close the socket; returns the time just before."""
        now = time.monotonic()
        self._socket.close()
        return now


class DisconnectTimer:
    """Measures how long after a client's disconnect the engine's connection stays open."""

    def __init__(self, way: Way, engine: int) -> None:
        self._way = way
        self._engine = engine
        self._markers = (f"{way.name}-{time.monotonic_ns()}-{n}" for n in itertools.count())
        self._leavers: set[str] = set()

    def time_ms(self, case: str) -> float:
        """Milliseconds from the client's disconnect, in one of `CASES`."""
        if case == "queued":
            return self._queued_ms()
        # Mid-stream the engine is silent when the client disconnects, so a proxy that notices
        # only when it writes the next token does not notice at all.
        script = Script(
            tokens=3 if case == "mid-stream" else 0, hold=True, marker=next(self._markers)
        )
        request = chat_request(script, stream=case != "non-stream")
        with RawClient(self._way.port, request) as caller:
            self._wait_for_any(script.marker)
            if case == "mid-stream":
                caller.read_events(4)  # the role and three words
            closed_at = caller.disconnect()
        with suppress(BenchError):
            wait_until(lambda: self._lost_at(script.marker) is not None, case, NEVER_MS / 1000)
        lost_at = self._lost_at(script.marker)
        return NEVER_MS if lost_at is None else (lost_at - closed_at) * 1000

    def _queued_ms(self) -> float:
        # One request holds the only slot, two wait. The client of the first one waiting
        # disconnects, so it must never be sent. The one behind it is sent when the slot is
        # free, which shows that the queue moved.
        holder, leaver, behind = (
            Script(tokens=1, hold=True, marker=next(self._markers)) for _ in range(3)
        )
        waits = "a request that waits for the only slot"
        with ExitStack() as calls:

            def call(script: Script) -> RawClient:
                request = chat_request(script, model=NARROW)
                return calls.enter_context(RawClient(self._way.port, request))

            holding = call(holder)
            holding.read_events(1)
            leaving = call(leaver)
            wait_until(lambda: self._waiting() == 1, waits)
            call(behind)
            wait_until(lambda: self._waiting() == 2, f"{waits}, behind another")
            closed_at = leaving.disconnect()
            with suppress(BenchError):
                wait_until(lambda: self._waiting() == 1, "the queue to be shorter", NEVER_MS / 1000)
            dropped_ms = min(NEVER_MS, (time.monotonic() - closed_at) * 1000)
            holding.disconnect()
            self._wait_for_any(behind.marker, leaver.marker)
            self._leavers.add(leaver.marker)  # of earlier tries as well: never sent later
            if not self._notes().keys().isdisjoint(self._leavers):
                raise BrokenAnswer("a request was sent after its client had disconnected")
        return dropped_ms

    def _notes(self) -> dict[str, MarkedRequest]:
        return engine_log(self._engine).notes

    def _lost_at(self, marker: str) -> float | None:
        return self._notes()[marker].lost_at

    def _wait_for_any(self, *markers: str) -> None:
        wait_until(lambda: not self._notes().keys().isdisjoint(markers), "a request at the engine")

    def _waiting(self) -> int:
        status, body = fetch(self._way.port, "/status")
        if status != 200:
            raise BenchError(f"GET /status returned {status}: {body[:300]!r}")
        return int(msgspec.json.decode(body)["models"][NARROW]["waiting"])
