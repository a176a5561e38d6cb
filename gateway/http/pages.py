"""Everything but generating: the model list, health, status, and the documentation.

FastAPI serves these and documents all of it, the generating paths too, which the edge
has answered before a request comes this far.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from backends import base
from backends.kinds import KINDS
from gateway.errors import BadRequest, GatewayError, MethodNotAllowed, NotFound
from gateway.http import metrics_page as scrape
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


def build(  # noqa: C901 - a table of routes
    catalogue: Catalogue,
    loader: Loader,
    *,
    ready: Callable[[], dict[str, Any]],
    status: Callable[[], dict[str, Any]],
    pin: Callable[[str | None], None],
    release: Callable[[], None],
    version: str,
    metrics: scrape.Exposition,
) -> FastAPI:
    """The pages as an ASGI application.

    Args:
        catalogue: The models to list.
        loader: Brings them into memory, and knows whether they are there.
        ready: What each model waits for; `{"ready": bool, ...}`.
        status: What the gateway knows of itself.
        pin: Keep the work at a lane, or (None) leave it to the policy; raises GatewayError.
        release: Give the GPU's memory back until the next pin; raises GatewayError.
        version: Shown in the documentation.
        metrics: What `/metrics` says, for what the asker reads; raises GatewayError.
    """
    failures: dict[int | str, dict[str, Any]] = {
        "4XX": {"model": Envelope, "description": "The request is at fault, or came too often."},
        "5XX": {"model": Envelope, "description": "An engine failed, or none is there."},
    }
    app = FastAPI(
        title="twolane", description=DESCRIPTION, version=version, redoc_url=None,
        responses=failures, redirect_slashes=False,  # to the address that a Host header names
    )  # fmt: skip

    @app.get("/models", include_in_schema=False)  # llama.cpp's, where Open WebUI loads them
    @app.get("/v1/models", tags=["models"])
    async def models() -> JSONResponse:
        """All models, from memory: it answers while an engine hangs."""
        data = [_listed(model, loader.residence(model)) for model in catalogue.models.values()]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models/{name:path}", tags=["models"])
    async def one_model(name: str) -> JSONResponse:
        """One model."""
        model, _ = catalogue.find(name)
        return JSONResponse(_listed(model, loader.residence(model)))

    @app.post("/models/load", tags=["models"])
    async def load(body: Wish) -> JSONResponse:
        """Bring a model into memory. 202: it is on its way there."""
        return moved(body.model, done=await loader.load(body.model))

    @app.post("/models/unload", tags=["models"])
    async def unload(body: Wish) -> JSONResponse:
        """Put a model out of memory until somebody asks for it. 202: who runs ends first."""
        return moved(body.model, done=await loader.unload(body.model))

    def moved(name: str, *, done: bool) -> JSONResponse:
        status = {"value": loader.residence(catalogue.find(name)[0])}
        return JSONResponse({"success": True, "status": status}, 200 if done else 202)

    @app.get("/health", tags=["operating"])
    async def health() -> JSONResponse:
        """200 as long as the gateway itself lives."""
        return JSONResponse({"status": "ok"})

    @app.get("/ready", tags=["operating"])
    async def readiness() -> JSONResponse:
        """200 when at least one model can be answered, else 503 and what it waits for."""
        said = ready()
        return JSONResponse(
            said, 200 if said["ready"] else 503, {} if said["ready"] else {"Retry-After": "5"}
        )

    @app.get("/status", tags=["operating"])
    async def state() -> JSONResponse:
        """Lanes, demand, queues, health and the last decisions."""
        return JSONResponse(status())

    app.add_api_route(
        scrape.PATH, scrape.page(metrics), tags=["operating"], response_class=PlainTextResponse
    )

    @app.post("/admin/pin", tags=["operating"])
    async def pinned(body: Pin) -> JSONResponse:
        """Keep the work (and in an exclusive placement the GPU) at one engine, or `auto`."""
        pin(None if body.lane == "auto" else body.lane)
        return JSONResponse(status())

    @app.post("/admin/release", tags=["operating"])
    async def released() -> JSONResponse:
        """Give the GPU's memory to others, a training job perhaps, until the next pin."""
        release()
        return JSONResponse(status())

    @app.get("/", include_in_schema=False)
    async def root() -> JSONResponse:
        return JSONResponse({"name": "twolane", "api": "/v1", "docs": "/docs"})

    # Answered at the edge; here for the documentation.

    @app.post(base.CHAT, tags=["generate"])
    async def chat(body: ChatBody) -> Response:
        """Chat, streamed or not."""
        raise NotImplementedError

    @app.post(base.COMPLETIONS, tags=["generate"])
    async def completions(body: CompletionBody) -> Response:
        """Complete a text, streamed or not."""
        raise NotImplementedError

    @app.post(base.EMBEDDINGS, tags=["generate"])
    async def embeddings(body: EmbeddingBody) -> Response:
        """Embed texts."""
        raise NotImplementedError

    # Every failure in one shape

    @app.exception_handler(GatewayError)
    async def told(_: Request, error: GatewayError) -> Response:
        return _answer(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == MethodNotAllowed.status:
            return _answer(MethodNotAllowed(f"{request.method} is not for this path."))
        return _answer(NotFound("There is nothing at this path. The API is at /v1, see /docs."))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _answer(BadRequest("The request does not fit this path; see /docs."))

    return app


def _answer(error: GatewayError) -> Response:
    headers = {name.decode(): value.decode() for name, value in error.headers()}
    return Response(error.envelope(), error.status, headers, media_type="application/json")


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
