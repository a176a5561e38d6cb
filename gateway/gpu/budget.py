"""A budget of this machine's memory, in place of a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from gateway.gpu.memory import MemoryUnknown, largest_first


class Budget:
    """Bytes that take the place of a GPU's where there is none (Linux).

    The engines' memory on the machine counts. Pages that processes share count once where the
    kernel lets this user see that, else once for each process.

    Args:
        size: Total bytes.
        engines: Returns the processes as which engines were started. Their descendants count,
            and all processes of their groups, in which an orphan stays.
        proc: Where the kernel shows processes.
    """

    def __init__(
        self, size: int, engines: Callable[[], Iterable[int]], *, proc: Path = Path("/proc")
    ) -> None:
        self._size = size
        self._engines = engines
        self._proc = proc

    def total(self) -> int:
        return self._size

    def free(self) -> int:
        return max(0, self._size - sum(size for _, size in self.processes()))

    def least(self) -> int:
        return self.free()

    def by_card(self) -> list[tuple[str, int, int]]:
        """The budget is one card."""
        return [("the budget", self._size, self.free())]

    def processes(self) -> list[tuple[int, int]]:
        sizes = {pid: self._resident(pid) for pid in self._members(set(self._engines()))}
        return largest_first({pid: size for pid, size in sizes.items() if size})

    def _members(self, engines: set[int]) -> set[int]:
        """The processes that belong to these engines, themselves included."""
        parents: dict[int, int] = {}
        members: set[int] = set()
        try:
            pids = [int(entry.name) for entry in self._proc.iterdir() if entry.name.isdecimal()]
        except OSError as exc:
            raise MemoryUnknown(
                f"the processes in {self._proc} cannot be listed: {exc.strerror}"
            ) from exc
        for pid in pids:
            try:
                stat = (self._proc / str(pid) / "stat").read_bytes()
            except OSError:
                continue  # it has ended
            # The name, in brackets, may contain anything, brackets too.
            _, parent, group, session = stat.rpartition(b")")[2].split()[:4]
            parents[pid] = int(parent)
            if not engines.isdisjoint((pid, int(group), int(session))):
                members.add(pid)
        while more := {p for p, parent in parents.items() if parent in members} - members:
            members |= more
        return members

    def _resident(self, pid: int) -> int:
        """Resident bytes of a process; 0 if it has ended."""
        where = self._proc / str(pid)
        try:
            for line in (where / "smaps_rollup").read_bytes().splitlines():
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) * 1024
        except (
            OSError
        ):  # it has ended, or belongs to another user: of those only `statm` is readable
            pass
        try:
            return int((where / "statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return 0
