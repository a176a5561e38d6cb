"""How each figure of a report is computed, in words."""

from __future__ import annotations

from loadtests.analysis import crossover, energy, rows

#: Name and formula, in the order in which a report lists them.
FORMULAS = {
    "TTFT": "time to first token: from just before a request is sent to the first delta with "
    "content, reasoning or a tool call",
    "E2E": "end-to-end latency: from just before a request is sent to the last byte. Every "
    "request has a connection of its own; opening it is not counted",
    "chunk gap": "time between two such deltas",
    "TPOT": "time per output token: (last delta - first delta) / (tokens - 1), tokens by the "
    "server's usage; the mean chunk gap where the server sends no usage, which is noted",
    "window": "of a cell: from the start of its first measured request to the end of its last "
    "one. Users keep sending requests until then, so the concurrency stays the same",
    "tokens/s": "tokens whose chunk arrived in the window / window, of requests of all phases. A "
    "chunk has its request's tokens / chunks; of a request that was cancelled or has no usage it "
    "has the median of the cell",
    "requests/s": "requests answered in the window / window",
    "concurrency achieved": "integral of the requests in flight over the window / window",
    "goodput": "requests per second that meet the stated SLO. A level meets the SLO if "
    f"{rows.SLO_SHARE:.0%} of its measured requests do (a failed request does not) and every "
    "lower level meets it too",
    "ended early": "answers with fewer tokens than requested / answers; without usage, answers "
    "with the finish reason stop",
    "percentile": "linear between the two nearest values: of n sorted values, p lies at place "
    "p (n - 1), counted from 0; over the answered requests of all repetitions. With fewer than a "
    "hundred requests, p99 is close to the slowest one",
    "spread": "in brackets: the lowest and the highest median of a repetition; of a ratio, the "
    "lowest and the highest ratio within a repetition",
    "crossover": "where the difference of mean E2E changes sign: every repetition has the same "
    "weight, and levels are joined by straight lines. The interval is a bootstrap of "
    f"{crossover.BOOTSTRAP_DRAWS} draws, repetitions first, then requests within each. It needs "
    f"{crossover.MIN_REPETITIONS} repetitions, {crossover.MIN_REQUESTS} requests of each target "
    f"at the levels around it, and {crossover.MIN_SHARE_OF_DRAWS:.0%} of the draws that cross "
    "once. With three repetitions it is rough: in simulations it contained the true value 95 "
    "times in 100 where the repetitions differed by 1 %, and 77 times where they differed by 5 %",
    "tokens/J": "tokens/s / watts. Measured watts are the mean power of this machine's cards in "
    "the window, all together, sampled about once a second; the rest of the machine is not "
    f"included. Not known if samples are missing for over {energy.MAX_POWER_GAP_S:g} s",
    "cost of a million tokens": "output tokens: electricity by tokens/J and rent by tokens/s, "
    "both within the window, so a machine with idle times costs more; the price of an API as "
    "configured",
    "gateway's overhead": "its median less the median of the lane with the lowest E2E behind it",
    "saturated": f"the generator's busiest process uses over {rows.MAX_CPU:.0%} of a core, or its "
    f"scheduling lag is over {rows.MAX_LAG_P50:.0%} of the median TTFT at the median, or over "
    f"{rows.MAX_LAG_P99:.0%} of it at the 99th percentile",
}
