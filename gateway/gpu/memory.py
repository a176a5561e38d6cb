"""What there is of GPU memory, how much of it is free, who has the rest, and how the cards do.

It is asked and never reckoned: an engine that says its model is gone may still hold the
bytes. A question waits for a driver or for files, up to a tenth of a second: ask it in a
thread. Whoever cannot answer says `MemoryUnknown`, and serving goes on without it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntFlag
from functools import partial
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


class Brake(IntFlag):
    """What keeps a card from its full clock now, with the driver's own numbers."""

    POWER_LIMIT = 0x4
    HARDWARE = 0x8
    HEAT = 0x20
    HARDWARE_HEAT = 0x40
    POWER_SUPPLY = 0x80


@dataclass(frozen=True, slots=True)
class Card:
    """One card as its driver sees it now; None where that does not tell.

    Attributes:
        memory: Bytes in all.
        width: Lanes of its PCIe link now, and at most. A link may rest when nothing runs.
        generation: Of its PCIe link now, and at most.
        state: From 0, working at full clock, to 15, idle.
        power_w: Its power limit, and the one it came with, watts.
        heat_c: Its temperature, and the one at which its driver slows it down, °C.
        peers: The cards, by index, whose memory it reads directly (P2P).
    """

    index: int
    name: str
    memory: int
    width: tuple[int | None, int | None] = (None, None)
    generation: tuple[int | None, int | None] = (None, None)
    state: int | None = None
    power_w: tuple[float | None, float | None] = (None, None)
    heat_c: tuple[int | None, int | None] = (None, None)
    brakes: Brake | None = None
    peers: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"card {self.index} ({self.name})"


@dataclass(frozen=True, slots=True)
class Reading:
    """What a card's meters show now; None where it has no such meter.

    Attributes:
        memory_total: Bytes in all.
        memory_used: Bytes that somebody has.
        watts: What it draws.
        watts_limit: What it may draw.
        celsius: Of the chip.
        utilization: Share of the time in which it computed, 0.0 to 1.0.
        joules: Energy since the driver was loaded.
    """

    index: int
    name: str
    memory_total: int
    memory_used: int
    watts: float | None = None
    watts_limit: float | None = None
    celsius: int | None = None
    utilization: float | None = None
    joules: float | None = None


@dataclass(frozen=True, slots=True)
class Driver:
    """The driver's version, the newest CUDA it runs, and its cards."""

    version: str
    cuda: str
    cards: tuple[Card, ...]


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

    def driver(self) -> Driver:
        """The driver, and how each card does; raises `MemoryUnknown`."""
        cards = self._each(_card)
        version, cuda = self._each(
            lambda nvml, _: (
                nvml.nvmlSystemGetDriverVersion(),
                nvml.nvmlSystemGetCudaDriverVersion_v2(),
            )
        )[0]
        return Driver(version, f"{cuda // 1000}.{cuda % 1000 // 10}", tuple(cards))

    def readings(self) -> list[Reading]:
        """What each card's meters show; raises `MemoryUnknown`."""
        return self._each(_reading)

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
            self._library = _pynvml()
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


def _card(nvml: Any, card: Any) -> Card:
    """What this card tells of itself."""
    told = partial(_told, nvml)
    index = nvml.nvmlDeviceGetIndex(card)
    brakes = told(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, card)
    peers: list[tuple[int, int | None]] = []
    for other in range(nvml.nvmlDeviceGetCount()):
        if other != index:
            handle = nvml.nvmlDeviceGetHandleByIndex(other)
            # By number: the library's own constant for reading is a tuple by mistake.
            peers.append((other, told(nvml.nvmlDeviceGetP2PStatus, card, handle, 0)))
    return Card(
        index=index,
        name=nvml.nvmlDeviceGetName(card),
        memory=nvml.nvmlDeviceGetMemoryInfo(card).total,
        width=(
            told(nvml.nvmlDeviceGetCurrPcieLinkWidth, card),
            told(nvml.nvmlDeviceGetMaxPcieLinkWidth, card),
        ),
        generation=(
            told(nvml.nvmlDeviceGetCurrPcieLinkGeneration, card),
            told(nvml.nvmlDeviceGetMaxPcieLinkGeneration, card),
        ),
        state=told(nvml.nvmlDeviceGetPerformanceState, card),
        power_w=(
            _thousandth(told(nvml.nvmlDeviceGetPowerManagementLimit, card)),
            _thousandth(told(nvml.nvmlDeviceGetPowerManagementDefaultLimit, card)),
        ),
        heat_c=(
            told(nvml.nvmlDeviceGetTemperature, card, nvml.NVML_TEMPERATURE_GPU),
            told(
                nvml.nvmlDeviceGetTemperatureThreshold,
                card,
                nvml.NVML_TEMPERATURE_THRESHOLD_GPU_MAX,
            ),
        ),
        brakes=None if brakes is None else Brake(brakes & sum(Brake)),
        peers=None
        if any(status is None for _, status in peers)
        else tuple(other for other, status in peers if status == nvml.NVML_P2P_STATUS_OK),
    )


def _reading(nvml: Any, card: Any) -> Reading:
    """What this card's meters show."""
    told = partial(_told, nvml)
    memory = nvml.nvmlDeviceGetMemoryInfo(card)
    rates = told(nvml.nvmlDeviceGetUtilizationRates, card)
    return Reading(
        index=nvml.nvmlDeviceGetIndex(card),
        name=nvml.nvmlDeviceGetName(card),
        memory_total=memory.total,
        memory_used=memory.used,
        watts=_thousandth(told(nvml.nvmlDeviceGetPowerUsage, card)),
        watts_limit=_thousandth(told(nvml.nvmlDeviceGetEnforcedPowerLimit, card)),
        celsius=told(nvml.nvmlDeviceGetTemperature, card, nvml.NVML_TEMPERATURE_GPU),
        utilization=None if rates is None else rates.gpu / 100,
        joules=_thousandth(told(nvml.nvmlDeviceGetTotalEnergyConsumption, card)),
    )


def _pynvml() -> Any:
    """What speaks to the driver; 18 MB, so it is not loaded where there is none."""
    if importlib.util.find_spec("pynvml") is None:
        raise MemoryUnknown("pynvml is not installed: pip install nvidia-ml-py")
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as exc:
        raise MemoryUnknown(f"there is no NVIDIA driver ({exc})") from exc
    return importlib.import_module("pynvml")


def drawn(cards: Sequence[Reading]) -> float | None:
    """Watts of all of them together; None where one does not tell."""
    watts = [card.watts for card in cards if card.watts is not None]
    return sum(watts) if cards and len(watts) == len(cards) else None


def _told(nvml: Any, question: Callable[..., Any], *arguments: Any) -> Any:
    """What is answered, which not every card does to everything; else None."""
    try:
        return question(*arguments)
    except (
        nvml.NVMLError_NotSupported,
        nvml.NVMLError_NoPermission,
        nvml.NVMLError_FunctionNotFound,  # a driver older than the question
        nvml.NVMLError_InvalidArgument,
    ):
        return None


def _thousandth(thousandths: int | None) -> float | None:
    """Watts of milliwatts, joules of millijoules."""
    return None if thousandths is None else thousandths / 1000


def _largest_first(sizes: dict[int, int]) -> list[tuple[int, int]]:
    return sorted(sizes.items(), key=lambda entry: (-entry[1], entry[0]))
