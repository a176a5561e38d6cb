"""Runs one engine, and leaves nothing of it behind, whoever dies how.

    gateway ──a pipe──► outer keeper ──► inner keeper ──► engine ──► what it starts

The inner keeper ends the engine when the gateway says so, when the pipe closes because
the gateway is gone, and when the outer keeper is gone. The outer one ends what is left
when the inner one is gone. So of the three any may be killed with -9, and the gateway
together with either keeper; only who kills both keepers at one stroke is left with what
the engine had started (the engine itself goes).

On Linux "nothing" is the kernel's word: a keeper is the parent of every orphan below it,
in whatever session that hid, and has ended when it has no children. Elsewhere (macOS) it
is as much as stayed in the engine's process group.

A program of its own, from the standard library alone: see `main`.
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

#: What it says on stdout when the engine's program has been found and runs.
STARTED = b"started\n"
#: Seconds from SIGTERM to SIGKILL when nobody is there to say.
ALONE_S = 3.0
#: How often it looks while something ends.
LOOK_S = 0.02
#: As a shell does: what could not be run, and the signal that ended what ran.
NOT_RUN = 127
SIGNALLED = 128

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


class Family:
    """A child and all that descends from it, as their keeper sees it."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.status: int | None = None  # the first's, once it has ended

    def bury(self, *, wait: bool = False) -> bool:
        """Take note of who has ended; False when nobody is left.

        `wait`: return only when the first has ended.
        """
        while True:
            try:
                pid, status = os.waitpid(-1, 0 if wait else os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.first:
                code = os.waitstatus_to_exitcode(status)
                self.status = code if code >= 0 else SIGNALLED - code
                if wait:
                    return True

    def end(self, grace_s: float) -> None:
        """Return when nobody is left.

        The first is asked to go, so that it can end its own in the order it knows; those
        it leaves are asked next; whoever is there after `grace_s` is killed.
        """
        deadline = time.monotonic() + grace_s
        orphans_asked = False
        if self.status is None:
            os.kill(self.first, signal.SIGTERM)
        while self.bury():
            if time.monotonic() >= deadline:
                self.signal(signal.SIGKILL)
            elif self.status is not None and not orphans_asked:
                self.signal(signal.SIGTERM)
                orphans_asked = True
            time.sleep(LOOK_S)
        if sys.platform != "linux":
            self.signal(signal.SIGKILL)

    def signal(self, sign: int) -> None:
        """Send all of them a signal."""
        if sys.platform == "linux":
            for pid in descendants():
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, sign)
        else:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.first, sign)


def descendants() -> set[int]:
    """The processes below this one (Linux); one that is just being born may be missing."""
    parents: dict[int, int] = {}
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with suppress(OSError):  # it has ended
                stat = (process / "stat").read_bytes()
                # Its name, in brackets, may hold anything, brackets too.
                parents[int(process.name)] = int(stat.rpartition(b")")[2].split()[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def child(run: Callable[[], int], sign: int) -> int:
    """Run this in a child that gets `sign` when this process ends; returns its pid."""
    parent = os.getpid()
    if pid := os.fork():
        return pid
    try:
        if sys.platform == "linux":
            prctl(PR_SET_PDEATHSIG, sign)
            if os.getppid() != parent:
                os._exit(SIGNALLED + sign)  # it was gone before we asked to be told
        os._exit(run())
    except BaseException as exc:  # noqa: BLE001 - the parent's code must not run a second time
        os.write(2, f"{exc!r}\n".encode())
        os._exit(NOT_RUN)


def prctl(option: int, value: int) -> None:
    """Set something about this process (Linux); raises OSError."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def adopt_orphans() -> None:
    """Be the parent of all below that lose theirs."""
    if sys.platform == "linux":
        prctl(PR_SET_CHILD_SUBREAPER, 1)


def outer(command: list[str], *, heard: bool) -> int:
    """Wait for the inner keeper, and end whatever it left; returns the engine's status."""
    adopt_orphans()
    family = Family(child(lambda: inner(command, heard=heard), signal.SIGTERM))

    def pass_on(sign: int, frame: FrameType | None) -> None:
        if family.status is None:
            os.kill(family.first, sign)

    signal.signal(signal.SIGTERM, pass_on)
    family.bury(wait=True)
    family.end(0.0)
    assert family.status is not None  # noqa: S101 - it was waited for
    return family.status


def inner(command: list[str], *, heard: bool) -> int:
    """Run the engine until it ends or is to end; returns its status when nothing is left."""
    adopt_orphans()
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for sign in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(sign, lambda *_: None)  # they are read from `woken`
    family = Family(start(command, heard=heard))
    grace_s = ALONE_S
    while family.status is None:
        readable, _, _ = select.select([0, woken], [], [])
        if 0 in readable:
            grace_s = given(os.read(0, 64))
            break
        if signal.SIGTERM in os.read(woken, 64):
            break
        family.bury()
    family.end(grace_s)
    assert family.status is not None  # noqa: S101 - nobody is left
    return family.status


def given(line: bytes) -> float:
    """The seconds of grace that the gateway gives; if it gives none, it is gone."""
    try:
        return float(line)
    except ValueError:
        return ALONE_S


def start(command: list[str], *, heard: bool) -> int:
    """Start the engine, and say so; returns its pid, also where it could not be run."""
    runs, fails = os.pipe()  # the second closes when another program takes our place
    # Nothing is ever said on its stdin; but one that listens there hears when we are gone.
    stdin, _ = os.pipe()

    def become() -> int:
        os.setsid()  # whoever signals its own process group must not meet us
        os.dup2(stdin, 0)
        if not heard:
            os.dup2(2, 1)
        for sign in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(sign, signal.SIG_DFL)  # Python ignores them, and so would it
        try:
            os.execvp(command[0], command)  # noqa: S606 - a shell would stand in between
        except OSError as exc:
            os.write(2, f"cannot run {command[0]}: {exc.strerror}\n".encode())
            os.write(fails, b".")
        return NOT_RUN

    pid = child(become, signal.SIGKILL)
    os.close(fails)
    if not os.read(runs, 1):
        with suppress(OSError):  # the gateway is gone, as we are about to hear
            os.write(1, STARTED)
    return pid


def main() -> None:
    """Run `keeper.py log|pipe PROGRAM ARGUMENT…`; the status is the program's.

    All it says goes to stderr; with `pipe` its stdout goes to ours. A number on stdin ends
    it with so many seconds of grace. The end of stdin ends it, too, and so does SIGTERM.
    """
    where, *command = sys.argv[1:]
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # uvloop lets through what may be inherited
    sys.exit(outer(command, heard=where == "pipe"))


if __name__ == "__main__":
    main()
