"""A profile that live requests refine."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping

import msgspec

from gateway.routing.profile import LaneProfile, Profile, _along

#: How far from the profile an answer's time is believed, and so a correction: twice, or half.
MOST = math.log(2)
#: Rounds that are remembered; one is n requests at n at once. What is older fades.
MEMORY = 200.0
#: After so many rounds what they have in common counts fully, and their own spread as much
#: as the usual one. Assumed.
FEW = 20.0
USUAL_SPREAD = 0.3
#: So many standard errors off may be chance.
CHANCE = 3.0
#: Corrections that change by less are not worth a new profile.
WORTH = math.log(1.02)
#: No answer is longer, tokens.
LONGEST = 10**7


class _Deviation:
    """How far answers at one level were from the profile: logarithms of what they took more."""

    __slots__ = ("mean", "rounds", "variance")

    def __init__(self) -> None:
        self.rounds = 0.0
        self.mean = 0.0
        self.variance = 0.0

    def learn(self, off: float, rounds: float) -> None:
        self.rounds = min(MEMORY, self.rounds + rounds)
        gain = rounds / self.rounds
        before = off - self.mean
        self.mean += gain * before
        self.variance += gain * (before * (off - self.mean) - self.variance)

    def beyond(self, common: float) -> float:
        """What of its distance to the common is its own, and not chance."""
        if not self.rounds:
            return 0.0
        spread = self.variance * self.rounds + USUAL_SPREAD**2 * FEW
        chance = CHANCE**2 * spread / (self.rounds + FEW) / self.rounds
        own = self.mean - common
        # Shrunk as James and Stein do: nothing of it at the limit, nearly all well beyond.
        return own * (1 - chance / own**2) if own**2 > chance else 0.0


class _Curve:
    """One lane's times by level, for answers of any length, and how far off they are seen.

    Levels beyond the lane's slots are not told apart: who is too many waits in the gateway,
    and the engine is as busy as it is with all slots taken.
    """

    def __init__(self, lane: LaneProfile, slots: int, tokens_out: int) -> None:
        self.levels = sorted({min(level, slots) for level in lane.at_once})
        self._place = [self.levels.index(min(level, slots)) for level in lane.at_once]
        self._deviations = [_Deviation() for _ in self.levels]
        self._first = [_along(lane.at_once, lane.ttft_s, n) for n in self.levels]
        # By Little's law, since an answer may have ended before its limit.
        rates = lane.tokens_per_s or (math.inf,) * len(lane.at_once)
        lengths = [
            max(1.0, min(tokens_out, rate * seconds / n)) if rate > 0 else tokens_out
            for n, seconds, rate in zip(lane.at_once, lane.seconds, rates, strict=True)
        ]
        self._lengths = [_along(lane.at_once, lengths, n) for n in self.levels]
        self._tokens_s = [
            max(0.0, lane.at(n) - first) / length
            for n, first, length in zip(self.levels, self._first, self._lengths, strict=True)
        ]

    def learn(self, at_once: float, seconds: float, tokens: int) -> None:
        levels = self.levels
        n = min(max(1.0, at_once), levels[-1])
        expected = _along(levels, self._first, n) + tokens * _along(levels, self._tokens_s, n)
        if expected <= 0:
            return
        off = min(MOST, max(-MOST, math.log(seconds) - math.log(expected)))
        length = _along(levels, self._lengths, n)
        # One of another length says less; and n at once share what befalls them.
        rounds = min(tokens / length, length / tokens) / n
        right = bisect_left(levels, n)
        if right == 0 or levels[right] == n:
            self._deviations[right].learn(off, rounds)
            return
        near = (n - levels[right - 1]) / (levels[right] - levels[right - 1])
        for seen, share in (
            (self._deviations[right - 1], 1 - near),
            (self._deviations[right], near),
        ):
            if share > 0:
                seen.learn(off, rounds * share)

    def totals(self) -> tuple[float, float]:
        """What all of it was off, times the rounds it took, and these."""
        return (
            math.fsum(deviation.mean * deviation.rounds for deviation in self._deviations),
            math.fsum(deviation.rounds for deviation in self._deviations),
        )

    def own(self, common: float) -> list[float]:
        """By the profile's levels, what is this lane's own."""
        return [self._deviations[place].beyond(common) for place in self._place]


class ProfileRefiner:
    """A measured profile, corrected by the answers that are given.

    Each answer is compared with what the profile says of one of its length, beside as many. What
    all of them have in common (longer prompts than were measured, say) is taken for true of
    every lane at every level, also where nobody was seen: it says nothing about which is
    faster, and a lane must not look slow only because it is the one that is used. What is
    one lane's own at one level is believed as far as it is beyond chance. Neither is believed
    beyond a factor of two.

    Args:
        profile: As measured. One without `ttft_s` or `tokens_out` says nothing of answers of
            other lengths, so nothing is learned.
        slots: Of each lane that may be seen.

    Attributes:
        profile: As it was told last.
        requests: How many have been compared.
    """

    def __init__(self, profile: Profile, slots: Mapping[str, int]) -> None:
        self.profile = profile
        self.requests = 0
        self._measured = profile
        self._corrections = {
            name: [0.0] * len(lane.at_once) for name, lane in profile.lanes.items()
        }
        tokens_out = profile.tokens_out or 0
        self._curves = {
            name: _Curve(lane, slots[name], tokens_out)
            for name, lane in profile.lanes.items()
            if name in slots and lane.ttft_s and tokens_out > 0
        }

    def __repr__(self) -> str:
        return f"<ProfileRefiner by {self.requests} requests: {self.factors}>"

    def learn(self, lane: str, at_once: float, seconds: float, tokens: int) -> None:
        """A request was answered.

        Args:
            lane: By whom.
            at_once: How many this lane answered meanwhile, itself included.
            seconds: From its being sent to its last token.
            tokens: Of the answer.
        """
        curve = self._curves.get(lane)
        if curve is not None and 0 < seconds < math.inf and 0 < tokens <= LONGEST:
            self.requests += 1
            curve.learn(at_once, seconds, tokens)

    @property
    def factors(self) -> dict[str, dict[int, float]]:
        """By lane and level, what the measured seconds are multiplied with in `profile`."""
        return {
            name: {
                n: math.exp(off)
                for n, off in zip(lane.at_once, self._corrections[name], strict=True)
            }
            for name, lane in self._measured.lanes.items()
        }

    def corrected(self) -> Profile | None:
        """The profile as it has become; None where it is hardly another than was told before."""
        totals = [curve.totals() for curve in self._curves.values()]
        rounds = math.fsum(rounds for _, rounds in totals)
        mean = math.fsum(off for off, _ in totals) / rounds if rounds else 0.0
        common = mean * min(1.0, rounds / FEW)
        found = {}
        for name, lane in self._measured.lanes.items():
            curve = self._curves.get(name)
            own = curve.own(mean) if curve else [0.0] * len(lane.at_once)
            found[name] = [min(MOST, max(-MOST, common + off)) for off in own]
        if not any(
            abs(now - was) > WORTH
            for name, offs in found.items()
            for now, was in zip(offs, self._corrections[name], strict=True)
        ):
            return None
        self._corrections = found
        lanes = {}
        for name, lane in self._measured.lanes.items():
            pairs = zip(lane.seconds, found[name], strict=True)
            corrected = tuple(seconds * math.exp(off) for seconds, off in pairs)
            lanes[name] = msgspec.structs.replace(lane, seconds=corrected)
        self.profile = msgspec.structs.replace(self._measured, lanes=lanes)
        return self.profile
