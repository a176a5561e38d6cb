"""A raw file can be read, whatever happened to the run that wrote it."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from loadtests.measure import samples
from loadtests.measure.samples import Cell, Line, Power, Request, Run, SamplesError, Writer


def asked(start: float, target: str = "a", phase: samples.Phase = "measured") -> Request:
    return Request(target, "closed", 4, 1, 0, 0, phase, start, 1.0, gaps_s=[0.1, 0.2])


def cell(began: float, ended: float, outcome: str = "complete") -> Cell:
    return Cell("a", "closed", 4, 1, began, ended, outcome)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "raw.jsonl"


def test_lines_are_read_as_they_were_written(path: Path) -> None:
    lines: list[Line] = [Run(1, 5.0, ["locust"]), asked(10.0), cell(10.0, 11.0)]
    writer = Writer(path)
    for line in lines:
        writer.write(line)

    assert list(samples.read(path)) == lines


def test_a_line_has_its_type_and_leaves_out_defaults(path: Path) -> None:
    Writer(path).write(asked(10.0))

    assert json.loads(path.read_text()) == {
        "type": "request", "target": "a", "loop": "closed", "level": 4, "repetition": 1, "user": 0,
        "number": 0, "phase": "measured", "start": 10.0, "e2e_s": 1.0, "gaps_s": [0.1, 0.2],
    }  # fmt: skip


def test_a_cut_off_last_line_is_skipped_and_appended_to(path: Path) -> None:
    Writer(path).write(asked(10.0))
    with path.open("ab") as file:
        file.write(b'{"type":"request","tar')
    Writer(path).write(asked(20.0))

    assert [one.start for one in samples.requests(samples.read(path))] == [10.0]


def _write(path: Path, target: str) -> None:
    writer = Writer(path)
    for number in range(500):
        writer.write(asked(float(number), target))


@pytest.mark.integration
def test_processes_that_write_concurrently_tear_no_line(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(path, name)) for name in "abc"]
    for one in writers:
        one.start()
    for one in writers:
        one.join()

    assert len(samples.requests(samples.read(path))) == 1500


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("no json\n{}\n", "line 1"),
        ('{"type":"run","version":9,"at":0,"command":[]}\n', "version 9"),
    ],
)
def test_another_kind_of_file_is_refused_with_the_line(path: Path, text: str, why: str) -> None:
    path.parent.mkdir()
    path.write_text(text)

    with pytest.raises(SamplesError, match=why):
        list(samples.read(path))


def test_files_of_version_1_are_still_read(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"type":"run","version":1,"at":0,"command":[]}\n')

    assert [type(line) for line in samples.read(path)] == [Run]


def test_power_samples_belong_to_no_request(path: Path) -> None:
    writer = Writer(path)
    for line in (Power(3.0, 700.0), asked(1.0), Power(1.0, 650.0), cell(0.0, 5.0)):
        writer.write(line)
    lines = [*samples.read(path)]

    assert samples.powers(lines) == [Power(1.0, 650.0), Power(3.0, 700.0)]
    assert samples.by_cell(lines) == [(cell(0.0, 5.0), [asked(1.0)])]


def test_a_full_disk_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(SamplesError, match=r"No space left.*free some space"):
        Writer(Path("/dev/full")).write(asked(1.0))


def test_a_repeated_cell_has_only_its_own_requests(path: Path) -> None:
    lines: list[Line] = [
        Run(1, 0.0, []), asked(1.0), cell(1.0, 5.0, "interrupted"),
        Run(1, 10.0, []), asked(11.0, phase="warm-up"), asked(12.0), cell(12.0, 13.0),
        asked(12.5),
    ]  # fmt: skip

    first, second = samples.by_cell(lines)

    assert [one.start for one in first[1]] == [1.0]
    assert [one.start for one in second[1]] == [11.0, 12.0, 12.5]
