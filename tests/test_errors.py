"""The form of every error that a client can receive."""

from __future__ import annotations

import inspect
import json

import pytest

from gateway import errors
from gateway.errors import (
    MAX_RETRY_AFTER_S,
    BadRequest,
    EngineFailed,
    EngineRefused,
    EngineSilent,
    GatewayError,
    QueueFull,
)

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, GatewayError) and kind not in (GatewayError, EngineRefused)
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_failure_has_a_status_a_type_and_a_code_of_its_own(kind: type[GatewayError]) -> None:
    error = kind("Too bad.")

    assert 400 <= error.status < 600
    assert json.loads(error.envelope()) == {
        "error": {"message": "Too bad.", "type": error.type, "param": None, "code": error.code}
    }
    assert error.code
    assert [other for other in KINDS if other.code == error.code] == [kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_type_says_who_is_at_fault(kind: type[GatewayError]) -> None:
    owners = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    ours = "api_error" if kind.status >= 500 else "invalid_request_error"

    assert kind.type == owners.get(kind.status, ours)


def test_any_message_stays_json() -> None:
    error = BadRequest('"}\r\ndata: [DONE]\n\n👋', param='a"b')

    envelope = error.envelope()

    assert b"\n" not in envelope  # it must fit into one event of a stream
    assert json.loads(envelope)["error"]["message"] == '"}\r\ndata: [DONE]\n\n👋'
    assert json.loads(envelope)["error"]["param"] == 'a"b'


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, 1), (-5, 1), (0.001, 1), (1, 1), (1.01, 2), (119.5, 120), (121, 120), (1e9, 120)],
)
def test_retry_after_is_whole_seconds_from_one_to_what_clients_accept(
    seconds: float, said: int
) -> None:
    headers = dict(QueueFull("Full.", retry_after=seconds).headers())

    assert headers == {b"retry-after": b"%d" % said}
    assert said <= MAX_RETRY_AFTER_S


def test_without_a_time_there_is_no_retry_after() -> None:
    assert QueueFull("Full.").headers() == []


def test_an_error_that_a_retry_cannot_help_tells_the_sdks() -> None:
    refused = EngineRefused("Conflict.", status=409, kind="conflict", param=None, code="taken")

    assert refused.headers() == [(b"x-should-retry", b"false")]
    assert EngineSilent("Nothing.").headers() == [(b"x-should-retry", b"false")]
    assert EngineFailed("Broken.", retry_after=1).headers() == [(b"retry-after", b"1")]


def test_an_engines_refusal_keeps_its_message() -> None:
    refused = EngineRefused("Too long.", status=422, kind="BadRequest", param="prompt", code="long")

    assert refused.status == 422
    assert json.loads(refused.envelope())["error"] == {
        "message": "Too long.",
        "type": "BadRequest",
        "param": "prompt",
        "code": "long",
    }
