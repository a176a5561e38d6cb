"""The units: as systemd reads them, and as they fit the gateway and each other."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gateway import settings
from gateway.serve import LAST_WORD_S
from gateway.settings import Settings
from tests.support.requirements import unavailable
from tests.support.units import SYSTEMD, command, environment, option, values

GATEWAY = SYSTEMD / "twolane.service"
SUPERVISING = SYSTEMD / "twolane.service.d" / "supervise-vllm.conf"
VLLM = SYSTEMD / "vllm.service"
OLLAMA = SYSTEMD / "ollama.service.d" / "twolane.conf"
PROGRAMS = ("/opt/twolane/bin/twolane", "/opt/vllm/bin/vllm", "/usr/local/bin/ollama")
#: What Ollama's installer leaves, as far as the drop-in is concerned.
INSTALLED = "[Service]\nExecStart=/usr/local/bin/ollama serve\n"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A root with our units, the distribution's, and something in the place of each program."""
    if not shutil.which("systemd-analyze"):
        unavailable("no systemd-analyze: apt-get install systemd")
    for program in PROGRAMS:
        path = tmp_path / program[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o755)
    units = tmp_path / "etc/systemd/system"
    shutil.copytree(SYSTEMD, units)
    (units / "ollama.service").write_text(INSTALLED)
    (tmp_path / "usr/lib/systemd").mkdir(parents=True)
    shutil.copytree("/usr/lib/systemd/system", tmp_path / "usr/lib/systemd/system", symlinks=True)
    return tmp_path


def analyzed(machine: Path, *arguments: str) -> str:
    """All that systemd-analyze says of it."""
    done = subprocess.run(
        ["systemd-analyze", f"--root={machine}", "--no-pager", *arguments],  # noqa: S607
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def verified(machine: Path) -> str:
    """Its complaints, none if all is well."""
    units = sorted((machine / "etc/systemd/system").glob("*.service"))
    return analyzed(machine, "verify", *map(str, units))


def exposure(machine: Path, unit: str) -> float:
    """How exposed it is by systemd's reckoning: 0 not at all, 10 wide open."""
    report = analyzed(machine, "security", "--offline=true", unit)
    found = re.search(r"exposure level for \S+: ([\d.]+)", report)
    assert found, report
    return float(found[1])


@pytest.mark.integration
def test_systemd_accepts_the_units(machine: Path) -> None:
    assert verified(machine) == ""

    shutil.rmtree(machine / "etc/systemd/system/twolane.service.d")
    assert verified(machine) == ""


@pytest.mark.integration
def test_systemd_rejects_a_misspelt_name(machine: Path) -> None:
    unit = machine / "etc/systemd/system/twolane.service"
    unit.write_text(unit.read_text().replace("RestartSec=", "RestartSecs="))

    assert "Unknown key 'RestartSecs'" in verified(machine)


@pytest.mark.integration
def test_the_exposure_of_the_gateway_is_limited_to_its_network_and_cards(
    machine: Path,
) -> None:
    supervising = exposure(machine, "twolane.service")
    shutil.rmtree(machine / "etc/systemd/system/twolane.service.d")

    # 1.7, 3.4 and 3.7 of 10 with systemd 252; others count a little otherwise.
    assert exposure(machine, "twolane.service") < 2.5
    assert supervising < 4.5
    assert exposure(machine, "vllm.service") < 4.5


def configured(monkeypatch: pytest.MonkeyPatch, *units: Path) -> Settings:
    """The settings of a gateway that these units start."""
    variables = {name: value for unit in units for name, value in environment(unit).items()}
    ours = {name: value for name, value in variables.items() if name.startswith("TWOLANE_")}
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    return settings.load(SYSTEMD / "twolane.yaml", {}, ours)


def test_the_settings_match_the_units_of_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    read = configured(monkeypatch, GATEWAY)
    [model] = read.models.values()
    ollama, vllm = model.lanes["ollama"], model.lanes["vllm"]
    asked, given = environment(OLLAMA), command(VLLM)

    assert model.placement == "exclusive"
    assert str(read.gpu.lease) == "%t/twolane/gpu.lease"
    assert str(read.api_keys_file) == "%d/api_keys"
    assert read.engines["ollama"].urls == (f"http://{asked['OLLAMA_HOST']}",)
    assert ollama.slots == int(asked["OLLAMA_NUM_PARALLEL"])
    assert ollama.context == int(asked["OLLAMA_CONTEXT_LENGTH"])
    assert read.engines["vllm"].urls == (
        f"http://{option(given, '--host')}:{option(given, '--port')}",
    )
    assert vllm.model == option(given, "--served-model-name")
    assert vllm.slots == int(option(given, "--max-num-seqs"))
    assert vllm.context == int(option(given, "--max-model-len"))


def test_a_supervised_vllm_has_the_same_options_except_sleep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = configured(monkeypatch, GATEWAY, SUPERVISING).engines["vllm"]
    alone = command(VLLM)
    alone.remove("--enable-sleep-mode")

    assert sorted(engine.command) == sorted(alone)
    assert engine.urls == ("http://127.0.0.1:8001",)
    assert "VLLM_SERVER_DEV_MODE" not in engine.environment
    assert values(SUPERVISING, "Conflicts") == ["vllm.service"]


def test_only_this_machine_can_reach_the_dev_endpoints() -> None:
    assert environment(VLLM)["VLLM_SERVER_DEV_MODE"] == "1"
    assert option(command(VLLM), "--host") == "127.0.0.1"
    assert environment(OLLAMA)["OLLAMA_HOST"].startswith("127.0.0.1:")


@pytest.mark.parametrize("unit", [GATEWAY, SUPERVISING], ids=["alone", "supervising"])
def test_the_stop_timeout_is_longer_than_the_drain(unit: Path) -> None:
    [seconds] = map(int, values(unit, "TimeoutStopSec"))

    assert seconds > Settings().limits.drain_s + LAST_WORD_S + 5
    # Else the engine that it runs would be told to end at the same moment.
    assert values(GATEWAY, "KillMode") == ["mixed"]


def test_neither_units_nor_settings_contain_a_key() -> None:
    files = [path for path in SYSTEMD.rglob("*") if path.is_file()]

    assert len(files) == 5
    for path in files:
        assert not re.search(r"(?i)(api_keys?|token)=['\"\[]?\w{8}", path.read_text()), path


def test_json_in_a_unit_is_valid() -> None:
    variables = environment(SUPERVISING)

    assert json.loads(variables["TWOLANE_ENGINES__VLLM__COMMAND"])[1] == "serve"
    assert json.loads(variables["TWOLANE_ENGINES__VLLM__ENVIRONMENT"])["NCCL_P2P_DISABLE"] == "1"
