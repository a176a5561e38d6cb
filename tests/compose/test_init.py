"""The folder that `twolane init` writes, in Docker: the image is made of the wheel beside it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests import compose
from tests.compose import Box
from tests.support import checkout
from tests.support.requirements import unavailable

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """The gateway of such a folder, without engines: they are those of the clone's compose.yaml."""
    if what := compose.missing():
        unavailable(what)
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("init")
    checkout.clone(source)
    wheel = checkout.build("wheel", source, tmp_path_factory.mktemp("dist"))
    init = [sys.executable, "-m", "gateway", "init", str(folder), "--wheel", str(wheel)]
    subprocess.run(init, check=True, capture_output=True)
    box = compose.box(folder)
    try:
        box.compose("up", "--detach", "--build", "--wait", "--no-deps", "gateway")
        yield box
    finally:
        box.compose("--profile", "*", "down", "--volumes", "--timeout", "40")


def test_the_gateway_of_the_wheel_is_up_and_waits_for_its_engines(box: Box) -> None:
    ready = box.get("/ready")

    assert ready["ready"] is False
    assert list(box.get("/status")["models"]) == ["smollm2"]


def test_its_key_is_asked_for(box: Box) -> None:
    with box.client(key="") as client:
        assert client.get("/status").status_code == 401


def test_its_commands_run_in_the_container(box: Box) -> None:
    version = box.inside("gateway", "twolane", "--version")
    status = box.inside("gateway", "twolane", "status", "--key", compose.KEY)
    fakes = box.inside("gateway", "python", "-c", "import backends.fake")

    assert version.stdout.startswith("twolane ")
    assert (status.returncode, "smollm2" in status.stdout) == (0, True), status.stderr
    assert "No module named 'backends.fake'" in fakes.stderr


def test_compose_reads_the_folder_without_the_tests_images(box: Box) -> None:
    command = ["docker", "compose", "--profile", "*", "config", "--services"]
    said = subprocess.run(command, cwd=box.folder, capture_output=True, text=True, check=False)

    assert {"gateway", "ollama", "vllm", "open-webui", "grafana"} <= set(said.stdout.split())
