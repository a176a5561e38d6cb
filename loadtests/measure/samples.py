"""The raw file of a measurement: one JSON line for each request, cell and run.

Every figure of a report is computed from it. A line is one write to a file opened for
appending, so several processes may write at the same time, and a run that is killed loses
at most its last line.

Schema, version 2; version 1 had no `power`. Every line is an object with a `type`.

| type      | a line for                             | written                                 |
|-----------|----------------------------------------|-----------------------------------------|
| `run`     | a start of the load generator          | first; has `version` and the options    |
| `request` | a request, however it ended            | when it is over                         |
| `cell`    | a target at a level in one repetition  | when all its measured requests are over |
| `power`   | the power of the cards                 | about once a second, if it is known     |

Seconds are counted from just before the request was sent, by a steady clock; `start`, `began`
and `ended` are Unix time. Fields with their default value are left out.
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
    """A raw file cannot be read or written; the message says why and what to do."""


class Run(msgspec.Struct, tag="run", omit_defaults=True):
    """A start of the load generator.

    Attributes:
        version: Version of this schema.
        at: Unix time.
        command: The command line, without keys.
        options: The options of the measurement by name.
    """

    version: int
    at: float
    command: list[str]
    options: dict[str, str | int | float | None] = {}


class Request(msgspec.Struct, tag="request", omit_defaults=True):
    """One request as its client timed it.

    Attributes:
        target: Label of the target.
        loop: `closed`: a fixed concurrency. `open`: a fixed rate of arrivals. `chat`: users who
            chat.
        level: Concurrent requests, requests per second, or users, by the loop.
        repetition: Counted from 1.
        user: Number of the simulated user.
        number: Number of the user's request in this cell, from 0.
        phase: Only `measured` requests make latencies. `trailing` ones keep the concurrency up
            until the last measured one is over, and may be cancelled.
        start: Unix time just before it was sent.
        e2e_s: To the last byte, or to the error.
        ttft_s: To the first delta with content, reasoning or a tool call.
        gaps_s: Times between such deltas.
        tpot_s: (last delta - first delta) / (tokens_out - 1).
        tokens_in: Tokens of the prompt, by the server's `usage`.
        tokens_out: Tokens of the answer, by the server's `usage`.
        finish: The server's `finish_reason`.
        lane: Header `x-gateway-lane`.
        reason: Header `x-gateway-reason`.
        error: The error, if any; `cut` if the generator cancelled the request itself.
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
    """A target at a level in one repetition, with the load of the generator itself.

    Attributes:
        began: Start of the first measured request, Unix time.
        ended: End of the last measured request, Unix time.
        outcome: `complete`, or the reason why it is not.
        cpu: CPU share of one core of the generator's busiest process.
        lag_p50_s: Scheduling lag of the generator, median.
        lag_p99_s: Scheduling lag of the generator, 99th percentile.
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
    """A sample of the power of all cards of this machine together.

    Attributes:
        at: Unix time.
        watts: By the cards' driver.
    """

    at: float
    watts: float


Line: TypeAlias = Run | Request | Cell | Power

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)


def decode(line: bytes) -> Line:
    """The line in these bytes; raises `msgspec.DecodeError` if they are not one."""
    return _decoder.decode(line)


class Writer:
    """Appends lines to a raw file; other processes may append at the same time.

    Args:
        path: The file; it is created if missing, parents included.

    Raises:
        SamplesError: The file cannot be written.
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
        """Append a line.

        Raises:
            SamplesError: The line could not be written whole, as on a full disk.
        """
        text = _encoder.encode(line) + b"\n"
        try:
            written = os.write(self._file, text)
            if written < len(text):  # the disk has just become full
                os.write(self._file, text[written:])
        except OSError as exc:
            raise self._failed(exc) from exc

    def close(self) -> None:
        """Close the file; nothing can be written after it."""
        os.close(self._file)

    def _failed(self, exc: OSError) -> SamplesError:
        return SamplesError(
            f"{self.path} cannot be written: {exc.strerror}. Its lines stay; free some space or "
            "name another file"
        )


def read(path: Path) -> Iterator[Line]:
    """The lines of a raw file, in order; a line that was cut off is skipped.

    Raises:
        SamplesError: The file cannot be read, or is not a raw file.
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
            decoded = decode(line)
        except msgspec.DecodeError as exc:
            if _cut(lines, number):
                continue
            raise SamplesError(f"{path}, line {number}: {exc}") from exc
        if isinstance(decoded, Run) and decoded.version not in READABLE_VERSIONS:
            raise SamplesError(
                f"{path} has version {decoded.version}, this program reads versions "
                f"{' and '.join(map(str, READABLE_VERSIONS))}: read it with the program that wrote "
                "it, or measure again"
            )
        yield decoded


def _cut(lines: list[bytes], number: int) -> bool:
    """Whether a line was cut off: at the file's end, or where the next run began to append."""
    line = lines[number - 1]
    return number == len(lines) or b'{"type":' in line[1:]


def requests(lines: Iterable[Line]) -> list[Request]:
    """The requests among the lines."""
    return [line for line in lines if isinstance(line, Request)]


def by_cell(lines: Iterable[Line]) -> list[tuple[Cell, list[Request]]]:
    """Each cell with its requests of all phases.

    A cell that was repeated after an interruption is there twice. A request belongs to the
    run in whose time it started: from the start of the generator to the end of the cell.
    """
    run_at = 0.0
    measured: list[tuple[float, Cell, list[Request]]] = []
    requests: list[Request] = []
    for line in lines:
        if isinstance(line, Run):
            run_at = line.at
        elif isinstance(line, Cell):
            measured.append((run_at, line, []))
        elif isinstance(line, Request):
            requests.append(line)
    by_key: dict[tuple[str, str, float, int], list[tuple[float, Cell, list[Request]]]] = {}
    for entry in measured:
        cell = entry[1]
        key = cell.target, cell.loop, cell.level, cell.repetition
        by_key.setdefault(key, []).append(entry)
    for request in requests:
        key = request.target, request.loop, request.level, request.repetition
        for began, cell, of_cell in by_key.get(key, ()):
            if began <= request.start <= cell.ended:
                of_cell.append(request)
    return [(cell, of_cell) for _, cell, of_cell in measured]


def powers(lines: Iterable[Line]) -> list[Power]:
    """The power samples among the lines, in order of time."""
    return sorted((line for line in lines if isinstance(line, Power)), key=lambda one: one.at)


def cells(lines: Iterable[Line]) -> list[Cell]:
    """The cells among the lines."""
    return [line for line in lines if isinstance(line, Cell)]
