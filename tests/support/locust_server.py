"""Runs Locust as often as asked, each time in a fork of a process that has it imported.

    python -m tests.support.locust_server

A line on stdin is a list of arguments and the files for stdout and stderr, as JSON; the line
on stdout is the exit status. Importing Locust takes a second, which each start would pay;
Locust itself forks its workers at the same place, after its imports.
"""

from __future__ import annotations

import json
import os
import sys

from locust import main


def run(arguments: list[str], stdout: str, stderr: str) -> None:
    """Be Locust with these arguments; raises `SystemExit` at its end."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for path, descriptor in ((os.devnull, 0), (stdout, 1), (stderr, 2)):
        opened = os.open(path, os.O_RDONLY if descriptor == 0 else flags, 0o644)
        os.dup2(opened, descriptor)
    sys.argv = ["locust", *arguments]
    main.main()  # type: ignore[no-untyped-call]
    raise SystemExit(0)


def serve() -> None:
    """Fork for every line, one at a time, until stdin ends."""
    for line in sys.stdin:
        arguments, stdout, stderr = json.loads(line)
        child = os.fork()
        if not child:
            run(arguments, stdout, stderr)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    serve()
