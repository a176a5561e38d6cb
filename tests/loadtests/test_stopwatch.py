"""The times and counts of an answer, and the errors of broken ones."""

from __future__ import annotations

from typing import Any

import pytest

from loadtests.measure import stopwatch
from loadtests.measure.stopwatch import BadTarget, Target, Timing
from tests.support.servers import (
    DONE,
    WHOLE,
    Scripted,
    always,
    delta,
    finish,
    scripted,
    unused_url,
    usage,
)

pytestmark = pytest.mark.integration  # programs of their own


def ask(server: Scripted, key: str | None = None) -> Timing:
    target = Target("a", server.url, "m", key)
    question = [{"role": "user", "content": "?"}]
    return stopwatch.ask(target, stopwatch.request_body(target, question, 3))


def test_a_whole_answer_has_every_time_and_count() -> None:
    with scripted(always(*WHOLE)) as server:
        seen = ask(server, key="sk-secret")

    assert seen.error is None
    assert (seen.tokens_in, seen.tokens_out, seen.finish, seen.lane) == (7, 3, "length", "vllm")
    assert (len(seen.deltas_s), len(seen.gaps_s), seen.text) == (3, 2, "abc")
    assert seen.ttft_s is not None
    assert 0 < seen.ttft_s <= seen.ttft_s + sum(seen.gaps_s) <= seen.e2e_s
    assert seen.tpot_s == pytest.approx(sum(seen.gaps_s) / 2)
    headers, body = server.received[0]
    assert headers["authorization"] == "Bearer sk-secret"
    assert (body["max_tokens"], body["stream_options"]) == (3, {"include_usage": True})


@pytest.mark.parametrize(
    "said",
    [delta(content="x"), delta(reasoning="x"), delta(reasoning_content="x"),
     delta(tool_calls=[{"index": 0, "function": {"name": "f"}}])],
)  # fmt: skip
def test_the_first_token_is_the_first_delta_with_content(said: dict[str, Any]) -> None:
    empty = [delta(role="assistant"), delta(content=""), {"choices": []}]
    with scripted(always(*empty, said, finish(), DONE)) as server:
        seen = ask(server)

    assert len(seen.deltas_s) == 1


def test_without_usage_there_is_no_tpot_and_no_error() -> None:
    with scripted(always(delta(content="a"), delta(content="b"), finish("stop"), DONE)) as server:
        seen = ask(server)

    assert (seen.error, seen.tokens_out, seen.tpot_s) == (None, None, None)


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ([delta(content="a")], "broke off"),
        ([], "broke off"),
        ([finish("stop"), usage(7, 0), DONE], "it has no token"),
        ([delta(content="a"), {"error": {"message": "out of memory"}}, DONE], "out of memory"),
        (["{no json", DONE], "not an event of OpenAI's API"),
    ],
)
def test_an_incomplete_answer_is_an_error(events: list[Any], why: str) -> None:
    with scripted(always(*events)) as server:
        seen = ask(server)

    assert seen.error is not None
    assert why in seen.error


def test_a_refusal_keeps_the_servers_message() -> None:
    refusal = {"error": {"message": "no such\nmodel", "code": "not_found"}}
    with scripted(lambda _: (404, refusal)) as server:
        seen = ask(server)

    assert seen.error == "404: no such model"


def test_a_refused_connection_is_an_error() -> None:
    target = Target("a", unused_url(), "m")

    seen = stopwatch.ask(target, stopwatch.request_body(target, [], 1))

    assert seen.error is not None
    assert "refused" in seen.error
    assert seen.ttft_s is None


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999", "http://[::1"])
def test_an_invalid_address_is_an_error_and_no_crash(url: str) -> None:
    seen = stopwatch.ask(Target("a", url, "m"), {})

    assert seen.error is not None
    assert seen.error.startswith("ValueError: ")


@pytest.mark.parametrize("text", ["", "a", "a=b", "a=ftp://b=m", "=http://a=m", "a=http://b="])
def test_an_invalid_target_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadTarget, match="LABEL=URL=MODEL"):
        Target.read(text)


def test_a_targets_model_may_contain_any_character() -> None:
    target = Target.read("a=http://h:1/v1/=hf.co/org/m:Q4=x", "sk-secret")

    assert (target.url, target.model) == ("http://h:1", "hf.co/org/m:Q4=x")
    assert "sk-secret" not in f"{target} {target!r}"


def test_the_first_listed_model_is_taken() -> None:
    with scripted(always()) as server:
        assert stopwatch.first_model(f"{server.url}/v1/", None) == "first"
    with pytest.raises(BadTarget, match="give --model"):
        stopwatch.first_model(unused_url(), None)
