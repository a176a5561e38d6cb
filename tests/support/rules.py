"""What kind of test a test is, and what follows from it.

A test is a *unit* test if it is a plain `def` without the mark `integration`, outside the folders
of real engines: it may open no connection and start no program, in every run. A test that waits
is a coroutine and never one. `make unit` leaves out those that are `slow`, because they
compute for seconds.
A test with the mark `alone` measures time: no other test runs beside it, however many workers
there are.
"""

from __future__ import annotations

import contextlib
import fcntl
import inspect
import multiprocessing.process
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from xdist.scheduler import LoadScopeScheduling

#: What opens a connection or starts a program.
DOORS: tuple[tuple[type, str], ...] = (
    (socket.socket, "bind"),
    (socket.socket, "connect"),
    (socket.socket, "connect_ex"),
    (subprocess.Popen, "__init__"),
    (multiprocessing.process.BaseProcess, "start"),
)

#: Folders of tests on real engines, in Docker or in a browser; none of them is a unit test.
REAL = frozenset(("browser", "compose", "engines"))
#: Modules whose tests share a fixture that takes long, such as a whole comparison.
TOGETHER = ("test_compare.py", "test_report.py", "test_package.py")


def is_unit(item: pytest.Item) -> bool:
    """Whether the test may neither connect nor start a program."""
    function = getattr(item, "obj", None)
    return not (
        inspect.iscoroutinefunction(function)
        or _has(item, "integration")
        or item.path.parent.name in REAL
    )


class Groups(LoadScopeScheduling):
    """xdist's scheduler by groups, where the tests of a group share a fixture that takes long.

    xdist's own `loadgroup` has no effect with pytest 9.2: the mark gets lost on the way to here.
    """

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid) or nodeid


def group(nodeid: str) -> str:
    """The group that one worker runs as a whole; empty: a test that any worker may run."""
    file, _, test = nodeid.partition("::")
    name = Path(file).name
    if name == "test_simulate.py" and "[" in test:
        return test.partition("[")[2]  # all tests of a simulated day
    return name if name in TOGETHER else ""


def in_order(items: list[pytest.Item]) -> list[pytest.Item]:
    """The tests in the order in which two workers are done soonest.

    Groups, which one worker runs as a whole, come first: they take longest. Tests that must be
    alone come last, when nothing long runs any more that they would wait for.
    """
    return sorted(items, key=lambda item: (_has(item, "alone"), not group(item.nodeid)))


def _has(item: pytest.Item, mark: str) -> bool:
    return item.get_closest_marker(mark) is not None


@contextlib.contextmanager
def closed_doors() -> Iterator[None]:
    """Let every attempt to connect, to listen or to start a program fail."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        pytest.fail(
            "a unit test opens no connection and starts no program: mark it "
            "@pytest.mark.integration"
        )

    with pytest.MonkeyPatch.context() as patch:
        for owner, method in DOORS:
            patch.setattr(owner, method, refuse)
        yield


@contextlib.contextmanager
def machine(*, alone: bool) -> Iterator[None]:
    """Share this machine with the tests of other workers, or have it alone.

    Two files that are there anyway serve as locks. The first is held by who waits, so that a
    test that waits to be alone is next when the running tests have ended.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:  # the only process
        yield
        return
    here = Path(__file__)
    with here.open() as turn, here.with_name("waiting.py").open() as own:
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(own, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        yield
