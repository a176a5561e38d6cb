"""Two engines that do not fit on one GPU together, and a gateway before them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from backends.fake import GIB, FakeEngine, FakeGpu
from backends.fake.wire import Received
from gateway.gpu.handover import Gpu
from gateway.gpu.state import Step
from gateway.routing.scheduler import Action
from gateway.serving.admission import Admission
from gateway.settings import Timings
from tests.support.gateways import Running, StartGateway
from tests.support.models import chat

CHAT = "/v1/chat/completions"
PING = b": ping\n\n"
#: Both engines would fit, so that a test sees whether both were ever loaded. But each is
#: configured to need what is free only after the other has released its memory.
TOTAL = 100 * GIB
SIZE = 40 * GIB
NEEDS_GIB = 90
#: Short enough to wait for, long enough for a busy machine.
SHORT: Mapping[str, Any] = {
    "drain_s": 0.5,
    "unload_s": 0.5,
    "free_s": 0.5,
    "load_s": 0.6,
    "probe_s": 0.5,
    "away_s": 0.4,
}
#: What the gateway asks to see whether an engine generates.
PROBE = "Hi"


@dataclass
class Box:
    """The GPU and its two engines, observed from outside the gateway."""

    gpu: FakeGpu
    ollama: FakeEngine
    vllm: FakeEngine
    folder: Path
    #: Whether both ever had a model in memory together.
    both_seen: bool = False
    both_expected: bool = False
    models: dict[str, Any] = field(default_factory=dict)
    timings: Timings = field(default_factory=Timings)

    def __post_init__(self) -> None:
        self.models = {"m": self.model("ollama", "vllm")}

    def model(self, *kinds: str, slots: int = 4, **lane: Any) -> dict[str, Any]:
        """Settings of a model on these engines."""
        names = {"ollama": "small:1b", "vllm": "Small-1B"}
        lanes = {
            kind: {"model": names[kind], "slots": slots, "memory_gib": NEEDS_GIB, **lane}
            for kind in kinds
        }
        return {"placement": "exclusive", "lanes": lanes}

    def settings(
        self,
        *,
        limits: dict[str, float] | None = None,
        timings: Timings | None = None,
        **gpu: Any,
    ) -> dict[str, Any]:
        """Settings of a gateway; keyword arguments are settings of `gpu`."""
        patience = {"patience_s": 0.2, "handover_s": 0.1}
        return {
            "timings": timings or self.timings,
            "memory": self.gpu,
            "engines": {engine.kind: {"urls": [engine.url]} for engine in self.engines},
            "models": self.models,
            "limits": {"max_wait_s": 15, "heartbeat_s": 5, **(limits or {})},
            "gpu": {**patience, "lease": str(self.folder / "lease"), **gpu},
        }

    @property
    def engines(self) -> Sequence[FakeEngine]:
        return (self.ollama, self.vllm)

    def engine(self, kind: str) -> FakeEngine:
        [found] = [engine for engine in self.engines if engine.kind == kind]
        return found

    def other(self, kind: str) -> FakeEngine:
        [found] = [engine for engine in self.engines if engine.kind != kind]
        return found

    def asked(self, kind: str, path: str) -> list[Received]:
        """The requests for this path that an engine received."""
        return [request for request in self.engine(kind).received if request.path == path]

    def said(self, kind: str) -> list[str]:
        """The messages that an engine received, in order, without the gateway's probes."""
        texts = [request.body["messages"][0]["content"] for request in self.asked(kind, CHAT)]
        return [text for text in texts if text != PROBE]

    def answered_by(self, text: str) -> list[str]:
        """The engines that received this message, once for each time."""
        return [engine.kind for engine in self.engines for said in self.said(engine.kind)
                if said == text]  # fmt: skip

    def revive(self, kind: str) -> None:
        """Let a dead engine start without a model in memory the next time."""
        self.engine(kind).asleep = kind == "vllm"

    async def watch(self) -> None:
        """Record whether both have a model in memory together, until cancelled."""

        def both(_: FakeEngine) -> bool:
            return bool(self.ollama.memory) and "awake" in self.vllm.memory

        seen = [asyncio.ensure_future(e.until(both, within_s=3600)) for e in self.engines]
        try:
            await asyncio.wait(seen, return_when=asyncio.FIRST_COMPLETED)
            self.both_seen = True
        finally:
            for each in seen:
                each.cancel()
            await asyncio.gather(*seen, return_exceptions=True)


@contextmanager
def never_reentered() -> Iterator[list[str]]:
    """Admission never acts inside its own acting, whichever models share a GPU; its steps."""
    act, running, steps = Admission._act, 0, list[str]()

    def traced(admission: Admission, actions: list[Action]) -> None:
        nonlocal running
        running += 1
        steps.append(f"{admission.scheduler.model} at depth {running}")
        try:
            act(admission, actions)
        finally:
            running -= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Admission, "_act", traced)
        yield steps
    assert {step.rpartition(" ")[2] for step in steps} <= {"1"}, steps


@asynccontextmanager
async def boxed(folder: Path, *, loaded: Sequence[str] = ()) -> AsyncIterator[Box]:
    """The engines, of which `loaded` have a model in memory; checks at the end how it was used."""
    gpu = FakeGpu(TOTAL)
    with never_reentered():
        async with _boxed(folder, gpu, loaded) as box:
            yield box


@asynccontextmanager
async def _boxed(folder: Path, gpu: FakeGpu, loaded: Sequence[str]) -> AsyncIterator[Box]:
    async with (
        FakeEngine("ollama", ["small:1b"], gpu=gpu, size=SIZE, slots=4) as ollama,
        FakeEngine(
            "vllm", ["Small-1B"], gpu=gpu, size=SIZE, dev_mode=True, asleep="vllm" not in loaded
        ) as vllm,
    ):
        box = Box(gpu, ollama, vllm, folder, both_expected=len(loaded) > 1)
        if "ollama" in loaded:
            await ollama.load("small:1b")
        watching = asyncio.create_task(box.watch())
        try:
            yield box
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        assert box.both_seen == box.both_expected, "two engines in memory at once"
        # The default mode, abort, breaks off running requests; level 2 would discard the weights.
        told = [request.query for request in box.asked("vllm", "/sleep")]
        assert all(query == {"level": "1", "mode": "wait"} for query in told)


@dataclass(frozen=True)
class Served:
    """A gateway in front of the box, with its GPU's owner."""

    running: Running
    owner: Gpu
    box: Box

    @classmethod
    def of(cls, running: Running, box: Box) -> Self:
        """The pair of this gateway and this box."""
        owner = running.gateway.gpu
        assert owner is not None
        return cls(running, owner, box)

    async def ask(self, text: str = "Hello", /, **fields: Any) -> httpx.Response:
        """The answer to this message, whole or streamed to its end."""
        headers = fields.pop("headers", None)
        body = chat(**{"messages": [{"role": "user", "content": text}], **fields})
        return await self.running.http.post(CHAT, json=body, headers=headers)

    def asking(self, text: str = "Hello", /, **fields: Any) -> asyncio.Task[httpx.Response]:
        """Ask in the background."""
        return asyncio.create_task(self.ask(text, **fields))

    async def pin(self, lane: str) -> None:
        """Pin the work to a lane, as the operator does."""
        answer = await self.running.http.post("/admin/pin", json={"lane": lane})
        assert answer.status_code == 200, answer.text

    async def release(self) -> None:
        answer = await self.running.http.post("/admin/release")
        assert answer.status_code == 200, answer.text

    async def until(
        self, happened: Step | str | Callable[[], object], *, within_s: float = 15.0
    ) -> None:
        """Return when the GPU is at this step, held by this engine, or the condition holds."""

        def true(_: object) -> bool:
            if isinstance(happened, Step):
                return self.owner.state.step is happened
            if isinstance(happened, str):
                return self.owner.state.step is Step.HELD and self.owner.state.layout == happened
            return bool(happened())

        try:
            await self.running.until(true, within_s)
        except TimeoutError:
            said = f"{self.owner!r}, {list(self.owner.records)}"
            raise TimeoutError(f"not {happened} within {within_s:g} s: {said}") from None

    @property
    def waiting(self) -> int:
        models = self.running.gateway.catalogue.models.values()
        return sum(model.admission.waiting for model in models)

    @property
    def outcomes(self) -> list[str]:
        """The outcome of each hand-over."""
        return [record.outcome for record in self.owner.records]


@asynccontextmanager
async def serving(
    start_gateway: StartGateway, box: Box, *, holder: str | None = "ollama", **settings: Any
) -> AsyncIterator[Served]:
    """A gateway in front of the box, as soon as this engine holds the GPU."""
    async with start_gateway(**box.settings(**settings)) as running:
        served = Served.of(running, box)
        if holder is not None:
            await served.until(holder)
        yield served


@asynccontextmanager
async def stream_of(served: Served, text: str, **fields: Any) -> AsyncIterator[httpx.Response]:
    """A streamed answer, open for as long as the context is."""
    body = chat(stream=True, **{"messages": [{"role": "user", "content": text}], **fields})
    async with served.running.http.stream("POST", CHAT, json=body) as answer:
        yield answer


def failed(answer: httpx.Response, status: int = 503, code: str = "no_engine") -> str:
    """The message of a refusal; checks its envelope and its Retry-After."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code, error
    if status in (429, 503):
        assert 1 <= int(answer.headers["retry-after"]) <= 120
    message: str = error["message"]
    return message


async def gone(task: asyncio.Task[Any]) -> None:
    """Cancel a request, which hangs up."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
