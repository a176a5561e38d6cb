"""Runs a collector, and turns its failure into `Unknown`."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import TypeVar

from backends.errors import BackendError
from gateway.doctor.observations import NotObserved, Unknown
from gateway.gpu.lease import LeaseError
from gateway.gpu.memory import MemoryUnknown
from gateway.settings import SettingsError

T = TypeVar("T")


def attempt(read: Callable[[], T]) -> T | Unknown:
    """What was read, or why it could not be read."""
    try:
        return read()
    except (NotObserved, MemoryUnknown, LeaseError, SettingsError) as exc:
        return Unknown(str(exc))
    except OSError as exc:
        return Unknown(f"{exc.filename or 'it'} cannot be read: {exc.strerror or exc}")
    except Exception as exc:  # noqa: BLE001 - one faulty collector must not stop the others
        return _fault(exc)


async def ask(answer: Awaitable[T]) -> T | Unknown:
    """What an engine answered, or why there is no answer."""
    try:
        return await answer
    except BackendError as exc:
        return Unknown(re.sub(r"^<\S+ (\S+)>:? ", r"\1 ", str(exc)))
    except NotObserved as exc:
        return Unknown(str(exc))
    except Exception as exc:  # noqa: BLE001 - one faulty collector must not stop the others
        return _fault(exc)


def _fault(exc: Exception) -> Unknown:
    return Unknown(f"the collector itself failed: {type(exc).__name__}: {exc}")
