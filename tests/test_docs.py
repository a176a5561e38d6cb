"""What the documents say is what the code does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from backends.kinds import KINDS
from gateway import settings
from gateway.cli import main
from gateway.settings import Settings

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "twolane.example.yaml"


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


@pytest.mark.parametrize("document", ["README.md", ".ci/run"])
def test_every_make_target_that_is_named_is_there(document: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = re.findall(r"\bmake ((?:[a-z-]+ ?)+)", (ROOT / document).read_text())
    targets = {target for line in named for target in line.split() if target != "are"}

    assert {"test", "engines", "test-engines"} <= targets
    assert {t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)} == set()


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["serve", "--help"], ["status", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0

    said = capsys.readouterr().out
    assert "--pair chat=ollama:llama3.1:70b,vllm:llama-70b-awq" in said
    assert "TWOLANE_LIMITS__MAX_WAIT_S" in said
    assert "--watch" in said
