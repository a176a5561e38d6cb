"""Runs one engine, and ends all its processes, however any of them ends.

    gateway ──a pipe──► outer keeper ──► inner keeper ──► engine ──► what it starts

The inner keeper ends the engine when the gateway says so, when the pipe closes because the
gateway has ended, and when the outer keeper has ended. The outer keeper ends whatever is
left when the inner one has ended. So any of the three may be killed with -9, also the
gateway together with one keeper. Only if both keepers are killed at the same moment do
processes that the engine started remain; the engine itself ends.

On Linux the kernel guarantees it: a keeper becomes the parent of every orphan below it,
in any session, and ends when it has no children. Elsewhere (macOS) it covers the processes
that stayed in the engine's process group.

This is a program of its own, of the standard library alone: see `main`.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

#: The line on stdout that reports that the engine's program was found and runs.
STARTED = b"started\n"
#: Seconds from SIGTERM to SIGKILL when the gateway has ended and names none.
ORPHAN_GRACE_S = 3.0
#: Seconds between two looks at processes that are ending.
POLL_S = 0.02
#: Exit statuses as of a shell: the program could not run; 128 + the signal that ended it.
NOT_RUN = 127
SIGNALLED = 128

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


class ProcessTree:
    """A child process and its descendants, from their keeper's view."""

    def __init__(self, root: int) -> None:
        self.root = root
        self.status: int | None = None  # the exit status of the root

    def reap(self, *, wait: bool = False) -> bool:
        """Collect the processes that have ended; False when none is left.

        Args:
            wait: Return only when the root has ended.
        """
        while True:
            try:
                pid, status = os.waitpid(-1, 0 if wait else os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.root:
                code = os.waitstatus_to_exitcode(status)
                self.status = code if code >= 0 else SIGNALLED - code
                if wait:
                    return True

    def end(self, grace_s: float) -> None:
        """Return when no process is left.

        The root receives SIGTERM first, so that it can end its children in its own order.
        Then those that it left receive it, and after `grace_s` all receive SIGKILL.
        """
        deadline = time.monotonic() + grace_s
        orphans_signalled = False
        if self.status is None:
            os.kill(self.root, signal.SIGTERM)
        while self.reap():
            if time.monotonic() >= deadline:
                self.signal(signal.SIGKILL)
            elif self.status is not None and not orphans_signalled:
                self.signal(signal.SIGTERM)
                orphans_signalled = True
            time.sleep(POLL_S)
        if sys.platform != "linux":
            self.signal(signal.SIGKILL)

    def signal(self, sign: int) -> None:
        """Send a signal to all of them."""
        if sys.platform == "linux":
            for pid in descendants():
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, sign)
        else:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.root, sign)


def descendants() -> set[int]:
    """The processes below this one (Linux); one that is just starting may be missing."""
    parents: dict[int, int] = {}
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with suppress(OSError):  # it has ended
                stat = (process / "stat").read_bytes()
                # The name, in brackets, may contain anything, also brackets.
                parents[int(process.name)] = int(stat.rpartition(b")")[2].split()[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def fork_with_pdeathsig(run: Callable[[], int], sign: int) -> int:
    """Run a function in a child that receives `sign` when this process ends; returns its pid."""
    parent = os.getpid()
    if pid := os.fork():
        return pid
    try:
        if sys.platform == "linux":
            prctl(PR_SET_PDEATHSIG, sign)
            if os.getppid() != parent:
                os._exit(SIGNALLED + sign)  # the parent ended before the signal was set
        os._exit(run())
    except BaseException as exc:  # noqa: BLE001 - the parent's code must not run a second time
        os.write(2, f"{exc!r}\n".encode())
        os._exit(NOT_RUN)


def prctl(option: int, value: int) -> None:
    """Set an option of this process (Linux); raises OSError."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def adopt_orphans() -> None:
    """Become the parent of every descendant whose parent ends (Linux)."""
    if sys.platform == "linux":
        prctl(PR_SET_CHILD_SUBREAPER, 1)


def outer_keeper(command: list[str], *, pipe_stdout: bool) -> int:
    """Wait for the inner keeper, and end what it left; returns the engine's exit status."""
    adopt_orphans()
    tree = ProcessTree(
        fork_with_pdeathsig(lambda: inner_keeper(command, pipe_stdout=pipe_stdout), signal.SIGTERM)
    )

    def pass_on(sign: int, frame: FrameType | None) -> None:
        if tree.status is None:
            os.kill(tree.root, sign)

    signal.signal(signal.SIGTERM, pass_on)
    tree.reap(wait=True)
    tree.end(0.0)
    assert tree.status is not None  # noqa: S101 - it was waited for
    return tree.status


def inner_keeper(command: list[str], *, pipe_stdout: bool) -> int:
    """Run the engine until it ends or is to end; returns its exit status when none is left."""
    adopt_orphans()
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for sign in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(sign, lambda *_: None)  # `woken` reports them
    tree = ProcessTree(start_engine(command, pipe_stdout=pipe_stdout))
    grace_s = ORPHAN_GRACE_S
    while tree.status is None:
        readable, _, _ = select.select([0, woken], [], [])
        if 0 in readable:
            grace_s = parse_grace_s(os.read(0, 64))
            break
        if signal.SIGTERM in os.read(woken, 64):
            break
        tree.reap()
    tree.end(grace_s)
    assert tree.status is not None  # noqa: S101 - no process is left
    return tree.status


def parse_grace_s(line: bytes) -> float:
    """The seconds of grace that the gateway sent; it sends none when it has ended."""
    try:
        return float(line)
    except ValueError:
        return ORPHAN_GRACE_S


def start_engine(command: list[str], *, pipe_stdout: bool) -> int:
    """Start the engine, and report it; returns its pid, also where it could not run."""
    runs, fails = os.pipe()  # the second closes when exec replaces this program
    # Its stdin never has data; but it closes when the keeper ends, for an engine that reads it.
    stdin, _ = os.pipe()

    def become() -> int:
        os.setsid()  # an engine that signals its process group must not reach the keeper
        os.dup2(stdin, 0)
        if not pipe_stdout:
            os.dup2(2, 1)
        for sign in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(sign, signal.SIG_DFL)  # Python ignores them, and exec would keep that
        try:
            os.execvp(command[0], command)  # noqa: S606 - a shell would stand in between
        except OSError as exc:
            os.write(2, f"cannot run {command[0]}: {exc.strerror}\n".encode())
            os.write(fails, b".")
        return NOT_RUN

    pid = fork_with_pdeathsig(become, signal.SIGKILL)
    os.close(fails)
    if not os.read(runs, 1):
        with suppress(OSError):  # the gateway has ended; stdin will show it
            os.write(1, STARTED)
    return pid


def main() -> None:
    """Run `keeper.py log|pipe PROGRAM ARGUMENT…`; the status is the program's.

    The program's output goes to stderr; with `pipe` its stdout goes to stdout. A number on
    stdin ends it with so many seconds of grace. The end of stdin and SIGTERM end it, too.
    """
    where, *command = sys.argv[1:]
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # uvloop passes inheritable files on
    sys.exit(outer_keeper(command, pipe_stdout=where == "pipe"))


if __name__ == "__main__":
    main()
