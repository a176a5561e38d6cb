"""The server of known times sends each token at its due time, and reports its lag."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest

from loadtests.measure import stopwatch
from loadtests.measure.stopwatch import Target
from loadtests.proof import known
from loadtests.proof.known import Times

pytestmark = pytest.mark.integration  # programs of their own

TIMES = Times(ttft_s=0.05, gap_s=0.01, tokens=5)


@pytest.fixture(scope="module")
def engine() -> Iterator[known.KnownServer]:
    with known.known_server(TIMES) as engine:
        yield engine


@pytest.fixture
def session() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False) as session:
        yield session


def asked(tokens: int) -> stopwatch.Body:
    return {"max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}


def test_no_token_is_early(engine: known.KnownServer) -> None:
    timing = stopwatch.ask(Target("known", engine.url, "known"), asked(20))

    assert timing.error is None
    assert [at >= 0.05 + k * 0.01 for k, at in enumerate(timing.deltas_s)] == [True] * 20


def test_an_answer_has_the_requested_length_and_reports_it(
    engine: known.KnownServer,
) -> None:
    timing = stopwatch.ask(Target("known", engine.url, "known"), asked(3))

    assert (len(timing.deltas_s), timing.tokens_out, timing.finish) == (3, 3, "length")


def test_without_a_limit_an_answer_has_the_servers_own_length(
    engine: known.KnownServer, session: httpx.Client
) -> None:
    answer = session.post(f"{engine.url}/v1/completions", json={"stream": True})

    assert answer.text.count('"text":" word"') == TIMES.tokens


def test_usage_is_sent_only_on_request(engine: known.KnownServer, session: httpx.Client) -> None:
    answer = session.post(f"{engine.url}/v1/chat/completions", json={"stream": True})

    assert "usage" not in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")


def test_a_request_without_streaming_is_refused(
    engine: known.KnownServer, session: httpx.Client
) -> None:
    answer = session.post(f"{engine.url}/v1/chat/completions", json={})

    assert answer.status_code == 400
    assert "stream=true" in answer.json()["error"]["message"]


@pytest.mark.alone
def test_it_counts_the_lag_of_every_token(session: httpx.Client) -> None:
    with known.known_server(TIMES) as engine:
        session.post(f"{engine.url}/v1/completions", json={"stream": True})

        late = engine.lateness()

    assert late.tokens == TIMES.tokens
    assert 0 < late.p50 <= late.p99


@pytest.mark.alone
def test_lag_does_not_add_up(session: httpx.Client) -> None:
    with known.known_server(Times(ttft_s=0.0, gap_s=0.0005, tokens=1000)) as engine:
        began = time.perf_counter()
        session.post(f"{engine.url}/v1/completions", json={"stream": True})
        took_s = time.perf_counter() - began

    assert took_s < 1.0  # rounded up to milliseconds, as event loops do, it were a second


def test_a_client_that_disconnects_does_not_stop_the_others(
    engine: known.KnownServer, session: httpx.Client
) -> None:
    with session.stream("POST", f"{engine.url}/v1/completions", json=asked(100)) as gone:
        assert gone.status_code == 200

    timing = stopwatch.ask(Target("known", engine.url, "known"), asked(3))

    assert timing.error is None


def test_the_true_e2e_is_the_due_time_of_the_last_token() -> None:
    assert Times(0.3, 0.02, 64).e2e_s == pytest.approx(1.56)
