"""What an engine reports about itself and its models. None always means: not reported."""

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
    """What a model on an engine can take. None: not reported, so requests are let through.

    Attributes:
        context: Tokens of prompt and answer together.
        chat: Chat completions.
        tools: Tool definitions.
        images: Images in messages.
        embeddings: Embeddings.
        multiple_choices: Several answers to one prompt (n > 1).
    """

    context: int | None = None
    chat: bool | None = None
    tools: bool | None = None
    images: bool | None = None
    embeddings: bool | None = None
    multiple_choices: bool | None = None


@dataclass(frozen=True, slots=True)
class Activity:
    """What happens inside an engine now.

    Attributes:
        running: Requests that it answers.
        waiting: Requests in its own queue.
        loaded: Whether a model that it is ready for is in memory already.
        on_gpu: The part of a loaded model that is in GPU memory, 0.0 to 1.0.
    """

    running: int | None = None
    waiting: int | None = None
    loaded: bool = True  # as most engines are ready only then
    on_gpu: float | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory.

    Attributes:
        model: The engine's name of it.
        size: Bytes in all.
        on_gpu: Bytes of them in GPU memory.
        context: Tokens of context per slot.
    """

    model: str
    size: int
    on_gpu: int
    context: int | None


@dataclass(frozen=True, slots=True)
class Identity:
    """What serves a model. Where it changes, a measured profile may be out of date.

    Attributes:
        version: Version of the engine; empty: not reported.
        weights: Precision of the weights; empty: not reported.
        digest: What its name of the model stands for: a checksum, a repository, a file.
        slots: Concurrent requests that it was started for.
    """

    version: str = ""
    weights: str = ""
    digest: str = ""
    slots: int | None = None


class ListedModel(msgspec.Struct):
    """One entry of `/v1/models`."""

    id: str
    owned_by: str = ""
    max_model_len: int | None = None
    root: str | None = None


class ModelListing(msgspec.Struct):
    """The body of `/v1/models`."""

    data: list[ListedModel] | None = None


class VersionBody(msgspec.Struct):
    """What Ollama and vLLM answer when asked for their version."""

    version: str = ""


@dataclass(frozen=True, slots=True)
class Gauges:
    """The gauges of a Prometheus page, each summed over its labels."""

    values: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str) -> Gauges:
        """Read a page; lines that are not samples are skipped."""
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
        """A gauge as a whole number; None where the page has no such gauge."""
        value = self.values.get(name)
        return None if value is None or not math.isfinite(value) else int(value)
