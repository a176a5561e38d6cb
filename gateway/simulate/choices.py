"""The names that `twolane simulate` takes, and what each means.

Without another import: the command line lists them, and is built for every command of `twolane`.
"""

from __future__ import annotations

from collections.abc import Mapping

#: The largest team. A larger number is a slip of the keyboard, not a team.
MAX_PEOPLE = 10_000

#: The built-in traces of `built_in.py`.
TRACES: Mapping[str, str] = {
    "constant-low": "a quarter of the team, all the time",
    "constant": "the whole team, all the time",
    "constant-high": "twice the team, all the time",
    "office": "a working day: people arrive, have lunch, leave, and pause in between",
    "office-double": "the same day with twice the team",
    "bursts": "a few people; about every ten minutes a crowd for a minute or two",
    "flash-crowd": "a quarter of the team; twice a crowd arrives within a minute",
    **{
        f"square-{period_s}": f"few people, then twice the team, each for {period_s} s"
        for period_s in (30, 60, 120, 300, 600, 1800)
    },
    "adversary": "always the demand that is worse for the engine that holds the GPU",
}

#: The traces that answer "what if we were N people": steady, a day, bursts, a crowd.
TRACES_OF_ONE_TEAM = ("constant", "office", "bursts", "flash-crowd")

#: The built-in profiles of `profiles.py`.
PROFILES: Mapping[str, str] = {
    "measured": "Ollama 0.24 and vLLM 0.32 on two CPU cores, SmolLM2-135M: equal at 2 concurrent",
    "built-in": "what the gateway assumes until a profile is measured: equal at 4 concurrent",
    "70b": "a 70B on two RTX 4090, by bandwidth (assumed): vLLM is faster even for one request",
    "close": "two engines close to each other (invented): a crossover, but little to gain",
}

OURS, ALWAYS, CLAIRVOYANT = "ours", "always", "clairvoyant"

#: The policies of `policies.py`.
POLICIES: Mapping[str, str] = {
    OURS: "the gateway's: moves when staying has lost as much as a move costs",
    ALWAYS: "one engine all the time: a policy for each engine",
    "crossover": "the faster engine at the present demand, at once",
    "high-low": "above 8 requests vLLM, below 3 the other engine, at least 30 s on each",
    CLAIRVOYANT: "knows the whole day in advance",
}
