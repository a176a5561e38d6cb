"""What is counted when it is over: requests, their tokens and times, and hand-overs.

Labels are models, lanes and words of ours. A model that is not served, a key, a prompt, an
address or an engine's own words never become a label, so a client cannot make a series.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram

from backends import calls
from gateway.errors import GatewayError
from gateway.gpu.record import HandoverRecord
from gateway.relay.exchange import Exchange

#: Upper bounds of the histograms' buckets, seconds.
TTFT_S = (0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
TPOT_S = (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1)
E2E_S = (0.25, 0.5, 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 120, 240, 600)
QUEUE_S = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 45, 60, 120, 600)
HANDOVER_S = (0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 900)

#: The value of a label that does not apply.
NONE = "none"
#: How an exchange ends, apart from an error for its client.
ENDINGS = frozenset(("ok", "cancelled", "truncated", "internal_error"))
#: An engine's refusal comes with the engine's own code, which may be any word.
REFUSED = "engine_refused"
#: Outcomes for which neither the sender nor the operator is responsible.
FAILED_OUTCOMES = frozenset(
    (
        "engine_busy", "engine_failed", "engine_silent", "internal_error",
        "no_engine", "queue_full", "truncated", "waited_too_long",
    )
)  # fmt: skip
#: Outcomes of requests that may have waited in the queue without getting a slot.
GIVEN_UP = frozenset(("cancelled", "waited_too_long"))


class RequestCounters:
    """Counts requests that are over, and their tokens."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._outcomes = ENDINGS | set(error_codes(GatewayError))
        self._requests = Counter(
            "twolane_requests_total",
            "Finished requests. `reason` is why the lane was chosen, `background` marks a chat "
            "page's own calls, such as for a title.",
            ("model", "lane", "outcome", "reason", "background"),
            registry=registry,
        )
        self._failures = Counter(
            "twolane_request_failures_total",
            "Foreground requests that failed through no fault of their sender.",
            ("model",),
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "twolane_prompt_tokens_total",
            "Prompt tokens, as the engines count them.",
            ("model", "lane", "background"),
            registry=registry,
        )
        self._generation_tokens = Counter(
            "twolane_generation_tokens_total",
            "Output tokens, as the engines count them.",
            ("model", "lane", "background"),
            registry=registry,
        )
        self._retries = Counter(
            "twolane_retries_total",
            "Second attempts, on another replica or lane.",
            ("model",),
            registry=registry,
        )

    def expect(self, models: Iterable[str]) -> None:
        """Have the series of failures before the first one: Prometheus sees no growth otherwise."""
        for model in models:
            self._failures.labels(model)

    def outcome(self, exchange: Exchange) -> str:
        """How an exchange ended, as a label."""
        return exchange.outcome if exchange.outcome in self._outcomes else REFUSED

    def count(self, exchange: Exchange, model: str) -> None:
        """Count an exchange that is over; `model` is its label."""
        lane, outcome = exchange.lane or NONE, self.outcome(exchange)
        background = _flag(exchange.background)
        self._requests.labels(model, lane, outcome, exchange.cause or NONE, background).inc()
        if outcome in FAILED_OUTCOMES and not exchange.background:
            self._failures.labels(model).inc()
        if exchange.attempts > 1:
            self._retries.labels(model).inc(exchange.attempts - 1)
        if (usage := exchange.usage) is not None:
            self._prompt_tokens.labels(model, lane, background).inc(usage.prompt_tokens)
            self._generation_tokens.labels(model, lane, background).inc(usage.completion_tokens)


class LatencyHistograms:
    """Observes how long requests waited, and how long their answers took, in seconds."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._ttft = Histogram(
            "twolane_time_to_first_token_seconds",
            "From a streamed request to its first token, seconds; foreground requests.",
            ("model", "lane"),
            registry=registry,
            buckets=TTFT_S,
        )
        self._tpot = Histogram(
            "twolane_time_per_output_token_seconds",
            "(last - first) / (tokens - 1) of a streamed answer, seconds; foreground requests.",
            ("model", "lane"),
            registry=registry,
            buckets=TPOT_S,
        )
        self._e2e = Histogram(
            "twolane_e2e_request_latency_seconds",
            "From a request to the end of its answer, seconds; foreground, without embeddings.",
            ("model", "lane"),
            registry=registry,
            buckets=E2E_S,
        )
        self._queue = Histogram(
            "twolane_request_queue_time_seconds",
            "From a request to its slot, or until it was given up, seconds; first attempts only.",
            ("model", "background"),
            registry=registry,
            buckets=QUEUE_S,
        )

    def observe(self, exchange: Exchange, model: str, outcome: str) -> None:
        """Observe the times of an exchange that is over; `model` and `outcome` are labels."""
        queued = exchange.sent or outcome in GIVEN_UP
        if exchange.attempts <= 1 and model != NONE and queued:
            waited_s = (exchange.sent or exchange.ended) - exchange.began
            self._queue.labels(model, _flag(exchange.background)).observe(waited_s)
        if outcome != "ok" or exchange.background or exchange.path == calls.EMBEDDINGS:
            return
        lane = exchange.lane or NONE
        self._e2e.labels(model, lane).observe(exchange.ended - exchange.began)
        if exchange.stream and exchange.first:
            self._ttft.labels(model, lane).observe(exchange.first - exchange.began)
            tokens = exchange.usage.completion_tokens if exchange.usage is not None else 0
            if tokens > 1:
                tpot_s = (exchange.ended - exchange.first) / (tokens - 1)
                self._tpot.labels(model, lane).observe(tpot_s)


class HandoverCounters:
    """Counts hand-overs of the GPU that are over."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "twolane_gpu_handover_seconds",
            "Duration of hand-overs of the GPU, seconds.",
            ("source", "target", "outcome"),
            registry=registry,
            buckets=HANDOVER_S,
        )
        self._waited = Counter(
            "twolane_gpu_handover_waited_request_seconds_total",
            "Request-seconds that requests waited because of hand-overs.",
            ("source", "target", "outcome"),
            registry=registry,
        )

    def expect(self, engines: Iterable[str]) -> None:
        """Have the series of every direction before its first hand-over."""
        for target in engines:
            for source in {NONE, *engines} - {target}:
                self._seconds.labels(source, target, "done")
                self._waited.labels(source, target, "done")

    def count(self, handover: HandoverRecord) -> None:
        """Count a hand-over that is over."""
        outcome = handover.outcome.partition(":")[0]
        labels = (handover.source or NONE, handover.target, outcome)
        self._seconds.labels(*labels).observe(sum(handover.steps.values()))
        self._waited.labels(*labels).inc(handover.waited)


def error_codes(kind: type[GatewayError]) -> Iterator[str]:
    """The codes of an error and of all its subclasses."""
    if kind.code is not None:
        yield kind.code
    for subclass in kind.__subclasses__():
        yield from error_codes(subclass)


def _flag(value: bool) -> str:  # noqa: FBT001 - it is what is written down
    return "true" if value else "false"
