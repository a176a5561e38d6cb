"""What deploy/ starts vLLM with, as the real vLLM's own command line reads it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.test_recipes import NODES, submit, vllm_commands
from tests.deploy.test_systemd import SUPERVISING, VLLM
from tests.engines import rig
from tests.support.units import DEPLOY, command, environment

READ = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
read = [vars(parser.parse_args(arguments)) for arguments in json.load(sys.stdin)]
json.dump(read, sys.stdout, default=str)
"""


def parsed(*commands: list[str]) -> list[dict[str, Any]]:
    """What vLLM makes of `vllm serve` and its arguments; one that it does not know fails."""
    if not rig.VLLM_PYTHON.exists():
        pytest.skip(rig.GET_ENGINES)
    done = subprocess.run(
        [rig.VLLM_PYTHON, "-c", READ],
        input=json.dumps([arguments[2:] for arguments in commands]),
        env=rig.vllm_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    read: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return read


@pytest.mark.timeout(120)
def test_vllm_knows_every_argument_that_we_start_it_with(tmp_path: Path) -> None:
    chart = yaml.safe_load((DEPLOY / "kubernetes" / "vllm.values.yaml").read_text())
    [spec] = chart["servingEngineSpec"]["modelSpec"]
    supervised = json.loads(environment(SUPERVISING)["TWOLANE_ENGINES__VLLM__COMMAND"])
    nodes = vllm_commands(submit(tmp_path, NODES, "some/model"))

    alone, kept, charted, first, second = parsed(
        command(VLLM),
        supervised,
        ["vllm", "serve", spec["modelURL"], *spec["vllmConfig"]["extraArgs"]],
        *nodes,
    )

    assert (alone["tensor_parallel_size"], alone["kv_cache_dtype"]) == (2, "fp8")
    assert (alone["host"], alone["enable_sleep_mode"]) == ("127.0.0.1", True)
    assert not kept["enable_sleep_mode"]
    assert charted["served_model_name"] == ["qwen2.5-32b"]
    assert (first["node_rank"], first["headless"]) == (0, False)
    assert (second["node_rank"], second["headless"]) == (1, True)
    assert first["nnodes"] * first["tensor_parallel_size"] == 4
