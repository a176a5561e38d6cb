"""A collector that fails gives the reason, and stops no other."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import TypeVar

from backends.errors import BackendError
from gateway.doctor.observations import (
    NotObserved,
    Unknown,
)
from gateway.gpu.lease import LeaseError
from gateway.gpu.memory import MemoryUnknown
from gateway.settings import SettingsError

T = TypeVar("T")


def attempt(look: Callable[[], T]) -> T | Unknown:
    """What a look finds, or why it finds nothing."""
    try:
        return look()
    except (NotObserved, MemoryUnknown, LeaseError, SettingsError) as exc:
        return Unknown(str(exc))
    except OSError as exc:
        return Unknown(f"{exc.filename or 'it'} cannot be read: {exc.strerror or exc}")
    except Exception as exc:  # noqa: BLE001 - one closed eye must not close the others
        return Unknown(f"the look failed: {type(exc).__name__}: {exc}")


async def ask(answer: Awaitable[T]) -> T | Unknown:
    """What an engine answers, or why it does not."""
    try:
        return await answer
    except BackendError as exc:
        return Unknown(re.sub(r"^<\S+ (\S+)>:? ", r"\1 ", str(exc)))
    except NotObserved as exc:
        return Unknown(str(exc))
    except Exception as exc:  # noqa: BLE001 - as above
        return Unknown(f"the look failed: {type(exc).__name__}: {exc}")
