"""Corrects a measured profile by the answers of live requests."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping

import msgspec

from gateway.routing.profile import LaneProfile, Profile, interpolate

#: The largest deviation from the profile that counts, and so the largest correction: a factor
#: of two, as a logarithm.
MAX_CORRECTION = math.log(2)
#: Rounds that are remembered: n answers with n concurrent are one round. Older ones fade.
REMEMBERED_ROUNDS = 200.0
#: After so many rounds the common deviation counts fully, and the measured spread as much as
#: the usual one. Assumed.
PRIOR_ROUNDS = 20.0
USUAL_SPREAD = 0.3
#: A deviation of so many standard errors may be chance.
CHANCE_ERRORS = 3.0
#: A correction that changes by less makes no new profile.
MIN_CHANGE = math.log(1.02)
#: The longest answer that counts, tokens.
LONGEST_ANSWER = 10**7


class _Deviation:
    """The mean deviation of answers at one level from the profile, as a logarithm."""

    __slots__ = ("mean", "rounds", "variance")

    def __init__(self) -> None:
        self.rounds = 0.0
        self.mean = 0.0
        self.variance = 0.0

    def learn(self, off: float, rounds: float) -> None:
        self.rounds = min(REMEMBERED_ROUNDS, self.rounds + rounds)
        gain = rounds / self.rounds
        before = off - self.mean
        self.mean += gain * before
        self.variance += gain * (before * (off - self.mean) - self.variance)

    def beyond(self, common: float) -> float:
        """The part of its distance from the common deviation that is not chance."""
        if not self.rounds:
            return 0.0
        spread = self.variance * self.rounds + USUAL_SPREAD**2 * PRIOR_ROUNDS
        chance = CHANCE_ERRORS**2 * spread / (self.rounds + PRIOR_ROUNDS) / self.rounds
        own = self.mean - common
        # Shrunk as James and Stein do: nothing of it at the limit, nearly all well beyond.
        return own * (1 - chance / own**2) if own**2 > chance else 0.0


class _Curve:
    """One lane's seconds by level, for answers of any length, and how far live answers deviate.

    Levels beyond the lane's slots are one level: further requests wait in the gateway, and the
    engine is as busy as with all slots taken.
    """

    def __init__(self, lane: LaneProfile, slots: int, tokens_out: int) -> None:
        self.levels = sorted({min(level, slots) for level in lane.at_once})
        self._place = [self.levels.index(min(level, slots)) for level in lane.at_once]
        self._deviations = [_Deviation() for _ in self.levels]
        self._first = [interpolate(lane.at_once, lane.ttft_s, n) for n in self.levels]
        # By Little's law, since an answer may have ended before its limit.
        rates = lane.tokens_per_s or (math.inf,) * len(lane.at_once)
        lengths = [
            max(1.0, min(tokens_out, rate * seconds / n)) if rate > 0 else tokens_out
            for n, seconds, rate in zip(lane.at_once, lane.seconds, rates, strict=True)
        ]
        self._lengths = [interpolate(lane.at_once, lengths, n) for n in self.levels]
        self._tokens_s = [
            max(0.0, lane.at(n) - first) / length
            for n, first, length in zip(self.levels, self._first, self._lengths, strict=True)
        ]

    def learn(self, at_once: float, seconds: float, tokens: int) -> None:
        levels = self.levels
        n = min(max(1.0, at_once), levels[-1])
        expected = interpolate(levels, self._first, n) + tokens * interpolate(
            levels, self._tokens_s, n
        )
        if expected <= 0:
            return
        off = min(MAX_CORRECTION, max(-MAX_CORRECTION, math.log(seconds) - math.log(expected)))
        length = interpolate(levels, self._lengths, n)
        # An answer of another length says less, and n concurrent ones share what delays them.
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
        """The sum of the deviations times their rounds, and the rounds."""
        return (
            math.fsum(deviation.mean * deviation.rounds for deviation in self._deviations),
            math.fsum(deviation.rounds for deviation in self._deviations),
        )

    def own(self, common: float) -> list[float]:
        """This lane's own deviation, by the profile's levels."""
        return [self._deviations[place].beyond(common) for place in self._place]


class ProfileRefiner:
    """Corrects a measured profile by the answers of live requests.

    Each answer is compared with the profile's seconds for its length and concurrency. The
    deviation that all answers have in common (longer prompts than were measured, say) corrects
    every lane at every level, also levels without an answer. It says nothing about which lane is
    faster: without this, a lane would look slow only because it is in use. One lane's own deviation
    at one level counts as far as it is beyond chance. Neither counts beyond a factor of two.

    Args:
        profile: The measured profile. Without `ttft_s` or `tokens_out` it says nothing about
            answers of other lengths, so nothing is learned.
        slots: The slots of each lane.

    Attributes:
        profile: The profile as last corrected.
        requests: How many answers have been compared.
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
        return f"<ProfileRefiner of {self.requests} requests: {self.factors}>"

    def learn(self, lane: str, at_once: float, seconds: float, tokens: int) -> None:
        """A request was answered.

        Args:
            lane: The lane that answered.
            at_once: Mean concurrency of the lane meanwhile, this request included.
            seconds: From sending the request to the last token.
            tokens: Length of the answer.
        """
        curve = self._curves.get(lane)
        if curve is not None and 0 < seconds < math.inf and 0 < tokens <= LONGEST_ANSWER:
            self.requests += 1
            curve.learn(at_once, seconds, tokens)

    @property
    def factors(self) -> dict[str, dict[int, float]]:
        """The factors between the measured seconds and those of `profile`, by lane and level."""
        return {
            name: {
                n: math.exp(off)
                for n, off in zip(lane.at_once, self._corrections[name], strict=True)
            }
            for name, lane in self._measured.lanes.items()
        }

    def corrected(self) -> Profile | None:
        """The profile corrected by all answers so far; None: hardly other than the last one."""
        totals = [curve.totals() for curve in self._curves.values()]
        rounds = math.fsum(rounds for _, rounds in totals)
        mean = math.fsum(off for off, _ in totals) / rounds if rounds else 0.0
        common = mean * min(1.0, rounds / PRIOR_ROUNDS)
        corrections = {}
        for name, lane in self._measured.lanes.items():
            curve = self._curves.get(name)
            own = curve.own(mean) if curve else [0.0] * len(lane.at_once)
            corrections[name] = [
                min(MAX_CORRECTION, max(-MAX_CORRECTION, common + off)) for off in own
            ]
        if not any(
            abs(now - was) > MIN_CHANGE
            for name, offs in corrections.items()
            for now, was in zip(offs, self._corrections[name], strict=True)
        ):
            return None
        self._corrections = corrections
        lanes = {}
        for name, lane in self._measured.lanes.items():
            pairs = zip(lane.seconds, corrections[name], strict=True)
            corrected = tuple(seconds * math.exp(off) for seconds, off in pairs)
            lanes[name] = msgspec.structs.replace(lane, seconds=corrected)
        self.profile = msgspec.structs.replace(self._measured, lanes=lanes)
        return self.profile
