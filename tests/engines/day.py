"""The mixed day on the real engines of the rig: `make day`.

Starts the real Ollama and the real vLLM on this machine's CPU and a gateway before
them, runs `loadtests.day` against each of the three, and stops them again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

from loadtests import day
from tests.engines import rig

START_S = 30.0


def main() -> int:
    """Run the day with the arguments of `loadtests.day`, the targets filled in."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left running
    with rig.ollama() as ollama, rig.vllm() as vllm:
        port = rig.free_port()
        environment = os.environ | {
            "TWOLANE_ENGINES__OLLAMA__URLS": json.dumps([ollama.url]),
            "TWOLANE_ENGINES__VLLM__URLS": json.dumps([vllm.url]),
            "TWOLANE_LOG": "off",
        }
        pair = f"smollm2=ollama:{ollama.model},vllm:{vllm.model}"
        gateway = subprocess.Popen(
            [sys.executable, "-m", "gateway", "serve", "--port", str(port), "--pair", pair],
            env=environment,
        )
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/ready")
            targets = [
                f"ollama={ollama.url}={ollama.model}",
                f"vllm={vllm.url}={vllm.model}",
                f"gateway=http://127.0.0.1:{port}=smollm2",
            ]
            flags = [part for target in targets for part in ("--target", target)]
            return day.main([*flags, *sys.argv[1:]])
        finally:
            gateway.terminate()
            gateway.wait(60)


def wait_until_ready(url: str) -> None:
    """Return when it answers 200; raises TimeoutError."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=2):  # noqa: S310 - our own gateway
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise TimeoutError(f"the gateway is not ready at {url}")


if __name__ == "__main__":
    sys.exit(main())
