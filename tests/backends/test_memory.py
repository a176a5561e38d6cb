"""Loading and unloading: what engines do with a GPU they share, and what can go wrong in it.

Real sockets, fake engines. Where something is to take for ever it does; nobody waits for it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from backends import calls
from backends.calls import Call
from backends.errors import BackendError, Broken, BrokeOff, ServerError, Unreachable, Unsupported
from backends.fake import (
    GIB,
    Answer,
    FakeEngine,
    FakeGpu,
    Kill,
    OutOfMemory,
    Serve,
    Silence,
    status,
)
from backends.fake.control import Control
from backends.ollama import Ollama
from backends.reports import Readiness
from backends.transport import http
from backends.vllm import VLLM
from tests.support.plain_http import async_client

#: The name of the model `m` on the fake Ollama.
M = "m:latest"
#: The id of another process on the GPU.
STRANGER = 1


@asynccontextmanager
async def ollama_at(fake: FakeEngine) -> AsyncIterator[Ollama]:
    """The engine as the gateway uses it; after its close no connection is open."""
    async with http.Client() as client:
        engine = Ollama(fake.url, client)
        yield engine
        await engine.close()
    await fake.until(lambda fake: not fake.connections)


@asynccontextmanager
async def vllm_at(fake: FakeEngine) -> AsyncIterator[VLLM]:
    async with http.Client() as client:
        yield VLLM(fake.url, client)
    await fake.until(lambda fake: not fake.connections)


def chat(**fields: object) -> Call:
    fields_of_it = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields_of_it.items()}
    return Call(calls.CHAT, raw, stream=bool(fields.get("stream")))


async def rest_of(answer: calls.StreamedAnswer) -> None:
    while await answer.read():
        pass


def requests_for(fake: FakeEngine, path: str) -> int:
    """The number of requests for a path."""
    return sum(request.path == path for request in fake.received)


async def cancelled(work: asyncio.Task[None]) -> None:
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work


# The GPU


def test_allocated_memory_is_free_after_its_release() -> None:
    gpu = FakeGpu(10 * GIB, cards=2)
    first, second = gpu.allocate(1, 6 * GIB), gpu.allocate(2, 2 * GIB)
    with pytest.raises(OutOfMemory, match="GiB wanted"):
        gpu.allocate(2, 3 * GIB)
    gpu.allocate(2, 1 * GIB)
    full = (gpu.free(), gpu.least(), gpu.processes())
    gpu.release(first)
    gpu.release(first)
    gpu.process_ended(2)
    gpu.release(second)

    assert full == (1 * GIB, GIB // 2, [(1, 6 * GIB), (2, 3 * GIB)])
    assert (gpu.free(), gpu.peak) == (10 * GIB, 9 * GIB)


async def test_the_gpu_passes_from_one_engine_to_the_other_and_back() -> None:
    gpu = FakeGpu(24 * GIB)
    async with (
        FakeEngine("vllm", gpu=gpu, size=22 * GIB, dev_mode=True) as fake_vllm,
        FakeEngine("ollama", gpu=gpu, size=20 * GIB) as fake_ollama,
        vllm_at(fake_vllm) as vllm,
        ollama_at(fake_ollama) as ollama,
    ):
        free = [gpu.free()]
        await vllm.unload("m")
        free.append(gpu.free())
        await ollama.load(M)
        free.append(gpu.free())
        on_gpu = await ollama.on_gpu(M)
        await ollama.unload(M)
        await vllm.load("m")
        free.append(gpu.free())

    kept = gpu.remainder
    assert free == [2 * GIB, 24 * GIB - kept, 4 * GIB - kept, 2 * GIB]
    assert on_gpu == 1.0
    assert gpu.free() == gpu.total()  # and who ends has nothing


async def test_an_engine_that_cannot_unload_keeps_its_memory_while_it_runs() -> None:
    gpu = FakeGpu(24 * GIB)
    async with FakeEngine("llamacpp", gpu=gpu, size=5 * GIB) as fake:
        running = gpu.processes()
        pid = fake.pid
        fake.kill()

        assert running == [(pid, 5 * GIB)]
        assert gpu.free() == 24 * GIB


async def test_a_vllm_that_begins_asleep_has_its_remainder() -> None:
    gpu = FakeGpu(48 * GIB, cards=2)
    async with (
        FakeEngine("vllm", gpu=gpu, size=44 * GIB, dev_mode=True, asleep=True) as fake,
        vllm_at(fake) as vllm,
    ):
        assert await vllm.ready("m") is Readiness.ASLEEP
        assert await vllm.resident() == []
        assert gpu.free() == 48 * GIB - 2 * gpu.remainder
        await vllm.load("m")
        assert await vllm.resident() == ["m"]
        assert gpu.free() == 4 * GIB


async def test_vllm_does_not_start_without_free_memory() -> None:
    gpu = FakeGpu(24 * GIB)
    other = gpu.allocate(STRANGER, 10 * GIB)
    fake = FakeEngine("vllm", gpu=gpu, size=22 * GIB)
    with pytest.raises(OutOfMemory):
        await fake.up()
    assert (fake.alive, fake.listening, gpu.processes()) == (False, False, [(STRANGER, 10 * GIB)])
    gpu.release(other)

    async with fake, vllm_at(fake) as vllm:
        assert await vllm.ready("m") is Readiness.READY


# Ollama


async def test_a_model_without_enough_free_memory_is_partly_on_the_cpu() -> None:
    gpu = FakeGpu(24 * GIB)
    gpu.allocate(STRANGER, 14 * GIB)
    async with FakeEngine("ollama", gpu=gpu, size=20 * GIB) as fake, ollama_at(fake) as ollama:
        before = await ollama.on_gpu(M)
        await ollama.load(M)

        assert before is None
        assert await ollama.on_gpu(M) == 0.5
        assert gpu.free() == 0


async def test_an_unload_returns_when_the_model_has_left_memory() -> None:
    async with FakeEngine("ollama", unload_s=0.25) as fake, ollama_at(fake) as ollama:
        await ollama.load(M)
        loaded = await ollama.resident()
        await ollama.unload(M)

        assert loaded == [M]
        assert fake.memory == {}
        assert requests_for(fake, "/api/ps") >= 3


async def test_an_unload_of_a_model_that_stays_lasts_until_it_is_cancelled() -> None:
    async with FakeEngine("ollama", unload_s=math.inf) as fake, ollama_at(fake) as ollama:
        await ollama.load(M)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await ollama.unload(M)

        assert await ollama.resident() == [M]


async def test_memory_can_still_be_taken_when_the_model_has_left() -> None:
    gpu = FakeGpu(24 * GIB)
    async with (
        FakeEngine("ollama", gpu=gpu, size=20 * GIB, settle_s=math.inf) as fake,
        ollama_at(fake) as ollama,
    ):
        await ollama.load(M)
        await ollama.unload(M)
        gone = await ollama.resident()
        free = gpu.free()
        fake.kill()

        assert (gone, free) == ([], 4 * GIB)
        assert gpu.free() == 24 * GIB


async def test_memory_that_settles_is_free_in_the_end() -> None:
    gpu = FakeGpu(24 * GIB)
    async with (
        FakeEngine("ollama", gpu=gpu, size=20 * GIB, settle_s=0.05) as fake,
        ollama_at(fake) as ollama,
    ):
        await ollama.load(M)
        await ollama.unload(M)
        await fake.until(lambda _: gpu.free() == 24 * GIB)


async def test_a_cancelled_load_ends_in_the_engine() -> None:
    async with FakeEngine("ollama", load_s=math.inf) as fake, ollama_at(fake) as ollama:
        load = asyncio.create_task(ollama.load(M))
        await fake.until(lambda fake: fake.memory)
        while_loading = await ollama.resident()
        await cancelled(load)
        await fake.until(lambda fake: not fake.memory)

        assert while_loading == [M]
        assert await ollama.resident() == []
        assert fake.resident == []


async def test_a_model_is_unloaded_after_a_running_load() -> None:
    async with FakeEngine("ollama", load_s=0.1) as fake, ollama_at(fake) as ollama:
        load = asyncio.create_task(ollama.load(M))
        await fake.until(lambda fake: fake.memory)
        await ollama.unload(M)

        assert fake.memory == {}
        await asyncio.gather(load, return_exceptions=True)  # whether it saw it is chance


# vLLM


async def test_only_vllm_in_dev_mode_sleeps() -> None:
    async with (
        FakeEngine("vllm") as awake,
        FakeEngine("vllm", dev_mode=True) as able,
        vllm_at(awake) as never,
        vllm_at(able) as vllm,
    ):
        assert await vllm.sleeps()
        assert not await never.sleeps()
        await never.load("m")
        assert await never.resident() == ["m"]
        with pytest.raises(Unsupported, match="VLLM_SERVER_DEV_MODE=1"):
            await never.unload("m")
        with pytest.raises(Unsupported, match="it was started with"):
            await never.load("other")
        able.down()
        with pytest.raises(Unreachable):
            await vllm.sleeps()


async def test_the_sleep_is_requested_when_nothing_runs() -> None:
    async with FakeEngine("vllm", dev_mode=True, gap_s=60.0) as fake, vllm_at(fake) as vllm:
        answer = await vllm.open_stream(chat(stream=True), "m")
        unload = asyncio.create_task(vllm.unload("m"))
        await fake.until(lambda fake: requests_for(fake, "/metrics") >= 3)
        while_running = (fake.paused, requests_for(fake, "/sleep"))
        answer.close()
        await unload

        assert while_running == (False, 0)
        assert fake.asleep
        assert await vllm.ready("m") is Readiness.ASLEEP


async def test_an_unload_cancelled_while_requests_run_changes_nothing() -> None:
    async with FakeEngine("vllm", dev_mode=True, gap_s=60.0) as fake, vllm_at(fake) as vllm:
        answer = await vllm.open_stream(chat(stream=True), "m")
        unload = asyncio.create_task(vllm.unload("m"))
        await fake.until(lambda fake: requests_for(fake, "/metrics") >= 3)
        await cancelled(unload)
        other = await vllm.fetch_answer(chat(max_tokens=1), "m")
        answer.close()

        assert other.finish == "length"
        assert requests_for(fake, "/sleep") == 0


async def test_vllm_sleeps_and_wakes_whether_its_client_waits_or_not() -> None:
    async with (
        FakeEngine("vllm", dev_mode=True, sleep_s=0.05, wake_s=0.05) as fake,
        vllm_at(fake) as vllm,
    ):
        unload = asyncio.create_task(vllm.unload("m"))
        await fake.until(lambda fake: fake.paused)
        await cancelled(unload)
        await fake.until(lambda fake: fake.asleep)
        load = asyncio.create_task(vllm.load("m"))
        await fake.until(lambda fake: requests_for(fake, "/wake_up"))
        await cancelled(load)
        await fake.until(lambda fake: not fake.asleep)

        assert await vllm.ready("m") is Readiness.READY


async def test_a_vllm_woken_without_free_memory_dies() -> None:
    gpu = FakeGpu(24 * GIB)
    other = gpu.allocate(STRANGER, 10 * GIB)
    async with (
        FakeEngine("vllm", gpu=gpu, size=22 * GIB, dev_mode=True, asleep=True) as fake,
        vllm_at(fake) as vllm,
    ):
        url = fake.url
        with pytest.raises((Broken, Unreachable)):
            await vllm.load("m")
        dead = (fake.alive, await vllm.ready("m"), gpu.free())
        with pytest.raises(OutOfMemory):
            await fake.up()
        gpu.release(other)
        await fake.up()

        assert dead == (False, Readiness.DOWN, 14 * GIB)
        assert fake.url == url
        assert await vllm.ready("m") is Readiness.READY
        assert gpu.free() == 2 * GIB


async def test_a_vllm_woken_before_it_slept_sleeps_later_and_dies_at_the_next_request() -> None:
    # Seen in vLLM's engine core: a wake resumes the scheduler, and the sleep that waits for
    # it to be idle stays. It is why `unload` waits for that first.
    async with (
        FakeEngine("vllm", dev_mode=True, gap_s=60.0) as fake,
        vllm_at(fake) as vllm,
        async_client(fake.url) as client,
    ):
        answer = await vllm.open_stream(chat(stream=True), "m")
        sleep = asyncio.create_task(client.post("/sleep?level=1&mode=wait"))
        await fake.until(lambda fake: fake.paused)
        reported = await vllm.asleep()
        await client.post("/wake_up")
        woken = await vllm.asleep()
        answer.close()
        await sleep
        asleep = (fake.asleep, await vllm.asleep())
        with pytest.raises(BackendError):
            await vllm.fetch_answer(chat(), "m")

        assert (reported, woken, asleep) == (True, False, (True, True))
        assert not fake.alive


async def test_a_vllm_can_wake_and_never_generate_until_it_is_started_anew() -> None:
    async with FakeEngine("vllm", dev_mode=True, asleep=True) as fake, vllm_at(fake) as vllm:
        fake.wakes_stuck = True
        await vllm.load("m")
        ready = await vllm.ready("m")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await vllm.fetch_answer(chat(), "m")
        fake.kill()
        await fake.up()

        assert ready is Readiness.READY
        assert (await vllm.fetch_answer(chat(), "m")).finish == "stop"


# Faults, each at each step

Work = Callable[[], Coroutine[Any, Any, None]]
#: The path or operation that a script of each step is for.
STEPS = {"load": "load", "unload": "unload", "wake": "/wake_up", "sleep": "/sleep"}


@asynccontextmanager
async def at_step(step: str) -> AsyncIterator[tuple[FakeEngine, Work]]:
    """An engine before this step, and the work that does it."""
    if step in ("load", "unload"):
        async with FakeEngine("ollama") as fake, ollama_at(fake) as ollama:
            if step == "unload":
                await ollama.load(M)
            yield fake, lambda: ollama.load(M) if step == "load" else ollama.unload(M)
    else:
        async with (
            FakeEngine("vllm", dev_mode=True, asleep=step == "wake") as fake,
            vllm_at(fake) as vllm,
        ):
            yield fake, lambda: vllm.load("m") if step == "wake" else vllm.unload("m")


@pytest.mark.parametrize("step", STEPS)
async def test_a_failed_step_raises_and_can_be_repeated(step: str) -> None:
    async with at_step(step) as (fake, work):
        fake.script(status(500, "no luck"), path=STEPS[step])
        with pytest.raises(ServerError, match="no luck"):
            await work()
        await work()


@pytest.mark.parametrize("step", STEPS)
async def test_a_step_that_is_never_answered_can_be_cancelled(step: str) -> None:
    async with at_step(step) as (fake, work):
        fake.script(Silence(), path=STEPS[step])
        doing = asyncio.create_task(work())
        path = STEPS[step] if step in ("wake", "sleep") else "/api/generate"
        await fake.until(lambda fake: fake.received and fake.received[-1].path == path)
        await cancelled(doing)
        await fake.until(lambda fake: len(fake.hang_ups) == 1)
        await work()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("answer", [Kill(), [Serve(), Kill()]])
async def test_an_engine_that_dies_at_a_step_can_be_started_anew(step: str, answer: Answer) -> None:
    async with at_step(step) as (fake, work):
        fake.script(answer, path=STEPS[step])
        with pytest.raises((Broken, Unreachable)):
            await work()
        died = (fake.alive, fake.memory)
        await fake.up()
        await work()

        assert died == (False, {})


@pytest.mark.parametrize(
    ("step", "claim"),
    [
        ("load", {"model": M, "done": True, "done_reason": "load"}),
        ("wake", {"status": "awake", "tags": None}),
        ("sleep", {"status": "sleeping", "level": 1}),
    ],
)
async def test_a_false_confirmation_raises(step: str, claim: object) -> None:
    async with at_step(step) as (fake, work):
        fake.script(status(200, body=claim), path=STEPS[step])
        with pytest.raises(Broken, match="confirmed"):
            await work()


async def test_an_engine_killed_while_it_loads_has_no_memory_left() -> None:
    gpu = FakeGpu(24 * GIB)
    async with (
        FakeEngine("ollama", gpu=gpu, size=20 * GIB, load_s=math.inf) as fake,
        ollama_at(fake) as ollama,
    ):
        load = asyncio.create_task(ollama.load(M))
        await fake.until(lambda fake: fake.memory)
        fake.kill()
        with pytest.raises(Broken):
            await load
        with pytest.raises(Unreachable):
            await ollama.resident()
        await fake.up()

        assert gpu.free() == 24 * GIB
        assert await ollama.resident() == []


async def test_an_engine_killed_inside_an_answer_breaks_it_off() -> None:
    async with FakeEngine("vllm") as fake, vllm_at(fake) as vllm:
        fake.script([Serve(tokens=2), Kill()])
        answer = await vllm.open_stream(chat(stream=True), "m")
        with pytest.raises(BrokeOff):
            await rest_of(answer)
        answer.close()
        await fake.until(lambda fake: not fake.running)

        assert not fake.alive


async def test_control_port_kills_and_starts_anew() -> None:
    gpu = FakeGpu(24 * GIB)
    async with (
        FakeEngine("vllm", gpu=gpu, size=22 * GIB) as fake,
        Control(fake) as control,
        async_client(control.url) as remote,
    ):
        before = (await remote.get("/")).json()
        await remote.post("/kill")
        dead = (await remote.get("/")).json()
        other = gpu.allocate(STRANGER, 10 * GIB)
        refused = await remote.post("/up")
        gpu.release(other)
        up = (await remote.post("/up")).status_code
        after = (await remote.get("/")).json()

    assert (before["alive"], sum(before["memory"].values())) == (True, 22 * GIB)
    assert (dead["alive"], dead["up"], dead["memory"]) == (False, False, {})
    assert (refused.status_code, up, after["alive"]) == (409, 200, True)
