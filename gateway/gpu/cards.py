"""The NVIDIA cards of this machine, as their driver sees them."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntFlag
from functools import partial
from typing import Any, TypeVar

from gateway.gpu.memory import MemoryUnknown, largest_first

T = TypeVar("T")
#: How long a query waits for the one before it, seconds. A driver that hangs must not block
#: one thread after the other.
DRIVER_BUSY_S = 2.0


class Brake(IntFlag):
    """The reasons why a card runs below its full clock, with the driver's own numbers."""

    POWER_LIMIT = 0x4
    HARDWARE = 0x8
    HEAT = 0x20
    HARDWARE_HEAT = 0x40
    POWER_SUPPLY = 0x80


@dataclass(frozen=True, slots=True)
class Card:
    """One card as its driver reports it now; None: not reported.

    Attributes:
        memory: Total bytes.
        width: Lanes of its PCIe link now, and at most. An idle link may use fewer.
        generation: PCIe generation of its link now, and at most.
        state: Performance state, from 0 (full clock) to 15 (idle).
        power_w: Its power limit, and the default one, watts.
        heat_c: Its temperature, and the one at which it is throttled, °C.
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
    """What a card measures of itself now; None: it has no such sensor.

    Attributes:
        memory_total: Total bytes.
        memory_used: Bytes in use.
        watts: Power draw.
        watts_limit: Power limit.
        celsius: Temperature of the chip.
        utilization: Share of the time in which it computed, from 0.0 to 1.0.
        joules: Energy used since the driver was loaded.
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
        cards: Their indexes at the driver; empty: all.
        library: The binding to the driver; by default `pynvml` of the package nvidia-ml-py.
        busy_s: How long a query waits for the one before it, seconds.
    """

    def __init__(
        self, cards: Sequence[int] = (), library: Any = None, busy_s: float = DRIVER_BUSY_S
    ) -> None:
        self._cards = tuple(cards)
        self._library = library
        self._busy_s = busy_s
        self._open = False
        self._asking = threading.Lock()

    def total(self) -> int:
        return sum(memory.total for memory in self._memories())

    def free(self) -> int:
        return sum(memory.free for memory in self._memories())

    def least(self) -> int:
        free: int = min(memory.free for memory in self._memories())
        return free

    def by_card(self) -> list[tuple[str, int, int]]:
        """See `Memory.by_card`."""
        return self._query(_card_memory)

    def processes(self) -> list[tuple[int, int]]:
        sizes: dict[int, int] = {}
        for processes in self._query(self._processes):
            for process in processes:
                size = process.usedGpuMemory or 0  # None on some drivers, and in containers
                sizes[process.pid] = sizes.get(process.pid, 0) + size
        return largest_first(sizes)

    def cards(self) -> list[tuple[str, int]]:
        """The name of each card, and the bytes that programs can allocate on it in all."""
        return self._query(self._card)

    def _card(self, nvml: Any, card: Any) -> tuple[str, int]:
        try:  # only the second version reports what the driver reserves
            memory = nvml.nvmlDeviceGetMemoryInfo(card, version=nvml.nvmlMemory_v2)
        except nvml.NVMLError_FunctionNotFound:
            return str(nvml.nvmlDeviceGetName(card)), nvml.nvmlDeviceGetMemoryInfo(card).total
        return str(nvml.nvmlDeviceGetName(card)), memory.total - memory.reserved

    def driver(self) -> Driver:
        """The driver, and the state of each card; raises `MemoryUnknown`."""
        cards = self._query(_card)
        version, cuda = self._query(
            lambda nvml, _: (
                nvml.nvmlSystemGetDriverVersion(),
                nvml.nvmlSystemGetCudaDriverVersion_v2(),
            )
        )[0]
        return Driver(version, f"{cuda // 1000}.{cuda % 1000 // 10}", tuple(cards))

    def readings(self) -> list[Reading]:
        """What each card measures of itself; raises `MemoryUnknown`."""
        return self._query(_reading)

    def _memories(self) -> list[Any]:
        """`total`, `free` and `used` of each card."""
        return self._query(lambda nvml, card: nvml.nvmlDeviceGetMemoryInfo(card))

    def _processes(self, nvml: Any, card: Any) -> Sequence[Any]:
        try:
            found: Sequence[Any] = nvml.nvmlDeviceGetComputeRunningProcesses(card)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_NoPermission):
            return ()
        return found

    def _query(self, question: Callable[[Any, Any], T]) -> list[T]:
        """The answer of each card."""
        if not self._asking.acquire(timeout=self._busy_s):
            raise MemoryUnknown(f"the NVIDIA driver has not answered for {self._busy_s:g} s")
        try:
            return self._query_all(question)
        finally:
            self._asking.release()

    def _query_all(self, question: Callable[[Any, Any], T]) -> list[T]:
        if self._library is None:
            self._library = _pynvml()
        nvml = self._library
        try:
            if not self._open:
                nvml.nvmlInit()
                self._open = True
            indexes = self._cards or range(nvml.nvmlDeviceGetCount())
            # Handles are fetched each time: those from before a fault are invalid.
            answers = [question(nvml, nvml.nvmlDeviceGetHandleByIndex(i)) for i in indexes]
        except nvml.NVMLError as exc:
            self._shut()  # a driver that was updated or reset has to be opened again
            raise MemoryUnknown(f"the NVIDIA driver reports: {exc}") from exc
        if not answers:
            raise MemoryUnknown("the NVIDIA driver reports no card")
        return answers

    def _shut(self) -> None:
        if self._open:
            self._open = False
            with contextlib.suppress(self._library.NVMLError):  # it is closed already
                self._library.nvmlShutdown()


def _card(nvml: Any, card: Any) -> Card:
    """The state of this card."""
    read = partial(_supported, nvml)
    index = nvml.nvmlDeviceGetIndex(card)
    brakes = read(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, card)
    peers: list[tuple[int, int | None]] = []
    for other in range(nvml.nvmlDeviceGetCount()):
        if other != index:
            handle = nvml.nvmlDeviceGetHandleByIndex(other)
            # By number: the library's own constant for reading is a tuple by mistake.
            peers.append((other, read(nvml.nvmlDeviceGetP2PStatus, card, handle, 0)))
    return Card(
        index=index,
        name=nvml.nvmlDeviceGetName(card),
        memory=nvml.nvmlDeviceGetMemoryInfo(card).total,
        width=(
            read(nvml.nvmlDeviceGetCurrPcieLinkWidth, card),
            read(nvml.nvmlDeviceGetMaxPcieLinkWidth, card),
        ),
        generation=(
            read(nvml.nvmlDeviceGetCurrPcieLinkGeneration, card),
            read(nvml.nvmlDeviceGetMaxPcieLinkGeneration, card),
        ),
        state=read(nvml.nvmlDeviceGetPerformanceState, card),
        power_w=(
            _thousandth(read(nvml.nvmlDeviceGetPowerManagementLimit, card)),
            _thousandth(read(nvml.nvmlDeviceGetPowerManagementDefaultLimit, card)),
        ),
        heat_c=(
            read(nvml.nvmlDeviceGetTemperature, card, nvml.NVML_TEMPERATURE_GPU),
            read(
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


def _card_memory(nvml: Any, card: Any) -> tuple[str, int, int]:
    """Name, total and free bytes of this card."""
    memory = nvml.nvmlDeviceGetMemoryInfo(card)
    name = f"card {nvml.nvmlDeviceGetIndex(card)} ({nvml.nvmlDeviceGetName(card)})"
    return name, memory.total, memory.free


def _reading(nvml: Any, card: Any) -> Reading:
    """What this card measures of itself."""
    read = partial(_supported, nvml)
    memory = nvml.nvmlDeviceGetMemoryInfo(card)
    rates = read(nvml.nvmlDeviceGetUtilizationRates, card)
    return Reading(
        index=nvml.nvmlDeviceGetIndex(card),
        name=nvml.nvmlDeviceGetName(card),
        memory_total=memory.total,
        memory_used=memory.used,
        watts=_thousandth(read(nvml.nvmlDeviceGetPowerUsage, card)),
        watts_limit=_thousandth(read(nvml.nvmlDeviceGetEnforcedPowerLimit, card)),
        celsius=read(nvml.nvmlDeviceGetTemperature, card, nvml.NVML_TEMPERATURE_GPU),
        utilization=None if rates is None else rates.gpu / 100,
        joules=_thousandth(read(nvml.nvmlDeviceGetTotalEnergyConsumption, card)),
    )


def _pynvml() -> Any:
    """The binding to the driver; it takes 18 MB, so it is not loaded without a driver."""
    if importlib.util.find_spec("pynvml") is None:
        raise MemoryUnknown("pynvml is not installed: pip install nvidia-ml-py")
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as exc:
        raise MemoryUnknown(f"there is no NVIDIA driver ({exc})") from exc
    return importlib.import_module("pynvml")


def total_watts(cards: Sequence[Reading]) -> float | None:
    """Power draw of all cards together, watts; None where one does not report it."""
    watts = [card.watts for card in cards if card.watts is not None]
    return sum(watts) if cards and len(watts) == len(cards) else None


def _supported(nvml: Any, question: Callable[..., Any], *arguments: Any) -> Any:
    """The answer to a query, or None where card or driver does not support it."""
    try:
        return question(*arguments)
    except (
        nvml.NVMLError_NotSupported,
        nvml.NVMLError_NoPermission,
        nvml.NVMLError_FunctionNotFound,  # a driver older than the query
        nvml.NVMLError_InvalidArgument,
    ):
        return None


def _thousandth(thousandths: int | None) -> float | None:
    """Watts from milliwatts, joules from millijoules."""
    return None if thousandths is None else thousandths / 1000
