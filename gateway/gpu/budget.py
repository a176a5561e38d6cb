"""Memory of this machine that stands for a GPU where there is none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from gateway.gpu.memory import MemoryUnknown, largest_first


class Budget:
    """Bytes that stand for the GPU where there is none (Linux).

    What engines have of it is the memory they have of the machine: pages they share among
    them are counted once where the kernel lets us see that, and as each one's own if not.

    Args:
        size: Bytes there are in all.
        engines: Tells the processes that engines were started as. All that descend from
            one count, and all of its process group, in which an orphan stays.
        proc: Where the kernel tells of processes.
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
        return max(0, self._size - sum(size for _, size in self.who()))

    def least(self) -> int:
        return self.free()

    def by_card(self) -> list[tuple[str, int, int]]:
        """The budget is one card."""
        return [("the budget", self._size, self.free())]

    def who(self) -> list[tuple[int, int]]:
        sizes = {pid: self._resident(pid) for pid in self._members(set(self._engines()))}
        return largest_first({pid: size for pid, size in sizes.items() if size})

    def _members(self, engines: set[int]) -> set[int]:
        """The processes that belong to these, themselves included."""
        parents: dict[int, int] = {}
        members: set[int] = set()
        try:
            pids = [int(entry.name) for entry in self._proc.iterdir() if entry.name.isdecimal()]
        except OSError as exc:
            raise MemoryUnknown(f"no {self._proc} to see processes in: {exc.strerror}") from exc
        for pid in pids:
            try:
                stat = (self._proc / str(pid) / "stat").read_bytes()
            except OSError:
                continue  # it has ended
            # Its name, in brackets, may hold anything, brackets too.
            _, parent, group, session = stat.rpartition(b")")[2].split()[:4]
            parents[pid] = int(parent)
            if not engines.isdisjoint((pid, int(group), int(session))):
                members.add(pid)
        while more := {p for p, parent in parents.items() if parent in members} - members:
            members |= more
        return members

    def _resident(self, pid: int) -> int:
        """Bytes of this process in memory; 0 if it has ended."""
        where = self._proc / str(pid)
        try:
            for line in (where / "smaps_rollup").read_bytes().splitlines():
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) * 1024
        except OSError:  # it has ended, or is another user's: of those all may read only this
            pass
        try:
            return int((where / "statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return 0
