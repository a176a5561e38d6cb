"""Waiting for a condition: the one loop of the tests that looks again and again."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable


async def until(
    condition: Callable[[], object],
    within_s: float = 30.0,
    *,
    every_s: float = 0.005,
    describe: Callable[[], object] | None = None,
) -> None:
    """Return as soon as the condition holds.

    Args:
        condition: A function or a coroutine function; what it returns is true or false.
        within_s: The test fails after so long. A generous limit costs nothing.
        every_s: Pause between two looks.
        describe: What the failure's message says of the state then.

    Raises:
        TimeoutError: The condition did not hold in time.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    while not await _value(condition):
        if loop.time() > deadline:
            state = f": {describe()}" if describe else ""
            raise TimeoutError(f"the condition did not hold within {within_s:g} s{state}")
        await asyncio.sleep(every_s)


def wait_until(
    condition: Callable[[], object],
    within_s: float = 30.0,
    *,
    every_s: float = 0.05,
    describe: Callable[[], object] | None = None,
) -> None:
    """The same as `until`, for a test that has no event loop."""
    asyncio.run(until(condition, within_s, every_s=every_s, describe=describe))


async def _value(condition: Callable[[], object]) -> object:
    result = condition()
    return await result if inspect.isawaitable(result) else result
