"""`twolane compare` and `twolane calibrate` on the rig's engines: `make compare`, `make calibrate`.

Writes the settings that an operator would write, engines' commands included, and runs the
command, so the result is what a user would measure. The gateway of a later comparison
decides by the calibrated profile.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from tests.engines import rig

CONFIG = rig.ENGINES / "twolane.yaml"
PROFILE = rig.ENGINES / "profile.json"


def configuration(ports: Mapping[str, int], profile: Path | None = None) -> dict[str, Any]:
    """Both engines on the CPU, side by side, with one model."""
    urls = {kind: f"http://127.0.0.1:{port}" for kind, port in ports.items()}
    measured = {"profile": os.path.relpath(profile)} if profile else {}
    return {
        "engines": {
            "ollama": {
                "urls": [urls["ollama"]],
                "command": ["ollama", "serve"],
                "environment": _own(rig.ollama_environment(urls["ollama"], None)),
                "log": str(rig.LOGS / "ollama.log"),
            },
            "vllm": {
                "urls": [urls["vllm"]],
                "command": rig.vllm_command(ports["vllm"]),
                "environment": _own(rig.vllm_environment()),
                "log": str(rig.LOGS / "vllm.log"),
            },
        },
        "models": {
            "smollm2": {
                **measured,
                "lanes": {
                    "ollama": {"model": rig.OLLAMA_MODEL, "slots": 1},
                    "vllm": {"model": rig.VLLM_MODEL, "slots": 32},
                },
            }
        },
    }


def _own(environment: dict[str, str]) -> dict[str, str]:
    """The variables that differ from our own environment."""
    return {name: value for name, value in environment.items() if os.environ.get(name) != value}


def ports() -> dict[str, int]:
    """The ports of the last run: a profile names the measured command lines, ports included."""
    if not CONFIG.exists():
        return {kind: rig.free_port() for kind in ("ollama", "vllm")}
    engines = yaml.safe_load(CONFIG.read_text())["engines"]
    return {kind: urlsplit(its["urls"][0]).port for kind, its in engines.items()}


def main() -> None:
    """Write the settings, and run the command in place of this process."""
    missing = [part.name for part in rig.parts() if not part.is_complete()]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}; {rig.GET_ENGINES}")
    command, *arguments = sys.argv[1:]
    known = PROFILE if PROFILE.exists() else None
    CONFIG.write_text(yaml.safe_dump(configuration(ports(), known)))
    if command == "calibrate" and "--out" not in arguments:
        arguments += ["--out", os.path.relpath(PROFILE)]
    words = [command, "--config", os.path.relpath(CONFIG), *arguments]
    if "--resume" in arguments:
        words = [command, *arguments]
    os.execv(sys.executable, [sys.executable, "-m", "gateway", *words])  # noqa: S606 - our own


if __name__ == "__main__":
    main()
