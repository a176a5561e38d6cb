"""The programs that people really use, pointed at a gateway under test."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import openai
from pydantic import SecretStr

from tests.support.plain_http import NO_TLS
from tests.support.requirements import unavailable

if TYPE_CHECKING:
    from langchain_openai import ChatOpenAI

HERE = Path(__file__).parent


@asynccontextmanager
async def sdk(
    url: str, *, max_retries: int = 0, api_key: str = "x"
) -> AsyncIterator[openai.AsyncOpenAI]:
    """The openai package for Python; it tries only once, unless told otherwise."""
    # A proxy of the contributor's is none of the tests' business.
    transport = openai.DefaultAsyncHttpxClient(trust_env=False, verify=NO_TLS)
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key=api_key, max_retries=max_retries, http_client=transport
    ) as client:
        yield client


def langchain(url: str) -> ChatOpenAI:
    """LangChain's chat model for `m`; it tries only once."""
    from langchain_openai import ChatOpenAI  # noqa: PLC0415 - 2 s that one test needs

    return ChatOpenAI(model="m", base_url=f"{url}/v1", api_key=SecretStr("x"), max_retries=0)


async def node(url: str, request: dict[str, Any], **options: Any) -> dict[str, Any]:
    """What `chat.mjs` saw of one chat."""
    needs_node()
    asked = {"baseURL": f"{url}/v1", "maxRetries": 0, **options, "request": request}
    ran = await anyio.run_process(["node", str(HERE / "chat.mjs"), json.dumps(asked)])
    seen: dict[str, Any] = json.loads(ran.stdout)
    return seen


def needs_node() -> None:
    """Skip the test where Node or the package is missing; fail it in CI."""
    if missing := _missing():
        unavailable(missing)


def _missing() -> str:
    if shutil.which("node") is None:
        return "no Node here: install it, then run `make test`"
    if not (HERE / "node_modules" / "openai").is_dir():
        return "openai for Node is not installed: `make test` does it (npm ci in tests/clients)"
    return ""
