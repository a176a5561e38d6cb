"""The answers of vLLM, as its release 0.32 gives them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from backends.fake.behaviour import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    Behaviour,
    Job,
    Json,
    PlainAnswer,
    Refusal,
    text,
    vectors,
)
from backends.fake.script import DONE, event
from backends.fake.wire import Received

VLLM_VERSION = "0.32.0"
PHRASES = {400: "BadRequestError", 404: "NotFoundError", 500: "InternalServerError"}


class FakeVLLM(Behaviour):
    """Serves the model it was started with, and can sleep in dev mode."""

    name = "vllm"
    head_first = True
    keep_alive_s = 5.0
    stream_type = "text/event-stream; charset=utf-8"

    def headers(self) -> dict[str, str]:
        return {**super().headers(), "server": "uvicorn", "vary": "Origin"}

    def refuse(
        self, status: int, message: str, kind: str = "", param: str | None = None
    ) -> Refusal:
        kind = kind or PHRASES.get(status, "BadRequestError")
        error = {"message": message, "type": kind, "param": param, "code": status}
        return Refusal(PlainAnswer({"error": error}, status))

    # Control requests

    async def control(self, request: Received) -> PlainAnswer:
        if self.process.dev_mode and (answer := await self._dev(request)):
            return answer
        match request.method, request.path:
            case "GET", "/health" | "/ping":
                return PlainAnswer(b"")
            case "GET", "/version":
                return PlainAnswer({"version": self.process.version or VLLM_VERSION})
            case "GET", "/openapi.json":
                return PlainAnswer(self._openapi())
            case "GET", "/metrics":
                return PlainAnswer(self._metrics(), type="text/plain; version=0.0.4; charset=utf-8")
            case "GET", "/v1/models":
                listed = [self._listed(name) for name in self.names()]
                return PlainAnswer({"object": "list", "data": listed})
        if request.path in ("/health", "/version", "/v1/models", *self._paths()):
            raise Refusal(PlainAnswer({"detail": "Method Not Allowed"}, 405))
        raise Refusal(PlainAnswer({"detail": "Not Found"}, 404))

    async def _dev(self, request: Received) -> PlainAnswer | None:
        match request.method, request.path:
            case "POST", "/sleep":
                # Without mode=wait it aborts running requests.
                await self.process.fall_asleep(abort=request.query.get("mode", "abort") == "abort")
                return PlainAnswer(
                    {"status": "sleeping", "level": int(request.query.get("level", 1))}
                )
            case "POST", "/wake_up":
                await self.process.wake()
                return PlainAnswer({"status": "awake", "tags": None})
            case "GET", "/is_sleeping":
                # True from the request to sleep on, while requests still run.
                return PlainAnswer({"is_sleeping": self.process.paused or self.process.asleep})
        return None

    def _paths(self) -> list[str]:
        """The generating paths that it serves, which follow from its model."""
        chats = [CHAT, COMPLETIONS] if self.process.models else []
        return [*chats, EMBEDDINGS] if self.process.embedding else chats

    def _openapi(self) -> Json:
        posts = self._paths()
        gets = ["/health", "/version", "/v1/models", "/metrics"]
        if self.process.dev_mode:
            posts += ["/sleep", "/wake_up"]
            gets += ["/is_sleeping"]
        paths: Json = {path: {"post": {}} for path in posts}
        paths |= {path: {"get": {}} for path in gets}
        info = {"title": "FastAPI", "version": "0.1.0"}
        return {"openapi": "3.1.0", "info": info, "paths": paths}

    def _metrics(self) -> str:
        labels = f'{{engine="0",model_name="{self.names()[0]}"}}'
        used, asleep = self.process.running / self.process.slots, self.process.asleep
        gauges: dict[str, float] = {
            "num_requests_running": self.process.running,
            "num_requests_waiting": self.process.waiting,
            "kv_cache_usage_perc": used,
        }
        lines = (
            f"# HELP vllm:{name} As named.\n# TYPE vllm:{name} gauge\n"
            f"vllm:{name}{labels} {float(value)}\n"
            for name, value in gauges.items()
        )
        awake = f'vllm:engine_sleep_state{{engine="0",sleep_state="awake"}} {float(not asleep)}\n'
        return "".join(lines) + awake

    def _listed(self, name: str) -> Json:
        return {
            "id": name,
            "object": "model",
            "created": 1700000000,
            "owned_by": "vllm",
            "root": name,
            "parent": None,
            "max_model_len": self.process.context,
            "permission": [],
        }

    # Generating

    def job(self, request: Received) -> Job:
        if request.path not in self._paths():
            raise Refusal(PlainAnswer({"detail": "Not Found"}, 404))
        body = self._valid(request)
        model = body.get("model") or self.names()[0]
        if model not in self.names():
            valid = f"Valid aliases: {', '.join(self.names())}."
            raise self.refuse(404, f"The model `{model}` does not exist. {valid}", param="model")
        self._check_tools(body)
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        if request.path == COMPLETIONS and limit is None:
            limit = 16
        job = self.new_job(request, body, limit)
        job.model = model
        job.choices = body.get("n") or 1
        self._check_lengths(job, limit)
        return job

    def _valid(self, request: Received) -> Json:
        """The body, if pydantic would accept it; raises `Refusal`."""
        body = request.body
        required = {CHAT: "messages", COMPLETIONS: "prompt"}.get(request.path, "input")
        fault = None
        if not isinstance(body, dict):
            fault = ("json_invalid", "body.0", "JSON decode error")
        elif body.get(required) is None:
            fault = ("missing", f"body.{required}", "Field required")
        elif required == "messages" and not isinstance(body[required], list):
            fault = ("list_type", f"body.{required}", "Input should be a valid list")
        else:
            for name in ("max_tokens", "max_completion_tokens"):
                if not isinstance(body.get(name), int | None):
                    fault = ("int_parsing", f"body.{name}", "Input should be a valid integer")
        if fault is not None:
            kind, where, message = fault
            detail = f"{{'type': '{kind}', 'loc': '{where}', 'msg': '{message}'}}"
            raise self.refuse(400, f"1 validation error:\n  {detail}", "Bad Request", where)
        if body.get("stream_options") and not body.get("stream"):
            message = "Stream options can only be defined when `stream=True`."
            raise self.refuse(400, message, param="stream_options")
        if body.get("messages") == []:
            message = "Cannot apply chat template to an empty conversation."
            raise self.refuse(400, message)
        return cast(Json, body)

    def _check_tools(self, body: Json) -> None:
        tools, choice = body.get("tools"), body.get("tool_choice", "auto")
        if tools == []:
            raise self.refuse(400, "`tools` must not be an empty array.", param="tools")
        if tools and choice == "auto" and not self.process.tools:
            flags = "--enable-auto-tool-choice and --tool-call-parser"
            raise self.refuse(400, f'"auto" tool choice requires {flags} to be set')
        if tools and choice == "required" and not self.process.tools:
            raise self.refuse(400, 'tool_choice="required" requires --tool-call-parser to be set')

    def _check_lengths(self, job: Job, limit: int | None) -> None:
        context, prompt = self.process.context, job.prompt_tokens
        if limit is not None and limit < 1:
            message = f"max_tokens must be at least 1, got {limit}."
            raise self.refuse(400, message, param="max_tokens")
        if limit is not None and limit > context:
            message = f"max_tokens={limit} cannot be greater than max_model_len={context}."
            raise self.refuse(400, message, param="max_tokens")
        if prompt + (limit or 1) > context:
            message = (
                f"This model's maximum context length is {context} tokens. However, your prompt "
                f"contains at least {prompt} input tokens. Please reduce its length. "
                f"(parameter=input_tokens, value={prompt})"
            )
            raise self.refuse(400, message, param="input_tokens")

    def token(self, job: Job, index: int) -> Iterator[bytes]:
        if index == 0 and job.path == CHAT:
            for choice in range(job.choices):
                yield event(self._chunk(job, choice, {"role": "assistant", "content": ""}))
        # An answer cut at its limit finishes in its last token, any other in a chunk of its own.
        last = job.finish == "length" and index == job.tokens - 1
        for choice in range(job.choices):
            delta = {"content": text(index)}
            yield event(self._chunk(job, choice, delta, job.finish if last else None))

    def closing(self, job: Job) -> Iterator[bytes]:
        if job.finish != "length":
            for choice in range(job.choices):
                yield event(self._chunk(job, choice, {"content": ""}, job.finish))
        if job.usage:
            yield event(self._chunk(job, 0, {}) | {"choices": [], "usage": job.counts})
        yield DONE

    def whole(self, job: Job) -> bytes:
        if job.path == EMBEDDINGS:
            counts = {**job.counts, "completion_tokens": 0, "total_tokens": job.prompt_tokens}
            body = self._frame(job, "list") | {"data": vectors(job), "usage": counts}
            return PlainAnswer(body).encoded
        fields: Json = {"text": job.text}
        if job.path == CHAT:
            fields = {"message": {"role": "assistant", "content": job.text, "reasoning": None}}
        end = {"logprobs": None, "finish_reason": job.finish, "stop_reason": None}
        choices = [{"index": index, **fields, **end} for index in range(job.choices)]
        body = self._frame(job, "chat.completion" if job.path == CHAT else "text_completion")
        return PlainAnswer(body | {"choices": choices, "usage": job.counts}).encoded

    def _chunk(self, job: Job, choice: int, delta: Json, finish: str | None = None) -> Json:
        fields = {"delta": delta} if job.path == CHAT else {"text": delta.get("content", "")}
        end: Json = {"logprobs": None, "finish_reason": finish}
        if finish:
            end["stop_reason"] = None
        what = "chat.completion.chunk" if job.path == CHAT else "text_completion"
        return self._frame(job, what) | {"choices": [{"index": choice, **fields, **end}]}

    def _frame(self, job: Job, what: str) -> Json:
        return {"id": job.id, "object": what, "created": job.created, "model": job.model}
