"""The configuration: the order of its sources, and the messages about mistakes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gateway import settings
from gateway.settings import Settings, SettingsError


class Place:
    """The sources of a configuration: a file, the environment, the command line."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._monkeypatch = monkeypatch

    def file(self, text: str, name: str = "twolane.yaml") -> Path:
        path = self._folder / name
        path.write_text(text)
        return path

    def load(self, text: str | None = None, /, *, given: Any = None, **environ: str) -> Settings:
        """Read the settings, as `twolane serve` does."""
        for name, value in environ.items():
            self._monkeypatch.setenv(name, value)
        path = self.file(text) if text is not None else None
        return settings.load(path, given or {}, os.environ)

    def mistake(self, text: str | None = None, /, **environ: str) -> str:
        """The message about a configuration that cannot be used."""
        with pytest.raises(SettingsError) as caught:
            self.load(text, **environ)
        return str(caught.value)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


# The order of the sources


def test_an_empty_configuration_is_valid(place: Place) -> None:
    read = place.load()

    assert read.port == 8000
    assert place.load("").model_dump() == read.model_dump()
    assert place.load("# nothing\n").model_dump() == read.model_dump()


def test_the_command_line_precedes_the_environment_and_that_the_file(place: Place) -> None:
    text = "port: 9001"

    assert place.load(text).port == 9001
    assert place.load(text, TWOLANE_PORT="9002").port == 9002
    assert place.load(text, given={"port": 9003}, TWOLANE_PORT="9002").port == 9003


def test_a_variable_changes_one_limit_and_leaves_the_others_of_the_file(place: Place) -> None:
    read = place.load("limits: {max_wait_s: 5, idle_s: 7}", TWOLANE_LIMITS__IDLE_S="3")

    assert (read.limits.max_wait_s, read.limits.idle_s) == (5, 3)


def test_lists_and_maps_are_json_in_the_environment(place: Place) -> None:
    read = place.load(
        TWOLANE_ENGINES__VLLM__URLS='["http://gpu:8000"]',
        TWOLANE_PAIR='{"chat": {"vllm": "Small-1B"}}',
    )

    assert read.engines["vllm"].urls == ("http://gpu:8000",)
    assert read.pair == {"chat": {"vllm": "Small-1B"}}


def test_settings_cannot_be_changed_later(place: Place) -> None:
    read = place.load()

    with pytest.raises(ValueError, match="frozen"):
        read.port = 1  # type: ignore[misc]  # that is what is tested
    with pytest.raises(ValueError, match="frozen"):
        read.limits.idle_s = 1  # type: ignore[misc]  # that is what is tested


# Misspelt names


@pytest.mark.parametrize(
    ("text", "where", "nearest"),
    [
        ("prot: 1", "prot", "port"),
        ("limits: {max_wait: 3}", "limits.max_wait", "max_wait_s"),
        ("engines: {vllm: {url: [http://a]}}", "engines.vllm.url", "urls"),
        ("models: {m: {lanes: {vllm: {modell: a}}}}", "models.m.lanes.vllm.modell", "model"),
        ("embedded: {slot: 3}", "embedded.slot", "slots"),
    ],
)
def test_a_misspelt_name_in_the_file_names_the_nearest_right_one(
    place: Place, text: str, where: str, nearest: str
) -> None:
    said = place.mistake(text)

    assert f"twolane.yaml: {where}: there is no such setting; did you mean {nearest}?" in said


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("TWOLANE_PROT", "TWOLANE_PORT"),
        ("TWOLANE_LIMITS__MAX_WAIT", "TWOLANE_LIMITS__MAX_WAIT_S"),
        ("TWOLANE_LIMITS_MAX_WAIT_S", "TWOLANE_LIMITS"),
        ("TWOLANE_ENGINES__VLM__URLS", "TWOLANE_ENGINES__VLLM"),
        ("TWOLANE_MODELS__CHAT__LANES__VLLM__SLOT", "TWOLANE_MODELS__CHAT__LANES__VLLM__SLOTS"),
        ("TWOLANE_PAIR__CHAT__OLAMA", "TWOLANE_PAIR__CHAT__OLLAMA"),
    ],
)
def test_a_misspelt_variable_names_the_nearest_right_one(
    place: Place, name: str, nearest: str
) -> None:
    said = place.mistake(**{name: "1"})

    assert said == f"{name}: there is no such setting; did you mean {nearest}?"


def test_a_name_like_no_setting_has_no_hint(place: Place) -> None:
    assert place.mistake("xyzzy: 1").endswith("xyzzy: there is no such setting")
    assert place.mistake(TWOLANE_XYZZY="1") == "TWOLANE_XYZZY: there is no such setting"


def test_all_mistakes_are_reported_together(place: Place) -> None:
    said = place.mistake("prot: 1\nport: many\nlimits: {idle_s: 0}").splitlines()

    assert [line.split(": ")[1] for line in said] == ["port", "limits.idle_s", "prot"]


def test_variables_of_other_programs_are_ignored(place: Place) -> None:
    assert place.load(TWOLANES_PROT="1", PORT="2").port == 8000


# Values that make no sense


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("port: 99999", "port: Input should be less than or equal to 65535"),
        ("limits: {max_wait_s: 0}", "limits.max_wait_s: Input should be greater than 0"),
        ("limits: {max_wait_s: .inf}", "limits.max_wait_s: Input should be a finite number"),
        ("limits: {max_wait_s: soon}", "limits.max_wait_s: Input should be a valid number"),
        ("log: loud", "log: Input should be 'json' or 'off'"),
        ("- port", "the top level must be `name: value` lines"),
        ("port: [", "is not valid YAML"),
        ("engines: {vlm: {urls: [http://a]}}", "engines.vlm: Input should be 'ollama', 'vllm'"),
        ("models: {m: {lanes: {}}}", "models.m.lanes: Dictionary should have at least 1 item"),
    ],
)
def test_an_invalid_value_is_reported_with_its_place(place: Place, text: str, said: str) -> None:
    assert said in place.mistake(text)


@pytest.mark.parametrize(
    "url",
    ["localhost:8001", "ftp://a", "http://", "gpu", "http://a?key=1", "http://me:secret@a", ""],
)
def test_an_invalid_url_is_reported_with_what_to_write(place: Place, url: str) -> None:
    said = place.mistake(f"engines: {{vllm: {{urls: ['{url}']}}}}")

    assert f"engines.vllm.urls.0: '{url}' is not a base URL: write http://HOST:PORT" in said


def test_a_url_with_an_invalid_port_is_refused(place: Place) -> None:
    said = place.mistake("engines: {vllm: {urls: ['http://a:99999']}}")

    assert "engines.vllm.urls.0: Port out of range" in said


@pytest.mark.parametrize("url", ["http://gpu:8000", "http://gpu:8000/", "http://gpu:8000/v1/"])
def test_a_base_url_may_be_written_with_v1(place: Place, url: str) -> None:
    read = place.load(f"engines: {{vllm: {{urls: ['{url}']}}}}")

    assert read.engines["vllm"].urls == ("http://gpu:8000",)


def test_a_list_in_the_environment_that_is_not_json_is_refused(place: Place) -> None:
    assert "write lists and maps as JSON" in place.mistake(TWOLANE_API_KEYS="secret-secret")


def test_off_without_quotes_turns_the_log_off(place: Place) -> None:
    assert place.load("log: off").log == "off"
    assert place.load("log: 'off'").log == "off"


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        settings.load(tmp_path / "none.yaml", {}, {})


# Models, lanes, pairs

ENGINE = "engines: {ollama: {urls: ['http://a:1']}}\n"


def test_a_lane_needs_an_engine_or_urls_of_its_own(place: Place) -> None:
    lane = "models: {m: {lanes: {vllm: {model: a}}}}"
    own = "models: {m: {lanes: {vllm: {model: a, urls: ['http://b:1']}}}}"

    said = place.mistake(ENGINE + lane)

    assert "models.m.lanes.vllm: no engine is configured for it; add engines.vllm.urls" in said
    assert place.load(ENGINE + own).models["m"].lanes["vllm"].urls == ("http://b:1",)


def test_a_pin_is_one_of_the_models_lanes(place: Place) -> None:
    said = place.mistake(ENGINE + "models: {m: {pin: vllm, lanes: {ollama: {model: a}}}}")

    assert "models.m: pin: vllm is none of this model's lanes" in said


def test_a_pair_needs_its_engines_where_any_are_configured(place: Place) -> None:
    pair = "pair: {chat: {ollama: 'a:1b', vllm: A}}"

    assert "pair.chat.vllm: no engine is configured for it" in place.mistake(ENGINE + pair)
    assert place.load(pair).pair == {"chat": {"ollama": "a:1b", "vllm": "A"}}  # they are found


@pytest.mark.parametrize("lanes", ["{}", "{vllm: ''}"])
def test_a_pair_names_at_least_one_model(place: Place, lanes: str) -> None:
    assert "pair.chat" in place.mistake(f"pair: {{chat: {lanes}}}")


# One GPU for several


def shared_gpu(*models: str, engines: str = "", more: str = "") -> str:
    """Settings in which each of these models, as JSON, is in exclusive placement."""
    engines = engines or "{ollama: {urls: ['http://a:1']}, vllm: {urls: ['http://a:2']}}"
    listed = "\n".join(
        f"  m{number}: {{placement: exclusive, {model}}}" for number, model in enumerate(models)
    )
    return f"engines: {engines}\nmodels:\n{listed}\n{more}"


BOTH = "lanes: {ollama: {model: 'a:1b'}, vllm: {model: A}}"


def test_lanes_that_do_not_fit_together_share_a_gpu(place: Place) -> None:
    read = place.load(shared_gpu(BOTH, "lanes: {vllm: {model: A}}", more="gpu: {drain_s: 5}"))

    assert {model.placement for model in read.models.values()} == {"exclusive"}
    assert (read.gpu.drain_s, read.gpu.patience_s, read.gpu.moves_per_hour) == (5, 30, 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            shared_gpu(
                BOTH,
                engines="{ollama: {urls: ['http://a:1']}, "
                "vllm: {urls: ['http://a:2', 'http://b:2']}}",
            ),
            "models.m0.lanes.vllm: one GPU has one server of an engine, not replicas",
        ),
        (
            shared_gpu("lanes: {vllm: {model: A, urls: ['http://c:1']}}"),
            "models.m0.lanes.vllm: one GPU has one server of an engine, not replicas",
        ),
        (
            shared_gpu(
                "lanes: {llamacpp: {model: a}}", engines="{llamacpp: {urls: ['http://a:3']}}"
            ),
            "a llama-server cannot unload its model; give engines.llamacpp.command",
        ),
        (
            shared_gpu(BOTH, more="gpu: {patience_s: 60}"),
            "gpu.patience_s (60) must be below limits.max_wait_s (60)",
        ),
        (
            shared_gpu(BOTH, more="limits: {max_wait_s: 20}"),
            "gpu.patience_s (30) must be below limits.max_wait_s (20)",
        ),
        (
            shared_gpu(f"pin: vllm, {BOTH}", f"pin: ollama, {BOTH}"),
            "pin: one GPU cannot be kept at ollama and vllm",
        ),
        (
            shared_gpu("lanes: {vllm: {model: A, memory_gib: 5}}", more="gpu: {budget_gib: 4}"),
            "models.m0.lanes.vllm.memory_gib: 5 is more than the whole budget of 4 GiB",
        ),
        (shared_gpu(BOTH, more="gpu: {drain_s: 0}"), "gpu.drain_s: Input should be greater than 0"),
        (shared_gpu(BOTH, more="gpu: {drains: 1}"), "did you mean drain_s?"),
        (shared_gpu("lanes: {vllm: {model: A, memory_gib: 0}}"), "memory_gib: Input should be gr"),
    ],
)
def test_an_impossible_use_of_one_gpu_is_reported_with_what_to_change(
    place: Place, text: str, said: str
) -> None:
    assert said in place.mistake(text)


@pytest.mark.parametrize(
    "text",
    [
        shared_gpu(
            "lanes: {llamacpp: {model: a}}",
            engines="{llamacpp: {urls: ['http://a:3'], command: [llama-server, -m, a.gguf]}}",
        ),
        shared_gpu(f"pin: vllm, {BOTH}", f"pin: vllm, {BOTH}"),
        shared_gpu("lanes: {vllm: {model: A, memory_gib: 4}}", more="gpu: {budget_gib: 4}"),
        shared_gpu(BOTH, more="gpu: {patience_s: 30}\nlimits: {max_wait_s: 31}"),
        # Of models whose lanes are all in memory none of this is asked.
        shared_gpu(BOTH, more="limits: {max_wait_s: 20}").replace("exclusive", "shared"),
        shared_gpu(f"pin: vllm, {BOTH}", f"pin: ollama, {BOTH}").replace("exclusive", "shared"),
    ],
)
def test_a_possible_use_of_one_gpu_is_accepted(place: Place, text: str) -> None:
    assert place.load(text).models


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (
            "{urls: ['http://a:1', 'http://b:1'], command: [vllm, serve, A]}",
            "engines.vllm: command: it starts one server, so name one URL",
        ),
        ("{urls: ['http://a:1'], log: /tmp/log}", "environment and log belong to a command"),
        ("{urls: ['http://a:1'], environment: {A: b}}", "environment and log belong to a command"),
        ("{urls: ['http://a:1'], command: ['']}", "engines.vllm.command.0: "),
    ],
)
def test_a_command_starts_one_server_and_only_that_has_a_log(
    place: Place, engine: str, said: str
) -> None:
    assert said in place.mistake(f"engines: {{vllm: {engine}}}")


# Keys


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "gpu.example", ""])  # noqa: S104 - refused
def test_a_public_address_without_a_key_is_refused(place: Place, host: str) -> None:
    with pytest.raises(SettingsError, match="open to other machines") as caught:
        place.load(f"host: '{host}'").check_exposure()

    assert "TWOLANE_API_KEYS" in str(caught.value)


@pytest.mark.parametrize("more", ["api_keys: [a-long-secret]", "allow_public_without_key: true"])
def test_a_public_address_needs_a_key_or_explicit_permission(place: Place, more: str) -> None:
    place.load(f"host: 0.0.0.0\n{more}").check_exposure()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_this_machine_needs_no_key(place: Place, host: str) -> None:
    place.load(f"host: '{host}'").check_exposure()


def test_the_published_address_of_a_container_is_the_one_checked(place: Place) -> None:
    place.load("host: 0.0.0.0\npublished: 127.0.0.1").check_exposure()
    with pytest.raises(SettingsError, match=r"published 192\.0\.2\.1 is open to other machines"):
        place.load("host: 0.0.0.0\npublished: 192.0.2.1").check_exposure()


def test_the_error_of_a_published_address_names_the_keys_file(place: Place) -> None:
    keys = place.file("# none yet\n", "keys")
    settings = f"host: 0.0.0.0\npublished: 0.0.0.0\napi_keys_file: {keys}"

    with pytest.raises(SettingsError, match=f"Put one into {keys}"):
        place.load(settings).check_exposure()


def test_keys_come_from_the_settings_and_from_the_file(place: Place) -> None:
    keys = place.file(
        "first-secret\n\n  # a comment, indented\n# another\n second-secret \n", "keys"
    )

    read = place.load(f"api_keys: [zeroth-secret]\napi_keys_file: {keys}")

    assert read.keys() == ("zeroth-secret", "first-secret", "second-secret")


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment, and a long one\n"])
def test_a_file_without_a_key_is_refused(place: Place, text: str) -> None:
    keys = place.file(text, "keys")

    with pytest.raises(SettingsError, match="holds no key"):
        place.load(f"api_keys_file: {keys}").keys()


def test_a_missing_keys_file_is_an_error(place: Place) -> None:
    with pytest.raises(SettingsError, match="api_keys_file: /none: "):
        place.load("api_keys_file: /none").keys()


@pytest.mark.parametrize("key", ["short", "seven77", "lösung-lösung"])
def test_a_key_that_is_short_or_not_ascii_is_refused_and_not_shown(place: Place, key: str) -> None:
    with pytest.raises(SettingsError, match="at least 8 characters") as caught:
        place.load(f"api_keys: [{key}]").keys()

    assert key not in str(caught.value)


def test_keys_are_in_no_repr(place: Place) -> None:
    read = place.load(
        "api_keys: [a-long-secret]\nengines: {vllm: {urls: [http://a], api_key: b-long}}"
    )

    assert "long" not in repr(read)
