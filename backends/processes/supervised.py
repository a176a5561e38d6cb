"""An engine process that the gateway starts, watches and stops.

Two small keepers stand between the gateway and the engine (`backends.processes.keeper`).
They hold a pipe to this process. When it ends, however it ends, they end the engine and all
that the engine started. Keepers and engine have sessions of their own, so Ctrl-C reaches
the gateway alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from backends.errors import BackendError
from backends.processes import keeper

log = logging.getLogger("backends.process")

#: How much of the log's end an error shows, bytes.
TAIL = 1000
#: Grace between SIGTERM and SIGKILL where a stop names none, seconds.
GRACE_S = 5.0

COLOURS = re.compile(r"\x1b\[[\d;]*[A-Za-z]")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


class StartFailed(BackendError):
    """The engine did not start; the text has the end of its log."""


class StopFailed(BackendError):
    """A process of the engine still runs, although it was killed."""


@dataclass(frozen=True, slots=True)
class ProcessTimings:
    """How long the steps of a process may take, seconds.

    Attributes:
        killed_s: From SIGKILL to the end of the process; a driver may hold it that long.
        settle_s: A process that ends sooner than this has not started.
        first_pause_s: From an unexpected end to the next start …
        longest_pause_s: … and after several; each pause is twice the one before.
        stable_s: After so long a run the next pause is the first one again.
    """

    killed_s: float = 10.0
    settle_s: float = 0.3
    first_pause_s: float = 1.0
    longest_pause_s: float = 60.0
    stable_s: float = 60.0


class Supervised:
    """An engine process, to be started and stopped any number of times.

    One task at a time starts and stops it; any task may read its state.

    Args:
        command: Program and arguments.
        log: The file that its output is appended to, with a dated line at each start.
        environment: Variables for it, in addition to the gateway's own.
        reports_url: Whether the first line on its stdout is its base URL.
        timings: How long its steps may take.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        *,
        reports_url: bool = False,
        timings: ProcessTimings = ProcessTimings(),
    ) -> None:
        self.command = tuple(command)
        self.log = log
        #: Whether it should run: it was started, and has not been stopped since.
        self.wanted = False
        #: Whether a start has failed, or it has ended without being stopped.
        self.failed = False
        #: Called when it has ended, whatever the reason.
        self.on_end: Callable[[], None] = lambda: None
        #: The base URL that it reported; empty before, and if it reports none.
        self.url = ""
        self._environment = dict(environment or {})
        self._reports_url = reports_url
        self._timings = timings
        self._child: asyncio.subprocess.Process | None = None
        self._watching: asyncio.Task[None] | None = None
        self._log_from = 0  # where its last start begins in the log
        self._started = asyncio.Event()
        self._ended = asyncio.Event()
        self._ended.set()

    def __repr__(self) -> str:
        state = f"pid={self.pid}" if self.running else "not running"
        return f"<Supervised {self.command[0]} {state}>"

    @property
    def running(self) -> bool:
        """Whether any process of it runs, also while it ends."""
        return not self._ended.is_set()

    @property
    def pid(self) -> int | None:
        """The outer keeper, of which all its processes descend; None while nothing runs."""
        return self._child.pid if self._child is not None and self.running else None

    async def start(self, *, deadline_s: float | None = None) -> None:
        """Return when it runs, and has reported its URL; at once if it runs already.

        Whether it serves is to be asked over HTTP. If a run before is still ending, that end
        is awaited. Cancelling a start ends the process.

        Args:
            deadline_s: The longest it may take to report its URL.

        Raises:
            StartFailed: There is no such program, it ended at once, or it reported no URL.
        """
        if self.wanted and self.running:
            return
        try:
            await self._start(deadline_s)
        except StartFailed:
            self.failed = True
            raise

    async def _start(self, deadline_s: float | None) -> None:
        await self._ended.wait()
        await self._spawn()
        try:
            async with asyncio.timeout(deadline_s):
                await self._started.wait()
            if not self._reports_url:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._timings.settle_s):
                        await self._ended.wait()
        except TimeoutError:
            await self.stop()
            text = f"it reported no URL within {deadline_s:g} s; {self.exit_report()}"
            raise StartFailed(text) from None
        except BaseException:
            self._request_end(GRACE_S)  # without waiting: a cancelled call returns soon
            raise
        if self._reports_url and not self.url.startswith("http"):
            await self.stop()
        if not self.running:
            raise StartFailed(f"{self.command[0]} does not start: {self.exit_report()}")
        self.wanted = True

    async def stop(self, grace_s: float = GRACE_S) -> None:
        """Return when it has ended, and every process that it started.

        It receives SIGTERM, and SIGKILL after `grace_s`, also if this call is cancelled.

        Raises:
            StopFailed: It was killed and still runs.
        """
        self.wanted = False
        self._request_end(grace_s)
        try:
            async with asyncio.timeout(grace_s + self._timings.killed_s):
                await self._ended.wait()
        except TimeoutError:
            raise StopFailed(
                f"{self.command[0]} was killed and still runs, below process {self.pid}: "
                "a driver may hold it"
            ) from None

    async def keep_running(self) -> None:
        """Start it, and start it again whenever it has ended, until cancelled.

        Cancelling does not stop the process. Between two starts there is a pause, which
        doubles until a run was stable.
        """
        pause_s = self._timings.first_pause_s
        while True:
            began = time.monotonic()
            try:
                await self.start()
                await self._ended.wait()
                reason = self.exit_report()
            except BackendError as exc:
                reason = str(exc)
            if time.monotonic() - began > self._timings.stable_s:
                pause_s = self._timings.first_pause_s
            log.error("%s is started again in %g s: %s", self.command[0], pause_s, reason)
            await asyncio.sleep(pause_s)
            pause_s = min(self._timings.longest_pause_s, 2 * pause_s)

    def exit_report(self) -> str:
        """How it ended, if it did, and the end of its log since its start."""
        status = self._child.returncode if self._child is not None else None
        how = "" if self.running or status is None else f"{_how_it_ended(status)}; "
        tail = _tail(self.log, self._log_from)
        return f"{how}{self.log} ends with:\n{tail}" if tail else f"{how}nothing in {self.log}"

    async def _spawn(self) -> None:
        """Start the keepers, which start the engine; raises `StartFailed`."""
        try:
            output = self._open_log()
        except OSError as exc:
            raise StartFailed(f"cannot write the log {self.log}: {exc.strerror}") from exc
        program = (sys.executable, "-I", "-S", keeper.__file__)  # it needs no package
        try:
            child = await asyncio.create_subprocess_exec(
                *program,
                "pipe" if self._reports_url else "log",
                *self.command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=output,
                env=_environment_without_ours() | self._environment,
                start_new_session=True,
            )
        except OSError as exc:
            raise StartFailed(f"{self.command[0]} does not start: {exc.strerror}") from exc
        finally:
            os.close(output)
        self._child = child
        self.url = ""
        self._started.clear()
        self._ended.clear()
        self._watching = asyncio.create_task(self._watch(child))

    def _open_log(self) -> int:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # Engines may log prompts, so only the owner may read the file.
        output = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        # Without the arguments, which may hold keys.
        os.write(output, f"--- {now} starting {self.command[0]}\n".encode())
        self._log_from = os.fstat(output).st_size
        return output

    async def _watch(self, child: asyncio.subprocess.Process) -> None:
        """Read its URL from stdout, then wait for its end."""
        assert child.stdout is not None  # noqa: S101 - it is a pipe
        with contextlib.suppress(ValueError):  # a line without end is not a URL
            if await child.stdout.readline() == keeper.STARTED and self._reports_url:
                self.url = (await child.stdout.readline()).decode(errors="replace").strip()
        self._started.set()
        while await child.stdout.read(4096):
            pass  # both keepers hold it open until every process has ended
        await child.wait()
        self.failed = self.failed or self.wanted
        self._ended.set()
        self.on_end()

    def _request_end(self, grace_s: float) -> None:
        pipe = self._child.stdin if self._child is not None else None
        if pipe is not None and not pipe.is_closing():
            pipe.write(f"{grace_s:g}\n".encode())


def _environment_without_ours() -> dict[str, str]:
    """The gateway's environment without its own settings, which may hold keys."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TWOLANE_")}


def _how_it_ended(status: int) -> str:
    """An exit status in words; a shell's status above 128 stands for a signal."""
    if status < 0 or status > keeper.SIGNALLED:
        return f"ended by signal {-status if status < 0 else status - keeper.SIGNALLED}"
    return f"ended with status {status}"


def _tail(path: Path, since: int) -> str:
    """The end of a log as printable text, of its last start at most."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            # Log rotation may have cut it off at the front.
            file.seek(max(since if since <= size else 0, size - TAIL))
            text = file.read(TAIL).decode(errors="replace")
    except OSError:
        return ""
    return CONTROL.sub("", COLOURS.sub("", text.replace("\r", "\n"))).strip()
