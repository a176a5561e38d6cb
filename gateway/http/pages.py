"""The pages: the model list, health, status, the operator's paths, and the documentation.

FastAPI serves them and documents the whole API. The generating paths are documented here,
too; the edge answers them before a request reaches FastAPI.
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
from gateway.http import metrics_page
from gateway.observe.status import GatewayStatus, ReadyReport
from gateway.serving.catalogue import Catalogue, Model
from gateway.serving.loading import Loader
from gateway.serving.outlook import Residence

#: A kind of engine, or `auto`; to the type checker a plain string.
if TYPE_CHECKING:
    Pinned: TypeAlias = str
else:
    Pinned = Literal[(*KINDS, "auto")]

DESCRIPTION = """
One OpenAI endpoint over Ollama and vLLM. Point any OpenAI client at `/v1`. Each response
names the engine in `X-Gateway-Lane` and the reason for it in `X-Gateway-Reason`.

To choose the lane yourself, send `model@vllm` or the header `X-Gateway-Lane`.
"""

Endpoint: TypeAlias = Callable[..., Awaitable[Response]]
#: The response classes of pages that are not JSON.
RESPONSE_CLASSES: dict[str, type[Response]] = {metrics_page.PATH: PlainTextResponse}
#: The structs that pages respond with, for the documentation.
RESPONSE_STRUCTS: Mapping[str, type[msgspec.Struct]] = {
    "/ready": ReadyReport,
    "/status": GatewayStatus,
    "/admin/pin": GatewayStatus,
    "/admin/release": GatewayStatus,
}
SCHEMAS = "#/components/schemas/"


class ChatBody(BaseModel):
    """The fields of OpenAI's API; others are passed on to the engine."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(examples=["smollm2", "smollm2@vllm"])
    messages: list[dict[str, Any]] = Field(examples=[[{"role": "user", "content": "Hello"}]])
    stream: bool = False
    max_tokens: int | None = Field(None, examples=[64])


class CompletionBody(BaseModel):
    """The fields of OpenAI's API; others are passed on to the engine."""

    model_config = ConfigDict(extra="allow")

    model: str
    prompt: str | list[str]
    stream: bool = False
    max_tokens: int | None = None


class EmbeddingBody(BaseModel):
    """The fields of OpenAI's API; others are passed on to the engine."""

    model_config = ConfigDict(extra="allow")

    model: str
    input: str | list[str]


class PinBody(BaseModel):
    """The lane that the operator pins."""

    model_config = ConfigDict(extra="forbid")

    lane: Pinned = Field(description="An engine, or `auto`: the policy decides.")


class ModelBody(BaseModel):
    """The model to load or unload; other fields of llama.cpp's API are ignored."""

    model: str = Field(examples=["smollm2", "smollm2@vllm"])


class ErrorBody(BaseModel):
    """An error in OpenAI's form."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """The body of every failed request."""

    error: ErrorBody


@dataclass(frozen=True)
class Pages:
    """The pages of one gateway, as an ASGI application.

    Args:
        catalogue: The models to list.
        loader: Loads and unloads models, and knows which are in memory.
        ready: Whether any model can be answered, and what the others wait for.
        status: The gateway's state as `/status` shows it.
        pin: Pins a lane, or (None) leaves the choice to the policy; raises GatewayError.
        release: Releases the GPU until the next pin; raises GatewayError.
        version: The gateway's version, for the documentation.
        metrics: The metrics in the format that the client accepts; raises
            GatewayError.
    """

    catalogue: Catalogue
    loader: Loader
    ready: Callable[[], ReadyReport]
    status: Callable[[], GatewayStatus]
    pin: Callable[[str | None], None]
    release: Callable[[], None]
    version: str
    metrics: metrics_page.Exposition

    def __post_init__(self) -> None:
        _application(self.version)  # takes 35 ms, before the first request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = {**scope.get("state", {}), "pages": self}
        await _application(self.version)({**scope, "state": state}, receive, send)


class DocumentedApp(FastAPI):
    """FastAPI with the schemas of `RESPONSE_STRUCTS` in its document.

    FastAPI itself would make a pydantic model of each, and validate every answer with it.
    """

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        known = self.openapi_schema is not None
        document = super().openapi()
        if not known:
            _, structs = msgspec.json.schema_components(
                RESPONSE_STRUCTS.values(), ref_template=f"{SCHEMAS}{{name}}"
            )
            document["components"]["schemas"] |= structs
        return document


def _documented_responses(path: str) -> dict[str, Any] | None:
    """What OpenAPI says of a page's JSON, where it has a schema; 503 of `/ready` has it, too."""
    if path not in RESPONSE_STRUCTS:
        return None
    schema = {"$ref": f"{SCHEMAS}{RESPONSE_STRUCTS[path].__name__}"}
    content = {"content": {"application/json": {"schema": schema}}}
    if path != "/ready":
        return {"responses": {"200": content}}
    unready = {"description": "No model can be answered yet.", **content}
    return {"responses": {"200": content, "503": unready}}


@functools.cache
def _application(version: str) -> FastAPI:
    """FastAPI over the routes, which are the same for every gateway of a process.

    A route finds its gateway in the request (`Here`), so the routes' schemas are made once.
    """
    failures: dict[int | str, dict[str, Any]] = {
        "4XX": {
            "model": ErrorEnvelope,
            "description": "The request is at fault, or the queue is full.",
        },
        "5XX": {"model": ErrorEnvelope, "description": "An engine failed, or none is available."},
    }
    app = DocumentedApp(
        title="twolane", description=DESCRIPTION, version=version, redoc_url=None,
        responses=failures, redirect_slashes=False,  # to the address that a Host header names
    )  # fmt: skip
    for method, path, endpoint, tag in _routes():
        app.add_api_route(
            path, endpoint, methods=[method], tags=[tag] if tag else None,
            include_in_schema=bool(tag), response_class=RESPONSE_CLASSES.get(path, JSONResponse),
            openapi_extra=_documented_responses(path),
        )  # fmt: skip
    app.add_exception_handler(GatewayError, _gateway_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    return app


def _routes() -> Iterator[tuple[str, str, Endpoint, str]]:
    """Method, path, endpoint, and heading in the documentation (empty: undocumented)."""
    yield "GET", "/v1/models", models, "models"
    yield "GET", "/models", models, ""  # llama.cpp's, where Open WebUI loads them
    yield "GET", "/v1/models/{name:path}", one_model, "models"
    yield "POST", "/models/load", load, "models"
    yield "POST", "/models/unload", unload, "models"
    yield "GET", "/health", health, "operating"
    yield "GET", "/ready", readiness, "operating"
    yield "GET", "/status", state, "operating"
    yield "GET", metrics_page.PATH, metrics, "operating"
    yield "POST", "/admin/pin", pin, "operating"
    yield "POST", "/admin/release", release, "operating"
    yield "GET", "/", root, ""
    yield "POST", calls.CHAT, chat, "generate"
    yield "POST", calls.COMPLETIONS, completions, "generate"
    yield "POST", calls.EMBEDDINGS, embeddings, "generate"


async def _gateway_of(request: Request) -> Pages:
    """The pages that a request is for. It is async: FastAPI runs a `def` in a thread."""
    pages: Pages = request.state.pages
    return pages


Here: TypeAlias = Annotated[Pages, Depends(_gateway_of)]


# Models


async def models(here: Here) -> JSONResponse:
    """List all models. This works while an engine hangs."""
    entries = here.catalogue.models.values()
    data = [_model_entry(model, here.loader.residence(model)) for model in entries]
    return JSONResponse({"object": "list", "data": data})


async def one_model(name: str, here: Here) -> JSONResponse:
    """Describe one model."""
    model, _ = here.catalogue.find(name)
    return JSONResponse(_model_entry(model, here.loader.residence(model)))


async def load(body: ModelBody, here: Here) -> JSONResponse:
    """Load a model into memory. 202: the load is still under way."""
    return _residence(here, body.model, done=await here.loader.load(body.model))


async def unload(body: ModelBody, here: Here) -> JSONResponse:
    """Unload a model until the next request for it. 202: running answers end first."""
    return _residence(here, body.model, done=await here.loader.unload(body.model))


def _residence(here: Pages, name: str, *, done: bool) -> JSONResponse:
    status = {"value": here.loader.residence(here.catalogue.find(name)[0])}
    return JSONResponse({"success": True, "status": status}, 200 if done else 202)


# Operating


async def health() -> JSONResponse:
    """Report that the gateway itself is alive."""
    return JSONResponse({"status": "ok"})


async def readiness(here: Here) -> Response:
    """Report whether any model can be answered; 503 names what the models wait for."""
    report = here.ready()
    if report.ready:
        return _json(report)
    return _json(report, 503, {"Retry-After": "5"})


async def state(here: Here) -> Response:
    """Report lanes, demand, queues, health, the GPU, costs and the last decisions."""
    return _json(here.status())


async def metrics(request: Request, here: Here) -> Response:
    """Expose the metrics to Prometheus."""
    return await metrics_page.page(here.metrics)(request)


async def pin(body: PinBody, here: Here) -> Response:
    """Pin a lane, and in an exclusive placement the GPU; `auto`: the policy decides."""
    here.pin(None if body.lane == "auto" else body.lane)
    return _json(here.status())


async def release(here: Here) -> Response:
    """Release the GPU for other programs, such as a training job, until the next pin."""
    here.release()
    return _json(here.status())


async def root() -> JSONResponse:
    """The name of the service and where its API and documentation are."""
    return JSONResponse({"name": "twolane", "api": "/v1", "docs": "/docs"})


# Generating paths: the edge answers them; these are for the documentation.


async def chat(body: ChatBody) -> Response:
    """Answer a chat, streamed or not."""
    raise NotImplementedError


async def completions(body: CompletionBody) -> Response:
    """Complete a text, streamed or not."""
    raise NotImplementedError


async def embeddings(body: EmbeddingBody) -> Response:
    """Embed texts."""
    raise NotImplementedError


# Errors, all in one form


async def _gateway_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)  # noqa: S101 - registered for it alone
    return _error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for it alone
    if error.status_code == MethodNotAllowed.status:
        return _error_response(MethodNotAllowed(f"{request.method} is not for this path."))
    return _error_response(NotFound("This path does not exist. The API is at /v1, see /docs."))


async def _invalid_request(_: Request, error: Exception) -> Response:
    return _error_response(BadRequest("The request does not fit this path; see /docs."))


def _error_response(error: GatewayError) -> Response:
    headers = {name.decode(): value.decode() for name, value in error.headers()}
    return Response(error.envelope(), error.status, headers, media_type="application/json")


def _json(body: msgspec.Struct, status: int = 200, headers: Mapping[str, str] = {}) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def _model_entry(model: Model, residence: Residence) -> dict[str, Any]:
    """A model in OpenAI's list, with the fields that llama.cpp and Open WebUI add."""
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
