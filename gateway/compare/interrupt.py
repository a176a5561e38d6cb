"""Measurements stop cleanly: engines, gateways and temporary folders do not stay behind."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_measurement(measurement: Coroutine[Any, Any, T]) -> T:
    """The result of a measurement; SIGTERM stops it as Ctrl-C does.

    Raises:
        KeyboardInterrupt: It was stopped, and has cleaned up.
    """
    try:
        return asyncio.run(_cancel_on_sigterm(measurement))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def _cancel_on_sigterm(measurement: Coroutine[Any, Any, T]) -> T:
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await measurement
    finally:
        await asyncio.sleep(0)  # a closed connection ends in the loop's next turn
