"""The real engines accept the flags and variables that `twolane plan` prints."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from gateway.serving import discovery
from gateway.sizing.cards import Cards
from gateway.sizing.figures import LanePlan, Requirements
from gateway.sizing.files import read_weights
from gateway.sizing.fit import make_plan
from gateway.sizing.known import weights_by_name
from gateway.sizing.shapes import PlannedEngine
from tests.engines import rig
from tests.support.requirements import unavailable

#: vLLM's own parser of its command line; nothing is loaded.
PARSE = """
import sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
args = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
print(args.tensor_parallel_size, args.kv_cache_dtype, args.max_model_len, args.enable_sleep_mode)
"""
MEASURE = """
import sys
from gguf import GGUFReader
print(*(sum(int(n) for n in of) for of in zip(*(
    (t.n_bytes, t.n_elements) for t in GGUFReader(sys.argv[1]).tensors))))
"""


def lane(engine: PlannedEngine, name: str) -> LanePlan:
    ollama, vllm = weights_by_name(name, "ollama"), weights_by_name(name, "vllm")
    return make_plan(ollama, vllm, Cards(2, 23.5, "2x24"), Requirements()).lanes[engine]


def require(available: object, what: str) -> None:
    if not available:
        unavailable(what)


def vllm_python(code: str, *arguments: str) -> str:
    require(rig.VLLM_PYTHON.exists(), "no vLLM: make engines")
    done = subprocess.run(
        [rig.VLLM_PYTHON, "-c", code, *arguments],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.timeout(300)
def test_vllm_accepts_every_flag() -> None:
    assert vllm_python(PARSE, *lane("vllm", "llama-3.3-70b").arguments) == "2 fp8 8192 True"


def test_ollama_knows_every_variable() -> None:
    require(shutil.which("ollama"), rig.GET_OLLAMA)
    help_text = subprocess.run(
        ["ollama", "serve", "--help"],  # noqa: S607 - found on PATH
        capture_output=True, text=True, check=True, timeout=30,
    ).stdout  # fmt: skip

    for model in ("llama-3.3-70b", "llama-3.1-8b"):  # exclusive, and shared
        unknown = {name for name in lane("ollama", model).environment if name not in help_text}

        assert unknown == set()


@pytest.mark.timeout(120)
def test_a_gguf_is_read_as_the_package_gguf_reads_it() -> None:
    path = discovery.packaged_model()
    require(path, "no extra `embedded`")
    read = read_weights(Path(str(path)))

    assert vllm_python(MEASURE, str(path)) == f"{read.total} {read.parameters}"
