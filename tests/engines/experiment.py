"""`twolane compare` and `twolane calibrate` on the rig's engines: `make compare`, `make calibrate`.

Writes the settings that an operator would write, engines' commands included, and hands
over to the command: what is measured here is what a user would have measured.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import yaml

from tests.engines import rig

CONFIG = rig.ENGINES / "twolane.yaml"


def configuration() -> dict[str, Any]:
    """Both engines on the CPU, side by side, with one model."""
    ports = {"ollama": rig.free_port(), "vllm": rig.free_port()}
    urls = {kind: f"http://127.0.0.1:{port}" for kind, port in ports.items()}
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
                "lanes": {
                    "ollama": {"model": rig.OLLAMA_MODEL, "slots": 1},
                    "vllm": {"model": rig.VLLM_MODEL, "slots": 32},
                }
            }
        },
    }


def _own(environment: dict[str, str]) -> dict[str, str]:
    """What is said besides what everybody has."""
    return {name: value for name, value in environment.items() if os.environ.get(name) != value}


def main() -> None:
    """Write the settings, and become the command."""
    missing = [part.name for part in rig.parts() if not part.is_complete()]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}; {rig.GET_ENGINES}")
    CONFIG.write_text(yaml.safe_dump(configuration()))
    command, *arguments = sys.argv[1:]
    said = [command, "--config", os.path.relpath(CONFIG), *arguments]
    if "--resume" in arguments:
        said = [command, *arguments]
    os.execv(sys.executable, [sys.executable, "-m", "gateway", *said])  # noqa: S606 - our own


if __name__ == "__main__":
    main()
