"""What an engine reports of itself and of its models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec


class Readiness(StrEnum):
    """Whether an engine would answer for one model now."""

    READY = "ready"
    LOADING = "loading"
    ABSENT = "no such model"
    ASLEEP = "asleep"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a model on an engine can take. None: not known, so let it try.

    `context` is in tokens, prompt and answer together.
    """

    context: int | None = None
    chat: bool | None = None
    tools: bool | None = None
    images: bool | None = None
    embeddings: bool | None = None
    multiple_choices: bool | None = None  # n > 1


@dataclass(frozen=True, slots=True)
class Activity:
    """What an engine says of itself now. None: it does not tell.

    Attributes:
        running: Requests inside the engine.
        waiting: Requests that it lets wait.
        loaded: Whether a model that it is ready for is in memory already.
        on_gpu: Which part of a loaded model is in GPU memory, from 0.0 to 1.0.
    """

    running: int | None = None
    waiting: int | None = None
    loaded: bool = True  # or it would not be ready
    on_gpu: float | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """What an engine says that it is; where that changes, so may its speed.

    Empty or None: it does not tell. `weights` is their precision, `digest` what its name of
    the model stands for: a checksum, a repository, a file.
    """

    version: str = ""
    weights: str = ""
    digest: str = ""
    slots: int | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory: bytes in all, bytes of them on a GPU, tokens of context a slot."""

    model: str
    size: int
    on_gpu: int
    context: int | None


class Listed(msgspec.Struct):
    """One entry of `/v1/models`."""

    id: str
    owned_by: str = ""
    max_model_len: int | None = None
    root: str | None = None


class Version(msgspec.Struct):
    """What Ollama and vLLM say of theirs."""

    version: str = ""


class Listing(msgspec.Struct):
    """The body of `/v1/models`."""

    data: list[Listed] | None = None


@dataclass(frozen=True, slots=True)
class Metrics:
    """Prometheus text, as far as we need it: the sum of a gauge over its labels."""

    values: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str) -> Metrics:
        """Read gauges; lines that are no samples are passed over."""
        values: dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith("#") or " " not in line:
                continue
            name, _, value = line.rpartition(" ")
            try:
                number = float(value)
            except ValueError:
                continue
            name = name.partition("{")[0]
            values[name] = values.get(name, 0.0) + number
        return cls(values)

    def count(self, name: str) -> int | None:
        """A gauge as a whole number, or None where the engine has no such gauge."""
        value = self.values.get(name)
        return None if value is None or not math.isfinite(value) else int(value)
