"""llama.cpp's server: the embedded one (`xllamacpp`), or any llama-server that runs.

It serves the one model that it was started with, and answers for it under any name. As a
program, `python -m backends.llamacpp`, this module is the embedded server.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec

from backends import calls, errors
from backends.base import Engine
from backends.calls import BridgedRequest, Call
from backends.errors import Unsupported
from backends.reports import Activity, Capabilities, Gauges, Identity, Readiness


class _Generation(msgspec.Struct):
    n_ctx: int | None = None


class _Modalities(msgspec.Struct):
    vision: bool = False


class _Props(msgspec.Struct):
    default_generation_settings: _Generation | None = None
    modalities: _Modalities | None = None
    chat_template_caps: dict[str, bool] = {}
    build_info: str = ""
    model_ftype: str = ""
    model_path: str = ""
    total_slots: int | None = None


class LlamaCpp(Engine):
    """One llama.cpp server."""

    kind = "llamacpp"
    sign_path = "/props"
    sign_field = ""
    # It closes the connection after each streamed answer in spite of its own header.
    reuse_after_stream = False

    async def models(self) -> list[str]:
        return [model.id for model in await self.listed_models()]

    async def ready(self, model: str) -> Readiness:
        try:
            await self.get("/health")
            return Readiness.READY if model in await self.models() else Readiness.ABSENT
        except (errors.Busy, errors.ServerError):
            return Readiness.LOADING  # it listens before its model is read, and answers 503
        except errors.BackendError:
            return Readiness.DOWN

    async def capabilities(self, model: str) -> Capabilities:
        props = await self.get_json("/props", _Props)
        generation, modalities = props.default_generation_settings, props.modalities
        return Capabilities(
            context=generation.n_ctx if generation else None,
            chat=True,
            tools=props.chat_template_caps.get("supports_tools"),
            images=modalities.vision if modalities else None,
            embeddings=await self._embeds(model),
            multiple_choices=True,
        )

    async def identity(self, model: str) -> Identity:
        props = await self.get_json("/props", _Props)
        file = Path(props.model_path).name
        return Identity(props.build_info, props.model_ftype, file, props.total_slots)

    async def _embeds(self, model: str) -> bool:
        """Whether it was started with --embeddings: only a request shows it."""
        try:
            await self.post(calls.EMBEDDINGS, {"model": model, "input": "a"}, timeout_s=60.0)
        except errors.BackendError:
            return False
        return True

    async def load(self, model: str) -> None:
        if await self.ready(model) is not Readiness.READY:
            raise Unsupported(f"{self} serves the model it was started with, not {model!r}")

    async def unload(self, model: str) -> None:
        raise Unsupported(f"{self} keeps its model as long as it runs: stop the process instead")

    async def release_obstacle(self) -> str:
        return "A llama-server keeps its model as long as it runs: stop the process instead"

    async def activity(self, model: str) -> Activity:
        metrics = Gauges.of((await self.get("/metrics")).decode("utf-8", "replace"))
        return Activity(
            metrics.count("llamacpp:requests_processing"),
            metrics.count("llamacpp:requests_deferred"),
        )

    def bridge(self, call: Call, model: str) -> BridgedRequest:
        return BridgedRequest(calls.body_for(call, model))


def serve(gguf: Path, name: str, slots: int, context: int) -> None:
    """Run the embedded server until SIGTERM, or until the process that started it has ended.

    The first line on stdout is its base URL. The model is in memory by then.
    """
    # An optional dependency that only this process needs, and that has no types.
    xllamacpp: Any = importlib.import_module("xllamacpp")

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.model_alias = {name}
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_parallel = slots
    params.n_ctx = context * slots
    params.cpuparams.n_threads = len(os.sched_getaffinity(0))
    params.endpoint_metrics = True
    params.ui = False
    params.cache_ram_mib = 256  # for finished prompts; the default is 8 GiB
    # With a pooling type set, one server both chats and embeds.
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the gateway handles Ctrl-C
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()  # ends when the other end closes, by a stop or by a kill -9


def main() -> None:
    """Serve as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m backends.llamacpp", description=serve.__doc__)
    parser.add_argument("gguf", type=Path, help="model file")
    parser.add_argument("--name", required=True, help="public name of the model")
    parser.add_argument("--slots", type=int, default=4, help="concurrent requests")
    parser.add_argument("--context", type=int, default=4096, help="tokens of context per slot")
    args = parser.parse_args()
    serve(args.gguf, args.name, args.slots, args.context)


if __name__ == "__main__":
    main()
