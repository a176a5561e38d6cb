"""How many seconds a request takes on each lane at each concurrency.

The policy decides by a profile. Until one is measured on this machine (`twolane calibrate`) the
built-in one is used, and everything that shows it says `assumed`. The file is the `Profile`
below as JSON; only `version`, `source` and, for each lane, `at_once` and `seconds` are required.
Live answers then correct it (`ProfileRefiner`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path, PurePath

import msgspec

VERSION = 1

#: The fields of a `MeasuredSetup` that make it another one where they differ.
CHANGES = ("engine", "model", "version", "weights", "digest", "slots", "context")


class ProfileError(Exception):
    """A profile file cannot be used; the text says why and what to do."""


class MeasuredSetup(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a lane was measured on; if that changes, its figures may be out of date.

    Attributes:
        version: The engine's version.
        weights: The precision of the weights, as far as the engine reported it.
        digest: What the engine's name of the model stands for: a checksum, a repository, a file.
        command: Its command line, where the gateway started it.
    """

    engine: str
    model: str
    version: str = ""
    weights: str = ""
    slots: int | None = None
    context: int | None = None
    command: str = ""
    digest: str = ""


class LaneProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Mean seconds of a request by concurrency: `seconds[i]` with `at_once[i]` concurrent.

    Attributes:
        low_s: Mean of the fastest repetition.
        high_s: Mean of the slowest repetition.
        ttft_s: Median seconds to the first token.
        tokens_per_s: Output tokens per second of all requests together.
        on: What it was measured on.
    """

    at_once: tuple[int, ...]
    seconds: tuple[float, ...]
    low_s: tuple[float, ...] = ()
    high_s: tuple[float, ...] = ()
    ttft_s: tuple[float, ...] = ()
    tokens_per_s: tuple[float, ...] = ()
    on: MeasuredSetup | None = None

    def __post_init__(self) -> None:
        if not self.at_once or len(self.at_once) != len(self.seconds):
            raise ValueError("`at_once` and `seconds` must be of one length, and not empty")
        for more in (self.low_s, self.high_s, self.ttft_s, self.tokens_per_s):
            if more and len(more) != len(self.at_once):
                raise ValueError("each list must have one value for each level of `at_once`")
        if any(a >= b for a, b in zip(self.at_once, self.at_once[1:], strict=False)):
            raise ValueError("`at_once` must grow from level to level")
        if self.at_once[0] < 1 or min(self.seconds) <= 0:
            raise ValueError("levels must be at least 1, and seconds above zero")

    def at(self, demand: float) -> float:
        """Seconds of a request at this concurrency: linear between the measured levels.

        Beyond the last level the last slope continues, as a queue does.
        """
        return interpolate(self.at_once, self.seconds, demand)


def interpolate(levels: Sequence[float], values: Sequence[float], at: float) -> float:
    """The value at a level, linear between the given ones; beyond the last it never falls."""
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
    """The concurrency from which on the other lane is faster.

    `low` and `high` are its 95 % confidence interval, if enough was measured for one.
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
        tokens_in: Length of the measured prompts, about.
        tokens_out: Longest measured answer.
        crossover: Where the faster lane changes, if it changes exactly once.
        command: The command that measured it.
    """

    version: int
    source: str
    lanes: Mapping[str, LaneProfile]
    machine: str = ""
    measured_at: str = ""
    tokens_in: int | None = None
    tokens_out: int | None = None
    crossover: Crossover | None = None
    command: str = ""

    def seconds(self, lane: str, demand: float) -> float | None:
        """Seconds of a request on this lane at this concurrency; None: not known."""
        known = self.lanes.get(lane)
        return None if known is None else known.at(demand)

    def age_s(self, now: float) -> float | None:
        """Seconds since it was measured, at this Unix time; None: it does not say when."""
        try:
            return max(0.0, now - datetime.fromisoformat(self.measured_at).timestamp())
        except ValueError:
            return None

    def summary(self, now: float) -> str:
        """A few words: whether it was measured, and how long ago."""
        age_s = self.age_s(now) if self.source == "measured" else None
        return self.source if age_s is None else f"{self.source} {_ago(age_s)}"

    def changed(self, lane: str, now: MeasuredSetup) -> list[str]:
        """The differences from what a lane was measured on; unknown fields do not count.

        Command lines are compared without their folders, which differ between installations.
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
    """The words that one command line has and the other does not."""
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
        ProfileError: It does not exist, is not JSON, or is not a profile of this version.
    """
    try:
        text = path.read_bytes()
        version = msgspec.json.decode(text, type=_Versioned).version
        if version != VERSION:  # before the fields, whose names may differ
            raise ProfileError(
                f"the profile {path} has version {version}, and this gateway reads {VERSION}: "
                "measure it again with `twolane calibrate`"
            )
        return msgspec.json.decode(text, type=Profile)
    except OSError as exc:
        raise ProfileError(f"the profile {path} cannot be read: {exc.strerror}") from exc
    except (msgspec.DecodeError, ValueError) as exc:
        raise ProfileError(
            f"{path} is not a valid profile: {exc}; measure one with `twolane calibrate`"
        ) from exc


def save(path: Path, profile: Profile) -> None:
    """Write a profile file atomically.

    Raises:
        ProfileError: It cannot be written.
    """
    text = msgspec.json.format(msgspec.json.encode(profile), indent=1)
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_bytes(text)
        new.replace(path)
    except OSError as exc:
        raise ProfileError(f"the profile {path} cannot be written: {exc.strerror}") from exc


#: Ollama 0.24 as installed (1 slot) and vLLM 0.32, SmolLM2-135M, 80 tokens in and 64 out,
#: on two CPU cores. Only the ratios matter to the policy; on another machine they are a
#: guess, and no more is claimed for them.
ASSUMED = Profile(
    version=VERSION,
    source="assumed",
    machine="two CPU cores, SmolLM2-135M",
    lanes={
        "ollama": LaneProfile((1, 4, 8, 16, 32), (1.2, 4.1, 7.0, 15.0, 32.8)),
        "llamacpp": LaneProfile((1, 4, 8, 16, 32), (1.4, 2.9, 5.9, 10.3, 19.2)),
        "vllm": LaneProfile((1, 4, 8, 16, 32), (3.0, 4.1, 5.7, 7.5, 12.3)),
    },
)
