"""Open WebUI's page, operated by the roles, names and ids of its elements."""

from __future__ import annotations

import re
from pathlib import Path

from playwright.async_api import Locator, Page, expect


class ChatPage:
    """One person's page.

    Args:
        page: What the browser shows.
        home: Where Open WebUI is.
        pictures: Where screenshots go; their names begin like this.
    """

    def __init__(self, page: Page, home: str, pictures: Path) -> None:
        self.page = page
        self._home = home
        self._pictures = pictures

    async def open(self) -> None:
        """Open a new chat with the default model, and close the release notes."""
        news = self.page.get_by_role("button", name="Okay, Let's Go!")
        await self.page.add_locator_handler(news, news.click)
        await self.page.goto(self._home)
        await expect(self.page.locator("#chat-input")).to_be_visible()
        await expect(self._selector).to_be_visible()

    async def say(self, text: str) -> None:
        """Send a message."""
        await self.page.locator("#chat-input").click()
        await self.page.keyboard.insert_text(text)
        await self.page.keyboard.press("Enter")
        await expect(self.page.locator(".user-message").last).to_contain_text(text)

    @property
    def answers(self) -> Locator:
        """The model's answers so far, an element for each turn."""
        return self.page.locator(".chat-assistant")

    async def read(self) -> str:
        """The last answer, as much of it as there is."""
        return (await self.answers.last.inner_text()).strip()

    async def shows_words(self) -> None:
        """Return when an answer has begun."""
        await expect(self.answers.last.locator("p").first).to_have_text(re.compile(r"\w"))

    async def finished(self, turns: int = 1) -> str:
        """The whole last answer, as soon as so many have come to their end."""
        await expect(self.page.get_by_role("button", name="Regenerate")).to_have_count(turns)
        return await self.read()

    async def stop(self) -> None:
        """Press Stop while an answer is streaming."""
        await self.page.get_by_role("button", name="Stop", exact=True).click()

    # The list of models

    @property
    def _selector(self) -> Locator:
        return self.page.locator("#model-selector-model-button")

    @property
    def options(self) -> Locator:
        """The models in the open list."""
        return self.page.get_by_role("option")

    @property
    def dot(self) -> Locator:
        """The mark of a loaded model in the open list."""
        return self.options.locator(".bg-green-500")

    async def open_list(self) -> None:
        """Open the model selector."""
        await self._selector.click()
        await expect(self.options.first).to_be_visible()

    async def eject(self) -> None:
        """Unload the first model of the open list."""
        await self.options.first.hover()
        await self.options.first.get_by_role("button", name="Eject model").click()

    # The administrator's list

    async def manage(self) -> None:
        """Open the administrator's page for loading and unloading models."""
        await self.page.goto(f"{self._home}/admin/settings/models")
        await self.page.get_by_role("button", name="Actions").click()
        await self.page.get_by_role("button", name=re.compile("^Manage")).click()

    async def press(self, button: str, then: str) -> None:
        """Press the first model's button, and return when the list shows its new state."""
        await self.page.get_by_role("button", name=button).first.click()
        await expect(self.page.get_by_text(then, exact=True)).to_be_visible()

    async def shot(self, name: str = "") -> Path:
        """Save a screenshot of the page; its path."""
        self._pictures.parent.mkdir(parents=True, exist_ok=True)
        stem = f"{self._pictures.name}-{name}" if name else self._pictures.name
        file = self._pictures.with_name(f"{stem}.png")
        await self.page.screenshot(path=file, animations="disabled")
        return file
