"""The parts of the configuration: each a frozen model that accepts no name but its own.

The description of a field is its documentation: the configuration reference is generated
from it. It states the unit, and what the default means where that is not plain.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    model_validator,
)

from backends.kinds import KINDS, Kind
from backends.transport.origin import Origin


def _base_url(url: str) -> str:
    Origin.of(url)
    return url.rstrip("/").removesuffix("/v1")


BaseURL = Annotated[str, AfterValidator(_base_url)]
Name = Annotated[str, Field(min_length=1)]
Port = Annotated[int, Field(ge=0, le=65535)]


class _Part(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A part of the settings: frozen, and no name but its own."""


class EngineSettings(_Part):
    """One kind of engine: where it runs, or the command that starts it."""

    urls: tuple[BaseURL, ...] = Field(
        min_length=1, description="Base URLs, http://HOST:PORT. Several URLs are replicas."
    )
    api_key: SecretStr | None = Field(
        None, description="Key that the engine itself requires. Default: none is sent."
    )
    command: tuple[Name, ...] = Field(
        (),
        description="Program and arguments with which the gateway starts the engine, and stops it "
        "again. Default: the engine runs by itself.",
    )
    environment: dict[str, str] = Field(
        {}, description="Environment variables for `command`, beside the gateway's own."
    )
    log: Path | None = Field(
        None,
        description="File that receives the output of `command`. Default: a temporary file, kept "
        "after a failure only.",
    )

    @model_validator(mode="after")
    def _one_server_per_command(self) -> EngineSettings:
        if self.command and len(self.urls) > 1:
            raise ValueError("command: it starts one server, so name one URL")
        if not self.command and (self.environment or self.log):
            raise ValueError("environment and log belong to a command, and there is none")
        return self


class LaneSettings(_Part):
    """One model on one engine. In an exclusive placement, a model's first lane is loaded first."""

    model: str = Field(min_length=1, description="The engine's own name of the model.")
    urls: tuple[BaseURL, ...] = Field(
        (), description="Replicas of this lane alone. Default: the URLs of its engine."
    )
    slots: PositiveInt | None = Field(
        None,
        description="Concurrent requests per replica. Default: "
        f"{', '.join(f'{kind.slots} on {kind.server}' for kind in KINDS.values())}.",
    )
    queue: NonNegativeInt = Field(
        128, description="Requests that may wait for this lane; one more receives 429."
    )
    context: PositiveInt | None = Field(
        None,
        description="Context length in tokens, prompt and answer together. Default: what the "
        "engine reports.",
    )
    tools: bool | None = Field(
        None, description="Whether the lane accepts tools. Default: what the engine reports."
    )
    images: bool | None = Field(
        None, description="Whether the lane accepts images. Default: what the engine reports."
    )
    embeddings: bool | None = Field(
        None, description="Whether the lane makes embeddings. Default: what the engine reports."
    )
    memory_gib: PositiveFloat | None = Field(
        None,
        description="GPU memory in GiB that must be free before the lane loads (exclusive "
        "placement); for a tensor-parallel vLLM an equal share of it on each card. Default: not "
        "checked.",
    )


class ModelSettings(_Part):
    """A public model name and its lanes, by kind of engine."""

    lanes: Annotated[dict[Kind, LaneSettings], Field(min_length=1)] = Field(
        description="The model's lanes, by kind of engine. The first is loaded first."
    )
    placement: Literal["shared", "exclusive"] = Field(
        "shared",
        description="`shared`: all lanes fit in memory together. `exclusive`: one lane at a time "
        "holds the GPU.",
    )
    pin: Kind | None = Field(
        None, description="Send every request to this lane. Default: the policy decides."
    )
    profile: Path | None = Field(
        None,
        description="Profile measured by `twolane calibrate`. Default: an assumed profile.",
    )
    refine: bool = Field(
        True, description="Correct a measured profile by the latency of live requests."
    )

    @model_validator(mode="after")
    def _pin_is_a_lane(self) -> ModelSettings:
        if self.pin is not None and self.pin not in self.lanes:
            raise ValueError(f"pin: {self.pin} is none of this model's lanes")
        return self


class GpuSettings(_Part):
    """The GPU that the models in exclusive placement share."""

    handover_s: PositiveFloat = Field(
        12, description="Assumed duration of a hand-over in seconds, until one has been measured."
    )
    moves_per_hour: PositiveInt = Field(
        2, description="Most hand-overs per hour that the policy may make for speed."
    )
    patience_s: PositiveFloat = Field(
        30,
        description="Seconds after which a request that only the other engine can serve gets the "
        "GPU, whatever the hand-over costs. Must be below `limits.max_wait_s`.",
    )
    drain_s: PositiveFloat = Field(
        60,
        description="Deadline in seconds for running answers to end before a hand-over. After it "
        "the hand-over is put off, and no answer is cut.",
    )
    unload_s: PositiveFloat = Field(
        120, description="Deadline in seconds for an engine to unload its models."
    )
    free_s: PositiveFloat = Field(
        30, description="Deadline in seconds until the released memory is seen to be free."
    )
    load_s: PositiveFloat = Field(
        900, description="Deadline in seconds for an engine to start, wake or load."
    )
    probe_s: PositiveFloat = Field(
        60, description="Deadline in seconds for the first token of an engine that has loaded."
    )
    away_s: PositiveFloat = Field(
        30,
        description="Seconds that an engine without a `command` may be unreachable when it is to "
        "load, as when its container restarts.",
    )
    idle_release_s: NonNegativeFloat = Field(
        0, description="Seconds without a request after which the GPU is released. 0: never."
    )
    budget_gib: PositiveFloat | None = Field(
        None,
        description="Memory in GiB that takes the place of the GPU's, for engines on the CPU. "
        "Default: the GPU's own memory.",
    )
    lease: Path | None = Field(
        None,
        description="File that is locked while this gateway owns the GPU. Default: a file in the "
        "runtime directory.",
    )


class EmbeddedSettings(_Part):
    """The embedded engine (extra `embedded`), started where no other engine is found."""

    model: Path | None = Field(
        None, description="GGUF file to serve. Default: the packaged SmolLM2-135M."
    )
    name: str = Field("smollm2", min_length=1, description="Public name of the embedded model.")
    slots: PositiveInt = Field(4, description="Concurrent requests of the embedded engine.")
    context: PositiveInt = Field(4096, description="Context length of each slot, in tokens.")


class LimitSettings(_Part):
    """What a request may cost before it is refused or given up."""

    max_body_mb: PositiveFloat = Field(
        16, description="Largest request body in MiB; a larger one receives 413."
    )
    max_wait_s: PositiveFloat = Field(
        60,
        description="Longest time in the queue in seconds, then the request receives 503. Keep it "
        "below the read timeout of a proxy in front.",
    )
    connect_s: PositiveFloat = Field(
        2, description="Timeout in seconds for connecting to an engine."
    )
    first_token_s: PositiveFloat = Field(
        300, description="Timeout in seconds for the first event of a stream (a cold 70B)."
    )
    idle_s: PositiveFloat = Field(
        60, description="Longest silence in seconds between two events of a stream."
    )
    answer_s: PositiveFloat = Field(
        600, description="Timeout in seconds for an answer that is not streamed."
    )
    heartbeat_s: PositiveFloat = Field(
        15, description="Silence in seconds after which a waiting stream receives a comment."
    )
    drain_s: PositiveFloat = Field(
        30, description="Seconds that running requests have after SIGTERM."
    )


class MetricsSettings(_Part):
    """Where Prometheus scrapes `/metrics`."""

    host: str = Field(
        "127.0.0.1", description="Address to listen on, where metrics have their own port."
    )
    port: Port | None = Field(
        None,
        description="Port for `/metrics` alone, without a key. Default: the gateway's own port, "
        "behind the API keys.",
    )


class Prices(_Part):
    """Prices, from which the cost of tokens is computed. No price, no cost of that part."""

    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")] = Field(
        "EUR", description="Currency of all prices, three letters."
    )
    per_kwh: NonNegativeFloat | None = Field(
        None, description="Price of a kWh of electricity. Default: not known."
    )
    rent_per_hour: NonNegativeFloat | None = Field(
        None, description="Price per hour of a rented machine like this one. Default: not known."
    )
    api_per_million: NonNegativeFloat | None = Field(
        None,
        description="Price of a million output tokens of a hosted API, for comparison. Default: "
        "not known.",
    )
    watts: PositiveFloat | None = Field(
        None,
        description="Power draw of the whole machine in watts. Default: what its cards report.",
    )
