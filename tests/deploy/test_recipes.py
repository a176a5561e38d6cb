"""What deploy/README.md tells: scripts that a shell takes, flags that come out right."""

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
#: What Slurm has, as far as the script asks: a node's turn after the other, and no cluster.
STUBS = {
    "scontrol": 'printf "%s\\n" ${SLURM_JOB_NODELIST//,/ }',
    "srun": 'shift; for SLURM_NODEID in $(seq 0 $((SLURM_NNODES - 1))); do export SLURM_NODEID; "$@"; done',  # noqa: E501
    "vllm": 'echo "vllm $*"; echo "key $VLLM_API_KEY" >&2',
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_one_that_bash_takes_and_shellcheck_praises(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    for check in (["bash", "-n"], [shellcheck]):
        done = subprocess.run([*check, script], capture_output=True, text=True, check=False)
        assert done.stdout + done.stderr == ""


def submitted(
    home: Path, nodes: tuple[str, ...], *arguments: str, key: str = "a-long-key"
) -> subprocess.CompletedProcess[str]:
    """The batch script, run where Slurm and vLLM are played."""
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


def started(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """Each vLLM's command line."""
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("vllm serve")]


def test_a_job_on_one_node_serves_with_all_its_cards(tmp_path: Path) -> None:
    done = submitted(tmp_path, NODES[:1], "some/model")
    [alone] = started(done)

    assert alone[:3] == ["vllm", "serve", "some/model"]
    assert option(alone, "--tensor-parallel-size") == "2"
    assert option(alone, "--port") == "8001"
    assert "--nnodes" not in alone
    assert "http://gpu-7:8001" in done.stdout


def test_a_job_on_two_nodes_serves_on_the_first_and_computes_on_the_other(tmp_path: Path) -> None:
    first, second = started(submitted(tmp_path, NODES, "some/model"))

    for number, one in enumerate((first, second)):
        assert option(one, "--pipeline-parallel-size") == "2"
        assert option(one, "--nnodes") == "2"
        assert option(one, "--node-rank") == str(number)
        assert option(one, "--master-addr") == "gpu-7"
    assert "--headless" not in first
    assert option(first, "--host") == "0.0.0.0"  # noqa: S104 - other nodes ask it
    assert "--headless" in second
    assert "--host" not in second


def test_the_key_is_in_no_command_line(tmp_path: Path) -> None:
    done = submitted(tmp_path, NODES, "some/model")

    assert "a-long-key" not in done.stdout
    assert done.stderr == "key a-long-key\n" * 2


def test_without_a_key_or_a_model_nothing_starts(tmp_path: Path) -> None:
    keyless, nothing = tmp_path / "keyless", tmp_path / "nothing"
    keyless.mkdir()
    nothing.mkdir()
    no_key = submitted(keyless, NODES[:1], "some/model", key="")
    no_model = submitted(nothing, NODES[:1])

    assert (no_key.returncode, no_key.stdout) == (2, "")
    assert "engines.vllm.api_key" in no_key.stderr
    assert "which model?" in no_model.stderr


def test_ray_takes_as_many_as_its_lane_gives() -> None:
    [application] = yaml.safe_load((DEPLOY / "ray" / "serve.yaml").read_text())["applications"]
    [model] = application["args"]["llm_configs"]
    deployment = model["deployment_config"]

    assert deployment["max_ongoing_requests"] == model["engine_kwargs"]["max_num_seqs"]
    slots = deployment["num_replicas"] * deployment["max_ongoing_requests"]
    assert f"slots: {slots}" in (DEPLOY / "README.md").read_text()
