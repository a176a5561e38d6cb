"""Open WebUI and the browser, started once for all tests; a gateway for each."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import pytest
from playwright.async_api import Browser, async_playwright, expect

from tests.engines import rig
from tests.engines.conftest import running
from tests.support.chat_page import ChatPage
from tests.support.gateways import Running, run_gateway
from tests.support.requirements import unavailable

KEY = "sk-of-the-chat-page"
PICTURES = rig.ROOT / ".cache" / "browser"
GET_CHROMIUM = (
    "Chromium is not on PATH. Install your system's (apt-get install chromium), then run "
    "`make test-browser` again; until then these tests are skipped."
)
SLOTS = 4
#: The longest that anything on the page may take on a busy machine.
PATIENCE_S = 30

StartGateway: TypeAlias = Callable[..., AbstractAsyncContextManager[Running]]
OpenPage: TypeAlias = Callable[[], Awaitable[ChatPage]]


@dataclass(frozen=True)
class Site:
    """Where Open WebUI is, and the port on which it looks for the gateway."""

    url: str
    gateway_port: int


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's program."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        unavailable(GET_CHROMIUM)
    return found


@pytest.fixture(scope="session")
def ollama() -> Iterator[rig.Engine]:
    """With slots for the page's own calls, which would take their time before the next turn."""
    yield from running(rig.ollama(num_parallel=SLOTS))


@pytest.fixture(scope="session")
def site(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Open WebUI, set up as the README says, before a gateway that each test starts."""
    port = rig.free_port()
    api = f"http://127.0.0.1:{port}/v1"
    data = tmp_path_factory.mktemp("open-webui")
    for page in running(rig.open_webui(api, KEY, data)):
        yield Site(page.url, port)


@pytest.fixture(scope="session")
async def browser(chromium: str) -> AsyncIterator[Browser]:
    """The browser; who is root may start it only without its sandbox."""
    shutil.rmtree(PICTURES, ignore_errors=True)
    expect.set_options(timeout=PATIENCE_S * 1000)
    async with async_playwright() as playwright:
        started = await playwright.chromium.launch(
            executable_path=chromium, chromium_sandbox=os.geteuid() != 0
        )
        yield started
        await started.close()


@pytest.fixture
async def open_page(
    site: Site, browser: Browser, request: pytest.FixtureRequest
) -> AsyncIterator[OpenPage]:
    """Opens the page as one more person, who shares nothing with the others.

    What each sees at the end is kept as a picture.
    """
    pages: list[ChatPage] = []
    async with AsyncExitStack() as contexts:

        async def opened() -> ChatPage:
            context = await browser.new_context(viewport={"width": 1100, "height": 700})
            contexts.push_async_callback(context.close)
            context.set_default_timeout(PATIENCE_S * 1000)
            stem = f"{request.node.name}-{len(pages) + 1}" if pages else request.node.name
            page = ChatPage(await context.new_page(), site.url, PICTURES / stem)
            pages.append(page)
            await page.open()
            return page

        yield opened
        for page in pages:
            await page.shot()


@pytest.fixture
def start(site: Site) -> StartGateway:
    """What starts a gateway where Open WebUI looks for it, for an `async with`."""
    return partial(run_gateway, port=site.gateway_port, api_keys=[KEY])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say where the pictures are."""
    if any(PICTURES.glob("*.png")):
        terminalreporter.write_line(f"screenshots: {PICTURES}")


def smollm2(ollama: rig.Engine, slots: int = SLOTS) -> dict[str, Any]:
    """Settings that serve the real Ollama's model as `smollm2`."""
    return {
        "engines": {"ollama": {"urls": [ollama.url]}},
        "models": {"smollm2": {"lanes": {"ollama": {"model": ollama.model, "slots": slots}}}},
    }
