"""The scripts and settings of deploy/README.md, run with stand-ins for Slurm and vLLM."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.units import DEPLOY, option

pytestmark = pytest.mark.integration  # programs of their own

SCRIPTS = sorted([*DEPLOY.rglob("*.sh"), *DEPLOY.rglob("*.sbatch")])
SBATCH = DEPLOY / "slurm" / "vllm.sbatch"
NODES = ("gpu-7", "gpu-8")
#: Stand-ins for the programs of Slurm and vLLM: they run the nodes one after the other.
STUBS = {
    "scontrol": 'printf "%s\\n" ${SLURM_JOB_NODELIST//,/ }',
    "srun": 'shift; for SLURM_NODEID in $(seq 0 $((SLURM_NNODES - 1))); do export SLURM_NODEID; "$@"; done',  # noqa: E501
    "vllm": 'echo "vllm $*"; echo "key $VLLM_API_KEY" >&2',
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_and_shellcheck_accept_every_script(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    for check in (["bash", "-n"], [shellcheck]):
        result = subprocess.run([*check, script], capture_output=True, text=True, check=False)
        assert result.stdout + result.stderr == ""


def submit(
    home: Path, nodes: tuple[str, ...], *arguments: str, key: str = "a-long-key"
) -> subprocess.CompletedProcess[str]:
    """Run the batch script with stand-ins for Slurm and vLLM."""
    programs = home / "bin"
    programs.mkdir()
    for name, body in STUBS.items():
        path = programs / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    if key:
        (home / ".config/twolane").mkdir(parents=True)
        (home / ".config/twolane/vllm.key").write_text(f"{key}\n")
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(home),
        "SLURM_JOB_NODELIST": ",".join(nodes),
        "SLURM_NNODES": str(len(nodes)),
        "SLURM_GPUS_ON_NODE": "2",
    }
    return subprocess.run(
        ["bash", SBATCH, *arguments],  # noqa: S607
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def vllm_commands(job: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """The command line of each vLLM that the job started."""
    assert job.returncode == 0, job.stderr
    return [shlex.split(line) for line in job.stdout.splitlines() if line.startswith("vllm serve")]


def test_a_job_on_one_node_uses_all_its_cards(tmp_path: Path) -> None:
    job = submit(tmp_path, NODES[:1], "some/model")
    [alone] = vllm_commands(job)

    assert alone[:3] == ["vllm", "serve", "some/model"]
    assert option(alone, "--tensor-parallel-size") == "2"
    assert option(alone, "--port") == "8001"
    assert "--nnodes" not in alone
    assert "http://gpu-7:8001" in job.stdout


def test_a_job_on_two_nodes_serves_on_the_first_and_computes_on_the_other(tmp_path: Path) -> None:
    first, second = vllm_commands(submit(tmp_path, NODES, "some/model"))

    for number, command in enumerate((first, second)):
        assert option(command, "--pipeline-parallel-size") == "2"
        assert option(command, "--nnodes") == "2"
        assert option(command, "--node-rank") == str(number)
        assert option(command, "--master-addr") == "gpu-7"
    assert "--headless" not in first
    assert option(first, "--host") == "0.0.0.0"  # noqa: S104 - for other nodes
    assert "--headless" in second
    assert "--host" not in second


def test_the_key_is_in_no_command_line(tmp_path: Path) -> None:
    job = submit(tmp_path, NODES, "some/model")

    assert "a-long-key" not in job.stdout
    assert job.stderr == "key a-long-key\n" * 2


def test_without_a_key_or_a_model_nothing_starts(tmp_path: Path) -> None:
    keyless, nothing = tmp_path / "keyless", tmp_path / "nothing"
    keyless.mkdir()
    nothing.mkdir()
    no_key = submit(keyless, NODES[:1], "some/model", key="")
    no_model = submit(nothing, NODES[:1])

    assert (no_key.returncode, no_key.stdout) == (2, "")
    assert "engines.vllm.api_key" in no_key.stderr
    assert "no model: run sbatch" in no_model.stderr


def test_the_slots_of_ray_in_the_readme_are_those_of_its_replicas() -> None:
    [application] = yaml.safe_load((DEPLOY / "ray" / "serve.yaml").read_text())["applications"]
    [model] = application["args"]["llm_configs"]
    deployment = model["deployment_config"]

    assert deployment["max_ongoing_requests"] == model["engine_kwargs"]["max_num_seqs"]
    slots = deployment["num_replicas"] * deployment["max_ongoing_requests"]
    assert f"slots: {slots}" in (DEPLOY / "README.md").read_text()
