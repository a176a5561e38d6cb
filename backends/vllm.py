"""vLLM: paged attention, continuous batching, tensor parallel. Made for many users.

Checked against the source of 0.32 and a server of 0.32 on CPU.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from pathlib import Path

import msgspec

from backends import calls, errors
from backends.base import Engine
from backends.calls import BridgedRequest, Call
from backends.errors import Broken, Refused, Unsupported
from backends.reports import Activity, Capabilities, Gauges, Identity, Readiness

#: Deadlines, seconds. The first sleep of a 70B takes about 8 s, a wake 2-4 s.
SLEEP_S = 120.0
WAKE_S = 60.0
#: Seconds between two looks at a server that is to become idle.
IDLE_POLL_S = 0.05


class _OpenAPI(msgspec.Struct):
    paths: dict[str, msgspec.Raw] = {}


class _Sleeping(msgspec.Struct):
    is_sleeping: bool = False


class VLLM(Engine):
    """One vLLM server."""

    kind = "vllm"
    sign_path = "/version"

    async def models(self) -> list[str]:
        return [model.id for model in await self.listed_models()]

    async def ready(self, model: str) -> Readiness:
        try:
            with contextlib.suppress(Refused):  # Ray Serve's OpenAI server has none
                await self.get("/health")
            if model not in await self.models():
                return Readiness.ABSENT
            # /health is 200 while asleep, and requests sent then hang.
            return Readiness.ASLEEP if await self.asleep() else Readiness.READY
        except errors.Busy:
            return Readiness.LOADING
        except errors.BackendError:
            return Readiness.DOWN

    async def asleep(self) -> bool:
        try:  # without dev mode it has no such endpoint, and cannot sleep
            return (await self.get_json("/is_sleeping", _Sleeping)).is_sleeping
        except (Refused, Broken):  # not there, or not for us
            return False

    async def capabilities(self, model: str) -> Capabilities:
        listed = {entry.id: entry for entry in await self.listed_models()}
        routes = (await self.get_json("/openapi.json", _OpenAPI)).paths
        chat = calls.CHAT in routes
        return Capabilities(
            context=listed[model].max_model_len if model in listed else None,
            chat=chat,
            tools=await self._takes_tools(model) if chat else False,
            images=None,
            embeddings=calls.EMBEDDINGS in routes,
            multiple_choices=True,
        )

    async def identity(self, model: str) -> Identity:
        roots = {entry.id: entry.root for entry in await self.listed_models()}
        version = await self.version()
        root = roots.get(model) or ""
        return Identity(version, digest=Path(root).name if root.startswith("/") else root)

    async def _takes_tools(self, model: str) -> bool:
        """Whether it was started with a tool parser: no endpoint says so, one token does."""
        tool = {"type": "function", "function": {"name": "noop", "parameters": {"type": "object"}}}
        question = {
            "model": model,
            "messages": [{"role": "user", "content": "Hi"}],
            "tools": [tool],
            "tool_choice": "auto",
            "max_tokens": 1,
        }
        try:
            await self.post(calls.CHAT, question, timeout_s=self.timeouts.first_token_s)
        except Refused:
            return False
        return True

    async def sleeps(self) -> bool:
        # Dev mode gives it its sleep endpoints. That it frees memory when it sleeps takes
        # `--enable-sleep-mode` as well: no endpoint reports that, only the memory shows it.
        try:
            await self.get_json("/is_sleeping", _Sleeping)
        except Refused:
            return False
        return True

    async def release_obstacle(self) -> str:
        if await self.sleeps():
            return ""
        return "Start vLLM with --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1"

    async def contexts(self, models: Iterable[str]) -> dict[str, int | None]:
        return {entry.id: entry.max_model_len for entry in await self.listed_models()}

    async def resident(self) -> list[str]:
        # It reports sleep as soon as it is requested, while running requests still end.
        return [] if await self.asleep() else await self.models()

    async def load(self, model: str) -> None:
        if not await self.sleeps():
            if model not in await self.models():
                raise Unsupported(f"{self} serves the model it was started with, not {model!r}")
            return  # the model is in memory as long as the process runs
        await self.post("/wake_up", timeout_s=WAKE_S)
        if await self.asleep():
            raise Broken(f"{self} confirmed that it is awake, and still sleeps")

    async def unload(self, model: str) -> None:
        if not await self.sleeps():
            raise Unsupported(
                f"{self} has no /sleep: start it with VLLM_SERVER_DEV_MODE=1 "
                "and --enable-sleep-mode"
            )
        # A sleep that waits for requests cannot be cancelled: woken before they end, vLLM
        # serves on, and still falls asleep as soon as it is idle, under the next requests.
        # So the sleep is requested only when nothing runs.
        while (await self.activity(model)).running:  # noqa: ASYNC110 - vLLM has no event for it
            await asyncio.sleep(IDLE_POLL_S)
        # The default mode, abort, ends running requests; level 2 has open correctness bugs.
        await self.post("/sleep?level=1&mode=wait", timeout_s=SLEEP_S)
        if not await self.asleep():
            raise Broken(f"{self} confirmed that it sleeps, and does not")

    async def activity(self, model: str) -> Activity:
        metrics = Gauges.of((await self.get("/metrics")).decode("utf-8", "replace"))
        return Activity(
            metrics.count("vllm:num_requests_running"), metrics.count("vllm:num_requests_waiting")
        )

    def bridge(self, call: Call, model: str) -> BridgedRequest:
        changes: dict[str, msgspec.Raw | None] = {}
        if call.continues and "continue_final_message" not in call.body:
            changes["continue_final_message"] = calls.TRUE
            changes["add_generation_prompt"] = calls.FALSE
        return BridgedRequest(calls.body_for(call, model, **changes))
