"""The fake engine as a program: for demos, and for load tests against known times."""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
import sys
from contextlib import AsyncExitStack

from backends.fake.control import Control
from backends.fake.engine import BEHAVIOURS, FakeEngine


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m backends.fake", description=__doc__)
    add = parser.add_argument
    add("--kind", choices=[*BEHAVIOURS], required=True)
    add("--port", type=int, default=0, help="port; 0: any free one, printed on stdout")
    add("--control-port", type=int, help="port to watch and script it (none)")
    add("--model", action="append", help="model it chats with; may be repeated (m)")
    add(
        "--embedding",
        action="append",
        default=[],
        help="model made for embeddings; may be repeated",
    )
    add("--ttft", type=float, default=0.0, help="from the slot to the first token, s (0)")
    add("--gap", type=float, default=0.0, help="between tokens, s (0)")
    add("--tokens", type=int, default=64, help="length of an answer that has no limit (64)")
    add("--slots", type=int, default=16, help="concurrent requests; all others wait (16)")
    add("--context", type=int, default=8192, help="context length, tokens (8192)")
    add("--tools", action="store_true", help="accept tools")
    add("--dev-mode", action="store_true", help="vllm: with /sleep and /wake_up")
    add("--sleep", type=float, default=0.0, help="vllm: time to fall asleep, s (0)")
    add("--wake", type=float, help="vllm: time to wake, s (as --sleep)")
    add("--load", type=float, default=0.0, help="ollama: time to load a model, s (0)")
    add("--unload", type=float, default=0.0, help="ollama: time to unload it, s (0)")
    add("--loading", type=float, default=0.0, help="llamacpp: time it answers 503 at first, s (0)")
    return parser


async def serve(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stop.set)
    engine = FakeEngine(
        options.kind,
        options.model or ([] if options.embedding else ["m"]),
        embedding=options.embedding,
        ttft_s=options.ttft,
        gap_s=options.gap,
        tokens=options.tokens,
        slots=options.slots,
        context=options.context,
        tools=options.tools,
        dev_mode=options.dev_mode,
        sleep_s=options.sleep,
        wake_s=options.sleep if options.wake is None else options.wake,
        load_s=options.load,
        unload_s=options.unload,
        loading=options.loading > 0,
        remember=100,
        own_port=options.port,
    )
    async with AsyncExitStack() as opened:
        await opened.enter_async_context(engine)
        line = f"{options.kind} at {engine.url}"
        if options.control_port is not None:
            control = await opened.enter_async_context(Control(engine, options.control_port))
            line += f", control at {control.url}"
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
        if engine.loading:
            loop.call_later(options.loading, setattr, engine, "loading", False)
        # All objects so far live to the end: without them a garbage collection is shorter.
        gc.freeze()
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(serve(arguments().parse_args()))
