"""The request log: one JSON line per request, written when it is over.

It contains no prompt and no key.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

import msgspec

from gateway.relay.exchange import Exchange


class RequestLog:
    """Writes one JSON line per exchange to a stream, stderr by default.

    A log that cannot be written never stops an answer.
    """

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr

    def write(self, exchange: Exchange) -> None:
        """Write the line of one exchange."""
        line = msgspec.json.encode(record(exchange)).decode()
        try:
            self._out.write(line + "\n")
        except (OSError, ValueError):
            return  # disk full or pipe closed: serving goes on


def record(exchange: Exchange) -> dict[str, object]:
    """The fields of an exchange in the log; times in seconds, null where a step was not reached."""
    began = exchange.began
    usage = exchange.usage
    return {
        "at": round(time.time() - (exchange.ended - began), 3),
        "id": exchange.id,
        "path": exchange.path,
        "key": exchange.key or None,
        "model": exchange.model or None,
        "lane": exchange.lane or None,
        "reason": exchange.reason or None,
        "background": exchange.background,
        "stream": exchange.stream,
        "status": exchange.status or None,
        "outcome": exchange.outcome,
        "attempts": exchange.attempts,
        "dropped": exchange.dropped,
        "queued_s": round(exchange.sent - began, 4) if exchange.sent else None,
        "ttft_s": round(exchange.first - began, 4) if exchange.first else None,
        "total_s": round(exchange.ended - began, 4),
        "tokens_in": usage.prompt_tokens if usage else None,
        "tokens_out": usage.completion_tokens if usage else None,
    }
