"""An engine's error body, read whichever of four shapes it has."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec


@dataclass(slots=True)
class Fault:
    """An error as an engine wrote it, in OpenAI's words."""

    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    status: int | None = None


def read_fault(body: bytes) -> Fault:
    """Whatever an engine says of an error, whichever of four shapes it uses.

    `{"error": {…}}` (all on /v1), `{"error": "text"}` (Ollama), `{"message": …}`
    at the top (older vLLM), `{"detail": …}` (what FastAPI says by itself).
    """
    try:
        said = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return Fault("the engine answered with an error that is not JSON")
    error = said.get("error", said) if isinstance(said, dict) else said
    if isinstance(error, str):
        return Fault(error)
    if not isinstance(error, dict):
        return Fault("the engine answered with an error of no known shape")
    code = error.get("code")
    message = error.get("message") or error.get("detail") or "the engine gave no reason"
    kind, param = error.get("type"), error.get("param")
    return Fault(
        message=message if isinstance(message, str) else msgspec.json.encode(message).decode(),
        type=kind if isinstance(kind, str) else "invalid_request_error",
        param=param if isinstance(param, str) else None,
        code=code if isinstance(code, str) else None,
        status=code if isinstance(code, int) else None,
    )
