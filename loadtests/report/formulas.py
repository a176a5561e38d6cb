"""How each figure of a report is computed, in words."""

from __future__ import annotations

from loadtests.analysis import crossover, energy, rows

FORMULAS = {
    "TTFT": "from just before a request is sent to the first delta that has content, reasoning "
    "or a tool call in it",
    "E2E": "from just before a request is sent to the last byte; each has its own connection, and "
    "making that is not counted",
    "chunk gap": "between two such deltas",
    "TPOT": "(last delta - first delta) / (tokens - 1), tokens by the server's usage; where it "
    "tells none, the mean chunk gap, and that is said",
    "window": "of a cell, from when its first measured request is sent to when its last one is "
    "over; users go on asking until then, so that the number at once holds",
    "tokens/s": "tokens whose chunk came in the window / window, of requests of all phases; a "
    "chunk is worth its request's tokens over its chunks, or the median worth of the cell where "
    "the request was cut or told no usage",
    "requests/s": "requests answered in the window / window",
    "achieved at once": "integral of the requests in flight over the window / window",
    "goodput": "requests a second that keep the stated limits; a level keeps them if "
    f"{rows.KEEPING:.0%} of its measured requests do, where one that failed does not, and all "
    "levels below it do",
    "ended early": "answers with fewer tokens than asked for / answers; where no usage is told, "
    "those that say they stopped",
    "percentile": "linear between the two nearest values: of n sorted ones, p lies at place "
    "p (n - 1), from 0; over the answered requests of all repetitions. Of fewer than a hundred, "
    "p99 is little else than the slowest",
    "spread": "in brackets: the lowest and the highest repetition's median; of a ratio, the "
    "ratios within each repetition",
    "crossover": "where the difference of mean E2E changes sign, every repetition counting the "
    f"same, straight lines between levels; the interval is of {crossover.DRAWS} draws, repetitions "
    f"first, then requests within each. It needs {crossover.REPETITIONS} repetitions and "
    f"{crossover.REQUESTS} requests of each at the levels it hangs on, and that "
    f"{crossover.AGREEING:.0%} of the draws cross once. Of three repetitions it is rough: "
    "simulated, it held the truth 95 times in 100 where these differed by 1 %, and 77 times "
    "where by 5 %",
    "tokens/J": "tokens/s / watts; measured watts are the mean of what the cards of this machine "
    "drew in the window, together and about once a second, and the rest of the machine is not in "
    f"them. Not known where the driver said nothing for over {energy.LONGEST_GAP_S:g} s",
    "cost of a million tokens": "output tokens: electricity by tokens/J, rent by tokens/s, both "
    "within the window, so a machine that idles between costs more; an API as it was given",
    "gateway's cost": "its median less the median of the lane behind it whose E2E is lower",
    "saturated": f"the generator's busiest process uses over {rows.CPU_MOST:.0%} of a core, "
    f"or is late by over {rows.LATE_P50:.0%} of the median TTFT in the median, or "
    f"{rows.LATE_P99:.0%} of it in the 99th percentile",
}
