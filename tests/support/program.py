"""The gateway as a program of its own: `twolane serve` in another process."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any


@asynccontextmanager
async def gateway_program(
    folder: Path, settings: Mapping[str, Any], **variables: str
) -> AsyncIterator[str]:
    """The URL of a gateway with these settings; its process works in `folder`.

    `variables` are environment variables besides our own.
    """
    config = folder / "twolane.yaml"
    config.write_text(json.dumps({"port": 0, **settings}))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "serve", "--config", str(config),
        stdout=asyncio.subprocess.PIPE, cwd=folder, env={**os.environ, **variables},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        async with asyncio.timeout(20):
            while not (found := re.search(rb"serves at (\S+)", await process.stdout.readline())):
                assert not process.stdout.at_eof(), "it ended"
        yield found[1].decode()
    finally:
        process.terminate()
        await process.communicate()
