"""What the doctor observes on this machine, and its command."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from backends.fake import GIB, FakeEngine
from gateway.doctor.checks.all_checks import CHECKS, run_checks
from gateway.doctor.checks.check import Finding, Level
from gateway.doctor.collect.collector import Sources, collect
from gateway.doctor.collect.processes import ListeningSocket, listening_sockets
from gateway.doctor.command import as_json
from gateway.doctor.observations import (
    Docker,
    Process,
    Ram,
    Unknown,
)
from gateway.gpu.cards import Nvml
from gateway.gpu.lease import Lease
from gateway.serving import discovery
from tests.gpu.test_memory import two_4090
from tests.support.command import Finished, run_command
from tests.support.gateways import StartGateway
from tests.support.machines import (
    DAY_S,
    NO_DRIVER,
    NOW,
    exclusive,
    findings_of,
    two_cards,
)
from tests.support.models import alone
from tests.support.plain_http import async_client

# Collecting


def isolated(folder: Path, **sources: Any) -> Sources:
    """This machine's processes and sockets; a PCI bus in `folder`; no usual ports, no Docker."""
    return Sources(sys=folder, ports={}, docker="no-such-docker", **sources)


def settings_file(folder: Path, **fields: Any) -> Path:
    """A file with these settings, and any free port."""
    path = folder / "twolane.yaml"
    path.write_text(json.dumps({"port": 0, **fields}))  # JSON is YAML
    return path


async def doctor(*arguments: object, **variables: str) -> Finished:
    """Run `twolane doctor` to its end, in a terminal of eighty columns."""
    run = partial(run_command, "doctor", *arguments, columns=80, **variables)
    return await anyio.to_thread.run_sync(run)


async def first_findings(config: Path | None, sources: Sources, **parts: Any) -> dict[str, Finding]:
    """The first finding of each check; `parts` replace what was observed."""
    observed = await collect(config, sources=sources)
    findings = run_checks(replace(observed, **parts))
    return {finding.check: finding for finding in reversed(findings)}


@pytest.mark.integration
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_listening_sockets_are_read_from_the_kernel(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as listens, socket.socket(family) as idle:
        try:
            listens.bind((address, 0))
        except OSError as exc:
            pytest.skip(f"no {address} here: {exc}")
        listens.listen()
        idle.bind((address, 0))
        listening = set(listening_sockets(Path("/proc")))
        inode, port = os.fstat(listens.fileno()).st_ino, listens.getsockname()[1]
        other = idle.getsockname()[1]

    assert ListeningSocket(address, port, inode) in listening
    assert other not in {entry.port for entry in listening}


def on_every_address(folder: Path, port: int) -> Path:
    """A /proc in which a socket listens on this port of all addresses, and nothing else is."""
    proc = folder / "proc"
    (proc / "net").mkdir(parents=True)
    line = f"0: 00000000:{port:04X} 00000000:0000 0A 0:0 00:0 0 0 0 77 1 0"
    (proc / "net/tcp").write_text(f"header\n{line}\n")
    return proc


async def test_a_collector_that_raises_is_unknown_with_the_name_of_the_exception(
    tmp_path: Path,
) -> None:
    class Odd:
        NVMLError = RuntimeError

        def nvmlInit(self) -> None:  # noqa: N802
            raise ZeroDivisionError("of all things")

    (tmp_path / "bus/pci/devices").mkdir(parents=True)
    observed = await collect(None, nvml=Nvml(library=Odd()), sources=isolated(tmp_path))

    assert isinstance(observed.driver, Unknown)
    assert observed.driver.reason == "the collector itself failed: ZeroDivisionError: of all things"


async def test_dev_endpoints_that_other_machines_can_reach_are_a_problem(tmp_path: Path) -> None:
    async with FakeEngine("vllm", ["Small-1B"], dev_mode=True) as engine:
        config = settings_file(tmp_path, **alone(engine))
        closed = await first_findings(config, isolated(tmp_path))
        proc = on_every_address(tmp_path, engine.port)
        open_ = await first_findings(config, isolated(tmp_path, proc=proc))
        engine.dev_mode = False
        without = await first_findings(config, isolated(tmp_path, proc=proc))

    assert closed["dev-endpoints"].level is Level.OK
    assert open_["dev-endpoints"].level is Level.PROBLEM
    assert open_["published"].level is Level.WARNING
    assert "0.0.0.0" in open_["dev-endpoints"].saw  # noqa: S104
    assert without["dev-endpoints"].level is Level.OK


async def load(engine: FakeEngine) -> None:
    async with async_client(engine.url) as client:
        await client.post("/api/generate", json={"model": "small:1b", "keep_alive": -1})


async def test_a_model_partly_on_the_cpu_is_a_problem_and_exit_code_1(tmp_path: Path) -> None:
    async with FakeEngine("ollama", ["small:1b"], on_gpu=0.5, size=2 * GIB) as engine:
        await load(engine)
        config = settings_file(tmp_path, **alone(engine, "small:1b"))
        ended = await doctor("--config", str(config))

    assert ended.returncode == 1, ended.stdout
    assert "1.0 GiB of 2.0 GiB are on the CPU" in ended.stdout
    assert ended.stdout.index("PROBLEM  on-gpu") < ended.stdout.index("ok ")
    assert max(map(len, ended.stdout.splitlines())) <= 80
    assert ended.stderr == ""


async def test_a_model_on_the_cpu_of_a_machine_without_a_card_is_no_problem(
    tmp_path: Path,
) -> None:
    async with FakeEngine("ollama", ["small:1b"], on_gpu=0.0) as engine:
        await load(engine)
        config = settings_file(tmp_path, **alone(engine, "small:1b"))
        cpu = await first_findings(
            config, isolated(tmp_path), driver=NO_DRIVER, nvidia_devices=0, driver_loaded=False
        )
        gpu = await first_findings(config, isolated(tmp_path), **two_cards())

    assert (cpu["on-gpu"].level, gpu["on-gpu"].level) == (Level.NOTE, Level.PROBLEM)


@contextmanager
def ollama_process(folder: Path, name: str, **environment: str) -> Iterator[tuple[int, str]]:
    """A fake Ollama in another process, whose program has this name; its pid and URL."""
    program = folder / name
    program.symlink_to(sys.executable)
    with subprocess.Popen(
        [program, "-m", "backends.fake", "--kind", "ollama", "--model", "small:1b"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process.pid, process.stdout.readline().split()[2]
        finally:
            process.terminate()


async def test_slots_and_context_are_read_from_the_process_of_the_engine(tmp_path: Path) -> None:
    variables = {"OLLAMA_NUM_PARALLEL": "4", "OLLAMA_CONTEXT_LENGTH": "1536"}
    with ollama_process(tmp_path, "ollama", **variables) as (pid, url):
        config = settings_file(
            tmp_path,
            engines={"ollama": {"urls": [url]}},
            models={"m": {"lanes": {"ollama": {"model": "small:1b", "slots": 16}}}},
        )
        observed = await collect(config, sources=isolated(tmp_path))
        findings = await first_findings(config, isolated(tmp_path))

    assert isinstance(observed.engines, tuple)
    process = observed.engines[0].process
    assert isinstance(process, Process)
    assert process.pid == pid
    assert findings["slots"].level is Level.WARNING
    assert (
        "sends up to 16 concurrent requests, but the engine answers 4 (OLLAMA_NUM_PARALLEL)"
        in findings["slots"].saw
    )
    assert "`slots: 4`" in findings["slots"].do
    assert isinstance(process.environment, dict)
    assert process.environment["OLLAMA_CONTEXT_LENGTH"] == "1536"


async def test_the_variables_of_a_program_that_is_not_the_engine_are_not_used(
    tmp_path: Path,
) -> None:
    with ollama_process(tmp_path, "ssh", OLLAMA_NUM_PARALLEL="16") as (pid, url):
        config = settings_file(tmp_path, engines={"ollama": {"urls": [url]}})
        findings = await first_findings(config, isolated(tmp_path))

    assert findings["slots"].level is Level.UNKNOWN
    assert f"ssh (process {pid})" in findings["slots"].saw


async def test_engines_are_discovered_without_settings(tmp_path: Path) -> None:
    async with FakeEngine("ollama", ["small:1b"]) as engine:
        ports: discovery.Ports = {"ollama": (engine.port,)}
        findings = await first_findings(None, replace(isolated(tmp_path), ports=ports))

    assert findings["engine"].level is Level.OK
    assert findings["engine"].about == f"ollama at 127.0.0.1:{engine.port}"


async def test_an_unknown_host_name_of_an_engine_is_a_warning(tmp_path: Path) -> None:
    name = "x" * 64  # too long for a host name: no name server is asked
    config = settings_file(tmp_path, engines={"vllm": {"urls": [f"http://{name}:8000"]}})
    findings = await first_findings(config, isolated(tmp_path))

    assert findings["engine"].level is Level.WARNING
    assert f"{name} is neither an address nor a known host name" in findings["engine"].saw
    assert findings["published"].level is Level.UNKNOWN
    assert "itself failed" not in findings["published"].saw


async def test_an_engine_of_another_kind_is_a_problem_and_a_silent_one_a_warning(
    tmp_path: Path,
) -> None:
    async with FakeEngine("ollama", ["small:1b"]) as other, FakeEngine("vllm", ["A"]) as silent:
        silent.down()
        config = settings_file(
            tmp_path, engines={"vllm": {"urls": [other.url]}, "ollama": {"urls": [silent.url]}}
        )
        observed = await collect(config, sources=isolated(tmp_path))

    findings = {f.about.partition(" ")[0]: f for f in findings_of("engine", observed)}
    assert findings["vllm"].level is Level.PROBLEM
    assert findings["vllm"].saw == "ollama answers at this address"
    assert findings["ollama"].level is Level.WARNING
    assert {f.level for f in findings_of("version", observed)} == {Level.UNKNOWN}


async def test_a_port_in_use_is_a_problem_that_names_the_process(tmp_path: Path) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as other:
        config = settings_file(tmp_path, port=other.sockets[0].getsockname()[1])
        findings = await first_findings(config, isolated(tmp_path))

    assert findings["port"].level is Level.PROBLEM
    assert f"(process {os.getpid()})" in findings["port"].saw


async def test_a_port_on_which_a_gateway_serves_is_ok(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    async with (
        FakeEngine("vllm", ["Small-1B"]) as engine,
        start_gateway(**alone(engine)) as running,
    ):
        config = settings_file(tmp_path, port=int(running.url.rpartition(":")[2]))
        findings = await first_findings(config, isolated(tmp_path))

    assert findings["port"].level is Level.OK
    assert "a twolane gateway serves" in findings["port"].saw


async def test_a_lease_that_another_process_has_is_a_problem_and_stays_with_it(
    tmp_path: Path,
) -> None:
    lease = Lease(tmp_path / "gpu.lease")
    lease.acquire("127.0.0.1:9999")
    fields = exclusive().model_dump(mode="json", include={"engines", "models"})
    config = settings_file(tmp_path, **fields, gpu={"lease": str(lease.path)})
    held = await first_findings(config, isolated(tmp_path))
    lease.release()
    free = await first_findings(config, isolated(tmp_path))

    assert held["lease"].level is Level.PROBLEM
    assert f"process {os.getpid()}, at 127.0.0.1:9999" in held["lease"].saw
    assert free["lease"].level is Level.OK


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (
            {"ServerVersion": "28.2", "Runtimes": {"runc": {}, "nvidia": {}}, "DockerRootDir": "/"},
            Docker("28.2", ("runc", "nvidia"), (), "/"),
        ),
        (
            {"ServerVersion": "29.0", "Runtimes": None, "CDISpecDirs": ["FOLDER"],
             "DiscoveredDevices": [{"ID": "nvidia.com/gpu=0"}], "DockerRootDir": "/"},
            Docker("29.0", (), ("nvidia.com/gpu=0", "nvidia.com/gpu"), "/"),
        ),
    ],
)  # fmt: skip
async def test_docker_info_is_read(tmp_path: Path, info: dict[str, Any], expected: Docker) -> None:
    (tmp_path / "nvidia.yaml").write_text("cdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices: []\n")
    docker = tmp_path / "docker"
    answer = json.dumps(info).replace("FOLDER", str(tmp_path))
    docker.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\n")
    docker.chmod(0o755)
    observed = await collect(None, sources=replace(isolated(tmp_path), docker=str(docker)))

    assert observed.docker == expected


async def test_the_error_of_docker_info_is_the_reason_of_an_unknown(tmp_path: Path) -> None:
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\necho '{}'\necho 'Cannot connect to the daemon' >&2\nexit 1\n")
    docker.chmod(0o755)
    sources = replace(isolated(tmp_path), docker=str(docker))
    findings = await first_findings(None, sources, **two_cards())

    assert findings["docker"].level is Level.UNKNOWN
    assert "Cannot connect to the daemon" in findings["docker"].saw


@pytest.mark.parametrize(
    ("vendor", "kind", "cards"),
    [("0x10de", "0x030000", 1), ("0x10de", "0x040300", 0), ("0x1002", "0x030000", 0)],
)
async def test_nvidia_devices_on_the_bus_are_counted(
    tmp_path: Path, vendor: str, kind: str, cards: int
) -> None:
    device = tmp_path / "bus/pci/devices/0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")

    assert (await collect(None, sources=isolated(tmp_path))).nvidia_devices == cards


async def test_the_report_of_the_driver_is_checked(tmp_path: Path) -> None:
    observed = await collect(None, nvml=Nvml(library=two_4090()), sources=isolated(tmp_path))
    findings = {finding.check: finding for finding in run_checks(observed)}

    assert findings["driver"].saw.startswith("driver 570.86.10, CUDA up to 12.8: NVIDIA GeForce")
    assert findings["p2p"].level is Level.NOTE
    assert findings["power"].level is Level.NOTE


async def test_memory_and_disks_of_this_machine_are_read_from_the_kernel(tmp_path: Path) -> None:
    observed = await collect(None, sources=isolated(tmp_path))

    assert isinstance(observed.ram, Ram)
    assert observed.ram.total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert isinstance(observed.own_process, Process)
    assert observed.own_process.pid == os.getpid()
    assert isinstance(observed.disks, tuple)
    assert all(disk.free > 0 for disk in observed.disks)


# The command


KEYS = ["check", "about", "level", "saw", "why", "do"]


async def test_this_machine_is_checked_without_a_traceback() -> None:
    command = [sys.executable, "-m", "gateway", "doctor"]
    ended = await anyio.run_process(command, check=False, env={**os.environ, "COLUMNS": "80"})
    as_json = await doctor("--json")

    report = json.loads(as_json.stdout)
    assert ended.returncode == as_json.returncode == (report["problems"] > 0)
    assert ended.stderr == b""
    assert as_json.stderr == ""
    text = ended.stdout.decode()
    for output in (text, as_json.stdout):
        assert "the check itself failed" not in output
        assert "the collector itself failed" not in output
    assert max(map(len, text.splitlines())) <= 80
    assert {finding["check"] for finding in report["findings"]} == {check.name for check in CHECKS}


async def test_the_json_has_the_fields_that_the_help_documents() -> None:
    report = json.loads((await doctor("--json")).stdout)
    guide = (await doctor("--help")).stdout

    assert list(report) == ["version", "at", "problems", "findings"]
    assert report["version"] == 1
    assert abs(datetime.fromisoformat(report["at"]).timestamp() - time.time()) < DAY_S
    assert all(list(finding) == KEYS for finding in report["findings"])
    assert {finding["level"] for finding in report["findings"]} <= set(Level)
    for word in [*KEYS, *report, *Level, "exit code", "--config FILE"]:
        assert word in guide, word


def test_the_json_counts_problems() -> None:
    findings = [Finding("a", "", level, "s", "w", "d") for level in Level]

    assert json.loads(as_json(findings, NOW))["problems"] == 1


async def test_unusable_settings_are_a_problem_and_all_else_is_still_checked(
    tmp_path: Path,
) -> None:
    as_text = await doctor("--config", str(settings_file(tmp_path, prot=1)))
    as_json = await doctor("--json", "--config", str(tmp_path / "none.yaml"))

    assert as_text.returncode == as_json.returncode == 1
    assert "PROBLEM  settings" in as_text.stdout
    assert as_text.stdout.count("did you mean port?") == 1
    assert as_text.stderr == as_json.stderr == ""
    findings = {finding["check"]: finding for finding in json.loads(as_json.stdout)["findings"]}
    assert "none.yaml cannot be read" in findings["settings"]["saw"]
    assert findings["slots"]["level"] == "unknown"
    assert findings["disk"]["level"] != "unknown"


async def test_a_misspelt_variable_is_a_problem_too() -> None:
    ended = await doctor(TWOLANE_PROT="1")

    assert ended.returncode == 1
    assert "did you mean TWOLANE_PORT?" in ended.stdout


async def test_a_public_address_without_a_key_is_a_problem(tmp_path: Path) -> None:
    config = settings_file(tmp_path, host="0.0.0.0")  # noqa: S104 - nothing listens
    ended = await doctor("--config", str(config))

    assert ended.returncode == 1
    assert "PROBLEM  exposure" in ended.stdout


async def test_an_unknown_option_exits_with_2() -> None:
    assert (await doctor("--jsno")).returncode == 2
