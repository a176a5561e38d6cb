"""Everything but generating: the model list, health, status, and the documentation.

FastAPI serves these and documents all of it, the generating paths too, which the edge
has answered before a request comes this far.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import msgspec
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from backends import calls
from backends.kinds import KINDS
from gateway.errors import BadRequest, GatewayError, MethodNotAllowed, NotFound
from gateway.http import metrics_page as scrape
from gateway.observe.status import GatewayStatus, ReadyReport
from gateway.serving.admission import Residence
from gateway.serving.catalogue import Catalogue, Model
from gateway.serving.loading import Loader

#: A kind of engine, or `auto`: a plain string to the type checker.
if TYPE_CHECKING:
    Pinned: TypeAlias = str
else:
    Pinned = Literal[(*KINDS, "auto")]

DESCRIPTION = """
One OpenAI endpoint over Ollama and vLLM. Point any OpenAI client at `/v1`. Every answer
says in `X-Gateway-Lane` which engine gave it and in `X-Gateway-Reason` why.

Name a lane with `model@vllm` or the header `X-Gateway-Lane` to choose it yourself.
"""

Endpoint: TypeAlias = Callable[..., Awaitable[Response]]
#: Of pages that are no JSON.
RESPONSES: dict[str, type[Response]] = {scrape.PATH: PlainTextResponse}
#: What pages answer with, for the documentation; checked when it is made, not when it is sent.
ANSWERS: Mapping[str, type[msgspec.Struct]] = {
    "/ready": ReadyReport,
    "/status": GatewayStatus,
    "/admin/pin": GatewayStatus,
    "/admin/release": GatewayStatus,
}
SCHEMAS = "#/components/schemas/"


class ChatBody(BaseModel):
    """What OpenAI's API takes; fields that are not listed are passed on to the engine."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(examples=["smollm2", "smollm2@vllm"])
    messages: list[dict[str, Any]] = Field(examples=[[{"role": "user", "content": "Hello"}]])
    stream: bool = False
    max_tokens: int | None = Field(None, examples=[64])


class CompletionBody(BaseModel):
    """What OpenAI's API takes; fields that are not listed are passed on to the engine."""

    model_config = ConfigDict(extra="allow")

    model: str
    prompt: str | list[str]
    stream: bool = False
    max_tokens: int | None = None


class EmbeddingBody(BaseModel):
    """What OpenAI's API takes; fields that are not listed are passed on to the engine."""

    model_config = ConfigDict(extra="allow")

    model: str
    input: str | list[str]


class Pin(BaseModel):
    """Where the operator wants the work to be done."""

    model_config = ConfigDict(extra="forbid")

    lane: Pinned = Field(description="An engine, or `auto`: the policy decides (again).")


class Wish(BaseModel):
    """A model to be loaded or unloaded; other fields are llama.cpp's, and mean nothing here."""

    model: str = Field(examples=["smollm2", "smollm2@vllm"])


class Problem(BaseModel):
    """What went wrong, as OpenAI writes it."""

    message: str
    type: str
    param: str | None
    code: str | None


class Envelope(BaseModel):
    """Every failure's shape."""

    error: Problem


@dataclass(frozen=True)
class Pages:
    """The pages of one gateway, as an ASGI application.

    Args:
        catalogue: The models to list.
        loader: Loads and unloads them, and knows which are in memory.
        ready: Whether any model can be answered, and what the others wait for.
        status: The gateway's state as `/status` shows it.
        pin: Keep the work at a lane, or (None) leave it to the policy; raises GatewayError.
        release: Give the GPU's memory back until the next pin; raises GatewayError.
        version: Shown in the documentation.
        metrics: What `/metrics` answers, in the format that the client accepts; raises
            GatewayError.
    """

    catalogue: Catalogue
    loader: Loader
    ready: Callable[[], ReadyReport]
    status: Callable[[], GatewayStatus]
    pin: Callable[[str | None], None]
    release: Callable[[], None]
    version: str
    metrics: scrape.Exposition

    def __post_init__(self) -> None:
        _application(self.version)  # 35 ms that the first reader of a page need not wait

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = {**scope.get("state", {}), "pages": self}
        await _application(self.version)({**scope, "state": state}, receive, send)


class DocumentedApp(FastAPI):
    """FastAPI with the schemas of `ANSWERS` in its document.

    FastAPI itself would make a pydantic model of each, and validate every answer with it.
    """

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        known = self.openapi_schema is not None
        document = super().openapi()
        if not known:
            _, structs = msgspec.json.schema_components(
                ANSWERS.values(), ref_template=f"{SCHEMAS}{{name}}"
            )
            document["components"]["schemas"] |= structs
        return document


def _documented_answer(path: str) -> dict[str, Any] | None:
    """What OpenAPI says of a page's JSON, where it has a schema; 503 of `/ready` has it, too."""
    if path not in ANSWERS:
        return None
    schema = {"$ref": f"{SCHEMAS}{ANSWERS[path].__name__}"}
    content = {"content": {"application/json": {"schema": schema}}}
    if path != "/ready":
        return {"responses": {"200": content}}
    unready = {"description": "No model can be answered yet.", **content}
    return {"responses": {"200": content, "503": unready}}


@functools.cache
def _application(version: str) -> FastAPI:
    """FastAPI over the routes, which are the same for every gateway of a process.

    A route finds its gateway in the request (`Here`), so that the routes' schemas are made once.
    """
    failures: dict[int | str, dict[str, Any]] = {
        "4XX": {"model": Envelope, "description": "The request is at fault, or came too often."},
        "5XX": {"model": Envelope, "description": "An engine failed, or none is there."},
    }
    app = DocumentedApp(
        title="twolane", description=DESCRIPTION, version=version, redoc_url=None,
        responses=failures, redirect_slashes=False,  # to the address that a Host header names
    )  # fmt: skip
    for method, path, endpoint, tag in _routes():
        app.add_api_route(
            path, endpoint, methods=[method], tags=[tag] if tag else None,
            include_in_schema=bool(tag), response_class=RESPONSES.get(path, JSONResponse),
            openapi_extra=_documented_answer(path),
        )  # fmt: skip
    app.add_exception_handler(GatewayError, _gateway_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    return app


def _routes() -> Iterator[tuple[str, str, Endpoint, str]]:
    """Method, path, what answers, and its heading in the documentation (none: not in it)."""
    yield "GET", "/v1/models", models, "models"
    yield "GET", "/models", models, ""  # llama.cpp's, where Open WebUI loads them
    yield "GET", "/v1/models/{name:path}", one_model, "models"
    yield "POST", "/models/load", load, "models"
    yield "POST", "/models/unload", unload, "models"
    yield "GET", "/health", health, "operating"
    yield "GET", "/ready", readiness, "operating"
    yield "GET", "/status", state, "operating"
    yield "GET", scrape.PATH, metrics, "operating"
    yield "POST", "/admin/pin", pin, "operating"
    yield "POST", "/admin/release", release, "operating"
    yield "GET", "/", root, ""
    yield "POST", calls.CHAT, chat, "generate"
    yield "POST", calls.COMPLETIONS, completions, "generate"
    yield "POST", calls.EMBEDDINGS, embeddings, "generate"


async def _gateway_of(request: Request) -> Pages:
    """Whose pages a request is for. No `def`: FastAPI would run that in a thread."""
    pages: Pages = request.state.pages
    return pages


Here: TypeAlias = Annotated[Pages, Depends(_gateway_of)]


# Models


async def models(here: Here) -> JSONResponse:
    """All models, from memory: it answers while an engine hangs."""
    entries = here.catalogue.models.values()
    data = [_listed(model, here.loader.residence(model)) for model in entries]
    return JSONResponse({"object": "list", "data": data})


async def one_model(name: str, here: Here) -> JSONResponse:
    """One model."""
    model, _ = here.catalogue.find(name)
    return JSONResponse(_listed(model, here.loader.residence(model)))


async def load(body: Wish, here: Here) -> JSONResponse:
    """Bring a model into memory. 202: it is on its way there."""
    return _residence(here, body.model, done=await here.loader.load(body.model))


async def unload(body: Wish, here: Here) -> JSONResponse:
    """Put a model out of memory until somebody asks for it. 202: who runs ends first."""
    return _residence(here, body.model, done=await here.loader.unload(body.model))


def _residence(here: Pages, name: str, *, done: bool) -> JSONResponse:
    status = {"value": here.loader.residence(here.catalogue.find(name)[0])}
    return JSONResponse({"success": True, "status": status}, 200 if done else 202)


# Operating


async def health() -> JSONResponse:
    """200 as long as the gateway itself lives."""
    return JSONResponse({"status": "ok"})


async def readiness(here: Here) -> Response:
    """200 when at least one model can be answered, else 503 and what it waits for."""
    report = here.ready()
    if report.ready:
        return _json(report)
    return _json(report, 503, {"Retry-After": "5"})


async def state(here: Here) -> Response:
    """Lanes, demand, queues, health and the last decisions."""
    return _json(here.status())


async def metrics(request: Request, here: Here) -> Response:
    """Everything that Prometheus may want to know."""
    return await scrape.page(here.metrics)(request)


async def pin(body: Pin, here: Here) -> Response:
    """Keep the work (and in an exclusive placement the GPU) at one engine, or `auto`."""
    here.pin(None if body.lane == "auto" else body.lane)
    return _json(here.status())


async def release(here: Here) -> Response:
    """Give the GPU's memory to others, a training job perhaps, until the next pin."""
    here.release()
    return _json(here.status())


async def root() -> JSONResponse:
    """The name of the service and where its API and documentation are."""
    return JSONResponse({"name": "twolane", "api": "/v1", "docs": "/docs"})


# Generating: answered at the edge; here for the documentation.


async def chat(body: ChatBody) -> Response:
    """Chat, streamed or not."""
    raise NotImplementedError


async def completions(body: CompletionBody) -> Response:
    """Complete a text, streamed or not."""
    raise NotImplementedError


async def embeddings(body: EmbeddingBody) -> Response:
    """Embed texts."""
    raise NotImplementedError


# Every failure in one shape


async def _gateway_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)  # noqa: S101 - it is called for no other
    return _answer(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - it is called for no other
    if error.status_code == MethodNotAllowed.status:
        return _answer(MethodNotAllowed(f"{request.method} is not for this path."))
    return _answer(NotFound("There is nothing at this path. The API is at /v1, see /docs."))


async def _invalid_request(_: Request, error: Exception) -> Response:
    return _answer(BadRequest("The request does not fit this path; see /docs."))


def _answer(error: GatewayError) -> Response:
    headers = {name.decode(): value.decode() for name, value in error.headers()}
    return Response(error.envelope(), error.status, headers, media_type="application/json")


def _json(body: msgspec.Struct, status: int = 200, headers: Mapping[str, str] = {}) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def _listed(model: Model, residence: Residence) -> dict[str, Any]:
    """A model as OpenAI lists it, with what llama.cpp and Open WebUI say beside it."""
    listed: dict[str, Any] = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "twolane",
        "lanes": list(model.lanes),
        "status": {"value": residence},
        "info": {
            "meta": {
                "capabilities": {
                    "builtin_tools": model.offers("tools") is True,
                    "vision": model.offers("images") is True,
                    "usage": True,
                }
            }
        },
    }
    if model.context:
        listed["max_model_len"] = model.context
    return listed
