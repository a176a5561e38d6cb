"""The fixtures of all tests: the event loop of the product, and a gateway in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from blockbuster import BlockBuster

from backends.fake import FakeEngine
from tests.support import rules
from tests.support.exclusive import Box, boxed
from tests.support.gateways import StartGateway, run_gateway

# A deadline of milliseconds would measure how busy the machine is.
hypothesis.settings.register_profile("full", deadline=None)
hypothesis.settings.register_profile("quick", deadline=None, max_examples=20)
hypothesis.settings.load_profile("full")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the unit tests, for `-m unit`, and order all."""
    for item in items:
        if rules.is_unit(item):
            item.add_marker(pytest.mark.unit)
    items[:] = rules.in_order(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> rules.Groups | None:
    """Give the tests of a group to one worker, with `--dist loadgroup`."""
    return rules.Groups(config, log) if config.getoption("dist") == "loadgroup" else None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Run each test, with its fixtures, under the rules of its kind."""
    doors = rules.closed_doors() if item.get_closest_marker("unit") else contextlib.nullcontext()
    with rules.machine(alone=item.get_closest_marker("alone") is not None), doors:
        return (yield)


@pytest.fixture
def start_gateway() -> StartGateway:
    """What starts a gateway with the given settings, for an `async with`."""
    return run_gateway


@pytest.fixture
async def ollama() -> AsyncIterator[FakeEngine]:
    """A fake Ollama with one model."""
    async with FakeEngine("ollama", ["small:1b"]) as engine:
        yield engine


@pytest.fixture
async def vllm() -> AsyncIterator[FakeEngine]:
    """A fake vLLM with one model."""
    async with FakeEngine("vllm", ["Small-1B"]) as engine:
        yield engine


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Box]:
    """Two fake engines that share one GPU; nothing is loaded."""
    async with boxed(tmp_path) as box:
        yield box


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The loop that the gateway runs on."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="session", autouse=True)
def _nothing_blocks_the_loop() -> Iterator[None]:
    """Fail the gateway's calls that block the event loop; files may be read, as at the start."""
    modules = ["gateway", "backends"]
    functions = BlockBuster(modules, excluded_modules=["backends.fake"]).functions
    guarded = [functions[name] for name in functions if name.startswith(("time", "socket", "ssl"))]
    for function in guarded:
        function.activate()
    yield
    for function in guarded:
        function.deactivate()


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a contributor's own TWOLANE_* variables out of the tests."""
    for name in os.environ:
        if name.startswith("TWOLANE_"):
            monkeypatch.delenv(name)
