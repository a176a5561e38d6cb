"""What every engine offers the gateway, and how it can fail.

An engine is a server that generates. Three kinds differ in names, endpoints and
habits; those differences end in this package. What leaves it is an `Answer` in
OpenAI's shape or one of the errors of `backends.errors`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NoReturn, TypeVar

import msgspec

from backends.calls import Answer, Body, Bridged, Call, Whole, decode_whole
from backends.errors import (
    BackendError,
    Broken,
    Busy,
    Refused,
    Sick,
    Silent,
    Unreachable,
    Unsupported,
)
from backends.fault import Fault, read_fault
from backends.reports import (
    Activity,
    Capabilities,
    Identity,
    Listed,
    Listing,
    Loaded,
    Readiness,
    Version,
)
from backends.transport import http, sse

T = TypeVar("T")


#: The largest answer that is not streamed, bytes. Embeddings of a long batch reach a few MB.
MAX_ANSWER = 64 * 1024 * 1024
#: The largest error body worth reading, bytes.
MAX_ERROR = 256 * 1024


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long an engine may take, in seconds."""

    connect_s: float = 5.0
    first_token_s: float = 300.0
    idle_s: float = 60.0
    answer_s: float = 600.0


class Engine(ABC):
    """One server of one kind at one base URL.

    Subclasses say what their kind does otherwise; everything that all have in
    common, the exchange itself, is here.
    """

    #: Its name in settings, paths and headers.
    kind: ClassVar[str]
    #: What only this kind answers with 200 and a JSON object, on any port …
    sign_path: ClassVar[str]
    #: … and a field of that object; empty: any object will do.
    sign_field: ClassVar[str] = "version"
    #: Whether a connection may carry another request after a streamed answer.
    reuse_after_stream: ClassVar[bool] = True
    #: Whether it loads a model when it is first asked for, and lets it go when told.
    loads_when_asked: ClassVar[bool] = False
    #: Whether the context is fixed when the server starts, and no request or model sets it.
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
        self._origin = http.Origin.of(self.url)
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"

    @staticmethod
    def full_name(model: str) -> str:
        """A model's name as the engine lists it, where settings may write it shorter."""
        return model

    # What it is and has

    async def is_own_kind(self, *, timeout_s: float = 5.0) -> bool:
        """Whether a server of this kind answers at the URL. Never raises."""
        try:
            body = msgspec.json.decode(await self.get(self.sign_path, timeout_s=timeout_s))
        except (BackendError, msgspec.DecodeError):
            return False
        return isinstance(body, dict) and (not self.sign_field or self.sign_field in body)

    async def version(self) -> str:
        """The version that the server reports, empty if none; raises `BackendError`."""
        return (await self.told(self.sign_path, Version)).version

    @abstractmethod
    async def models(self) -> list[str]:
        """The engine's own names of what it can serve; raises `BackendError`."""

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
        """Return when the model has been seen in memory; raises `BackendError`.

        It takes what the disk and the engine take: bound it with `asyncio.timeout`. Cancelled,
        it leaves no connection behind; Ollama then gives the load up, vLLM wakes all the same.
        """

    @abstractmethod
    async def unload(self, model: str) -> None:
        """Return when the model has been seen to be gone; raises `BackendError`.

        It waits for requests that run: bound it with `asyncio.timeout`. Cancelled, it may
        have told the engine already. The memory itself may be free a little later.
        """

    async def resident(self) -> list[str]:
        """The models in memory; raises `BackendError`.

        One that is being loaded is among them, and one that is to go until it is gone.
        """
        return await self.models()  # what serves one model all its life has it there

    async def loaded(self) -> list[Loaded]:
        """The models in memory, and where in it they are.

        Raises:
            BackendError: `Unsupported` where this kind never says so.
        """
        raise Unsupported(f"{self} does not say where its models are")

    async def contexts(self, models: Iterable[str]) -> dict[str, int | None]:
        """Tokens of context by model, as the server or the model file sets them.

        It may have more models than asked for. None: nothing sets it for that model.

        Raises:
            BackendError: `Unsupported` where this kind never says so.
        """
        raise Unsupported(f"{self} does not say what context its models have")

    async def on_gpu(self, model: str) -> float | None:
        """Which part of the model is in GPU memory, from 0.0 to 1.0.

        None: it is not loaded, or this kind never says so.

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
        """What keeps it from freeing GPU memory, and how to start it so that it can.

        Empty where nothing does. Raises `BackendError`.
        """
        return ""

    @abstractmethod
    async def activity(self, model: str) -> Activity:
        """What runs and waits inside the engine; raises `BackendError`."""

    async def close(self) -> None:
        """Give back what this engine holds of its own; the shared client is not its own."""
        return

    # One exchange

    @abstractmethod
    def bridge(self, call: Call, model: str) -> Bridged:
        """The request as this engine wants it, for its own name of the model."""

    async def open(self, call: Call, model: str) -> Answer:
        """Send a request to be streamed, and return once its first event is there.

        The first event is looked at before anything is handed out: some errors
        come inside a 200.

        Raises:
            BackendError: Any but `BrokeOff`.
        """
        bridged = self.bridge(call, model)
        response = await self._post(call.path, bridged.body, self.timeouts.first_token_s)
        try:
            if response.status != 200:
                await self._refuse(response)
            if not response.header("content-type").startswith("text/event-stream"):
                body = await self._read_all(response, MAX_ERROR)
                self._raise_fault(200, response, body)
            answer = Answer(
                response,
                sse.Watch(usage=call.wants_usage),
                bridged.dropped,
                self.reuse_after_stream,
            )
            await self._first_event(answer)
            response.allow_silence(self.timeouts.idle_s)
        except BaseException:
            response.close(reuse=False)
            raise
        return answer

    async def ask(self, call: Call, model: str) -> Whole:
        """Send a request and return its whole answer.

        Raises:
            BackendError: Any but `BrokeOff`.
        """
        bridged = self.bridge(call, model)
        response = await self._post(call.path, bridged.body, self.timeouts.answer_s)
        try:
            if response.status != 200:
                await self._refuse(response)
            body = await self._read_all(response, MAX_ANSWER)
        except BaseException:
            response.close(reuse=False)
            raise
        response.close(reuse=True)
        try:
            read = decode_whole(body)
        except (msgspec.DecodeError, RecursionError) as exc:
            raise Broken(f"{self} answered with no valid JSON: {exc}") from exc
        if sse.truthy(read.error):
            self._raise_fault(200, response, body)
        if b'"reasoning' in body:
            body = sse.both_reasoning_names(body, "message")
        finish = read.choices[0].finish_reason if read.choices else None
        return Whole(body, read.usage, finish, bridged.dropped)

    async def _post(self, path: str, body: Body, timeout_s: float) -> http.Response:
        return await self._send("POST", path, msgspec.json.encode(body), timeout_s)

    async def _send(self, method: str, path: str, body: bytes, timeout_s: float) -> http.Response:
        try:
            return await self._client.request(
                self._origin,
                method,
                path,
                self._headers,
                body,
                connect_s=self.timeouts.connect_s,
                head_s=timeout_s,
            )
        except http.ConnectFailed as exc:
            raise Unreachable(f"{self}: {exc}") from exc
        except http.TimedOut as exc:
            raise Silent(f"{self}: {exc}") from exc
        except http.HttpError as exc:
            raise Broken(f"{self}: {exc}") from exc

    async def _read_all(self, response: http.Response, limit: int) -> bytes:
        try:
            return await response.read_all(limit)
        except http.TimedOut as exc:
            raise Silent(f"{self}: {exc}") from exc
        except http.HttpError as exc:
            raise Broken(f"{self}: {exc}") from exc

    async def _first_event(self, answer: Answer) -> None:
        watch = answer.watch
        while not answer._pending:  # noqa: SLF001 - an answer is made here and nowhere else
            try:
                raw = await answer.response.read()
            except http.TimedOut as exc:
                raise Silent(f"{self}: {exc}") from exc
            except http.HttpError as exc:
                raise Broken(f"{self}: {exc}") from exc
            answer._pending = watch.feed(raw)  # noqa: SLF001
            if answer._pending:  # noqa: SLF001
                return
            if watch.error:
                self._raise_fault(200, answer.response, watch.error)
            if watch.fault is not None:
                raise Broken(f"{self}: {watch.fault}")
            if not raw:
                raise Broken(f"{self} ended the stream before its first event")

    async def _refuse(self, response: http.Response) -> NoReturn:
        body = await self._read_all(response, MAX_ERROR)
        self._raise_fault(response.status, response, body)

    def _raise_fault(self, status: int, response: http.Response, body: bytes) -> NoReturn:
        """Raise what an error answer means; an error inside a 200 tells its status itself."""
        fault = read_fault(body)
        if status == 200:
            status = fault.status if fault.status and 400 <= fault.status < 600 else 500
        said = f"{self} said {status}: {fault.message}"
        retry_after = response.header("retry-after")
        after = float(retry_after) if retry_after.isdecimal() else None
        if status == 429 or (status == 503 and (after is not None or self.is_busy(fault))):
            raise Busy(said, retry_after=after)
        if status == 501:  # llama.cpp says it of what it was not started for
            status = 400
        if status < 400 or status in (401, 403):  # between it and us; nothing a client can mend
            raise Broken(said)
        if status >= 500:
            raise Sick(said, status=status)
        raise Refused(
            fault.message, status=status, type=fault.type, param=fault.param, code=fault.code
        )

    def is_busy(self, fault: Fault) -> bool:
        """Whether a 503 means too much work and not illness."""
        words = fault.message.lower()
        return any(word in words for word in ("busy", "queue", "overload", "too many", "capacity"))

    # Small questions

    async def get(self, path: str, *, timeout_s: float = 5.0) -> bytes:
        """The body of a small GET; raises `BackendError`."""
        return await self._small("GET", path, b"", timeout_s)

    async def post(self, path: str, body: object = None, *, timeout_s: float = 5.0) -> bytes:
        """The body of a small POST; raises `BackendError`."""
        sent = b"" if body is None else msgspec.json.encode(body)
        return await self._small("POST", path, sent, timeout_s)

    async def _small(self, method: str, path: str, body: bytes, timeout_s: float) -> bytes:
        response = await self._send(method, path, body, timeout_s)
        try:
            if response.status != 200:
                await self._refuse(response)
            answer = await self._read_all(response, MAX_ANSWER)
        except BaseException:
            response.close(reuse=False)
            raise
        response.close(reuse=True)
        return answer

    async def listed(self) -> list[Listed]:
        """`GET /v1/models`, which all kinds have; raises `BackendError`."""
        return (await self.told("/v1/models", Listing)).data or []

    async def told(self, path: str, kind: type[T]) -> T:
        """What a small GET tells, as JSON of this shape; raises `BackendError`."""
        body = await self.get(path)
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.DecodeError as exc:
            raise Broken(f"{self}: what it says at {path} makes no sense: {exc}") from exc
