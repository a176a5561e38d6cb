"""What the documents say is what the code does."""

from __future__ import annotations

import ast
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from backends.kinds import KINDS
from gateway import settings
from gateway.cli import main
from gateway.errors import GatewayError
from gateway.settings import Settings
from tests.support.requirements import unavailable

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "twolane.example.yaml"
#: What people read, the generated report left out.
DOCUMENTS = sorted(
    path
    for folder in (".", "docs", "deploy", "gateway", "backends", "loadtests")
    for path in ROOT.glob(f"{folder}/*.md" if folder in {".", "docs"} else f"{folder}/**/*.md")
)


def code(document: Path) -> str:
    """What a document shows as shell commands."""
    text = document.read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", text)
    return "\n".join([*blocks, *spans])


def fields(kind: Any) -> Iterator[str]:
    """The name of every setting, of every part."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, field in kind.model_fields.items():
            yield name
            yield from fields(field.annotation)
    for inner in get_args(kind):
        yield from fields(inner)


def test_the_example_file_is_a_configuration() -> None:
    read = settings.load(EXAMPLE, {}, {})

    assert list(read.models["chat"].lanes) == ["ollama", "vllm"]


def test_the_example_file_shows_the_defaults() -> None:
    read, default = settings.load(EXAMPLE, {}, {}), settings.load(None, {}, {})

    assert read.limits == default.limits
    assert read.embedded == default.embedded
    assert (read.metrics, read.cost) == (default.metrics, default.cost)
    assert (read.host, read.port, read.log) == (default.host, default.port, default.log)
    for kind, lane in read.models["chat"].lanes.items():
        assert lane.slots == KINDS[kind].slots


def test_the_example_file_names_every_setting() -> None:
    shown = EXAMPLE.read_text()

    assert {name for name in fields(Settings) if not re.search(rf"\b{name}:", shown)} == set()


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    there = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    targets = {
        target
        for document in DOCUMENTS
        for line in re.findall(
            r"^(?:[^#\n]*&& )?make ([a-z][a-z -]*)", code(document), re.MULTILINE
        )
        for target in line.split()
    }

    assert {"serve", "unit", "test", "engines", "test-engines", "bench", "docs"} <= targets
    assert targets - there == set()


def test_every_command_that_is_named_exists() -> None:
    named = {
        command
        for document in DOCUMENTS
        for command in re.findall(r"^(?:\S*/)?twolane ([a-z]+)\b", code(document), re.MULTILINE)
    }

    assert {"serve", "status", "plan", "doctor", "compare"} <= named
    for command in sorted(named):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0, command


def test_the_configuration_reference_is_the_settings() -> None:
    written = runpy.run_path(str(ROOT / "docs" / "configuration.py"))["page"]()

    assert (ROOT / "docs" / "configuration.md").read_text() == written


def test_every_error_code_is_explained() -> None:
    explained = (ROOT / "docs" / "http-api.md").read_text()
    codes = {(kind.status, kind.code) for kind in every_kind(GatewayError) if kind.code}
    rows = {
        (int(status), code)
        for status, code in re.findall(r"^\| (\d+) \| `(\w+)`", explained, re.MULTILINE)
    }

    assert codes == rows


def every_kind(kind: type[GatewayError]) -> Iterator[type[GatewayError]]:
    """All errors below this one."""
    for inner in kind.__subclasses__():
        yield inner
        yield from every_kind(inner)


def test_every_file_that_is_linked_exists() -> None:
    broken = [
        f"{document.relative_to(ROOT)}: {target}"
        for document in DOCUMENTS
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", document.read_text())
        if not (document.parent / target).exists()
    ]

    assert broken == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.integration
def test_the_workflows_are_valid() -> None:
    program = shutil.which("actionlint")
    if program is None:
        unavailable("no actionlint: go install github.com/rhysd/actionlint/cmd/actionlint@v1.7.12")
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    checked = subprocess.run(
        [program, "-shellcheck=", *workflows], capture_output=True, text=True, check=False
    )

    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["serve", "--help"], ["status", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0

    said = capsys.readouterr().out
    assert "--pair chat=ollama:llama3.1:70b,vllm:llama-70b-awq" in said
    assert "TWOLANE_LIMITS__MAX_WAIT_S" in said
    assert "--watch" in said


def test_every_message_that_is_explained_is_one_of_ours() -> None:
    ours = "\n".join(messages())
    explained = re.findall(
        r"^### `([^`]+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE
    )

    assert len(explained) > 15
    assert {phrase for phrase in explained if phrase not in ours} - DOCKERS == set()


#: What Docker itself says.
DOCKERS = {"secrets/api_keys: no such file"}


def messages() -> Iterator[str]:
    """Every text in the code, with a mark where a value is put in."""
    for package in ("backends", "gateway"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
                elif isinstance(node, ast.JoinedStr):
                    yield "".join(
                        str(part.value) if isinstance(part, ast.Constant) else "…"
                        for part in node.values
                    )
