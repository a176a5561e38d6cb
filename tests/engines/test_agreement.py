"""What the other two tools write is read under the right names."""

from __future__ import annotations

import json

from loadtests.measure.experiment import Plan
from loadtests.proof.known import QUANTITIES
from tests.engines.agreement import Run, levels_of, read_bench, read_guidellm

RUN = Run("known", "http://127.0.0.1:1", "known", 8, 1, Plan(), 80)


def test_guidellms_time_between_tokens_is_our_tpot() -> None:
    def told(median: float, mean: float) -> dict[str, dict[str, float]]:
        return {"successful": {"median": median, "mean": mean}}

    metrics = {
        "request_totals": {"successful": 79, "errored": 1},
        "time_to_first_token_ms": told(301, 302),
        "inter_token_latency_ms": told(20, 21),
        "time_per_output_token_ms": told(24.4, 24.4),
        "request_latency": told(1.561, 1.562),
        "output_tokens_per_second": told(290, 327),
        "prompt_token_count": told(80, 80),
        "output_token_count": told(64, 64),
    }

    seen = read_guidellm(RUN, json.dumps({"benchmarks": [{"metrics": metrics}]}).encode())

    assert [seen.medians[name] for name in QUANTITIES] == [0.301, 0.02, 1.561, 327]
    assert (seen.requests, seen.failed, seen.tokens_out) == (79, 1, 64)


def test_what_bench_serve_wrote_is_in_milliseconds() -> None:
    written = {
        "median_ttft_ms": 303, "median_tpot_ms": 20, "median_e2el_ms": 1563,
        "output_throughput": 325.5, "completed": 80, "failed": 0, "total_input_tokens": 6400,
        "total_output_tokens": 5120,
    }  # fmt: skip

    seen = read_bench(RUN, json.dumps(written).encode())

    assert [seen.medians[name] for name in QUANTITIES] == [0.303, 0.02, 1.563, 325.5]
    assert (seen.tokens_in, seen.tokens_out) == (80, 64)


def test_levels_are_numbers_from_one() -> None:
    assert levels_of("1,8,32") == (1, 8, 32)
