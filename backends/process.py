"""An engine that we start ourselves, and that never outlives us.

The child holds the other end of a pipe: when this process ends, however it ends, the
pipe closes and the child goes. It gets its own process group, so that Ctrl-C reaches
the gateway alone and a stop reaches everything the child may have started.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from backends.base import BackendError

STOP_S = 5.0


class StartFailed(BackendError):
    """The engine did not start; the text has the end of what it said."""


class Process:
    """A running child whose first line on stdout was its base URL."""

    def __init__(self, child: asyncio.subprocess.Process, url: str) -> None:
        self.url = url
        self._child = child

    @property
    def pid(self) -> int:
        return self._child.pid

    @classmethod
    async def start(cls, command: Sequence[str], log: Path, *, deadline_s: float) -> Process:
        """Start a command and return when it has told its base URL.

        Args:
            command: Program and arguments.
            log: Where its stderr goes.
            deadline_s: How long it may take.

        Raises:
            StartFailed: It ended, or said nothing in time.
        """
        with log.open("wb") as errors:
            child = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        process = cls(child, "")
        assert child.stdout is not None  # noqa: S101 - it is a pipe
        try:
            async with asyncio.timeout(deadline_s):
                line = (await child.stdout.readline()).decode(errors="replace").strip()
        except BaseException as exc:
            await process.stop()
            if isinstance(exc, TimeoutError):
                raise StartFailed(f"no word within {deadline_s:g} s; see {log}") from None
            raise
        if not line.startswith("http"):
            await process.stop()
            tail = log.read_text(errors="replace")[-600:]  # noqa: ASYNC240 - nothing serves yet
            raise StartFailed(f"{command[0]} ended before it served; {log} ends with:\n{tail}")
        process.url = line
        return process

    async def stop(self) -> None:
        """End it and everything it started: asked first, killed when it does not listen."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, sign)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await self._child.wait()
                    return
