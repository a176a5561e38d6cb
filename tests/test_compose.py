"""The file that starts the box, without Docker: it is read, and its scripts are run.

What compose makes of it, and the box itself, are in tests/compose.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway import settings
from gateway.settings import Prices, Settings, SettingsError

ROOT = Path(__file__).parents[1]
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "compose.yaml").read_text()


@pytest.fixture(scope="module")
def file(text: str) -> dict[str, Any]:
    """The file, every variable at its default."""
    read: dict[str, Any] = yaml.safe_load(VARIABLE.sub(r"\2", text).replace("$$", "$"))
    return read


def settings_of(text: str, folder: Path, **variables: str) -> Settings:
    """The gateway's settings in compose.yaml, with these variables."""
    chosen = VARIABLE.sub(lambda m: variables.get(m[1]) or m[2], text)
    inline = yaml.safe_load(chosen)["services"]["gateway"]["environment"]["SETTINGS"]
    (folder / "twolane.yaml").write_text(inline)
    return settings.load(folder / "twolane.yaml", {}, {})


def test_the_gateway_accepts_its_settings(text: str, tmp_path: Path) -> None:
    read = settings_of(text, tmp_path)

    [model] = read.models.values()
    assert model.placement == "exclusive"
    assert {kind: engine.urls for kind, engine in read.engines.items()} == {
        "vllm": ("http://vllm:8000",),
        "ollama": ("http://ollama:11434",),
    }
    assert model.lanes["vllm"].slots == 32


def test_vllm_holds_the_cards_first_and_has_time_to_start(text: str, tmp_path: Path) -> None:
    read = settings_of(text, tmp_path)

    [model] = read.models.values()
    assert next(iter(model.lanes)) == "vllm"
    assert read.gpu.away_s >= 150, "a 70B's start on two cards"


def test_every_variable_has_one_default(text: str) -> None:
    defaults: dict[str, set[str]] = {}
    for name, default in VARIABLE.findall(text):
        defaults.setdefault(name, set()).add(default)

    # A variable without a default would leave its setting empty.
    assert {name: values for name, values in defaults.items() if len(values) > 1} == {}
    assert re.findall(r"(?<!\$)\$\{?(\w+)(?!\w*:-)\b", text) == []


def test_the_defaults_are_those_of_the_example_file(text: str) -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    example = dict(line.split("=", 1) for line in lines if line and line[0] != "#")
    defaults = dict(VARIABLE.findall(text))

    prices = {name for name, value in example.items() if not value and defaults[name] == "null"}
    assert prices == {"ELECTRICITY_PER_KWH", "RENT_PER_HOUR", "API_PER_MILLION", "MACHINE_WATTS"}
    assert {n: defaults[n] for n in example if n not in prices} == {
        n: value for n, value in example.items() if n not in prices
    }


def test_variables_change_the_settings(text: str, tmp_path: Path) -> None:
    read = settings_of(
        text, tmp_path, MODEL="chat", PLACEMENT="shared", OLLAMA_SLOTS="8", VLLM_CONTEXT="4096",
        CURRENCY="USD", RENT_PER_HOUR="0.70",
    )  # fmt: skip

    chat = read.models["chat"]
    assert chat.placement == "shared"
    assert chat.lanes["ollama"].slots == 8
    assert chat.lanes["vllm"].context == 4096
    assert read.cost == Prices(currency="USD", rent_per_hour=0.7)


def test_a_published_port_needs_a_key(text: str, tmp_path: Path) -> None:
    own, keys = {"api_keys_file": tmp_path / "keys"}, tmp_path / "keys"
    keys.write_text((ROOT / "secrets" / "api_keys.example").read_text())
    here = settings_of(text, tmp_path).model_copy(update=own)
    everywhere = settings_of(text, tmp_path, GATEWAY_BIND="0.0.0.0").model_copy(update=own)  # noqa: S104

    here.check_exposure()
    with pytest.raises(SettingsError, match=r"published 0\.0\.0\.0 is open"):
        everywhere.check_exposure()
    keys.write_text("a-long-secret\n")
    everywhere.check_exposure()


def test_a_stop_leaves_time_to_drain(file: dict[str, Any], text: str, tmp_path: Path) -> None:
    grace_s = int(file["services"]["gateway"]["stop_grace_period"].removesuffix("s"))

    assert grace_s > settings_of(text, tmp_path).limits.drain_s + 2


def test_every_image_is_pinned(file: dict[str, Any]) -> None:
    images = {name: service["image"] for name, service in file["services"].items()}
    base = re.search(r"^ARG BASE=(\S+)", (ROOT / "deploy" / "Dockerfile").read_text(), re.MULTILINE)

    assert base is not None
    for image in (*images.values(), base[1]):
        assert re.search(r":v?\d+\.\d+\.\d+", image), image


@pytest.mark.integration
def test_the_repository_tracks_examples_of_keys_only_and_ignores_keys() -> None:
    listed = ["git", "ls-files", "secrets"]
    tracked = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ignored = ["git", "check-ignore", "secrets/api_keys", "secrets/hf_token"]
    seen = subprocess.run(ignored, cwd=ROOT, capture_output=True, text=True, check=False).stdout

    assert tracked.split() == ["secrets/api_keys.example", "secrets/hf_token.example"]
    for name in tracked.split():
        lines = (ROOT / name).read_text().splitlines()
        assert [line for line in lines if line and line[0] != "#"] == []
    assert seen.split() == ["secrets/api_keys", "secrets/hf_token"]


# deploy/await-room.sh: vLLM starts when the cards are free


def command(folder: Path, name: str, script: str) -> None:
    """A program of this name, first on the path of what is run in this folder."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def script(name: str, *arguments: str, path: Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["/bin/sh", str(ROOT / "deploy" / name), *arguments],
        env={**os.environ, "PATH": f"{path}:{os.environ['PATH']}", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.integration
def test_vllm_starts_if_every_card_is_free(tmp_path: Path) -> None:
    command(tmp_path, "nvidia-smi", "printf '23800, 200\\n23900, 100\\n'")

    said, _ = script("await-room.sh", "0.95", "echo", "vllm", "starts", path=tmp_path).communicate()

    assert said == "vllm starts\n"


@pytest.mark.integration
def test_vllm_waits_until_the_fullest_card_is_free(tmp_path: Path) -> None:
    free = tmp_path / "free"
    free.write_text("23800, 200\n3000, 21000\n")
    command(tmp_path, "nvidia-smi", f"cat {free}")

    with script("await-room.sh", "0.95", "echo", "vllm starts", path=tmp_path) as waiting:
        assert waiting.stdout is not None
        first = waiting.stdout.readline()
        free.write_text("23800, 200\n23800, 200\n")
        rest = waiting.stdout.read()

    assert first == "await-room: waiting until a share of 0.95 of every card is free\n"
    assert rest == "vllm starts\n"


@pytest.mark.integration
def test_a_waiting_vllm_stops_at_once(tmp_path: Path) -> None:
    command(tmp_path, "nvidia-smi", "echo 0, 24000")

    with script("await-room.sh", "0.95", "false", path=tmp_path) as waiting:
        assert waiting.stdout is not None
        waiting.stdout.readline()
        waiting.terminate()

    assert waiting.returncode == 0


@pytest.mark.integration
@pytest.mark.parametrize("broken", ["exit 9", "echo 'No devices were found' >&2"])
def test_without_a_visible_card_vllm_starts_and_reports_the_fault(
    tmp_path: Path, broken: str
) -> None:
    command(tmp_path, "nvidia-smi", broken)

    with script("await-room.sh", "0.95", "echo", "vllm starts", path=tmp_path) as started:
        assert started.stdout is not None
        assert "vllm starts" in started.stdout.read()


# deploy/pull.sh: the progress of a download in lines


@pytest.mark.integration
def test_a_download_prints_progress_lines(tmp_path: Path) -> None:
    bar = "for n in 1 2 3; do printf '\\r\\033[Kmodel: %s0 %%' $n; sleep 0.7; done"

    pulling = script("pull.sh", str(tmp_path), "sh", "-c", bar, path=tmp_path, EVERY_S="1")
    said, _ = pulling.communicate()

    assert pulling.returncode == 0
    assert re.search(r"downloaded \| model: [12]0 %\n", said)
    assert said.endswith("downloaded: done\n")
    assert "\r" not in said
    assert "\x1b" not in said


@pytest.mark.integration
def test_a_failed_download_prints_the_reason_and_that_it_can_continue(tmp_path: Path) -> None:
    failing = "printf '\\r10 %%'; echo 'no route to the hub' >&2; exit 3"

    pulling = script("pull.sh", str(tmp_path), "sh", "-c", failing, path=tmp_path)
    said, _ = pulling.communicate()

    assert pulling.returncode == 3
    assert "no route to the hub" in said
    assert "run the same command again" in said
