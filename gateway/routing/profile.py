"""How long a request takes on each lane at each concurrency.

A profile is what the policy decides by. Until one is measured on this machine
(`twolane calibrate`) the built-in one is used, and everything that shows it says `assumed`.
The file is the `Profile` below as JSON; only `version`, `source` and, of each lane, `at_once` and
`seconds` must be there. What the requests then take in fact corrects it (`Refined`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path, PurePath

import msgspec

VERSION = 1

#: Of what a lane was measured on, what makes it another one.
CHANGES = ("engine", "model", "version", "weights", "digest", "slots", "context")

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


class ProfileError(Exception):
    """A profile file cannot be used; the text says why and what to do."""


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a lane was measured on; where that changes, so may its figures.

    Attributes:
        version: The engine's own.
        weights: Their precision, as far as it was told.
        digest: What the engine's name of the model stands for: a checksum, a repository, a file.
        command: Its command line, where we started it.
    """

    engine: str
    model: str
    version: str = ""
    weights: str = ""
    slots: int | None = None
    context: int | None = None
    command: str = ""
    digest: str = ""


class Lane(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Mean seconds a request, by requests at once: `seconds[i]` at `at_once[i]`.

    Attributes:
        low_s: Mean of the fastest repetition.
        high_s: Mean of the slowest repetition.
        ttft_s: Median seconds to the first token.
        tokens_per_s: Output of all requests together.
        on: What it was measured on.
    """

    at_once: tuple[int, ...]
    seconds: tuple[float, ...]
    low_s: tuple[float, ...] = ()
    high_s: tuple[float, ...] = ()
    ttft_s: tuple[float, ...] = ()
    tokens_per_s: tuple[float, ...] = ()
    on: Measured | None = None

    def __post_init__(self) -> None:
        if not self.at_once or len(self.at_once) != len(self.seconds):
            raise ValueError("`at_once` and `seconds` must be of one length, and not empty")
        for more in (self.low_s, self.high_s, self.ttft_s, self.tokens_per_s):
            if more and len(more) != len(self.at_once):
                raise ValueError("what is said of levels must be said of each of them")
        if any(a >= b for a, b in zip(self.at_once, self.at_once[1:], strict=False)):
            raise ValueError("`at_once` must grow")
        if self.at_once[0] < 1 or min(self.seconds) <= 0:
            raise ValueError("levels begin at 1 and seconds are above zero")

    def at(self, demand: float) -> float:
        """Seconds a request at this demand: straight lines between what was measured.

        Beyond the last level the last slope goes on, since a queue does.
        """
        return _along(self.at_once, self.seconds, demand)


def _along(levels: Sequence[float], values: Sequence[float], at: float) -> float:
    if at <= levels[0] or len(levels) == 1:
        return values[0]
    right = min(bisect_left(levels, at), len(levels) - 1)
    slope = (values[right] - values[right - 1]) / (levels[right] - levels[right - 1])
    if at > levels[-1]:
        return values[-1] + max(0.0, slope) * (at - levels[-1])
    return values[right - 1] + slope * (at - levels[right - 1])


class _Versioned(msgspec.Struct):
    version: int


class Crossover(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Requests at once from which on the other lane is the faster one.

    `low` and `high` are its 95 % confidence interval, where enough was measured for one.
    """

    level: float
    low: float | None = None
    high: float | None = None


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Measured (or assumed) lanes of one model on one machine.

    Attributes:
        source: `measured` or `assumed`.
        lanes: By engine kind.
        machine: Where it was measured, in words.
        measured_at: ISO date and time, UTC.
        tokens_in: Of a prompt, about, when it was measured.
        tokens_out: Of an answer, at most.
        crossover: Where the faster lane changes, if it does so once.
        command: What measured it.
    """

    version: int
    source: str
    lanes: Mapping[str, Lane]
    machine: str = ""
    measured_at: str = ""
    tokens_in: int | None = None
    tokens_out: int | None = None
    crossover: Crossover | None = None
    command: str = ""

    def seconds(self, lane: str, demand: float) -> float | None:
        """Seconds a request on this lane at this demand; None where it is not known."""
        known = self.lanes.get(lane)
        return None if known is None else known.at(demand)

    def age_s(self, now: float) -> float | None:
        """Seconds since it was measured, at this Unix time; None where it does not say."""
        try:
            return max(0.0, now - datetime.fromisoformat(self.measured_at).timestamp())
        except ValueError:
            return None

    def told(self, now: float) -> str:
        """In a few words: whether it was measured, and how long ago."""
        age_s = self.age_s(now) if self.source == "measured" else None
        return self.source if age_s is None else f"{self.source} {_ago(age_s)}"

    def changed(self, lane: str, now: Measured) -> list[str]:
        """What is otherwise than when this lane was measured; what one does not tell, is not.

        Command lines are compared without their folders, which differ by who started it where.
        """
        known = self.lanes.get(lane)
        if known is None or known.on is None:
            return []
        then = known.on
        pairs = [(name, getattr(then, name), getattr(now, name)) for name in CHANGES]
        found = [
            f"{name} {is_now} now, measured with {was}"
            for name, was, is_now in pairs
            if was and is_now and was != is_now
        ]
        return found + _other_words(then.command, now.command)


def _other_words(then: str, now: str) -> list[str]:
    """What one command line has and the other has not."""
    if not then or not now:
        return []
    was, is_now = ([PurePath(word).name for word in line.split()] for line in (then, now))
    gained = " ".join(word for word in is_now if word not in was)
    lost = " ".join(word for word in was if word not in is_now)
    if gained and lost:
        return [f"command with {gained} now, measured with {lost}"]
    if gained:
        return [f"command with {gained} now, measured without"]
    return [f"command without {lost} now, measured with it"] if lost else []


def _ago(seconds: float) -> str:
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            many = int(seconds // size)
            return f"{many} {unit}{'s' if many > 1 else ''} ago"
    return "just now"


def load(path: Path) -> Profile:
    """Read a profile file.

    Raises:
        ProfileError: It is not there, not JSON, or not a profile of this version.
    """
    try:
        said = path.read_bytes()
        version = msgspec.json.decode(said, type=_Versioned).version
        if version != VERSION:  # before its names, which may be others
            raise ProfileError(
                f"the profile {path} has version {version}, this gateway reads {VERSION}: "
                "measure it again"
            )
        return msgspec.json.decode(said, type=Profile)
    except OSError as exc:
        raise ProfileError(f"the profile {path} cannot be read: {exc.strerror}") from exc
    except (msgspec.DecodeError, ValueError) as exc:
        raise ProfileError(f"the profile {path} is no profile: {exc}") from exc


def save(path: Path, profile: Profile) -> None:
    """Write a profile file, whole or not at all.

    Raises:
        ProfileError: It cannot be written.
    """
    text = msgspec.json.format(msgspec.json.encode(profile), indent=1)
    whole = path.with_name(f"{path.name}.new")
    try:
        whole.write_bytes(text)
        whole.replace(path)
    except OSError as exc:
        raise ProfileError(f"the profile {path} cannot be written: {exc.strerror}") from exc


class _Seen:
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

    def __init__(self, lane: Lane, slots: int, tokens_out: int) -> None:
        self.levels = sorted({min(level, slots) for level in lane.at_once})
        self._place = [self.levels.index(min(level, slots)) for level in lane.at_once]
        self._seen = [_Seen() for _ in self.levels]
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
            self._seen[right].learn(off, rounds)
            return
        near = (n - levels[right - 1]) / (levels[right] - levels[right - 1])
        for seen, share in ((self._seen[right - 1], 1 - near), (self._seen[right], near)):
            if share > 0:
                seen.learn(off, rounds * share)

    def totals(self) -> tuple[float, float]:
        """What all of it was off, times the rounds it took, and these."""
        return (
            math.fsum(seen.mean * seen.rounds for seen in self._seen),
            math.fsum(seen.rounds for seen in self._seen),
        )

    def own(self, common: float) -> list[float]:
        """By the profile's levels, what is this lane's own."""
        return [self._seen[place].beyond(common) for place in self._place]


class Refined:
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
        self._told = {name: [0.0] * len(lane.at_once) for name, lane in profile.lanes.items()}
        tokens_out = profile.tokens_out or 0
        self._curves = {
            name: _Curve(lane, slots[name], tokens_out)
            for name, lane in profile.lanes.items()
            if name in slots and lane.ttft_s and tokens_out > 0
        }

    def __repr__(self) -> str:
        return f"<Refined by {self.requests} requests: {self.factors}>"

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
            name: {n: math.exp(off) for n, off in zip(lane.at_once, self._told[name], strict=True)}
            for name, lane in self._measured.lanes.items()
        }

    def told(self) -> Profile | None:
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
            for now, was in zip(offs, self._told[name], strict=True)
        ):
            return None
        self._told = found
        lanes = {}
        for name, lane in self._measured.lanes.items():
            pairs = zip(lane.seconds, found[name], strict=True)
            corrected = tuple(seconds * math.exp(off) for seconds, off in pairs)
            lanes[name] = msgspec.structs.replace(lane, seconds=corrected)
        self.profile = msgspec.structs.replace(self._measured, lanes=lanes)
        return self.profile


#: Ollama 0.24 as installed (1 slot) and vLLM 0.32, SmolLM2-135M, 80 tokens in and 64 out,
#: on two CPU cores. Only the ratios matter to the policy; on another machine they are a
#: guess, and no more is claimed for them.
ASSUMED = Profile(
    version=VERSION,
    source="assumed",
    machine="two CPU cores, SmolLM2-135M",
    lanes={
        "ollama": Lane((1, 4, 8, 16, 32), (1.2, 4.1, 7.0, 15.0, 32.8)),
        "llamacpp": Lane((1, 4, 8, 16, 32), (1.4, 2.9, 5.9, 10.3, 19.2)),
        "vllm": Lane((1, 4, 8, 16, 32), (3.0, 4.1, 5.7, 7.5, 12.3)),
    },
)
