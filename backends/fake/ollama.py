"""The answers of Ollama, as its release 0.24 gives them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

from backends.fake.behaviour import (
    CHAT,
    EMBEDDINGS,
    Behaviour,
    Job,
    Json,
    PlainAnswer,
    Refusal,
    text,
    vectors,
)
from backends.fake.script import DONE, event, usage
from backends.fake.wire import Received

OLLAMA_VERSION = "0.24.0"
DETAILS = {
    "parent_model": "",
    "format": "gguf",
    "family": "llama",
    "families": ["llama"],
    "parameter_size": "134.52M",
    "quantization_level": "Q4_1",
}
#: What Go calls the type of a JSON value.
GO_TYPES = {
    str: "string",
    list: "array",
    dict: "object",
    bool: "bool",
    int: "number",
    float: "number",
}


class FakeOllama(Behaviour):
    """Loads models when they are requested. Names without a tag get the tag `latest`."""

    name = "ollama"
    loads_when_asked = True

    def refuse(
        self, status: int, message: str, kind: str = "", param: str | None = None
    ) -> Refusal:
        named = {400: "invalid_request_error", 404: "not_found_error"}
        kind = kind or named.get(status, "api_error")
        error = {"message": message, "type": kind, "param": param, "code": None}
        return Refusal(PlainAnswer({"error": error}, status))

    def admit(self, request: Received) -> None:
        # Its guard against DNS rebinding: it refuses public host names.
        host = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
        own = host in ("", "localhost") or host.endswith((".localhost", ".local", ".internal"))
        if not own and not host.replace(".", "").isdecimal() and ":" not in host:
            raise Refusal(PlainAnswer(b"", 403))

    def operation(self, request: Received) -> str:
        if request.path != "/api/generate" or not isinstance(request.body, dict):
            return ""
        return "unload" if request.body.get("keep_alive") in (0, "0", "0s") else "load"

    # Control requests

    async def control(self, request: Received) -> PlainAnswer:  # noqa: PLR0911 - a table
        match request.method, request.path:
            case "GET" | "HEAD", "/":
                return PlainAnswer("Ollama is running", type="text/plain; charset=utf-8")
            case "GET", "/api/version":
                return PlainAnswer({"version": self.process.version or OLLAMA_VERSION})
            case "GET", "/api/tags":
                return PlainAnswer({"models": [self._tag(name) for name in self.names()]})
            case "GET", "/api/ps":
                return PlainAnswer(
                    {"models": [self._running(name) for name in self.process.memory]}
                )
            case "POST", "/api/show":
                return PlainAnswer(self._details(self._checked(self._model_of(request))))
            case "POST", "/api/generate":
                return await self._load_or_unload(request)
            case "GET", "/v1/models":
                return PlainAnswer(
                    {"object": "list", "data": [self._listed(n) for n in self.names()]}
                )
            case "GET", path if path.startswith("/v1/models/"):
                model = path.removeprefix("/v1/models/")
                if full_name(model) not in self.names():
                    raise self.refuse(404, f"model '{model}' not found")
                return PlainAnswer(self._listed(model))
        raise Refusal(PlainAnswer("404 page not found", 404, "text/plain"))

    async def _load_or_unload(self, request: Received) -> PlainAnswer:
        """Load or unload a model, as a generate without a prompt does."""
        model = self._checked(self._model_of(request))
        reason = self.operation(request)
        if reason == "unload":
            self.process.unload(model)
        else:
            await self.process.load(model)
        return PlainAnswer(
            {
                "model": request.body["model"],
                "created_at": _timestamp(0),
                "response": "",
                "done": True,
                "done_reason": reason,
            }
        )

    def names(self) -> list[str]:
        return [full_name(name) for name in super().names()]

    def _model_of(self, request: Received) -> str:
        body = request.body
        if not isinstance(body, dict):
            raise Refusal(PlainAnswer({"error": "missing request body"}, 400))
        model = body.get("model") or body.get("name")
        if not isinstance(model, str):
            raise Refusal(PlainAnswer({"error": "model is required"}, 400))
        return model

    def _checked(self, model: str) -> str:
        if full_name(model) not in self.names():
            raise Refusal(PlainAnswer({"error": f"model '{model}' not found"}, 404))
        return full_name(model)

    def _tag(self, name: str) -> Json:
        return {
            "name": name,
            "model": name,
            "modified_at": _timestamp(0),
            "size": self.process.size,
            "digest": "0" * 64,
            "details": DETAILS,
        }

    def _running(self, name: str) -> Json:
        return {
            "name": name,
            "model": name,
            "size": self.process.size,
            "digest": "0" * 64,
            "details": DETAILS,
            "expires_at": _timestamp(300),
            "size_vram": self.process.memory[name],
            "context_length": self.process.context,
        }

    def _details(self, name: str) -> Json:
        embeds = name in [full_name(other) for other in self.process.embedding]
        can = (
            ["embedding"] if embeds else ["completion", *(["tools"] if self.process.tools else [])]
        )
        return {
            "modelfile": f"FROM {name}\n",
            "parameters": f"num_ctx                        {self.process.context}",
            "template": "{{ .Prompt }}",
            "details": DETAILS,
            "model_info": {
                "general.architecture": "llama",
                "llama.context_length": self.process.context,
            },
            "capabilities": can,
            "modified_at": _timestamp(0),
        }

    def _listed(self, name: str) -> Json:
        return {"id": name, "object": "model", "created": 1700000000, "owned_by": "library"}

    # Generating

    def job(self, request: Received) -> Job:
        body = request.body
        if not isinstance(body, dict):
            raise self.refuse(400, "unexpected EOF" if request.raw else "EOF")
        required = {CHAT: "messages", EMBEDDINGS: "input"}.get(request.path)
        if required and not body.get(required):
            message = "[] is too short - 'messages'" if required == "messages" else "invalid input"
            raise self.refuse(400, message)
        go = "ChatCompletionRequest" if request.path == CHAT else "CompletionRequest"
        for field, kind, wanted in (
            ("max_tokens", int, "int"),
            ("prompt", str, "string"),
            ("messages", list, "[]openai.Message"),
        ):
            value = body.get(field)
            if value is not None and not isinstance(value, kind) and request.path != EMBEDDINGS:
                was = GO_TYPES[type(value)]
                message = f"json: cannot unmarshal {was} into Go struct field {go}.{field}"
                raise self.refuse(400, f"{message} of type {wanted}")
        model = body.get("model") or ""
        if not model:
            raise self.refuse(400, "model is required")
        if full_name(str(model)) not in self.names():
            raise self.refuse(404, f"model '{model}' not found")
        if body.get("tools") and not self.process.tools:
            name = f"registry.ollama.ai/library/{full_name(model)}"
            raise self.refuse(400, f"{name} does not support tools")
        # It ignores max_completion_tokens, n, ignore_eos, and every field it does not know.
        known = {key: value for key, value in body.items() if key != "ignore_eos"}
        limit = body.get("max_tokens")
        job = self.new_job(request, known, limit if limit and limit > 0 else None)
        # A prompt that is too long is cut silently.
        job.prompt_tokens = min(job.prompt_tokens, self.process.context)
        return job

    async def prepare(self, job: Job) -> None:
        await self.process.load(full_name(job.model))

    def token(self, job: Job, index: int) -> Iterator[bytes]:
        yield event(self._chunk(job, text(index), None))

    def closing(self, job: Job) -> Iterator[bytes]:
        end = event(self._chunk(job, "", job.finish))
        if job.usage:
            end += event(self._chunk(job, "", job.finish) | {"choices": [], "usage": job.counts})
        yield end + DONE

    def whole(self, job: Job) -> bytes:
        if job.path == EMBEDDINGS:
            counts = {"prompt_tokens": job.prompt_tokens, "total_tokens": job.prompt_tokens}
            body = {"object": "list", "data": vectors(job), "model": job.model, "usage": counts}
            return PlainAnswer(body).encoded + b"\n"
        choice: Json = {"index": 0, "finish_reason": job.finish}
        if job.path == CHAT:
            choice["message"] = {"role": "assistant", "content": job.text}
        else:
            choice["text"] = job.text
        body = self._frame(job, "chat.completion" if job.path == CHAT else "text_completion")
        return PlainAnswer(body | {"choices": [choice], "usage": job.counts}).encoded + b"\n"

    def _chunk(self, job: Job, content: str, finish: str | None) -> Json:
        if job.path == CHAT:
            delta = {"role": "assistant", "content": content}
            choices: list[Json] = [{"index": 0, "delta": delta, "finish_reason": finish}]
            return self._frame(job, "chat.completion.chunk") | {"choices": choices}
        choices = [{"text": content, "index": 0, "finish_reason": finish}]
        body = self._frame(job, "text_completion") | {"choices": choices}
        if job.usage:  # all zeros until the last event
            body["usage"] = usage()
        return body

    def _frame(self, job: Job, what: str) -> Json:
        return {
            "id": job.id,
            "object": what,
            "created": job.created,
            "model": job.model,
            "system_fingerprint": "fp_ollama",
        }


def full_name(model: str) -> str:
    """A model's name with its tag."""
    return model if not model or ":" in model.rpartition("/")[2] else f"{model}:latest"


def _timestamp(in_s: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=in_s)).isoformat().replace("+00:00", "Z")
