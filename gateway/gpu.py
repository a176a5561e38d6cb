"""What there is of GPU memory, how much of it is free, and who has the rest.

It is asked and never reckoned: an engine that says its model is gone may still hold the
bytes. A question waits for a driver or for files, up to a tenth of a second: ask it in a
thread. Whoever cannot answer says `MemoryUnknown`, and serving goes on without it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

#: How long a question waits for the one before it. A driver that hangs must not take
#: one thread after the other with it.
BUSY_S = 2.0


class MemoryUnknown(Exception):
    """Nobody can tell; the text says why, and what would change it."""


class Memory(Protocol):
    """The memory that engines share. All that is asked may raise `MemoryUnknown`."""

    def total(self) -> int:
        """Bytes of all cards together."""

    def free(self) -> int:
        """Bytes of all cards together that nobody has."""

    def least(self) -> int:
        """Free bytes of the fullest card: tensor parallel wants as much on each."""

    def who(self) -> Sequence[tuple[int, int]]:
        """Processes and the bytes each has, the largest first.

        0 bytes where the driver does not say how many; empty where it names nobody.
        """


class Nvml:
    """The NVIDIA cards of this machine, as their driver sees them.

    Args:
        cards: Which of them, by the driver's index; none named: all there are.
        library: What speaks to the driver; as it is, `pynvml` of the package nvidia-ml-py.
    """

    def __init__(self, cards: Sequence[int] = (), library: Any = None) -> None:
        self._cards = tuple(cards)
        self._library = library
        self._open = False
        self._asking = threading.Lock()

    def total(self) -> int:
        return sum(memory.total for memory in self._memories())

    def free(self) -> int:
        return sum(memory.free for memory in self._memories())

    def least(self) -> int:
        free: int = min(memory.free for memory in self._memories())
        return free

    def who(self) -> list[tuple[int, int]]:
        sizes: dict[int, int] = {}
        for processes in self._each(self._processes):
            for process in processes:
                size = process.usedGpuMemory or 0  # None on some drivers, and in containers
                sizes[process.pid] = sizes.get(process.pid, 0) + size
        return _largest_first(sizes)

    def cards(self) -> list[tuple[str, int]]:
        """Name of each card, and the bytes of it that programs can have between them."""
        return self._each(self._card)

    def _card(self, nvml: Any, card: Any) -> tuple[str, int]:
        try:  # what the driver keeps for itself is told by the second version alone
            memory = nvml.nvmlDeviceGetMemoryInfo(card, version=nvml.nvmlMemory_v2)
        except nvml.NVMLError_FunctionNotFound:
            return str(nvml.nvmlDeviceGetName(card)), nvml.nvmlDeviceGetMemoryInfo(card).total
        return str(nvml.nvmlDeviceGetName(card)), memory.total - memory.reserved

    def _memories(self) -> list[Any]:
        """`total`, `free` and `used` of each card."""
        return self._each(lambda nvml, card: nvml.nvmlDeviceGetMemoryInfo(card))

    def _processes(self, nvml: Any, card: Any) -> Sequence[Any]:
        try:
            found: Sequence[Any] = nvml.nvmlDeviceGetComputeRunningProcesses(card)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_NoPermission):
            return ()
        return found

    def _each(self, question: Callable[[Any, Any], T]) -> list[T]:
        """What each card answers."""
        if not self._asking.acquire(timeout=BUSY_S):
            raise MemoryUnknown(f"the NVIDIA driver has not answered for {BUSY_S:g} s")
        try:
            return self._asked(question)
        finally:
            self._asking.release()

    def _asked(self, question: Callable[[Any, Any], T]) -> list[T]:
        if self._library is None:
            try:
                self._library = importlib.import_module("pynvml")
            except ImportError as exc:
                raise MemoryUnknown("pynvml is not installed: pip install nvidia-ml-py") from exc
        nvml = self._library
        try:
            if not self._open:
                nvml.nvmlInit()
                self._open = True
            indexes = self._cards or range(nvml.nvmlDeviceGetCount())
            # A handle is asked for each time: one from before a fault is worth nothing.
            answers = [question(nvml, nvml.nvmlDeviceGetHandleByIndex(i)) for i in indexes]
        except nvml.NVMLError as exc:
            self._shut()  # a driver that was updated or reset has to be opened anew
            raise MemoryUnknown(f"the NVIDIA driver says: {exc}") from exc
        if not answers:
            raise MemoryUnknown("the NVIDIA driver knows of no card")
        return answers

    def _shut(self) -> None:
        if self._open:
            self._open = False
            with contextlib.suppress(self._library.NVMLError):  # closed is what was wanted
                self._library.nvmlShutdown()


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

    def who(self) -> list[tuple[int, int]]:
        sizes = {pid: self._resident(pid) for pid in self._members(set(self._engines()))}
        return _largest_first({pid: size for pid, size in sizes.items() if size})

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


def _largest_first(sizes: dict[int, int]) -> list[tuple[int, int]]:
    return sorted(sizes.items(), key=lambda entry: (-entry[1], entry[0]))
