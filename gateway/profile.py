"""How long a request takes on each lane at each concurrency.

A profile is what the policy decides by. Until one is measured on this machine the
built-in one is used, and everything that shows it says `assumed`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path

import msgspec

VERSION = 1


class ProfileError(Exception):
    """A profile file cannot be used; the text says why and what to do."""


class Lane(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Mean seconds a request, by requests at once: `seconds[i]` at `at_once[i]`."""

    at_once: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.at_once or len(self.at_once) != len(self.seconds):
            raise ValueError("`at_once` and `seconds` must be of one length, and not empty")
        if any(a >= b for a, b in zip(self.at_once, self.at_once[1:], strict=False)):
            raise ValueError("`at_once` must grow")
        if self.at_once[0] < 1 or min(self.seconds) <= 0:
            raise ValueError("levels begin at 1 and seconds are above zero")

    def at(self, demand: float) -> float:
        """Seconds a request at this demand: straight lines between what was measured.

        Beyond the last level the last slope goes on, since a queue does.
        """
        levels, seconds = self.at_once, self.seconds
        if demand <= levels[0] or len(levels) == 1:
            return seconds[0]
        right = min(bisect_left(levels, demand), len(levels) - 1)
        slope = (seconds[right] - seconds[right - 1]) / (levels[right] - levels[right - 1])
        if demand > levels[-1]:
            return seconds[-1] + max(0.0, slope) * (demand - levels[-1])
        return seconds[right - 1] + slope * (demand - levels[right - 1])


class _Versioned(msgspec.Struct):
    version: int


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Measured (or assumed) lanes of one model on one machine.

    Attributes:
        source: `measured` or `assumed`.
        lanes: By engine kind.
        machine: Where it was measured, in words.
        measured_at: ISO date and time, UTC.
    """

    version: int
    source: str
    lanes: Mapping[str, Lane]
    machine: str = ""
    measured_at: str = ""

    def seconds(self, lane: str, demand: float) -> float | None:
        """Seconds a request on this lane at this demand; None where it is not known."""
        known = self.lanes.get(lane)
        return None if known is None else known.at(demand)


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
