"""The gateway's configuration: read once at the start, never changed.

In order of weight: command line, `TWOLANE_*` variables, the YAML file, the defaults. A
name that is none of ours stops the start and the nearest right one is named, since a
setting that is silently not set is worse than none.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings import SettingsError as PydanticSettingsError

from backends.kinds import KINDS, Kind
from backends.transport.http import Origin
from gateway.errors import UsageError

PREFIX = "TWOLANE_"
DELIMITER = "__"


class SettingsError(UsageError):
    """The configuration cannot be used; the text says what to change."""


def _base_url(url: str) -> str:
    Origin.of(url)
    return url.rstrip("/").removesuffix("/v1")


BaseURL = Annotated[str, AfterValidator(_base_url)]
Name = Annotated[str, Field(min_length=1)]


def _off(value: object) -> object:
    """YAML reads the word off as false."""
    return "off" if value is False else value


class _Part(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A part of the settings: frozen, and no name but its own."""


class Engine(_Part):
    """An engine that runs already, on one or several servers."""

    urls: tuple[BaseURL, ...] = Field(
        min_length=1, description="Base URLs, http://HOST:PORT; several are replicas."
    )
    api_key: SecretStr | None = Field(None, description="Key the engine itself asks for.")
    command: tuple[Name, ...] = Field(
        (), description="Program and arguments, if the gateway is to start and stop it itself."
    )
    environment: dict[str, str] = Field({}, description="Variables for that program.")
    log: Path | None = Field(None, description="Where what it says goes (a temporary file).")

    @model_validator(mode="after")
    def _one_server_a_command(self) -> Engine:
        if self.command and len(self.urls) > 1:
            raise ValueError("command: it starts one server, so name one URL")
        if not self.command and (self.environment or self.log):
            raise ValueError("environment and log belong to a command, and there is none")
        return self


class Lane(_Part):
    """One model on one engine."""

    model: str = Field(min_length=1, description="The engine's own name of the model.")
    urls: tuple[BaseURL, ...] = Field(
        (), description="Replicas of this lane alone, where they are not the engine's."
    )
    slots: PositiveInt | None = Field(
        None,
        description="Requests answered at once by each replica "
        f"({', '.join(str(kind.slots) for kind in KINDS.values())} by kind).",
    )
    queue: NonNegativeInt = Field(128, description="Requests that may wait for this lane.")
    context: PositiveInt | None = Field(None, description="Tokens of context, asked if not given.")
    tools: bool | None = Field(None, description="Takes tools; asked if not given.")
    images: bool | None = Field(None, description="Takes images; asked if not given.")
    embeddings: bool | None = Field(None, description="Makes embeddings; asked if not given.")
    memory_gib: PositiveFloat | None = Field(
        None, description="GPU memory that must be free before it loads (exclusive placement)."
    )


class Model(_Part):
    """A public model name and its lanes, by engine kind."""

    lanes: Annotated[dict[Kind, Lane], Field(min_length=1)]
    placement: Literal["shared", "exclusive"] = Field(
        "shared",
        description="`shared`: both lanes fit in memory together. `exclusive`: one at a time.",
    )
    pin: Kind | None = Field(None, description="Send everything to this lane.")
    profile: Path | None = Field(
        None, description="Measured profile; without one an assumed profile is used."
    )
    refine: bool = Field(
        True, description="Correct a measured profile by what requests take in fact."
    )

    @model_validator(mode="after")
    def _pin_is_a_lane(self) -> Model:
        if self.pin is not None and self.pin not in self.lanes:
            raise ValueError(f"pin: {self.pin} is none of this model's lanes")
        return self


class Gpu(_Part):
    """The GPU that the models in exclusive placement share."""

    handover_s: PositiveFloat = Field(
        12, description="Seconds a hand-over is assumed to take until one has been measured."
    )
    moves_per_hour: PositiveInt = Field(2, description="Most hand-overs the policy makes an hour.")
    patience_s: PositiveFloat = Field(
        30, description="After so long, who needs the other engine gets it, whatever it costs."
    )
    drain_s: PositiveFloat = Field(60, description="For running answers before a hand-over.")
    unload_s: PositiveFloat = Field(120, description="For an engine to give its memory back.")
    free_s: PositiveFloat = Field(30, description="For that memory to be seen free.")
    load_s: PositiveFloat = Field(900, description="For an engine to start, wake or load.")
    probe_s: PositiveFloat = Field(60, description="For its first token.")
    away_s: PositiveFloat = Field(
        30, description="For an engine that is not ours to start to be there, or there again."
    )
    idle_release_s: NonNegativeFloat = Field(
        0, description="Without requests for so long, the memory is given back. 0: never."
    )
    budget_gib: PositiveFloat | None = Field(
        None, description="Stands for the GPU's memory where there is none: engines on the CPU."
    )
    lease: Path | None = Field(
        None, description="Locked while this gateway owns the GPU (in the runtime directory)."
    )


class Embedded(_Part):
    """The engine that comes along (extra `embedded`), used where no other is found."""

    model: Path | None = Field(None, description="A GGUF file; the packaged small one if none.")
    name: str = Field("smollm2", min_length=1, description="Public name of its model.")
    slots: PositiveInt = Field(4, description="Requests answered at once.")
    context: PositiveInt = Field(4096, description="Tokens of context of each slot.")


class Limits(_Part):
    """What a request may cost before it is refused or given up."""

    max_body_mb: PositiveFloat = Field(16, description="Largest request body, MiB.")
    max_wait_s: PositiveFloat = Field(60, description="Longest time in the queue.")
    connect_s: PositiveFloat = Field(2, description="To connect to an engine.")
    first_token_s: PositiveFloat = Field(300, description="To the first event of a stream.")
    idle_s: PositiveFloat = Field(60, description="Silence within a stream.")
    answer_s: PositiveFloat = Field(600, description="Silence before a whole answer.")
    heartbeat_s: PositiveFloat = Field(15, description="Silence before a comment to the client.")
    drain_s: PositiveFloat = Field(30, description="For running requests after SIGTERM.")


class Metrics(_Part):
    """Where Prometheus asks for `/metrics`."""

    host: str = Field("127.0.0.1", description="Address to listen on, if it has its own port.")
    port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        None, description="Its own port, without a key; none: the gateway's own, behind the keys."
    )


class Cost(_Part):
    """Prices, to tell what tokens cost. What is not given is not known."""

    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")] = Field(
        "EUR", description="Of all prices, three letters."
    )
    per_kwh: NonNegativeFloat | None = Field(None, description="Of electricity.")
    rent_per_hour: NonNegativeFloat | None = Field(
        None, description="Of a rented machine like this one."
    )
    api_per_million: NonNegativeFloat | None = Field(
        None, description="Of a million output tokens from somebody's API."
    )
    watts: PositiveFloat | None = Field(
        None, description="Of the whole machine, in place of what its cards say they draw."
    )


class Settings(BaseSettings):
    """The whole configuration.

    Each field can be set by environment, parts joined by two underscores, e.g.
    `TWOLANE_LIMITS__MAX_WAIT_S=30` or `TWOLANE_ENGINES__VLLM__URLS='["http://gpu:8000"]'`.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter=DELIMITER,
        frozen=True,
        extra="forbid",
    )

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="Port to listen on.")
    published: str | None = Field(
        None, description="Address that a container's port is published on, if not `host`."
    )
    allow_public_without_key: bool = Field(
        False, description="Listen beyond this machine although anybody may then use it."
    )
    api_keys: tuple[SecretStr, ...] = Field(
        (), description="Keys of which clients must send one; none: no key is asked for."
    )
    api_keys_file: Path | None = Field(None, description="A file of such keys, one a line.")
    engines: dict[Kind, Engine] = Field(
        {}, description="Engines that run; without any they are looked for on usual ports."
    )
    models: dict[str, Model] = Field(
        {}, description="Models to serve; without any, all that the engines have."
    )
    pair: dict[str, Annotated[dict[Kind, Name], Field(min_length=1)]] = Field(
        {}, description="Public name to the model's name on each engine (`--pair`)."
    )
    gpu: Gpu = Gpu()
    admin_keys: tuple[SecretStr, ...] = Field(
        (), description="Keys for /admin and /models/; without any, every API key may use them."
    )
    embedded: Embedded = Embedded()
    limits: Limits = Limits()
    metrics: Metrics = Metrics()
    cost: Cost = Cost()
    status_events: bool = Field(
        False, description="Tell streams that wait for the GPU so, in Open WebUI's own way."
    )
    log: Annotated[Literal["json", "off"], BeforeValidator(_off)] = Field(
        "json", description="One line a request, on stderr."
    )

    @model_validator(mode="after")
    def _lanes_have_engines(self) -> Settings:
        for name, model in self.models.items():
            for kind, lane in model.lanes.items():
                if not lane.urls and kind not in self.engines:
                    raise ValueError(
                        f"models.{name}.lanes.{kind}: no engine is configured for it; "
                        f"add engines.{kind}.urls"
                    )
        if self.engines or self.models:  # else engines are looked for
            for name, lanes in self.pair.items():
                for kind in lanes:
                    if kind not in self.engines:
                        raise ValueError(
                            f"pair.{name}.{kind}: no engine is configured for it; "
                            f"add engines.{kind}.urls"
                        )
        return self

    @model_validator(mode="after")
    def _ports_differ(self) -> Settings:
        if self.port and self.metrics.port == self.port:
            raise ValueError(
                f"metrics.port: {self.port} is the gateway's own; choose another, or leave it out, "
                "and /metrics is there behind the keys"
            )
        return self

    @model_validator(mode="after")
    def _exclusive_can_work(self) -> Settings:
        exclusive = {n: m for n, m in self.models.items() if m.placement == "exclusive"}
        pins = {model.pin for model in exclusive.values() if model.pin}
        if len(pins) > 1:
            raise ValueError(f"pin: one GPU cannot be kept at {' and '.join(sorted(pins))}")
        if exclusive and self.gpu.patience_s >= self.limits.max_wait_s:
            raise ValueError(
                f"gpu.patience_s ({self.gpu.patience_s:g}) must be below limits.max_wait_s "
                f"({self.limits.max_wait_s:g}), or who waits for the GPU is refused before"
            )
        for name, model in exclusive.items():
            for kind, lane in model.lanes.items():
                where = f"models.{name}.lanes.{kind}"
                if lane.urls or len(self.engines[kind].urls) > 1:
                    raise ValueError(f"{where}: one GPU has one server of an engine, not replicas")
                if not KINDS[kind].unloads and not self.engines[kind].command:
                    raise ValueError(
                        f"{where}: a {KINDS[kind].server} cannot unload its model; give "
                        f"engines.{kind}.command, so that the gateway can stop and start it"
                    )
                budget = self.gpu.budget_gib
                if budget and lane.memory_gib and lane.memory_gib > budget:
                    raise ValueError(
                        f"{where}.memory_gib: {lane.memory_gib:g} is more than the whole budget "
                        f"of {budget:g} GiB; take a smaller model or context"
                    )
        return self

    def served(self) -> dict[str, Model]:
        """The models by public name, pairs among them."""
        pairs = {
            name: Model(lanes={kind: Lane(model=model) for kind, model in lanes.items()})
            for name, lanes in self.pair.items()
        }
        return {**self.models, **pairs}

    def keys(self) -> tuple[str, ...]:
        """All API keys, from the settings and the file.

        A file may be without any where `published` says who can come.

        Raises:
            SettingsError: The file cannot be read, is empty, or a key is too short.
        """
        keys = [key.get_secret_value() for key in self.api_keys]
        if self.api_keys_file is not None:
            try:
                lines = self.api_keys_file.read_text().splitlines()
            except (OSError, UnicodeDecodeError) as exc:
                raise SettingsError(f"api_keys_file: {self.api_keys_file}: {exc}") from None
            listed = [key for line in lines if (key := line.strip()) and key[0] != "#"]
            if not listed and self.published is None:
                raise SettingsError(f"api_keys_file: {self.api_keys_file} holds no key")
            keys += listed
        if any(len(key) < 8 or not key.isascii() for key in keys):
            raise SettingsError("api_keys: a key needs at least 8 characters, all ASCII")
        return tuple(keys)

    def check_exposure(self) -> None:
        """Refuse to be open to others without a key.

        Raises:
            SettingsError: The address is not this machine's own and no key is asked for.
        """
        said, at = ("host", self.host) if self.published is None else ("published", self.published)
        local = at == "localhost" or at.startswith("127.") or at == "::1"
        if local or self.keys() or self.allow_public_without_key:
            return
        file = f"Put one into {self.api_keys_file}. " if self.api_keys_file else ""
        raise SettingsError(
            f"{said} {at} is open to other machines, and no API key is set. {file}Set api_keys "
            "(or TWOLANE_API_KEYS='[\"…\"]'), or say allow_public_without_key: true."
        )


def load(path: Path | None, overrides: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """Read the configuration.

    Args:
        path: The YAML file, if any.
        overrides: What the command line said; weighs most.
        environ: The environment, for its names only; pydantic-settings reads the values.

    Raises:
        SettingsError: Something is misspelt, missing or makes no sense.
    """
    misspelt = [problem for name in environ if (problem := _misspelt(name))]
    if misspelt:
        raise SettingsError("\n".join(misspelt))
    said = _file(path)

    class Configured(Settings):
        """The settings, from where this start takes them."""

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, said)

    try:
        return Configured(**overrides)
    except ValidationError as exc:
        source = f"{path}: " if path else ""
        raise SettingsError("\n".join(source + line for line in _told(exc))) from None
    except PydanticSettingsError as exc:  # no JSON where a list or map is wanted
        raise SettingsError(f"{exc}: write lists and maps as JSON") from None


def _file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        said = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(f"{path} cannot be read: {exc}") from None
    except yaml.YAMLError as exc:
        raise SettingsError(f"{path} is no YAML: {exc}") from None
    if said is None:
        return {}
    if not isinstance(said, dict):
        raise SettingsError(f"{path}: the top level must be `name: value` lines")
    return said


def _told(error: ValidationError) -> Iterator[str]:
    """Each problem as a line: where, what, and the nearest right name."""
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        where = ".".join(str(part) for part in problem["loc"] if part != "[key]")
        if problem["type"] == "extra_forbidden":
            *parents, name = problem["loc"]
            nearest = _nearest(str(name), _names(parents))
            yield f"{where}: there is no such setting{nearest}"
        else:
            yield f"{where or 'settings'}: {problem['msg'].removeprefix('Value error, ')}"


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _names(parents: Iterable[Any]) -> list[str]:
    """The names allowed below a place in the settings."""
    kind: Any = Settings
    for part in parents:
        kind = _below(kind, str(part))
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _below(kind: Any, name: str) -> Any:
    """The type of one field or map entry; None where there is none."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(name)
        return _inner(field.annotation) if field else None
    if get_origin(kind) is dict:
        keys, values = get_args(kind)
        if get_origin(keys) is Literal and name not in get_args(keys):
            return None
        return _inner(values)
    return None


def _inner(annotation: Any) -> Any:
    """An annotation without its Annotated and its None."""
    if get_origin(annotation) is Annotated:
        return _inner(get_args(annotation)[0])
    options = [option for option in get_args(annotation) if option is not type(None)]
    if len(options) == 1 and get_origin(annotation) is not tuple and len(get_args(annotation)) > 1:
        return _inner(options[0])
    return annotation


def _misspelt(variable: str) -> str | None:
    """What is wrong with the name of a variable, or None."""
    if not variable.upper().startswith(PREFIX):
        return None
    kind: Any = Settings
    parents: list[str] = []
    for part in variable[len(PREFIX) :].lower().split(DELIMITER):
        below = _below(kind, part)
        if below is None:
            allowed = _names(parents) or _keys(kind)
            nearest = difflib.get_close_matches(part, allowed, n=1, cutoff=0.5)
            right = PREFIX + DELIMITER.join([*parents, *nearest]).upper()
            hint = f"; did you mean {right}?" if nearest else ""
            return f"{variable}: there is no such setting{hint}"
        kind = below
        parents.append(part)
    return None


def _keys(kind: Any) -> list[str]:
    """The keys a map allows, where they are given."""
    if get_origin(kind) is dict and get_origin(get_args(kind)[0]) is Literal:
        return [str(key) for key in get_args(get_args(kind)[0])]
    return []


def environment() -> Mapping[str, str]:
    """The process's environment; read here and nowhere else."""
    return os.environ
