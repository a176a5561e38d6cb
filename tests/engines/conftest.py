"""The real engines, started once for all tests that need them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack

import pytest

from tests.engines import rig


def running(server: AbstractContextManager[rig.Engine]) -> Iterator[rig.Engine]:
    """A server for as long as its fixture lives.

    Where it cannot be started the test is skipped with what to install; in CI, where it
    has been installed, it fails.
    """
    with ExitStack() as stack:
        try:
            engine = stack.enter_context(server)
        except rig.RigError as exc:
            if os.environ.get("CI") == "true":
                raise
            pytest.skip(str(exc))
        yield engine


@pytest.fixture(scope="session")
def ollama() -> Iterator[rig.Engine]:
    yield from running(rig.ollama())


@pytest.fixture(scope="session")
def vllm() -> Iterator[rig.Engine]:
    yield from running(rig.vllm())
