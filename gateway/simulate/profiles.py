"""The built-in profiles to simulate on, and the team that suits a profile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from backends.kinds import KINDS
from gateway.routing.profile import ASSUMED, VERSION, LaneProfile, Profile
from gateway.simulate.traces import equilibrium

#: Mean time that people read and think, in answers of the faster lane to one request alone:
#: the longer the answers, the less often people ask. Assumed.
THINK_ANSWERS = 8.0
#: The team, where one lane is better for every size.
USUAL_TEAM = 12

#: The built-in profiles; `choices.PROFILES` says what each stands for.
BUILT_IN: Mapping[str, Profile] = {
    "measured": Profile(
        VERSION, "measured",
        {
            "ollama": LaneProfile((1, 2, 4, 8, 16, 24), (0.73, 1.43, 2.59, 4.86, 9.11, 11.86)),
            "vllm": LaneProfile((1, 2, 4, 8, 16, 24), (1.37, 1.44, 1.43, 1.97, 2.67, 3.33)),
        },
        machine="two CPU cores, SmolLM2-135M, Ollama 0.24 with one slot, vLLM 0.32",
    ),
    "built-in": ASSUMED,
    "70b": Profile(
        VERSION, "assumed",
        {
            "ollama": LaneProfile((1, 2, 4, 8, 16, 32), (13.7, 27.4, 54.8, 109.6, 219.2, 438.4)),
            "vllm": LaneProfile((1, 4, 8, 16, 32), (7.7, 8.4, 9.0, 10.2, 13.6)),
        },
        machine="two RTX 4090 by their bandwidth, 70B in 4 bit, 500 tokens in, 250 out",
    ),
    "close": Profile(
        VERSION, "assumed",
        {
            "ollama": LaneProfile((1, 2, 4, 8, 16, 32), (1.0, 1.4, 2.3, 4.2, 8.0, 15.6)),
            "vllm": LaneProfile((1, 2, 4, 8, 16, 32), (1.15, 1.5, 2.3, 4.0, 7.3, 13.8)),
        },
        machine="invented",
    ),
}  # fmt: skip


def lanes_of(profile: Profile) -> tuple[str, ...]:
    """The two lanes to compare: the first two of the profile, in the order of `KINDS`."""
    lanes = tuple(kind for kind in KINDS if kind in profile.lanes)
    return lanes[:2]


def seconds_on(profile: Profile, lane: str, demand: float) -> float:
    """What a request takes on this lane at this demand, seconds; inf where it is not known."""
    return profile.seconds(lane, demand) or math.inf


def think_s(profile: Profile) -> float:
    """Mean seconds between an answer and the next question, for answers of this speed."""
    return THINK_ANSWERS * min(profile.lanes[lane].at(1) for lane in lanes_of(profile))


def balanced_team(profile: Profile, think_s: float) -> int:
    """The number of people that both lanes serve equally well: here the choice matters most.

    12 where one lane is better for every number of people up to 100.
    """
    lanes = lanes_of(profile)

    def mean_load(lane: str, people: int) -> float:
        return equilibrium(people, partial(seconds_on, profile, lane), think_s)

    first = mean_load(lanes[0], 1) < mean_load(lanes[1], 1)
    for people in range(2, 101):
        if (mean_load(lanes[0], people) < mean_load(lanes[1], people)) != first:
            return people
    return USUAL_TEAM
