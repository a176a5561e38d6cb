"""What every engine offers the gateway.

An engine is a server that generates. The kinds differ in names, endpoints and behaviour, and
those differences end in this package. What leaves it is a `StreamedAnswer` or `WholeAnswer`
in OpenAI's shape, or one of the errors of `backends.errors`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, NoReturn, TypeVar

import msgspec

from backends.calls import Body, BridgedRequest, Call, StreamedAnswer, WholeAnswer, decode_answer
from backends.error_body import ErrorBody, read_error_body
from backends.errors import (
    BackendError,
    Broken,
    Busy,
    NoAnswer,
    Refused,
    ServerError,
    Unreachable,
    Unsupported,
)
from backends.reports import (
    Activity,
    Capabilities,
    Identity,
    ListedModel,
    Loaded,
    ModelListing,
    Readiness,
    VersionBody,
)
from backends.transport import http, sse
from backends.transport.origin import Origin

T = TypeVar("T")

#: The largest answer that is not streamed, bytes. Embeddings of a long batch reach a few MB.
MAX_ANSWER = 64 * 1024 * 1024
#: The largest error body worth reading, bytes.
MAX_ERROR = 256 * 1024


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long an engine may take, seconds."""

    connect_s: float = 5.0
    first_token_s: float = 300.0
    idle_s: float = 60.0
    answer_s: float = 600.0


class Engine(ABC):
    """One server of one kind at one base URL.

    The exchange of request and answer is the same for all kinds, and is here. A subclass
    has what its kind does differently.
    """

    #: Its name in settings, paths and headers.
    kind: ClassVar[str]
    #: What only this kind answers with 200 and a JSON object, on any port …
    sign_path: ClassVar[str]
    #: … and a field of that object; empty: any object will do.
    sign_field: ClassVar[str] = "version"
    #: Whether a connection may carry another request after a streamed answer.
    reuse_after_stream: ClassVar[bool] = True
    #: Whether a request loads its model, so that a model that is not in memory counts as ready.
    loads_when_asked: ClassVar[bool] = False
    #: Whether the context is fixed when the server starts; otherwise model or request set it.
    fixed_context: ClassVar[bool] = True

    def __init__(
        self,
        url: str,
        client: http.Client,
        *,
        api_key: str | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeouts = timeouts or Timeouts()
        self._client = client
        self._origin = Origin.of(self.url)
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"

    @staticmethod
    def full_name(model: str) -> str:
        """A model's name as the engine lists it, where settings may write it shorter."""
        return model

    # What it reports

    async def is_own_kind(self, *, timeout_s: float = 5.0) -> bool:
        """Whether a server of this kind answers at the URL. Never raises."""
        try:
            body = msgspec.json.decode(await self.get(self.sign_path, timeout_s=timeout_s))
        except (BackendError, msgspec.DecodeError):
            return False
        return isinstance(body, dict) and (not self.sign_field or self.sign_field in body)

    async def version(self) -> str:
        """The version that the server reports, empty if none; raises `BackendError`."""
        return (await self.get_json(self.sign_path, VersionBody)).version

    @abstractmethod
    async def models(self) -> list[str]:
        """The models that it can serve, by the engine's own names; raises `BackendError`."""

    @abstractmethod
    async def ready(self, model: str) -> Readiness:
        """Whether a request for this model would be answered now. Never raises."""

    @abstractmethod
    async def capabilities(self, model: str) -> Capabilities:
        """What this model can take here; raises `BackendError`."""

    @abstractmethod
    async def identity(self, model: str) -> Identity:
        """What serves this model here; raises `BackendError`."""

    @abstractmethod
    async def load(self, model: str) -> None:
        """Return when the engine lists the model in memory; raises `BackendError`.

        Bound it with `asyncio.timeout`: it takes as long as disk and engine need. Cancelling
        it leaves no connection behind. Ollama then ends the load; vLLM wakes all the same.
        """

    @abstractmethod
    async def unload(self, model: str) -> None:
        """Return when the engine lists the model in memory no more; raises `BackendError`.

        Bound it with `asyncio.timeout`: it waits for running requests. When it is cancelled,
        the engine may unload all the same. The memory itself may be free a little later.
        """

    async def resident(self) -> list[str]:
        """The models in memory; raises `BackendError`.

        A model that is loading is among them, and one that is leaving until it has left.
        """
        return await self.models()  # an engine that serves one model has it in memory

    async def loaded(self) -> list[Loaded]:
        """The models in memory, and where in it they are.

        Raises:
            BackendError: `Unsupported` where this kind does not report it.
        """
        raise Unsupported(f"{self} does not report where its models are")

    async def contexts(self, models: Iterable[str]) -> dict[str, int | None]:
        """Tokens of context by model, as the server or the model file sets them.

        The answer may hold more models than asked for. None: neither sets it.

        Raises:
            BackendError: `Unsupported` where this kind does not report it.
        """
        raise Unsupported(f"{self} does not report the context of its models")

    async def on_gpu(self, model: str) -> float | None:
        """The part of the model that is in GPU memory, 0.0 to 1.0.

        None: it is not loaded, or this kind does not report it.

        Raises:
            BackendError: The server did not answer.
        """
        return None

    async def sleeps(self) -> bool:
        """Whether it can free GPU memory by sleeping; raises `BackendError`."""
        return False

    async def asleep(self) -> bool:
        """Whether it sleeps now; raises `BackendError`."""
        return False

    async def release_obstacle(self) -> str:
        """How to start it so that it can free its GPU memory; empty where it can.

        Raises:
            BackendError: The server did not answer.
        """
        return ""

    @abstractmethod
    async def activity(self, model: str) -> Activity:
        """What runs and waits inside the engine; raises `BackendError`."""

    async def close(self) -> None:
        """Close the engine's own connections; those of the shared client stay."""
        return

    # One exchange

    @abstractmethod
    def bridge(self, call: Call, model: str) -> BridgedRequest:
        """The request in this engine's words, under its own name of the model."""

    async def open_stream(self, call: Call, model: str) -> StreamedAnswer:
        """Send a request to be streamed, and return once its first event is there.

        That event is read before anything is handed out: some errors come inside a 200.

        Raises:
            BackendError: Any but `BrokeOff`.
        """
        bridged = self.bridge(call, model)
        response = await self._post(call.path, bridged.body, self.timeouts.first_token_s)
        try:
            if response.status != 200:
                await self._raise_for_status(response)
            if not response.header("content-type").startswith("text/event-stream"):
                body = await self._read_all(response, MAX_ERROR)
                self._raise_error_body(200, response, body)
            answer = StreamedAnswer(
                response,
                sse.StreamFilter(usage=call.wants_usage),
                bridged.dropped,
                self.reuse_after_stream,
            )
            await self._read_first_event(answer)
            response.set_idle_timeout(self.timeouts.idle_s)
        except BaseException:
            response.close(reuse=False)
            raise
        return answer

    async def fetch_answer(self, call: Call, model: str) -> WholeAnswer:
        """Send a request and return its whole answer.

        Raises:
            BackendError: Any but `BrokeOff`.
        """
        bridged = self.bridge(call, model)
        response = await self._post(call.path, bridged.body, self.timeouts.answer_s)
        body = await self._read_and_close(response)
        try:
            answer = decode_answer(body)
        except (msgspec.DecodeError, RecursionError) as exc:
            raise Broken(f"{self} answered with JSON that is not valid: {exc}") from exc
        if sse.truthy(answer.error):
            self._raise_error_body(200, response, body)
        if b'"reasoning' in body:
            body = sse.both_reasoning_names(body, "message")
        return WholeAnswer(body, answer.usage, answer.finish, bridged.dropped)

    async def _post(self, path: str, body: Body, timeout_s: float) -> http.Response:
        return await self._send("POST", path, msgspec.json.encode(body), timeout_s)

    async def _send(self, method: str, path: str, body: bytes, timeout_s: float) -> http.Response:
        with self._translated():
            return await self._client.request(
                self._origin,
                method,
                path,
                self._headers,
                body,
                connect_s=self.timeouts.connect_s,
                head_s=timeout_s,
            )

    async def _read_all(self, response: http.Response, limit: int) -> bytes:
        with self._translated():
            return await response.read_all(limit)

    async def _read_and_close(self, response: http.Response) -> bytes:
        """The body of a 200; raises `BackendError` for any other status."""
        try:
            if response.status != 200:
                await self._raise_for_status(response)
            body = await self._read_all(response, MAX_ANSWER)
        except BaseException:
            response.close(reuse=False)
            raise
        response.close(reuse=True)
        return body

    async def _read_first_event(self, answer: StreamedAnswer) -> None:
        passed = answer.filter
        while not answer.pending:
            with self._translated():
                raw = await answer.response.read()
            answer.pending = passed.feed(raw)
            if answer.pending:
                return
            if passed.error_event:
                self._raise_error_body(200, answer.response, passed.error_event)
            if passed.error is not None:
                raise Broken(f"{self}: {passed.error}")
            if not raw:
                raise Broken(f"{self} ended the stream before its first event")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise the client's errors as `BackendError`."""
        try:
            yield
        except http.ConnectFailed as exc:
            raise Unreachable(f"{self}: {exc}") from exc
        except http.TimedOut as exc:
            raise NoAnswer(f"{self}: {exc}") from exc
        except http.HttpError as exc:
            raise Broken(f"{self}: {exc}") from exc

    async def _raise_for_status(self, response: http.Response) -> NoReturn:
        body = await self._read_all(response, MAX_ERROR)
        self._raise_error_body(response.status, response, body)

    def _raise_error_body(self, status: int, response: http.Response, body: bytes) -> NoReturn:
        """Raise what an error answer means; an error inside a 200 names its status itself."""
        error = read_error_body(body)
        if status == 200:
            status = error.status if error.status and 400 <= error.status < 600 else 500
        text = f"{self} answered {status}: {error.message}"
        retry_after = response.header("retry-after")
        after = float(retry_after) if retry_after.isdecimal() else None
        if status == 429 or (status == 503 and (after is not None or self.is_busy(error))):
            raise Busy(text, retry_after=after)
        if status == 501:  # llama.cpp's answer to what it was not started for
            status = 400
        if status < 400 or status in (401, 403):  # a matter between gateway and engine
            raise Broken(text)
        if status >= 500:
            raise ServerError(text, status=status)
        raise Refused(
            error.message, status=status, type=error.type, param=error.param, code=error.code
        )

    def is_busy(self, error: ErrorBody) -> bool:
        """Whether a 503 means too much work and not a fault."""
        words = error.message.lower()
        return any(word in words for word in ("busy", "queue", "overload", "too many", "capacity"))

    # Control requests

    async def get(self, path: str, *, timeout_s: float = 5.0) -> bytes:
        """The body that a GET returns; raises `BackendError`."""
        return await self._read_and_close(await self._send("GET", path, b"", timeout_s))

    async def post(self, path: str, body: object = None, *, timeout_s: float = 5.0) -> bytes:
        """The body that a POST of this JSON returns; raises `BackendError`."""
        encoded = b"" if body is None else msgspec.json.encode(body)
        return await self._read_and_close(await self._send("POST", path, encoded, timeout_s))

    async def get_json(self, path: str, kind: type[T]) -> T:
        """What a GET returns, as JSON of this type; raises `BackendError`."""
        body = await self.get(path)
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.DecodeError as exc:
            raise Broken(f"{self} answered {path} with something unexpected: {exc}") from exc

    async def listed_models(self) -> list[ListedModel]:
        """What `GET /v1/models` lists, which all kinds have; raises `BackendError`."""
        return (await self.get_json("/v1/models", ModelListing)).data or []
