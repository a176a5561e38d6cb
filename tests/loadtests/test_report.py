"""The content of a report, and when none is written; the samples have known distributions."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from loadtests.analysis import rows
from loadtests.measure import experiment, samples
from loadtests.measure.experiment import (
    EXPERIMENT_VERSION,
    SELFCHECK,
    Experiment,
    Limits,
    Machine,
    Plan,
    Prices,
    Subject,
)
from loadtests.proof.agreement import AGREEMENT_VERSION, Agreement, Reading
from loadtests.proof.known import Times
from loadtests.proof.selfcheck import SELFCHECK_VERSION, CheckedQuantity, SelfCheck
from loadtests.report import findings, page, report
from loadtests.report.fairness import fairness
from loadtests.report.findings import Findings
from loadtests.report.report import ReportError

pytestmark = pytest.mark.slow  # a report with its charts takes a second

LEVELS = (1, 4, 16)
ROUNDS = 10
TOKENS = 16
EVIL = '<script>alert("1")</script>|$x$'
MACHINE = Machine("a processor", 2, 24.0, "Linux 6.1", "3.11.9", packages={"locust": "2.47.0"})
OLLAMA = Subject(
    "ollama", "http://127.0.0.1:11434", "smollm2", "ollama", "0.24.0", "Q4_1", 1, 2048,
    "ollama serve",
)  # fmt: skip
VLLM = Subject(
    "vllm", "http://127.0.0.1:8001", "smollm2", "vllm", "0.32.0", "bfloat16", 32, 2048,
    "vllm serve smollm2",
)  # fmt: skip
GATEWAY = Subject(
    "gateway", "http://127.0.0.1:8000", "smollm2", "gateway", "0.1.0", before=("ollama", "vllm")
)
#: Mean seconds a request: Ollama's queue, vLLM's batch, and the gateway that has the better.
MEANS = {
    "ollama": lambda n: 0.2 + 0.9 * n,
    "vllm": lambda n: 2.7 + 0.29 * n,
    "gateway": lambda n: 0.02 + min(0.2 + 0.9 * n, 2.7 + 0.29 * n),
}


def measure(folder: Path, *, cpu: float = 0.1, lag_p50_s: float = 0.0, renamed: str = "") -> None:
    """Every target at every level three times, requests within a few per cent of their mean."""
    writer = samples.Writer(folder / "raw.jsonl")
    dice = random.Random(11)
    now = 1.79e9
    writer.write(samples.Run(samples.SAMPLES_VERSION, now, ["locust"]))
    for repetition in (1, 2, 3):
        for label in sorted(MEANS, reverse=repetition % 2 == 0):
            for level in LEVELS:
                began = now
                for user in range(level):
                    at = began
                    for number in range(ROUNDS):
                        e2e_s = MEANS[label](level) * dice.gauss(1, 0.03)
                        gap_s = e2e_s / (TOKENS + 2)
                        failed = label == "ollama" and level == 16 and number == user
                        writer.write(samples.Request(
                            renamed if renamed and label == "gateway" else label,
                            "closed", level, repetition, user, number, "measured", at, e2e_s,
                            ttft_s=3 * gap_s, gaps_s=[gap_s] * (TOKENS - 1), tpot_s=gap_s,
                            tokens_in=80, tokens_out=TOKENS, finish="length",
                            error=f"503: full {renamed}" if failed else None,
                        ))  # fmt: skip
                        at += e2e_s
                        now = max(now, at)
                label_said = renamed if renamed and label == "gateway" else label
                writer.write(samples.Cell(
                    label_said, "closed", level, repetition, began, now, cpu=cpu,
                    lag_p50_s=lag_p50_s,
                ))  # fmt: skip
    writer.close()


def describe(
    folder: Path,
    subjects: tuple[Subject, ...] = (OLLAMA, VLLM, GATEWAY),
    limits: Limits = Limits(e2e_s=5.0),  # noqa: B008 - frozen
) -> None:
    plan = Plan(LEVELS, 3, ROUNDS, tokens_out=TOKENS)
    Experiment(EXPERIMENT_VERSION, 1.79e9, MACHINE, plan, subjects, limits, "twolane compare").save(
        folder
    )


def check(folder: Path, *, level: int = 16, why: str = "") -> None:
    times = Times()
    quantities = tuple(
        CheckedQuantity(name, truth, truth) for name, truth in times.truth(level).items()
    )
    SelfCheck(
        SELFCHECK_VERSION, 1.79e9, level, times, 1, 160, quantities, requests=160, why=why
    ).save(folder)


def agree(folder: Path) -> None:
    times = Times()
    readings = tuple(Reading(tool, "known", 8, 1, times.truth(8), 80) for tool in ("twolane", "x"))
    Agreement(
        AGREEMENT_VERSION, 1.79e9, MACHINE, times, 10, 80, 64, {"twolane": "", "x": "1.0"}, readings
    ).save(folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete report."""
    folder = tmp_path_factory.mktemp("report")
    measure(folder)
    describe(folder)
    check(folder)
    agree(folder)
    report.write(folder)
    return folder


@pytest.fixture
def raw(written: Path, tmp_path: Path) -> Path:
    """The folder of an experiment without a self-check."""
    (tmp_path / "raw.jsonl").write_bytes((written / "raw.jsonl").read_bytes())
    describe(tmp_path)
    return tmp_path


class ParsedPage(HTMLParser):
    """The page as a browser would parse it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self._quiet = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._quiet = tag in {"script", "style"}
        self.fetched += [value or "" for name, value in attrs if name in {"src", "href"}]

    def handle_endtag(self, tag: str) -> None:
        self._quiet = False

    def handle_data(self, data: str) -> None:
        if not self._quiet:
            self.text += data


@pytest.fixture(scope="module")
def html(written: Path) -> ParsedPage:
    return ParsedPage((written / "report.html").read_text())


@pytest.fixture(scope="module")
def found(written: Path) -> Findings:
    return msgspec.json.decode((written / "report.json").read_bytes(), type=Findings)


# the page


def test_the_page_fetches_nothing(html: ParsedPage) -> None:
    assert html.fetched
    assert all(address.startswith("data:image/") for address in html.fetched)
    assert "link" not in html.tags


def test_the_page_begins_with_which_engine_is_faster_and_by_how_much(html: ParsedPage) -> None:
    headline = (
        "With 16 concurrent requests vLLM answers 2.0x as fast as Ollama as installed (1 slot), "
        "on this machine."
    )

    assert html.text.index(headline) < html.text.index("a processor, 2 cores, 24 GiB; no GPU")


def test_the_sections_come_in_order(written: Path) -> None:
    headings = re.findall("^## (.*)$", (written / "report.md").read_text(), re.MULTILINE)

    assert headings == [
        "Claimed and measured",
        "Latency and throughput by concurrency",
        "Every request",
        "All cells",
        "Goodput",
        "Power, and the cost of tokens",
        "Crossover",
        "Errors",
        "Achieved concurrency and the load generator",
        "Answers that ended early",
        "The gateway's overhead",
        "Fairness of the comparison",
        "Machine, versions and command lines",
        "Formulas",
        "Appendix: the stopwatch against a server of known times",
        "Appendix: agreement with other tools",
    ]


def test_a_published_claim_stands_once_and_beside_the_measured_figure(html: ParsedPage) -> None:
    assert html.text.count("about 17 s") == html.text.count("about 9 s") == 1
    assert "from 16 to 32 concurrent" in html.text


def test_every_percentile_has_the_errors_beside_it(written: Path) -> None:
    text = (written / "report.md").read_text()
    head = "| target at concurrency | median | mean | p90"
    tables = [line for line in text.splitlines() if line.startswith(head)]
    rows = re.findall(r"^\| ollama at 16 \|.*\| 450 \| 30 \| 0 \|$", text, re.MULTILINE)

    assert len(tables) == 3
    assert len(rows) == 5  # E2E, TTFT, TPOT, gaps, goodput
    assert "503: full" in text


def test_the_charts_are_data_that_a_browser_can_read(written: Path) -> None:
    text = (written / "report.html").read_text()
    plots = re.findall(r'<script type="application/json">(.*?)</script>', text)

    assert len(plots) == 4
    e2e = json.loads(plots[0])
    assert [line["name"] for line in e2e["data"]] == ["gateway", "ollama", "vllm"]
    assert e2e["data"][1]["x"] == [1, 4, 16]
    assert len(json.loads(plots[3])["data"][1]["y"]) == 3 * ROUNDS * sum(LEVELS)


def test_the_picture_for_a_readme_is_white_in_every_colour_scheme(written: Path) -> None:
    svg = (written / "comparison.svg").read_text()

    assert "fill: #ffffff" in svg
    assert "](comparison.svg)" in (written / "report.md").read_text()
    assert (written / "comparison.png").read_bytes()[:4] == b"\x89PNG"


# report.json


def test_report_json_has_a_version_and_every_figure(found: Findings) -> None:
    assert found.version == findings.REPORT_VERSION
    assert [(row.target, row.level) for row in found.rows][:3] == [
        ("gateway", 1), ("gateway", 4), ("gateway", 16),
    ]  # fmt: skip
    assert found.experiment.machine == MACHINE
    assert found.selfcheck is not None
    assert found.agreement is not None


def test_the_report_reproduces_known_means(found: Findings) -> None:
    for row in found.rows:
        assert row.e2e is not None
        assert row.e2e.mean == pytest.approx(MEANS[row.target](row.level), rel=0.03)


def test_the_crossover_is_where_the_known_lines_cross(found: Findings) -> None:
    (crossing,) = found.crossings

    assert (crossing.a, crossing.b, crossing.crossover.verdict) == ("ollama", "vllm", "crosses")
    assert crossing.crossover.level == pytest.approx(2.5 / 0.61, rel=0.05)


def test_goodput_ends_at_the_level_that_misses_the_slo(found: Findings) -> None:
    brackets = {one.target: (one.level, one.fails) for one in found.slo_brackets}

    assert brackets == {"gateway": (4, 16), "ollama": (4, 16), "vllm": (4, 16)}


def test_the_gateway_is_compared_with_the_faster_lane(found: Findings) -> None:
    assert [(one.level, one.lane) for one in found.costs] == [
        (1, "ollama"), (4, "ollama"), (16, "vllm"),
    ]  # fmt: skip


# no report


@pytest.mark.parametrize(
    ("level", "why", "said"),
    [
        (16, "TTFT was off", "did not pass its check: TTFT was off"),
        (8, "", "was checked with 8 concurrent requests, but 16 were measured"),
    ],
)
def test_without_a_passed_check_at_this_level_there_is_no_report(
    raw: Path, level: int, why: str, said: str
) -> None:
    check(raw, level=level, why=why)

    with pytest.raises(ReportError, match=said):
        report.write(raw)
    assert not (raw / "report.html").exists()
    assert (raw / "raw.jsonl").exists()


def test_without_a_self_check_there_is_no_report(raw: Path) -> None:
    with pytest.raises(ReportError, match=f"there is no {SELFCHECK}"):
        report.write(raw)


@pytest.mark.parametrize("busy", [{"cpu": 0.9}, {"lag_p50_s": 0.1}])
def test_a_saturated_generator_makes_no_report(tmp_path: Path, busy: dict[str, float]) -> None:
    measure(tmp_path, **busy)  # type: ignore[arg-type]
    describe(tmp_path)
    check(tmp_path)

    with pytest.raises(ReportError, match="the load generator was saturated at concurrency 1 on"):
        report.write(tmp_path)


def test_an_unchecked_report_says_so_first(raw: Path) -> None:
    report.write(raw, unchecked=True)

    text = (raw / "report.md").read_text()
    assert text.startswith("> **Do not trust these figures: the stopwatch was not checked")
    assert 'class="banner"' in (raw / "report.html").read_text()


def test_a_folder_in_which_nothing_was_measured_has_no_report(tmp_path: Path) -> None:
    describe(tmp_path)
    (tmp_path / "raw.jsonl").touch()

    with pytest.raises(ReportError, match="nothing was measured"):
        report.write(tmp_path, unchecked=True)


def test_a_folder_of_something_else_has_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(tmp_path)]) == 1
    assert "is " in capsys.readouterr().err


@pytest.mark.integration
def test_without_the_extra_the_error_says_what_to_install(raw: Path) -> None:
    program = """
import sys
class Without:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, *rest):
        return None if name == "plotly" else self.finder.find_spec(name, *rest)
sys.meta_path = [Without(finder) for finder in sys.meta_path]
from loadtests.report.report import main
sys.exit(main(sys.argv[1:]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(raw)], capture_output=True, text=True, check=False
    )

    assert done.returncode == 1
    assert "pip install 'twolane[load]'" in done.stderr


# text from outside is escaped


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report in which a label, a command and an error contain markup."""
    folder = tmp_path_factory.mktemp("hostile")
    measure(folder, renamed=EVIL)
    evil = msgspec.structs.replace(GATEWAY, label=EVIL, command=EVIL, version=EVIL, before=())
    describe(folder, (OLLAMA, VLLM, evil))
    check(folder, why=EVIL)
    report.write(folder, unchecked=True)
    return folder


def test_text_from_outside_is_escaped_on_the_page(hostile: Path, html: ParsedPage) -> None:
    seen = ParsedPage((hostile / "report.html").read_text())

    assert EVIL in seen.text
    assert seen.tags.count("script") == html.tags.count("script")


def test_text_from_outside_is_escaped_in_markdown(hostile: Path) -> None:
    text = (hostile / "report.md").read_text()
    prose = "".join(text.split("```")[::2]).replace("\\<", "").replace("\\|", "")

    assert "alert" in prose
    assert "<" not in prose
    for table in re.findall(r"(?:^\|.*\n)+", prose, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_code_in_markdown_cannot_end_its_fence() -> None:
    text = page.as_markdown([page.Code("```\n# no heading")], [])

    assert text == "````\n```\n# no heading\n````\n"


@pytest.mark.parametrize(
    ("value", "told"),
    [(0.0123456, "0.0123"), (0.342, "0.342"), (7.514, "7.51"), (9.996, "10.0"), (15.0, "15.0"),
     (1204.4, "1,204"), (0.0, "0"), (None, "-")],
)  # fmt: skip
def test_numbers_have_three_digits(value: float | None, told: str) -> None:
    assert page.format_number(value) == told


# fairness


def verdicts(*subjects: Subject, written: Path) -> dict[str, str]:
    cells = rows.closed_cells(samples.read(written / "raw.jsonl"))
    table = rows.make_rows(cells, tokens_out=TOKENS, limits=Limits())
    return {one.what: one.verdict for one in fairness(subjects, table)}


def test_weights_that_differ_are_called_unfair(found: Findings) -> None:
    (weights,) = [one for one in found.fairness if one.what == "weights and precision"]

    assert (weights.verdict, weights.why) == ("not fair", "ollama: Q4_1, vllm: bfloat16")
    assert "weights and precision" in found.short[-1]


def test_equal_conditions_are_fair_and_missing_ones_not_known(written: Path) -> None:
    alike = msgspec.structs.replace(VLLM, weights="Q4_1", slots=32, context=None)
    seen = verdicts(msgspec.structs.replace(OLLAMA, slots=32), alike, written=written)

    assert seen["weights and precision"] == "fair"
    assert seen["slots"] == "fair"
    assert seen["context"] == "not known"


def test_order_that_alternates_and_three_repetitions_are_fair(found: Findings) -> None:
    seen = {one.what: one.verdict for one in found.fairness}

    assert (seen["order"], seen["repetitions"], seen["prompts"]) == ("fair", "fair", "fair")
    assert seen["failures"] == "not fair"


def test_a_network_in_the_times_of_one_target_alone_is_unfair(written: Path) -> None:
    far = msgspec.structs.replace(VLLM, url="http://10.0.0.2:8001")

    assert verdicts(OLLAMA, far, written=written)["load generator"] == "not fair"


# power, and the cost of tokens


def costs(folder: Path, cost: Prices, *powers: samples.Power) -> str:
    """The report's section on power and cost, with these prices and power samples."""
    known = experiment.load(folder)
    msgspec.structs.replace(known, cost=cost).save(folder)
    writer = samples.Writer(folder / "raw.jsonl")
    for power in powers:
        writer.write(power)
    writer.close()
    check(folder)
    report.write(folder)
    text = (folder / "report.md").read_text()
    return text.partition("## Power, and the cost of tokens")[2].partition("\n## ")[0]


def test_without_power_and_prices_the_report_says_how_to_configure_them(raw: Path) -> None:
    text = costs(raw, Prices())

    assert "Not known: no card of this machine reported its power" in text
    assert "Set cost in the settings" in text
    assert "|" not in text


def test_configured_watts_and_prices_make_a_table_that_says_so(raw: Path) -> None:
    text = costs(raw, Prices("USD", 0.3, 2.0, 0.9, watts=700))

    assert "Watts are configured: 700 W." in text
    assert "Prices are configured, in USD: 0.3 per kWh, 2 per hour of a rented machine" in text
    assert "| target at concurrency | watts | tokens/J | electricity | rent | an API |" in text
    assert len(re.findall(r"^\| (ollama|vllm|gateway) at \d+ \| 700 \|", text, re.MULTILINE)) == 9
    assert "Costs are in USD per million output tokens." in text


def test_rent_alone_makes_a_table_without_watts_and_says_so(raw: Path) -> None:
    text = costs(raw, Prices(rent_per_hour=2.0))

    assert "Watts are not known: no card of this machine reported its power." in text
    assert "| target at concurrency | rent |" in text


def test_measured_watts_are_called_measured_and_unknown_columns_are_left_out(
    raw: Path,
) -> None:
    cells = samples.cells(samples.read(raw / "raw.jsonl"))
    [vllm] = [one for one in cells if (one.target, one.level, one.repetition) == ("vllm", 16, 1)]
    times = range(round(vllm.began), round(vllm.ended) + 1)
    text = costs(raw, Prices(), *(samples.Power(float(at), 350.0) for at in times))

    assert "Watts are measured: the power of the cards." in text
    assert "No price is set." in text
    assert "| target at concurrency | watts | tokens/J |" in text
    assert re.findall(r"^\| (\w+ at \d+) \| 350 \|", text, re.MULTILINE) == ["vllm at 16"]


# incomplete experiments


def test_a_headline_of_one_repetition_says_so(raw: Path) -> None:
    lines = (raw / "raw.jsonl").read_text().splitlines(keepends=True)
    once = [line for line in lines if '"repetition":2' not in line and '"repetition":3' not in line]
    (raw / "raw.jsonl").write_text("".join(once))
    check(raw)
    report.write(raw)

    assert "Too few repetitions: how much of this is chance is not known." in sentences(raw)


def test_cells_without_any_measurement_are_named(raw: Path) -> None:
    gone = msgspec.structs.replace(VLLM, label="vllm-2")
    describe(raw, (OLLAMA, VLLM, GATEWAY, gone))
    check(raw)
    report.write(raw)

    assert "Not measured at all: vllm-2 at 1, vllm-2 at 4" in (raw / "report.md").read_text()


def sentences(folder: Path) -> Iterator[str]:
    known = json.loads((folder / "report.json").read_bytes())
    yield known["headline"]
    yield from known["short"]


def test_targets_of_unknown_engines_are_compared_without_a_claim(raw: Path) -> None:
    describe(raw, (), Limits())
    check(raw)
    report.write(raw)

    text = (raw / "report.md").read_text()
    headline = "With 16 concurrent requests vllm answers 2.0x as fast as ollama"
    assert next(sentences(raw)).startswith(headline)
    assert "claimed" not in text.split("## Formulas")[0].lower()
    assert "No SLO was stated" in text
