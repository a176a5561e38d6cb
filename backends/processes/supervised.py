"""An engine that we start ourselves, and that never outlives us.

Two small keepers stand between us and it (`backends.processes.keeper`). They hold a pipe to this
process: when it ends, however it ends, they end the engine and all that it started. They
and the engine are in sessions of their own, so that Ctrl-C reaches the gateway alone.
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
from datetime import datetime
from pathlib import Path

from backends.errors import BackendError
from backends.processes import keeper

log = logging.getLogger("backends.process")

#: Between SIGTERM and SIGKILL, seconds.
GRACE_S = 5.0
#: How long what was killed may take to be gone, seconds: a driver may hold a process.
KILLED_S = 10.0
#: What ends sooner than this has not started, seconds.
MOMENT_S = 0.3
#: Between an end that nobody wanted and the next start, seconds.
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
#: What has run for so long was well, seconds.
A_WHILE_S = 60.0
#: How much of the log's end an error shows, bytes.
TAIL = 1000

COLOURS = re.compile(r"\x1b\[[\d;]*[A-Za-z]")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


class StartFailed(BackendError):
    """The engine did not start; the text has the end of what it said."""


class StopFailed(BackendError):
    """Something of the engine is still there, though it was killed."""


class Supervised:
    """An engine of ours: started, watched and stopped, any number of times.

    One task at a time starts and stops it; any may look at it.

    Args:
        command: Program and arguments.
        log: Where all it says is appended, with a dated line at each start.
        environment: Variables for it, besides those it has from us.
        tells_url: Its first line on stdout is its base URL.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        *,
        tells_url: bool = False,
    ) -> None:
        self.command = tuple(command)
        self.log = log
        #: Whether it is to run: it was started, and has not been stopped since.
        self.wanted = False
        #: Whether a start has failed, or it has ended without being stopped.
        self.failed = False
        #: Called when it has ended, told to or not.
        self.on_end: Callable[[], None] = lambda: None
        #: The base URL it told; empty before, and if it tells none.
        self.url = ""
        self._environment = dict(environment or {})
        self._tells_url = tells_url
        self._child: asyncio.subprocess.Process | None = None
        self._watching: asyncio.Task[None] | None = None
        self._log_from = 0  # where in the log its last start is
        self._spoke = asyncio.Event()
        self._ended = asyncio.Event()
        self._ended.set()

    def __repr__(self) -> str:
        state = f"pid={self.pid}" if self.running else "not running"
        return f"<Supervised {self.command[0]} {state}>"

    @property
    def running(self) -> bool:
        """Whether anything of it is there, be it on its way out."""
        return not self._ended.is_set()

    @property
    def pid(self) -> int | None:
        """The process that all of it descends from; None when there is nothing of it."""
        return self._child.pid if self._child is not None and self.running else None

    async def start(self, *, deadline_s: float | None = None) -> None:
        """Return when it runs, and has told its URL if it tells one; at once if it runs already.

        Whether it serves has to be asked over HTTP. Of a run before nothing is left: if
        that is still on its way out, it is waited for. A start that is cancelled ends
        what it has begun.

        Args:
            deadline_s: How long it may take to tell its URL.

        Raises:
            StartFailed: There is no such program, it ended within a moment, or it told no
                URL.
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
                await self._spoke.wait()
            if not self._tells_url:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(MOMENT_S):
                        await self._ended.wait()
        except TimeoutError:
            await self.stop()
            raise StartFailed(f"no word within {deadline_s:g} s; {self.last_words()}") from None
        except BaseException:
            self._ask_to_end(GRACE_S)  # and do not wait: whoever cancels is in a hurry
            raise
        if self._tells_url and not self.url.startswith("http"):
            await self.stop()
        if not self.running:
            raise StartFailed(f"{self.command[0]} does not start: {self.last_words()}")
        self.wanted = True

    async def stop(self, grace_s: float = GRACE_S) -> None:
        """Return when nothing is left of it, and of all it has started.

        It is asked to go, and killed after `grace_s`. That happens even if this call is
        cancelled.

        Raises:
            StopFailed: It was killed, and is still there.
        """
        self.wanted = False
        self._ask_to_end(grace_s)
        try:
            async with asyncio.timeout(grace_s + KILLED_S):
                await self._ended.wait()
        except TimeoutError:
            raise StopFailed(
                f"{self.command[0]} was killed and is still there, below process {self.pid}: "
                "a driver may hold it"
            ) from None

    async def keep(self) -> None:
        """Start it, and start it again whenever it has ended, until cancelled.

        It is not stopped by that. Between two starts there is a pause, longer each time until
        one has run for a while.
        """
        pause_s = FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            try:
                await self.start()
                await self._ended.wait()
                why = self.last_words()
            except BackendError as exc:
                why = str(exc)
            if time.monotonic() - began > A_WHILE_S:
                pause_s = FIRST_PAUSE_S
            log.error("%s is started again in %g s: %s", self.command[0], pause_s, why)
            await asyncio.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)

    def last_words(self) -> str:
        """How it ended, if it did, and the end of what it said since its start."""
        status = self._child.returncode if self._child is not None else None
        how = "" if self.running or status is None else f"{_how(status)}; "
        said = _tail(self.log, self._log_from)
        return f"{how}{self.log} ends with:\n{said}" if said else f"{how}nothing in {self.log}"

    async def _spawn(self) -> None:
        """Start its keepers, which start it; raises `StartFailed`."""
        try:
            output = self._open_log()
        except OSError as exc:
            raise StartFailed(f"cannot write the log {self.log}: {exc.strerror}") from exc
        program = (sys.executable, "-I", "-S", keeper.__file__)  # it needs no package
        try:
            child = await asyncio.create_subprocess_exec(
                *program,
                "pipe" if self._tells_url else "log",
                *self.command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=output,
                env=_for_others() | self._environment,
                start_new_session=True,
            )
        except OSError as exc:
            raise StartFailed(f"{self.command[0]} does not start: {exc.strerror}") from exc
        finally:
            os.close(output)
        self._child = child
        self.url = ""
        self._spoke.clear()
        self._ended.clear()
        self._watching = asyncio.create_task(self._watch(child))

    def _open_log(self) -> int:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # Engines may write what people ask, so it is not for everybody's eyes.
        output = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        # The arguments may have keys in them.
        os.write(output, f"--- {now} starting {self.command[0]}\n".encode())
        self._log_from = os.fstat(output).st_size
        return output

    async def _watch(self, child: asyncio.subprocess.Process) -> None:
        """Take note of what it says on stdout, and of its end."""
        assert child.stdout is not None  # noqa: S101 - it is a pipe
        with contextlib.suppress(ValueError):  # a line without end is no URL
            if await child.stdout.readline() == keeper.STARTED and self._tells_url:
                self.url = (await child.stdout.readline()).decode(errors="replace").strip()
        self._spoke.set()
        while await child.stdout.read(4096):
            pass  # both keepers hold it until nothing is left
        await child.wait()
        self.failed = self.failed or self.wanted
        self._ended.set()
        self.on_end()

    def _ask_to_end(self, grace_s: float) -> None:
        pipe = self._child.stdin if self._child is not None else None
        if pipe is not None and not pipe.is_closing():
            pipe.write(f"{grace_s:g}\n".encode())


def _for_others() -> dict[str, str]:
    """Our environment without our own settings, which have keys in them."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TWOLANE_")}


def _how(status: int) -> str:
    """How a process ended that left this status, our own or a shell's for a signal."""
    if status < 0 or status > keeper.SIGNALLED:
        return f"ended by signal {-status if status < 0 else status - keeper.SIGNALLED}"
    return f"ended with status {status}"


def _tail(path: Path, since: int) -> str:
    """The end of a log, as one may print it; from where it was last started at the most."""
    try:
        with path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            # Who rotates logs may have cut it off at the front.
            log.seek(max(since if since <= size else 0, size - TAIL))
            text = log.read(TAIL).decode(errors="replace")
    except OSError:
        return ""
    return CONTROL.sub("", COLOURS.sub("", text.replace("\r", "\n"))).strip()
