"""Users who send requests without a pause, and how each of their answers ended."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tests.support.gateways import Running
from tests.support.waiting import until

#: Returns a user's next request, from random numbers of his own.
Ask: TypeAlias = Callable[[random.Random], dict[str, Any]]


@dataclass(eq=False)
class Answer:
    """One streamed answer: `asked` is a monotonic time, `over` whether it was read to its end."""

    asked: float = field(default_factory=time.monotonic)
    status: int | None = None
    body: bytes = b""
    over: bool = False

    @property
    def events(self) -> list[Any]:
        """Its events without the final [DONE]; empty where that is missing."""
        datas = [part for part in self.body.decode().split("\n\n") if part.startswith("data: ")]
        if self.status != 200 or not datas or datas.pop() != "data: [DONE]":
            return []
        return [json.loads(data.removeprefix("data: ")) for data in datas]

    @property
    def text(self) -> str:
        return "".join(
            choice["delta"].get("content") or ""
            for event in self.events
            for choice in event.get("choices", ())
        )

    @property
    def outcome(self) -> str:
        """How it ended for the client: `whole`, `cut` (an error event at the end) or `lost`."""
        events = self.events
        finished = [
            choice["finish_reason"]
            for event in events
            for choice in event.get("choices", ())
            if choice["finish_reason"]
        ]
        errors = [event for event in events if "error" in event]
        if events and len(finished) == 1 and not errors:
            return "whole"
        if self.text and not finished and errors == [events[-1]]:
            return "cut"
        return "lost"


class Crowd:
    """The answers to all users, in the order of their requests."""

    def __init__(self, people: int) -> None:
        self._people = people
        self.answers: list[Answer] = []

    @property
    def now(self) -> list[Answer]:
        """The answers that are not over yet; each user has at most one."""
        return [answer for answer in self.answers[-4 * self._people :] if not answer.over]

    async def until(self, happened: Callable[[], object], within_s: float = 60.0) -> None:
        """Return when this holds."""
        await until(happened, within_s)

    async def more(self, count: int) -> list[Answer]:
        """The answers to the next `count` requests, once all of them are over."""
        first = len(self.answers)
        wanted = slice(first, first + count)
        await self.until(lambda: len(self.answers) >= first + count)
        await self.until(lambda: all(answer.over for answer in self.answers[wanted]))
        return self.answers[wanted]


@asynccontextmanager
async def crowd(running: Running, people: int, ask: Ask) -> AsyncIterator[Crowd]:
    """Users who send, read to the end and send again; leaving waits for their last answers."""
    seen, over = Crowd(people), asyncio.Event()

    async def person(number: int) -> None:
        dice = random.Random(number)
        while not over.is_set():
            answer = Answer()
            seen.answers.append(answer)
            body = {**ask(dice), "stream": True}
            url = "/v1/chat/completions"
            async with running.http.stream("POST", url, json=body, timeout=60) as response:
                answer.status = response.status_code
                async for part in response.aiter_bytes():
                    answer.body += part
            answer.over = True

    async with asyncio.TaskGroup() as group:
        for number in range(people):
            group.create_task(person(number))
        try:
            yield seen
        finally:
            over.set()
