"""The policy on simulated days, the simulator, and the command `twolane simulate`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from gateway.cli import main
from gateway.simulate import built_in, profiles
from gateway.simulate.choices import ALWAYS, OURS, PROFILES, TRACES
from gateway.simulate.comparison import Case, Outcome, compare, outcomes

pytestmark = pytest.mark.slow  # a simulated day takes a second

MEASURED = ("measured", "built-in")
BOUNDED_TRACES = [name for name in TRACES if name != "adversary"]
SQUARE_WAVES = [name for name in TRACES if name.startswith("square-")]


def case(trace: str, label: str, *handovers_s: float, hours: float = 8.0, seed: int = 1) -> Case:
    by = profiles.BUILT_IN[label]
    think_s = profiles.think_s(by)
    return Case(
        trace=trace,
        label=label,
        profile=by,
        lanes=profiles.lanes_of(by),
        think_s=think_s,
        people=profiles.balanced_team(by, think_s),
        hours=hours,
        seed=seed,
        handovers_s=handovers_s,
        policies=(OURS, ALWAYS),
    )


def ours(simulated: Case) -> list[Outcome]:
    """The days of the gateway's policy, by hand-over time."""
    return [outcome for outcome in outcomes(simulated) if outcome.policy == OURS]


@pytest.fixture(scope="module")
def day(request: pytest.FixtureRequest) -> list[Outcome]:
    """A day of a trace on a profile, at hand-overs of 5 and 60 s. Simulated once for its tests."""
    trace, label = request.param
    return ours(case(trace, label, 5.0, 60.0))


def days(traces: list[str]) -> pytest.MarkDecorator:
    """Run the test on each of these traces with each built-in profile."""
    pairs = [(trace, label) for trace in traces for label in PROFILES]
    return pytest.mark.parametrize(
        "day", pairs, ids=["-".join(pair) for pair in pairs], indirect=True, scope="module"
    )


# The figures that the policy must meet


@days(BOUNDED_TRACES)
def test_the_policy_is_never_much_slower_than_the_better_lane(day: list[Outcome]) -> None:
    assert [outcome.handover_s for outcome in day] == [5.0, 60.0]
    assert max(outcome.ratio_fixed for outcome in day) <= 1.12


@pytest.mark.parametrize("label", MEASURED)
def test_a_day_that_crosses_the_crossover_often_is_faster_than_on_either_lane(label: str) -> None:
    day = ours(case("office-double", label, 5.0, 12.0))

    assert all(outcome.moves >= 2 for outcome in day)
    assert max(outcome.ratio_fixed for outcome in day) <= 0.95


@days(SQUARE_WAVES)
def test_square_waves_of_demand_cause_at_most_two_moves_per_hour(
    day: list[Outcome],
) -> None:
    assert max(outcome.moves_per_hour for outcome in day if outcome.handover_s == 5.0) <= 2.0


def test_an_adversary_who_reacts_to_every_move_wins() -> None:
    [outcome] = ours(case("adversary", "measured", 12.0, hours=2.0))

    assert outcome.ratio_fixed > 1.12  # no bound is promised against it
    assert outcome.moves_per_hour <= 3.0


# The simulator


@pytest.mark.parametrize("lane", ["ollama", "vllm"])
def test_steady_demand_takes_the_seconds_of_the_profile(lane: str) -> None:
    one = case("constant", "built-in", 12.0, hours=4.0)
    [record] = [r for r in compare(one) if r.policy == f"{ALWAYS}-{lane}"]

    # In equilibrium as many requests arrive as are answered: n = people * s(n) / (s(n) + think).
    known = one.profile.lanes[lane]
    n = next(
        n / 100
        for n in range(100, 100 * one.people)
        if n / 100 >= one.people * known.at(n / 100) / (known.at(n / 100) + one.think_s)
    )
    assert record.mean_s == pytest.approx(known.at(n), rel=0.15)
    assert record.people == one.people
    assert record.requests == pytest.approx(
        one.people * 4 * 3600 / (record.mean_s + one.think_s), rel=0.05
    )


@pytest.mark.parametrize(
    ("documented", "built"), [(TRACES, built_in.SHAPES), (PROFILES, profiles.BUILT_IN)]
)
def test_the_command_line_documents_what_is_built_in(
    documented: Mapping[str, str], built: Mapping[str, object]
) -> None:
    assert documented.keys() == built.keys()


def test_the_same_seed_gives_the_same_day_and_another_seed_another_day() -> None:
    first, again = (compare(case("bursts", "close", 12.0, hours=1.0)) for _ in range(2))
    other = compare(case("bursts", "close", 12.0, hours=1.0, seed=2))

    assert first == again
    assert first != other


def test_a_longer_hand_over_costs_more_for_the_same_move() -> None:
    short, long = ours(case("constant", "70b", 5.0, 60.0, hours=4.0))

    assert (short.moves, long.moves) == (1, 1)
    assert 1.0 <= short.ratio_fixed < long.ratio_fixed


# The command


def simulate(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(["simulate", "--jobs", "1", *arguments])
    return capsys.readouterr().out


def test_the_output_has_a_table_of_mean_seconds_per_request(
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = simulate(
        capsys, "--people", "12", "--handover-s", "12", "--hours", "1", "--trace", "constant"
    )

    assert "measured: mean seconds per request" in " ".join(output.split())
    assert "constant" in output


def test_json_has_a_record_for_each_trace_profile_hand_over_and_policy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    records = json.loads(
        simulate(
            capsys, "--trace", "constant", "square-30", "--profile", "close", "--handover-s",
            "5,60", "--hours", "0.5", "--json", "-",
        )
    )  # fmt: skip

    keys = {(r["trace"], r["profile"], r["handover_s"], r["policy"]) for r in records}
    assert len(keys) == len(records) == 2 * 1 * 2 * 6
    for record in records:
        for name in ("mean_s", "p95_s", "moves", "ratio_fixed", "ratio_clairvoyant"):
            assert math.isfinite(record[name])
        assert record["ratio_clairvoyant"] >= 0.99  # the day was known to it


def test_a_trace_from_a_file_is_replayed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "people.csv"
    trace.write_text("0,1\n600,9\n1200,0\n")

    records = json.loads(
        simulate(capsys, "--trace", str(trace), "--policy", "ours", "--handover-s", "5",
                 "--json", "-")
    )  # fmt: skip

    assert [(r["policy"], r["people"]) for r in records] == [("ours", 9)]
    assert records[0]["hours"] == pytest.approx(1200 / 3600, abs=1e-3)


def test_the_gateways_own_log_is_replayed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = [
        {"at": 1000.0 + i, "path": "/v1/chat/completions", "lane": "ollama", "outcome": "ok",
         "status": 200, "background": i % 10 == 0, "tokens_out": 64, "total_s": 1.0}
        for i in range(60)
    ]  # fmt: skip
    log = tmp_path / "gateway.log"
    log.write_text("not json\n" + "\n".join(map(json.dumps, lines)) + "\n")

    records = json.loads(
        simulate(capsys, "--trace", str(log), "--policy", "ours", "--handover-s", "5",
                 "--json", "-")
    )  # fmt: skip

    assert 50 <= records[0]["requests"] <= 60


def test_the_plot_is_an_svg_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"

    simulate(capsys, "--trace", "constant", "--hours", "0.2", "--plot", str(plot))

    assert "<svg" in plot.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace", "nosuch"], "neither a file nor one of"),
        (["--profile", "nosuch"], "neither a file nor one of"),
        (["--handover-s", "0"], "is not a number above zero"),
        (["--people", "1.5"], "is not a whole number"),
        (["--plot", "x.gif"], ".svg, .png or .pdf"),
        (["--trace", "EMPTY"], "EMPTY"),
        (["--trace", "BAD"], "BAD"),
    ],
)
def test_a_wrong_argument_ends_with_2_and_a_message(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").write_text("")
    Path("BAD").write_text("0,1\nten,2\n")

    with pytest.raises(SystemExit) as ended:
        main(["simulate", *arguments])

    assert ended.value.code == 2
    assert message in capsys.readouterr().err
