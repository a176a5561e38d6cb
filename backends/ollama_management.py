"""Ollama's management API, spoken by the `ollama` package: list, show, load, unload.

The package is imported at its first use, never with this module: see `library`.
"""

from __future__ import annotations

import functools
import os
import ssl
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from backends.errors import Broken, NoAnswer, Refused, ServerError, Unreachable
from backends.reports import Loaded
from backends.transport import tls

if TYPE_CHECKING:
    from ollama import AsyncClient

T = TypeVar("T")

#: Timeout of a question about models, seconds.
QUESTION_TIMEOUT_S = 5.0
#: Timeout of a load, seconds. It takes as long as the disk needs.
LOAD_TIMEOUT_S = 600.0
#: What the package reads from the environment while it is imported.
ENVIRONMENT = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE",
               "SSL_CERT_DIR", "OLLAMA_HOST")  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model on Ollama's disk. Empty: Ollama does not report it."""

    name: str
    digest: str
    quantization: str


@dataclass(frozen=True, slots=True)
class ModelFile:
    """What a model file states: its parameters, one a line, and what the model can do."""

    parameters: str
    capabilities: frozenset[str]


@functools.cache
def library() -> Any:
    """The `ollama` package, imported at the first call (0.2 s).

    The package makes a client as it is imported. That client reads the environment, and
    raises on a proxy, a certificate file or an OLLAMA_HOST that it does not understand.
    Engines are addressed by URL and without a proxy, so the import sees none of these.
    """
    with _hidden(ENVIRONMENT):
        import ollama  # noqa: PLC0415 - see above

    return ollama


@contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    """Take these variables out of the environment while the context is open."""
    hidden = {name: value for name, value in os.environ.items() if name.upper() in names}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


class Management:
    """The management API of one Ollama server.

    All methods raise `BackendError`.

    Args:
        url: Base URL of the server.
        label: What error texts call the server.
    """

    def __init__(self, url: str, label: str) -> None:
        self._url = url
        self._label = label
        self._clients: list[AsyncClient] = []

    @functools.cached_property
    def _questions(self) -> AsyncClient:
        return self._client(QUESTION_TIMEOUT_S)

    @functools.cached_property
    def _loads(self) -> AsyncClient:
        return self._client(LOAD_TIMEOUT_S)

    def _client(self, timeout_s: float) -> AsyncClient:
        # The bare context has no certificates, costs nothing, and is never used over http.
        https = self._url.startswith("https:")
        verify = tls.context() if https else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client: AsyncClient = library().AsyncClient(
            host=self._url, timeout=timeout_s, trust_env=False, verify=verify
        )
        self._clients.append(client)
        return client

    async def stored(self) -> list[StoredModel]:
        """The models on disk."""
        listed = await self._answer(self._questions.list())
        return [
            StoredModel(
                known.model,
                known.digest or "",
                (known.details.quantization_level if known.details else None) or "",
            )
            for known in listed.models
            if known.model
        ]

    async def loaded(self) -> list[Loaded]:
        """The models in memory, those included that load or are about to leave."""
        running = await self._answer(self._questions.ps())
        return [
            Loaded(known.model, known.size or 0, known.size_vram or 0, known.context_length)
            for known in running.models
            if known.model
        ]

    async def model_file(self, model: str) -> ModelFile:
        """What the model's file states."""
        shown = await self._answer(self._questions.show(model))
        return ModelFile(shown.parameters or "", frozenset(shown.capabilities or ()))

    async def load(self, model: str) -> None:
        """Load a model and keep it; a load ends if this call is cancelled."""
        await self._answer(self._loads.generate(model=model, keep_alive=-1))

    async def unload(self, model: str) -> None:
        """Let a model go. Ollama answers at once, and frees the memory later."""
        await self._answer(self._questions.generate(model=model, keep_alive=0))

    async def close(self) -> None:
        """Close the connections."""
        for client in self._clients:
            await client.close()  # type: ignore[no-untyped-call]  # ollama has no types there

    async def _answer(self, question: Awaitable[T]) -> T:
        """The answer of the package, its errors as `BackendError`."""
        import httpx  # noqa: PLC0415 - `ollama` imports it, at its first use

        try:
            return await question
        except library().ResponseError as exc:
            if 400 <= exc.status_code < 500:
                raise Refused(exc.error, status=exc.status_code) from exc
            raise ServerError(f"{self._label} answered {exc.status_code}: {exc.error}") from exc
        except (ConnectionError, httpx.ConnectTimeout) as exc:
            raise Unreachable(f"{self._label}: {str(exc) or 'no connection in time'}") from exc
        except httpx.TimeoutException as exc:
            raise NoAnswer(f"{self._label}: {str(exc) or 'no answer in time'}") from exc
        except (httpx.HTTPError, ValueError) as exc:
            raise Broken(f"{self._label}: {str(exc) or type(exc).__name__}") from exc
