"""A fake engine that behaves like Ollama, vLLM or llama.cpp, and fails as scripted.

It serves over real sockets and plays faults down to the byte. Tests run it in their own
event loop; demos and load tests run it as a program, `python -m backends.fake --help`.
"""

from backends.fake.engine import FakeEngine
from backends.fake.gpu import GIB, FakeGpu, OutOfMemory
from backends.fake.script import (
    DONE,
    Answer,
    Close,
    Cut,
    Head,
    Kill,
    Pause,
    Repeat,
    Reset,
    Send,
    Serve,
    Silence,
    Step,
    chunk,
    event,
    status,
    stream,
    usage,
    usage_chunk,
)
from backends.fake.wire import Received

__all__ = [
    "DONE",
    "GIB",
    "Answer",
    "Close",
    "Cut",
    "FakeEngine",
    "FakeGpu",
    "Head",
    "Kill",
    "OutOfMemory",
    "Pause",
    "Received",
    "Repeat",
    "Reset",
    "Send",
    "Serve",
    "Silence",
    "Step",
    "chunk",
    "event",
    "status",
    "stream",
    "usage",
    "usage_chunk",
]
