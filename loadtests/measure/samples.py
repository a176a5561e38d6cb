"""What a run leaves behind: one JSON line for each request, cell and run, in one file.

The file is the measurement; every figure of a report is computed from it again. Lines
are whole or not there: each is one write to a file opened for appending, so that several
processes may write at once and a run that is ended loses at most its last line.

Schema, version 2; version 1 had no `power`. Every line is an object with a `type`.

| type      | a line for                     | written                                      |
|-----------|--------------------------------|----------------------------------------------|
| `run`     | a start of the load generator  | first; says `version` and how it was called  |
| `request` | a request, however it ended    | when it is over                              |
| `cell`    | a target at a level, once      | when all its measured requests are over      |
| `power`   | what the cards draw            | about once a second, where they tell it      |

Seconds are from just before the request was sent, by a steady clock; `start`, `began` and
`ended` are Unix time. Fields that hold nothing are left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

SAMPLES_VERSION = 2
READABLE_VERSIONS = (1, SAMPLES_VERSION)

Loop: TypeAlias = Literal["closed", "open", "chat"]
Phase: TypeAlias = Literal["warm-up", "measured", "trailing"]


class SamplesError(Exception):
    """A file of samples cannot be read or written; the text says why and what to do."""


class Run(msgspec.Struct, tag="run", omit_defaults=True):
    """A start of the load generator.

    Attributes:
        version: Of this schema.
        at: Unix time.
        command: The command line, keys left out.
        options: How it was asked to measure, by option.
    """

    version: int
    at: float
    command: list[str]
    options: dict[str, str | int | float | None] = {}


class Request(msgspec.Struct, tag="request", omit_defaults=True):
    """One request as its user saw it.

    Attributes:
        target: Label of what was asked.
        loop: `closed`: so many at once. `open`: so many a second, whoever waits. `chat`: people.
        level: Requests at once, a second, or people, by the loop.
        repetition: From 1.
        user: Number of the simulated user.
        number: Which of the user's requests in this cell, from 0.
        phase: Only `measured` ones make figures. `trailing` ones keep the level up until
            the last measured one is over, and may be cut.
        start: Unix time just before it was sent.
        e2e_s: To the last byte, or to the error.
        ttft_s: To the first delta with content, reasoning or a tool call in it.
        gaps_s: Between such deltas; one less than there were.
        tpot_s: (last - first of them) / (tokens_out - 1).
        tokens_in: Of the prompt, by the server's `usage`.
        tokens_out: Of the answer, by the server's `usage`.
        finish: The server's `finish_reason`.
        lane: Header `x-gateway-lane`.
        reason: Header `x-gateway-reason`.
        error: What went wrong, where something did. `cut` where we hung up ourselves.
    """

    target: str
    loop: Loop
    level: float
    repetition: int
    user: int
    number: int
    phase: Phase
    start: float
    e2e_s: float
    ttft_s: float | None = None
    gaps_s: list[float] = []
    tpot_s: float | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    finish: str | None = None
    lane: str | None = None
    reason: str | None = None
    error: str | None = None


class Cell(msgspec.Struct, tag="cell", omit_defaults=True):
    """A target at a level, once, and how the load generator itself fared meanwhile.

    Attributes:
        began: When the first measured request was sent, Unix time.
        ended: When the last measured request was over, Unix time.
        outcome: `complete`, or why it is not.
        cpu: CPU seconds a second of the busiest process of the generator.
        lag_p50_s: How late the generator was where it wanted to be on time, median.
        lag_p99_s: The same, 99th percentile.
    """

    target: str
    loop: Loop
    level: float
    repetition: int
    began: float
    ended: float
    outcome: str = "complete"
    cpu: float = 0.0
    lag_p50_s: float = 0.0
    lag_p99_s: float = 0.0


class Power(msgspec.Struct, tag="power"):
    """What all cards of this machine draw together.

    Attributes:
        at: Unix time.
        watts: As their driver tells it.
    """

    at: float
    watts: float


Line: TypeAlias = Run | Request | Cell | Power

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)


def decode(line: bytes) -> Line:
    """One line; raises `msgspec.DecodeError` where it is none."""
    return _decoder.decode(line)


class Writer:
    """Appends lines to a file, which other processes may do at the same time.

    Args:
        path: Made if it is not there, parents included.

    Raises:
        SamplesError: It cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as exc:
            raise self._failed(exc) from exc

    def __repr__(self) -> str:
        return f"<Writer {self.path}>"

    def write(self, line: Line) -> None:
        """Add a line.

        Raises:
            SamplesError: It could not be written whole: the disk is full, perhaps.
        """
        text = _encoder.encode(line) + b"\n"
        try:
            written = os.write(self._file, text)
            if written < len(text):  # what a disk that has just become full does
                os.write(self._file, text[written:])
        except OSError as exc:
            raise self._failed(exc) from exc

    def close(self) -> None:
        """Nothing can be written any more."""
        os.close(self._file)

    def _failed(self, exc: OSError) -> SamplesError:
        return SamplesError(
            f"{self.path} cannot be written: {exc.strerror}. What is in it stays; free some "
            "space or name another file"
        )


def read(path: Path) -> Iterator[Line]:
    """The lines of a file, in order; one that was cut off at the file's end is passed over.

    Raises:
        SamplesError: It cannot be read, or is not such a file.
    """
    try:
        text = path.read_bytes()
    except OSError as exc:
        raise SamplesError(f"{path} cannot be read: {exc.strerror}") from exc
    lines = text.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            said = decode(line)
        except msgspec.DecodeError as exc:
            if _cut(lines, number):
                continue
            raise SamplesError(f"{path}, line {number}: {exc}") from exc
        if isinstance(said, Run) and said.version not in READABLE_VERSIONS:
            raise SamplesError(
                f"{path} has version {said.version}, this program reads versions "
                f"{' and '.join(map(str, READABLE_VERSIONS))}: read it with the program that wrote "
                "it, or measure again"
            )
        yield said


def _cut(lines: list[bytes], number: int) -> bool:
    """Whether the line was cut off: at the file's end, or where the next run went on."""
    line = lines[number - 1]
    return number == len(lines) or b'{"type":' in line[1:]


def requests(lines: Iterable[Line]) -> list[Request]:
    """The requests among them."""
    return [line for line in lines if isinstance(line, Request)]


def by_cell(lines: Iterable[Line]) -> list[tuple[Cell, list[Request]]]:
    """Each cell with its requests of all phases.

    A cell that was begun again after an interruption is there twice, and what belonged to
    which is told by time: from the start of the generator that wrote the cell to its end.
    """
    since = 0.0
    begun: list[tuple[float, Cell, list[Request]]] = []
    asked: list[Request] = []
    for line in lines:
        if isinstance(line, Run):
            since = line.at
        elif isinstance(line, Cell):
            begun.append((since, line, []))
        elif isinstance(line, Request):
            asked.append(line)
    by_key: dict[tuple[str, str, float, int], list[tuple[float, Cell, list[Request]]]] = {}
    for one in begun:
        cell = one[1]
        key = cell.target, cell.loop, cell.level, cell.repetition
        by_key.setdefault(key, []).append(one)
    for request in asked:
        key = request.target, request.loop, request.level, request.repetition
        for began, cell, its in by_key.get(key, ()):
            if began <= request.start <= cell.ended:
                its.append(request)
    return [(cell, its) for _, cell, its in begun]


def powers(lines: Iterable[Line]) -> list[Power]:
    """What the cards drew, in the order of time."""
    return sorted((line for line in lines if isinstance(line, Power)), key=lambda one: one.at)


def cells(lines: Iterable[Line]) -> list[Cell]:
    """The cells among them."""
    return [line for line in lines if isinstance(line, Cell)]
