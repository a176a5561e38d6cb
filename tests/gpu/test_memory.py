"""The GPU memory as the driver reports it, as the kernel does, and where neither does."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backends.fake import GIB, FakeGpu
from gateway.gpu.budget import Budget
from gateway.gpu.cards import Brake, Card, Nvml, Reading
from gateway.gpu.memory import Memory, MemoryNeed, MemoryUnknown

MIB = 1024**2


class NVMLError(Exception):
    """As the real one: each code has its subclass, and says its words."""

    def __str__(self) -> str:
        return type(self).__name__


class NotSupported(NVMLError):
    pass


class NoPermission(NVMLError):
    pass


class Uninitialized(NVMLError):
    pass


class InvalidArgument(NVMLError):
    pass


class GpuIsLost(NVMLError):
    pass


@dataclass
class Info:
    """What the driver says of a card's memory."""

    total: int
    free: int

    @property
    def used(self) -> int:
        return self.total - self.free


@dataclass
class Process:
    """What it says of a process; it does not always know how much that has."""

    pid: int
    usedGpuMemory: int | None  # noqa: N815 - the library's name


@dataclass
class Driver:
    """The module `pynvml` over cards of our own making; a handle is good for one opening."""

    memories: list[Info] = field(default_factory=list)
    processes: list[list[Process] | NVMLError] = field(default_factory=list)
    fault: NVMLError | None = None
    opened: int = 0
    is_open: bool = False

    NVMLError = NVMLError
    NVMLError_NotSupported = NotSupported
    NVMLError_NoPermission = NoPermission

    def nvmlInit(self) -> None:  # noqa: N802
        if self.fault:
            raise self.fault
        self.is_open = True
        self.opened += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        if not self.is_open:
            raise Uninitialized
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self.ready()
        return len(self.memories)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> tuple[int, int]:  # noqa: N802
        self.ready()
        if not 0 <= index < len(self.memories):
            raise InvalidArgument
        return self.opened, index

    def nvmlDeviceGetMemoryInfo(self, handle: tuple[int, int]) -> Info:  # noqa: N802
        return self.memories[self.card(handle)]

    def nvmlDeviceGetComputeRunningProcesses(  # noqa: N802
        self, handle: tuple[int, int]
    ) -> list[Process]:
        found = self.processes[self.card(handle)]
        if isinstance(found, NVMLError):
            raise found
        return found

    def card(self, handle: tuple[int, int]) -> int:
        self.ready()
        opened, index = handle
        assert opened == self.opened, "a handle from before the driver was closed"
        return index

    def ready(self) -> None:
        if not self.is_open:
            raise Uninitialized
        if self.fault:
            raise self.fault


class FunctionNotFound(NVMLError):
    pass


#: What a card says that works at full clock: an RTX 4090 in a slot of eight lanes.
WELL: dict[str, Any] = {
    "CurrPcieLinkWidth": 8,
    "MaxPcieLinkWidth": 16,
    "CurrPcieLinkGeneration": 4,
    "MaxPcieLinkGeneration": 4,
    "PerformanceState": 2,
    "PowerManagementLimit": 300_000,
    "PowerManagementDefaultLimit": 450_000,
    "Temperature": 61,
    "TemperatureThreshold": 84,
    "CurrentClocksThrottleReasons": 0x4 | 0x1,
    "P2PStatus": 1,
}


@dataclass
class Told(Driver):
    """A driver that tells of its cards what it is made to; an error is raised."""

    says: dict[str, Any] = field(default_factory=lambda: dict(WELL))

    NVMLError_FunctionNotFound = FunctionNotFound
    NVMLError_InvalidArgument = InvalidArgument
    NVML_TEMPERATURE_GPU = 0
    NVML_TEMPERATURE_THRESHOLD_GPU_MAX = 3
    NVML_P2P_STATUS_OK = 0

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "570.86.10"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:  # noqa: N802
        return 12080

    def nvmlDeviceGetIndex(self, handle: tuple[int, int]) -> int:  # noqa: N802
        return self.card(handle)

    def nvmlDeviceGetName(self, handle: tuple[int, int]) -> str:  # noqa: N802
        return "NVIDIA GeForce RTX 4090"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        said = self.says[name.removeprefix("nvmlDeviceGet")]

        def answer(*_: Any) -> Any:
            if isinstance(said, NVMLError):
                raise said
            return said

        return answer


def two_4090(**says: Any) -> Told:
    return Told([Info(24 * GIB, 3 * GIB), Info(24 * GIB, 5 * GIB)], says=WELL | says)


#: Two cards of 24 GiB, one of them half full.
HALF_FULL = Told([Info(24 * GIB, 24 * GIB), Info(24 * GIB, 12 * GIB)])
FULL_CARD = "card 1 (NVIDIA GeForce RTX 4090) has 12.0 GiB free of the 15.0 needed on "


@pytest.mark.parametrize(
    ("need", "shortage"),
    [
        pytest.param(MemoryNeed(30 * GIB), "", id="spread as there is room"),
        pytest.param(
            MemoryNeed(30 * GIB, cards=2), FULL_CARD + "each of 2 cards", id="two cards, as said"
        ),
        pytest.param(
            MemoryNeed(30 * GIB, even=True),
            FULL_CARD + "each of 2 cards",
            id="more than one card has, so both",
        ),
        pytest.param(MemoryNeed(20 * GIB, even=True), "", id="it may be a server of one card"),
        pytest.param(MemoryNeed(20 * GIB, cards=1), "", id="the emptiest card"),
        pytest.param(MemoryNeed(24 * GIB, cards=2), "", id="half of it on each"),
        pytest.param(
            MemoryNeed(40 * GIB, cards=2), "36.0 GiB are free of the 40.0 needed", id="in all"
        ),
    ],
)
def test_what_is_loaded_in_equal_shares_needs_its_share_on_each_card(
    need: MemoryNeed, shortage: str
) -> None:
    assert need.shortage(Nvml(library=HALF_FULL)) == shortage


@pytest.mark.parametrize(
    ("free_gib", "needed_gib", "shortage"),
    [
        pytest.param((24, 24, 2, 2), 42.3, "", id="two cards are free, two are in use"),
        pytest.param((15, 15, 15, 15), 42.3, "", id="a part on each of three or four"),
        pytest.param((12, 12), 20, "", id="half of it on each"),
        pytest.param(
            (15, 6),
            20,
            "card 0 (NVIDIA GeForce RTX 4090) has 15.0 GiB free of the 20.0 needed on one card",
            id="neither on one card nor in halves",
        ),
    ],
)
def test_where_the_number_of_cards_is_unknown_any_equal_shares_will_do(
    free_gib: tuple[int, ...], needed_gib: float, shortage: str
) -> None:
    cards = Nvml(library=Told([Info(24 * GIB, free * GIB) for free in free_gib]))

    assert MemoryNeed(int(needed_gib * GIB), even=True).shortage(cards) == shortage
    assert MemoryNeed(int(needed_gib * GIB)).shortage(cards) == "", "spread as there is room"


def test_a_budget_is_one_card(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    budget = Budget(GIB, lambda: (), proc=tmp_path / "proc")

    assert budget.by_card() == [("the budget", GIB, GIB)]
    assert MemoryNeed(GIB, even=True).shortage(budget) == ""
    assert MemoryNeed(2 * GIB, even=True).shortage(budget) == ("1.0 GiB are free of the 2.0 needed")


def two_cards() -> Driver:
    return Driver(
        [Info(24 * GIB, 3 * GIB), Info(24 * GIB, 5 * GIB)],
        [[Process(7, 20 * GIB), Process(9, 1 * GIB)], [Process(7, 19 * GIB)]],
    )


# The cards


def test_memory_is_that_of_all_cards_and_of_the_fullest() -> None:
    memory: Memory = Nvml(library=two_cards())

    assert (memory.total(), memory.free(), memory.least()) == (48 * GIB, 8 * GIB, 3 * GIB)


def test_only_the_cards_that_were_named_count() -> None:
    memory = Nvml([1], two_cards())

    assert (memory.total(), memory.free(), memory.least()) == (24 * GIB, 5 * GIB, 5 * GIB)
    assert memory.processes() == [(7, 19 * GIB)]


def test_processes_are_named_with_what_they_have_on_all_cards() -> None:
    assert Nvml(library=two_cards()).processes() == [(7, 39 * GIB), (9, 1 * GIB)]


def test_a_process_of_unknown_memory_is_named_all_the_same() -> None:
    driver = Driver([Info(GIB, 0)], [[Process(7, None)]])

    assert Nvml(library=driver).processes() == [(7, 0)]


@pytest.mark.parametrize("refusal", [NotSupported(), NoPermission()])
def test_driver_that_names_no_processes_still_tells_the_memory(refusal: NVMLError) -> None:
    memory = Nvml(library=Driver([Info(4 * GIB, 1 * GIB)], [refusal]))

    assert memory.processes() == []
    assert memory.free() == 1 * GIB


def test_driver_is_opened_once_and_again_after_a_fault() -> None:
    driver = two_cards()
    memory = Nvml(library=driver)
    memory.free()
    memory.free()
    once = driver.opened
    driver.fault = GpuIsLost()
    with pytest.raises(MemoryUnknown, match="GpuIsLost"):
        memory.free()
    with pytest.raises(MemoryUnknown, match="GpuIsLost"):
        memory.processes()
    driver.fault = None

    assert once == 1
    assert memory.free() == 8 * GIB
    assert driver.opened == 2


def test_driver_tells_how_its_cards_do() -> None:
    driver = Nvml(library=two_4090()).driver()

    assert (driver.version, driver.cuda) == ("570.86.10", "12.8")
    assert driver.cards[1] == Card(
        index=1,
        name="NVIDIA GeForce RTX 4090",
        memory=24 * GIB,
        width=(8, 16),
        generation=(4, 4),
        state=2,
        power_w=(300.0, 450.0),
        heat_c=(61, 84),
        brakes=Brake.POWER_LIMIT,
        peers=(),
    )


def test_cards_that_read_each_others_memory_are_named() -> None:
    assert [card.peers for card in Nvml(library=two_4090(P2PStatus=0)).driver().cards] == [
        (1,),
        (0,),
    ]


@pytest.mark.parametrize(
    "refusal", [NotSupported(), NoPermission(), FunctionNotFound(), InvalidArgument()]
)
def test_what_a_card_does_not_tell_is_none(refusal: NVMLError) -> None:
    silent = dict.fromkeys(WELL, refusal)
    card = Nvml(library=two_4090(**silent)).driver().cards[0]

    assert card == Card(0, "NVIDIA GeForce RTX 4090", 24 * GIB)


def test_meters_are_read_in_watts_and_joules() -> None:
    [first, second] = Nvml(
        library=two_4090(
            PowerUsage=350_400,
            EnforcedPowerLimit=450_000,
            UtilizationRates=SimpleNamespace(gpu=97, memory=60),
            TotalEnergyConsumption=7_200_500,
        )
    ).readings()

    assert (first.index, second.index) == (0, 1)
    assert first == Reading(
        index=0,
        name="NVIDIA GeForce RTX 4090",
        memory_total=24 * GIB,
        memory_used=21 * GIB,
        watts=350.4,
        watts_limit=450.0,
        celsius=61,
        utilization=0.97,
        joules=7_200.5,
    )


@pytest.mark.parametrize("refusal", [NotSupported(), NoPermission(), FunctionNotFound()])
def test_meters_that_a_card_does_not_have_show_nothing(refusal: NVMLError) -> None:
    names = ("PowerUsage", "EnforcedPowerLimit", "Temperature", "UtilizationRates",
             "TotalEnergyConsumption")  # fmt: skip
    reading = Nvml(library=two_4090(**dict.fromkeys(names, refusal))).readings()[0]

    assert reading == Reading(0, "NVIDIA GeForce RTX 4090", 24 * GIB, 21 * GIB)


def test_card_that_is_lost_is_no_card_without_a_temperature() -> None:
    with pytest.raises(MemoryUnknown, match="GpuIsLost"):
        Nvml(library=two_4090(Temperature=GpuIsLost())).driver()


def test_a_missing_driver_is_reported_in_words() -> None:
    with pytest.raises(MemoryUnknown, match="driver reports: Uninitialized"):
        Nvml(library=Driver(fault=Uninitialized())).total()


def test_no_card_and_a_missing_card_are_reported() -> None:
    with pytest.raises(MemoryUnknown, match="no card"):
        Nvml(library=Driver()).least()
    with pytest.raises(MemoryUnknown, match="InvalidArgument"):
        Nvml([2], two_cards()).free()


def test_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # what makes an import fail

    with pytest.raises(MemoryUnknown, match="pip install nvidia-ml-py"):
        Nvml().free()


@pytest.mark.integration
def test_without_a_driver_the_binding_is_not_loaded() -> None:
    asked = "from gateway.gpu.cards import Nvml; import sys\ntry: Nvml().free()\n"
    asked += "except Exception as e: print(e)\nprint('pynvml' in sys.modules)"
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        said = subprocess.run([sys.executable, "-c", asked], capture_output=True, check=True)
    else:
        pytest.skip("this machine has a driver")

    assert said.stdout.startswith(b"there is no NVIDIA driver (libnvidia-ml.so.1: ")
    assert said.stdout.endswith(b"False\n")


def test_driver_that_hangs_takes_one_thread_and_no_more() -> None:
    asked, answers = threading.Event(), threading.Event()

    class Hangs(Driver):
        def nvmlDeviceGetCount(self) -> int:  # noqa: N802
            asked.set()
            answers.wait(10)
            return super().nvmlDeviceGetCount()

    memory = Nvml(library=Hangs([Info(2 * GIB, 1 * GIB)]), busy_s=0.01)
    first = threading.Thread(target=memory.free)
    first.start()
    asked.wait(10)
    try:
        with pytest.raises(MemoryUnknown, match="not answered"):
            memory.free()
    finally:
        answers.set()
        first.join()

    assert memory.free() == 1 * GIB


@pytest.mark.gpu
def test_real_cards_tell_how_they_do() -> None:
    try:
        driver = Nvml().driver()
    except MemoryUnknown as exc:
        pytest.skip(str(exc))

    assert driver.version
    assert all(card.name and card.memory > 0 for card in driver.cards)


@pytest.mark.gpu
def test_meters_of_real_cards_show_what_can_be() -> None:
    try:
        readings = Nvml().readings()
    except MemoryUnknown as exc:
        pytest.skip(str(exc))

    for card in readings:
        assert 0 < card.memory_used <= card.memory_total
        assert card.watts is None or 0 < card.watts < 2_000
        assert card.utilization is None or 0 <= card.utilization <= 1


@pytest.mark.gpu
def test_real_cards_have_memory() -> None:
    memory = Nvml()
    try:
        total = memory.total()
    except MemoryUnknown as exc:
        pytest.skip(str(exc))

    assert 0 < memory.least() <= memory.free() <= total
    assert all(pid > 0 for pid, _ in memory.processes())


def test_fake_gpu_is_read_like_a_real_one() -> None:
    fake = FakeGpu(48 * GIB, cards=2)
    fake.allocate(7, 8 * GIB)
    memory: Memory = fake

    assert (memory.total(), memory.free(), memory.least()) == (48 * GIB, 40 * GIB, 20 * GIB)
    assert memory.processes() == [(7, 8 * GIB)]


# The budget

FAMILY = f"""
import os, signal, sys
shared = bytes([1]) * ({64 * MIB})
ready, tell = os.pipe()
child = os.fork()
if not child:
    own = bytes([2]) * ({32 * MIB})
    os.write(tell, b"!")
    signal.pause()
os.read(ready, 1)
print(child, flush=True)
signal.pause()
"""


@contextmanager
def family() -> Iterator[tuple[int, int]]:
    """A process of 64 MiB and its child, which shares them and has 32 MiB of its own."""
    parent = subprocess.Popen(
        [sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, start_new_session=True
    )
    assert parent.stdout is not None
    try:
        yield parent.pid, int(parent.stdout.readline())
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
        parent.stdout.close()


@pytest.mark.integration
def test_budget_counts_a_process_and_its_children() -> None:
    with family() as (parent, child):
        budget: Memory = Budget(1 * GIB, lambda: [parent])
        who = dict(budget.processes())
        free = budget.free()

    assert set(who) == {parent, child}
    assert sum(who.values()) >= 96 * MIB
    assert free <= 1 * GIB - 96 * MIB
    assert (budget.total(), budget.free(), budget.least()) == (1 * GIB, 1 * GIB, 1 * GIB)


@pytest.mark.integration
@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="this kernel does not tell what is shared"
)
def test_budget_counts_what_is_shared_once() -> None:
    with family() as (parent, _):
        used = sum(size for _, size in Budget(1 * GIB, lambda: [parent]).processes())

    assert used < 150 * MIB  # 96, and two interpreters; counted twice it would be 160


@pytest.mark.integration
def test_budget_counts_an_orphan_until_it_has_gone() -> None:
    with family() as (parent, child):
        budget = Budget(1 * GIB, lambda: [parent])
        os.kill(parent, signal.SIGKILL)
        os.waitid(os.P_PID, parent, os.WEXITED | os.WNOWAIT)
        orphaned = budget.processes()
        os.kill(child, signal.SIGKILL)
        while budget.processes():
            pass

    assert [pid for pid, _ in orphaned] == [child]


@pytest.mark.integration
def test_budget_that_is_overdrawn_has_nothing_free() -> None:
    with family() as (parent, _):
        assert Budget(10 * MIB, lambda: [parent]).free() == 0


@pytest.mark.integration
def test_budget_knows_engines_as_they_are_started_anew() -> None:
    engines: list[int] = []
    budget = Budget(1 * GIB, lambda: engines)
    before = budget.processes()
    with family() as (parent, child):
        engines.append(parent)

        assert {pid for pid, _ in budget.processes()} == {parent, child}
    assert before == []


def proc(root: Path, pid: int, parent: int, pages: int, *, group: int = 0, name: str = "x") -> None:
    """A process that is another user's: how it shares its memory is not for us to read."""
    (root / str(pid)).mkdir()
    (root / str(pid) / "stat").write_text(f"{pid} ({name}) S {parent} {group} {group} 0 -1\n")
    (root / str(pid) / "statm").write_text(f"{pages * 3} {pages} 1 1 0 1 0\n")


def test_resident_memory_counts_where_no_more_may_be_read(tmp_path: Path) -> None:
    proc(tmp_path, 10, 1, 5)
    proc(tmp_path, 11, 10, 7, name="odd) S 1 (name")
    proc(tmp_path, 12, 11, 1)
    proc(tmp_path, 13, 1, 2, group=10)
    proc(tmp_path, 14, 1, 9)
    (tmp_path / "15").mkdir()  # ended while we looked
    (tmp_path / "self").mkdir()
    page = os.sysconf("SC_PAGE_SIZE")

    assert Budget(GIB, lambda: [10], proc=tmp_path).processes() == [
        (11, 7 * page),
        (10, 5 * page),
        (13, 2 * page),
        (12, 1 * page),
    ]


def test_processes_that_cannot_be_listed_are_reported(tmp_path: Path) -> None:
    with pytest.raises(MemoryUnknown, match="cannot be listed"):
        Budget(GIB, lambda: [1], proc=tmp_path / "none").free()
