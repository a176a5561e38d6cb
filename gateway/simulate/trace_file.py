"""A trace from a file: `seconds,people` lines, the same as JSON lines, or the gateway's log."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from gateway.errors import UsageError
from gateway.simulate.choices import MAX_PEOPLE
from gateway.simulate.traces import PeopleTrace, RequestTrace, Trace


def read(path: Path) -> Trace:
    """The trace in this file, whichever of the three formats it has.

    Raises:
        UsageError: It cannot be read, is empty, or has a line that is not understood.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"the trace {path} cannot be read: {exc}") from exc
    lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise UsageError(f"the trace {path} is empty")
    objects = [(n, _object(path, n, line)) for n, line in lines if line.startswith("{")]
    if any("total_s" in entry for _, entry in objects):
        return _from_log(path, objects)  # the other lines are the gateway's messages
    if objects:
        rows = [(n, entry.get("seconds"), entry.get("people")) for n, entry in objects]
        if len(objects) < len(lines):
            other = next(n for n, line in lines if not line.startswith("{"))
            raise UsageError(f"the trace {path}, line {other}: is not a JSON object")
        return _from_steps(path, rows)
    cells = [(n, [cell.strip() for cell in line.split(",")]) for n, line in lines]
    if [cell.lower() for cell in cells[0][1]] == ["seconds", "people"]:
        del cells[0]
    return _from_steps(path, [(n, row[0], row[1] if len(row) == 2 else None) for n, row in cells])


def _object(path: Path, number: int, line: str) -> dict[str, object]:
    try:
        return msgspec.json.decode(line, type=dict[str, object])
    except msgspec.DecodeError as exc:
        raise UsageError(f"the trace {path}, line {number}: {exc}") from exc


def _from_steps(path: Path, rows: Iterable[tuple[int, object, object]]) -> PeopleTrace:
    steps: list[tuple[float, int]] = []
    for number, seconds, people in rows:
        try:
            step = msgspec.convert((seconds, people), tuple[float, int], strict=False)
        except msgspec.ValidationError:
            step = (math.nan, 0)
        if not (math.isfinite(step[0]) and step[0] >= 0 and 0 <= step[1] <= MAX_PEOPLE):
            raise UsageError(
                f"the trace {path}, line {number}: write seconds from the beginning and the number "
                f"of people from then on (0 to {MAX_PEOPLE}), for example 3600,12"
            )
        steps.append(step)
        if len(steps) > 1 and steps[-2][0] >= step[0]:
            raise UsageError(f"the trace {path}, line {number}: the seconds must increase")
    if len(steps) < 2 or not any(people for _, people in steps[:-1]):
        raise UsageError(
            f"the trace {path} has no people in it: write at least two lines; the last one says "
            "when the trace ends"
        )
    people = max(people for _, people in steps[:-1])
    return PeopleTrace(path.stem, steps[:-1], steps[-1][0], people)


def _from_log(path: Path, objects: Iterable[tuple[int, Mapping[str, object]]]) -> RequestTrace:
    """The foreground requests of a log that an engine answered."""
    requests: list[tuple[float, float]] = []
    for number, entry in objects:
        if "total_s" not in entry or entry.get("background") or not entry.get("lane"):
            continue
        at, tokens = entry.get("at"), entry.get("tokens_out")
        if not isinstance(at, int | float) or not isinstance(tokens, int | float | None):
            raise UsageError(
                f"the trace {path}, line {number}: is not a line of the gateway's request log"
            )
        requests.append((float(at), float(tokens or 0)))
    if not requests:
        raise UsageError(f"the trace {path} has no request that an engine answered")
    requests.sort()
    first = requests[0][0]
    known = [tokens for _, tokens in requests if tokens > 0]
    mean = math.fsum(known) / len(known) if known else 1.0
    work = [tokens / mean if tokens > 0 else 1.0 for _, tokens in requests]
    at_s = [at - first for at, _ in requests]
    return RequestTrace(path.stem, at_s, work, at_s[-1] + 1.0)
