"""An engine's error body, whichever of four shapes it has."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec


@dataclass(slots=True)
class ErrorBody:
    """An error as an engine wrote it, in OpenAI's fields.

    `status` is the HTTP status that the body itself names, as in an error inside a 200.
    """

    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    status: int | None = None


def read_error_body(body: bytes) -> ErrorBody:
    """The error that a body describes; a body of no known shape has a message that says so.

    Known are `{"error": {…}}` (all engines on /v1), `{"error": "text"}` (Ollama),
    `{"message": …}` at the top (older vLLM) and `{"detail": …}` (FastAPI's own).
    """
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return ErrorBody("the engine answered with an error that is not JSON")
    error = decoded.get("error", decoded) if isinstance(decoded, dict) else decoded
    if isinstance(error, str):
        return ErrorBody(error)
    if not isinstance(error, dict):
        return ErrorBody("the engine answered with an error of no known shape")
    code = error.get("code")
    message = error.get("message") or error.get("detail") or "the engine gave no reason"
    kind, param = error.get("type"), error.get("param")
    return ErrorBody(
        message=message if isinstance(message, str) else msgspec.json.encode(message).decode(),
        type=kind if isinstance(kind, str) else "invalid_request_error",
        param=param if isinstance(param, str) else None,
        code=code if isinstance(code, str) else None,
        status=code if isinstance(code, int) else None,
    )
