"""A profile says what was measured, and draws straight lines between."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing import profile
from gateway.routing.profile import (
    ASSUMED,
    Crossover,
    LaneProfile,
    MeasuredSetup,
    Profile,
    ProfileError,
)

GOOD: dict[str, Any] = {
    "version": 1,
    "source": "measured",
    "machine": "two cores",
    "measured_at": "2026-09-01T12:00:00Z",
    "lanes": {"ollama": {"at_once": [1, 4], "seconds": [1.5, 6.0]}},
}


def written(directory: Path, said: object) -> Path:
    """A file with this in it: text as it is, all else as JSON."""
    file = directory / "profile.json"
    file.write_text(said if isinstance(said, str) else json.dumps(said))
    return file


def with_lane(**lane: Any) -> dict[str, Any]:
    """The good profile with another lane in it."""
    return {**GOOD, "lanes": {"ollama": lane}}


@pytest.mark.parametrize(("demand", "seconds"), [(1, 1.0), (4, 4.0), (16, 10.0)])
def test_at_a_measured_level_it_returns_the_measured_seconds(demand: int, seconds: float) -> None:
    lane = LaneProfile((1, 4, 16), (1.0, 4.0, 10.0))

    assert lane.at(demand) == seconds


@pytest.mark.parametrize(("demand", "seconds"), [(2, 2.0), (3, 3.0), (10, 7.0), (2.5, 2.5)])
def test_between_two_levels_it_is_linear(demand: float, seconds: float) -> None:
    lane = LaneProfile((1, 4, 16), (1.0, 4.0, 10.0))

    assert lane.at(demand) == pytest.approx(seconds)


def test_below_the_first_level_it_returns_that_levels_seconds() -> None:
    assert LaneProfile((4, 8), (3.0, 5.0)).at(1) == 3.0


def test_beyond_the_last_level_the_last_slope_goes_on() -> None:
    lane = LaneProfile((1, 4, 8), (1.0, 2.0, 10.0))

    assert lane.at(10) == pytest.approx(14.0)


def test_beyond_the_last_level_no_lane_becomes_faster() -> None:
    assert LaneProfile((1, 8), (3.0, 2.0)).at(100) == 2.0


def test_a_single_level_holds_for_every_demand() -> None:
    lane = LaneProfile((4,), (3.0,))

    assert [lane.at(1), lane.at(4), lane.at(64)] == [3.0, 3.0, 3.0]


@given(
    levels=st.sets(st.integers(1, 64), min_size=2).map(sorted),
    seconds=st.data(),
    demand=st.floats(1, 64),
)
def test_a_line_stays_between_its_two_ends(
    levels: list[int], seconds: st.DataObject, demand: float
) -> None:
    measured = [seconds.draw(st.floats(0.01, 100)) for _ in levels]
    lane = LaneProfile(tuple(levels), tuple(measured))

    if demand <= levels[-1]:
        right = next(i for i, level in enumerate(levels) if demand <= level)
        ends = measured[max(0, right - 1)], measured[right]
        assert min(ends) - 1e-9 <= lane.at(demand) <= max(ends) + 1e-9


def test_a_lane_that_was_not_measured_is_not_known() -> None:
    measured = Profile(version=1, source="measured", lanes={"ollama": LaneProfile((1,), (1.0,))})

    assert measured.seconds("vllm", 1) is None
    assert measured.seconds("ollama", 1) == 1.0


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    read = profile.load(written(tmp_path, GOOD))

    assert read == Profile(
        version=1,
        source="measured",
        machine="two cores",
        measured_at="2026-09-01T12:00:00Z",
        lanes={"ollama": LaneProfile((1, 4), (1.5, 6.0))},
    )


@pytest.mark.parametrize(
    ("said", "why"),
    [
        pytest.param("", "is not a valid profile", id="empty"),
        pytest.param("{", "is not a valid profile", id="no JSON"),
        pytest.param([], "is not a valid profile", id="no object"),
        pytest.param({"version": 1, "source": "measured"}, "lanes", id="no lanes"),
        pytest.param({**GOOD, "speed": 1}, "speed", id="a name it does not know"),
        pytest.param({**GOOD, "version": "1"}, "version", id="version is no number"),
        pytest.param(with_lane(at_once=[1]), "seconds", id="no seconds"),
        pytest.param(with_lane(at_once=[], seconds=[]), "not empty", id="no levels"),
        pytest.param(with_lane(at_once=[1, 2], seconds=[1]), "of one length", id="lengths"),
        pytest.param(with_lane(at_once=[2, 1], seconds=[1, 1]), "must grow", id="falls"),
        pytest.param(with_lane(at_once=[1, 1], seconds=[1, 1]), "must grow", id="stays"),
        pytest.param(
            with_lane(at_once=[0, 1], seconds=[1, 1]), "must be at least 1", id="level zero"
        ),
        pytest.param(with_lane(at_once=[1], seconds=[0]), "above zero", id="zero seconds"),
        pytest.param(with_lane(at_once=[1], seconds=[-1]), "above zero", id="less than none"),
        pytest.param(with_lane(at_once=[1], seconds=[None]), "seconds", id="no number"),
        pytest.param({**GOOD, "version": 2}, "measure it again", id="another version"),
        pytest.param(
            {**GOOD, "version": 2, "spread": 1}, "measure it again", id="with what that one has"
        ),
    ],
)
def test_a_file_that_is_not_a_valid_profile_is_refused_with_the_reason(
    tmp_path: Path, said: object, why: str
) -> None:
    file = written(tmp_path, said)

    with pytest.raises(ProfileError, match=why) as refused:
        profile.load(file)
    assert str(file) in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"missing\.json cannot be read: No such file"):
        profile.load(tmp_path / "missing.json")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(256)))

    with pytest.raises(ProfileError, match="is not a valid profile"):
        profile.load(tmp_path / "binary")


def test_the_assumed_profile_says_that_it_is_assumed_and_crosses_over() -> None:
    one, many = (
        {lane: ASSUMED.seconds(lane, demand) or 0 for lane in ("ollama", "vllm")}
        for demand in (1, 16)
    )

    assert ASSUMED.source == "assumed"
    assert one["ollama"] < one["vllm"]
    assert many["vllm"] < many["ollama"]


# What it was measured on, and when

ON = MeasuredSetup(
    "vllm", "small", "0.32.0", "bfloat16", 16, 4096, "/opt/vllm serve /models/small -n 16", "small"
)
FULL = Profile(
    version=1,
    source="measured",
    machine="two cores",
    measured_at="2026-11-20T12:00:00+00:00",
    tokens_in=80,
    tokens_out=64,
    crossover=Crossover(5.5, 4.0, 7.0),
    command="twolane calibrate",
    lanes={
        "ollama": LaneProfile((1, 4), (1.0, 4.0)),
        "vllm": LaneProfile(
            (1, 4), (2.0, 2.5), (1.9, 2.4), (2.1, 2.6), (0.3, 0.5), (32.0, 100.0), on=ON
        ),
    },
)
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC).timestamp()


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    file.write_text("what was there before")
    profile.save(file, FULL)

    assert profile.load(file) == FULL
    assert list(tmp_path.iterdir()) == [file]


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"chat\.json cannot be written: No such file"):
        profile.save(tmp_path / "none" / "chat.json", FULL)


@pytest.mark.parametrize(
    ("after_s", "told"),
    [
        (-3600, "measured just now"),  # clocks differ
        (59, "measured just now"),
        (60, "measured 1 minute ago"),
        (7200, "measured 2 hours ago"),
        (3 * 86400 + 5, "measured 3 days ago"),
    ],
)
def test_its_summary_has_its_age(after_s: float, told: str) -> None:
    assert FULL.summary(NOON + after_s) == told


@pytest.mark.parametrize("at", ["", "yesterday"])
def test_one_that_does_not_say_when_has_no_age(at: str) -> None:
    undated = msgspec.structs.replace(FULL, measured_at=at)

    assert undated.age_s(NOON) is None
    assert undated.summary(NOON) == "measured"
    assert ASSUMED.summary(NOON) == "assumed"


@pytest.mark.parametrize(
    ("now", "changes"),
    [
        ({}, []),
        ({"version": "0.33.1"}, ["version 0.33.1 now, measured with 0.32.0"]),
        ({"slots": 32}, ["slots 32 now, measured with 16"]),
        (
            {"digest": "other", "context": 2048},
            ["digest other now, measured with small", "context 2048 now, measured with 4096"],
        ),
        # What one of the two does not say is not held against it.
        ({"version": "", "weights": "", "slots": None, "context": None, "command": ""}, []),
        # Started elsewhere, by somebody else.
        ({"command": "~/bin/vllm serve ./small -n 16"}, []),
        (
            {"command": "/opt/vllm serve /models/small -n 32"},
            ["command with 32 now, measured with 16"],
        ),
        (
            {"command": "/opt/vllm serve /models/small -n 16 --enforce-eager"},
            ["command with --enforce-eager now, measured without"],
        ),
        (
            {"command": "/opt/vllm serve /models/small"},
            ["command without -n 16 now, measured with it"],
        ),
    ],
)
def test_changes_since_the_measurement_are_listed(now: dict[str, Any], changes: list[str]) -> None:
    assert FULL.changed("vllm", msgspec.structs.replace(ON, **now)) == changes


def test_of_a_lane_that_says_not_what_it_was_measured_on_nothing_has_changed() -> None:
    assert FULL.changed("ollama", ON) == FULL.changed("llamacpp", ON) == []
