"""The kinds of engine that the gateway can serve from: one entry each.

Whatever lists or compares kinds reads this table: settings, discovery, hand-over, doctor,
`compare`. A new kind is a module with its `Engine` subclass, and one entry here. The order
is the order of preference: of several equals the first is taken.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeAlias

from backends.base import Engine
from backends.llamacpp import LlamaCpp
from backends.ollama import Ollama
from backends.vllm import VLLM


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKind:
    """The facts about a kind of engine that hold for each of its servers.

    Attributes:
        engine: The class that speaks to it; `engine.kind` is its name in settings and paths.
        title: Its name for people.
        server: The name of its server program for people.
        ports: Where it usually listens, the likeliest first. A named engine without a URL is
            expected on the first.
        slots: Concurrent requests of a lane whose settings name no number.
        cold_start_s: Seconds to start from nothing. Assumed, until a start was measured.
        colour: Its colour in the terminal.
        unloads: Whether a model can leave memory while the server runs. Otherwise only the
            end of the process frees the GPU.
        slots_variable: The environment variable that sets its slots; empty: there is none.
        program: The name of its process; empty: it may have any name.
        command_word: A word that its command line contains; empty: there is none.
        parallel_options: Its options whose product is the number of cards over which it spreads
            a model in equal shares; empty: it spreads one as the memory allows.
        tested_releases: The releases that the tests run, as (major, minor).
        read_releases: Those whose source was checked, and that no test runs.
    """

    engine: type[Engine]
    title: str
    server: str
    ports: tuple[int, ...]
    slots: int
    cold_start_s: float
    colour: str
    unloads: bool = True
    slots_variable: str = ""
    program: str = ""
    command_word: str = ""
    parallel_options: tuple[str, ...] = ()
    tested_releases: tuple[tuple[int, int], ...] = ()
    read_releases: tuple[tuple[int, int], ...] = ()

    @property
    def name(self) -> str:
        """Its name in settings, paths and headers."""
        return self.engine.kind

    @property
    def usual_url(self) -> str:
        """The base URL where one is expected that has none in the settings."""
        return f"http://127.0.0.1:{self.ports[0]}"

    def cards(self, command: Sequence[str]) -> int | None:
        """On how many cards a command line spreads a model; None: it does not say."""
        words = [word for part in command for word in part.split("=", 1)]
        factors = {
            option: int(value)
            for option, value in itertools.pairwise(words)
            if option in self.parallel_options and value.isdecimal() and int(value)
        }
        return math.prod(factors.values()) if factors else None

    def is_process(self, program: str, command: str) -> bool:
        """Whether a process of this name and command line can be the engine itself."""
        return self.program in ("", program) and self.command_word in command.lower()


KINDS: Mapping[str, EngineKind] = MappingProxyType({
    kind.name: kind
    for kind in (
        EngineKind(
            engine=Ollama,
            title="Ollama",
            server="Ollama",
            ports=(11434,),
            slots=1,  # as installed; OLLAMA_NUM_PARALLEL sets more
            cold_start_s=20.0,
            colour="green",
            slots_variable="OLLAMA_NUM_PARALLEL",
            program="ollama",
            tested_releases=((0, 24),),
            read_releases=((0, 33),),
        ),
        EngineKind(
            engine=VLLM,
            title="vLLM",
            server="vLLM",
            ports=(8001, 8000),  # its own default, 8000, is often the gateway's
            slots=32,  # what a 70B on 48 GB can hold
            cold_start_s=120.0,
            colour="red",
            command_word="vllm",
            parallel_options=("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp"),
            tested_releases=((0, 32),),
            read_releases=((0, 33),),
        ),
        EngineKind(
            engine=LlamaCpp,
            title="llama.cpp",
            server="llama-server",
            ports=(8080,),
            slots=4,
            cold_start_s=20.0,
            colour="blue",
            unloads=False,
        ),
    )
})  # fmt: skip

#: The kind of the engine that comes with the extra `embedded`.
EMBEDDED = LlamaCpp.kind

#: A name of an entry: a plain string to the type checker, one of `KINDS` to pydantic.
if TYPE_CHECKING:
    Kind: TypeAlias = str
else:
    Kind = Literal[tuple(KINDS)]
