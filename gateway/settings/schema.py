"""The whole configuration as one frozen object."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from backends.kinds import Kind
from gateway.errors import SettingsError
from gateway.settings.checks import check_engines_exist, check_exclusive_placement
from gateway.settings.parts import (
    EmbeddedSettings,
    EngineSettings,
    GpuSettings,
    LaneSettings,
    LimitSettings,
    MetricsSettings,
    ModelSettings,
    Name,
    Port,
    Prices,
)
from gateway.settings.spelling import DELIMITER, PREFIX

MIN_KEY_LENGTH = 8


def _off(value: object) -> object:
    """YAML reads the word off as false."""
    return "off" if value is False else value


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
    port: Port = Field(8000, description="Port to listen on. 0: any free port.")
    published: str | None = Field(
        None,
        description="Address on which a container's port is published. It takes the place of "
        "`host` when the gateway checks who can reach it. Default: `host`.",
    )
    allow_public_without_key: bool = Field(
        False,
        description="Listen beyond this machine without an API key: anybody who reaches the port "
        "may use the gateway.",
    )
    api_keys: tuple[SecretStr, ...] = Field(
        (),
        description="API keys of the clients, at least 8 characters each. Default: no key is "
        "required.",
    )
    api_keys_file: Path | None = Field(
        None, description="File with further API keys, one per line; # begins a comment."
    )
    engines: dict[Kind, EngineSettings] = Field(
        {},
        description="Engines by kind. Default: they are looked for on their usual ports of this "
        "machine.",
    )
    models: dict[str, ModelSettings] = Field(
        {}, description="Models to serve, by public name. Default: every model of the engines."
    )
    pair: dict[str, Annotated[dict[Kind, Name], Field(min_length=1)]] = Field(
        {}, description="Public name to the model's name on each engine (`--pair`)."
    )
    gpu: GpuSettings = GpuSettings()
    admin_keys: tuple[SecretStr, ...] = Field(
        (),
        description="Keys for /admin and /models/. Default: every API key may use these paths.",
    )
    embedded: EmbeddedSettings = EmbeddedSettings()
    limits: LimitSettings = LimitSettings()
    metrics: MetricsSettings = MetricsSettings()
    cost: Prices = Prices()
    status_events: bool = Field(
        False,
        description="Send status events in Open WebUI's format to streams that wait for the GPU. "
        "Other clients do not know such events.",
    )
    log: Annotated[Literal["json", "off"], BeforeValidator(_off)] = Field(
        "json", description="`json`: one line per request on stderr. `off`: none."
    )

    @model_validator(mode="after")
    def _check_engines(self) -> Settings:
        check_engines_exist(self.engines, self.models, self.pair)
        return self

    @model_validator(mode="after")
    def _check_ports(self) -> Settings:
        if self.port and self.metrics.port == self.port:
            raise ValueError(
                f"metrics.port: {self.port} is the gateway's own. Choose another, or leave it "
                "out: /metrics is then on the gateway's port, behind the keys"
            )
        return self

    @model_validator(mode="after")
    def _check_placement(self) -> Settings:
        check_exclusive_placement(self.engines, self.models, self.gpu, self.limits)
        return self

    def served(self) -> dict[str, ModelSettings]:
        """The models by public name, pairs among them."""
        pairs = {
            name: ModelSettings(
                lanes={kind: LaneSettings(model=model) for kind, model in lanes.items()}
            )
            for name, lanes in self.pair.items()
        }
        return {**self.models, **pairs}

    def keys(self) -> tuple[str, ...]:
        """All API keys, from the settings and the file.

        The file may hold no key where `published` says who can reach the gateway.

        Raises:
            SettingsError: The file cannot be read, is empty, or a key is too short.
        """
        keys = [key.get_secret_value() for key in self.api_keys]
        if self.api_keys_file is not None:
            listed = _keys_of_file(self.api_keys_file)
            if not listed and self.published is None:
                raise SettingsError(f"api_keys_file: {self.api_keys_file} holds no key")
            keys += listed
        if any(len(key) < MIN_KEY_LENGTH or not key.isascii() for key in keys):
            raise SettingsError(
                f"api_keys: a key needs at least {MIN_KEY_LENGTH} characters, all ASCII"
            )
        return tuple(keys)

    def admins(self) -> tuple[str, ...]:
        """The keys for /admin and /models/: the admin keys, or every API key without any."""
        return tuple(key.get_secret_value() for key in self.admin_keys) or self.keys()

    def check_exposure(self) -> None:
        """Refuse to be reachable from other machines without a key.

        Raises:
            SettingsError: The address is not this machine's own and no key is required.
        """
        name, address = ("host", self.host)
        if self.published is not None:
            name, address = ("published", self.published)
        local = address == "localhost" or address.startswith("127.") or address == "::1"
        if local or self.keys() or self.allow_public_without_key:
            return
        file = f"Put one into {self.api_keys_file}. " if self.api_keys_file else ""
        raise SettingsError(
            f"{name} {address} is open to other machines, and no API key is set. {file}Set "
            "api_keys (or TWOLANE_API_KEYS='[\"…\"]'), or set allow_public_without_key: true."
        )


def _keys_of_file(path: Path) -> list[str]:
    """The keys of a file, one per line; raises SettingsError where it cannot be read."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(f"api_keys_file: {path}: {exc}") from None
    return [key for line in lines if (key := line.strip()) and key[0] != "#"]
