"""The answers of llama.cpp's server, as `xllamacpp` 2026.10 gives them."""

from __future__ import annotations

from collections.abc import Iterator

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

LLAMACPP_VERSION = "b0-unknown"
TOOLS_TEMPLATE = "{% if tools %}{{ tools }}{% endif %}"


class FakeLlamaCpp(Behaviour):
    """Serves the model it was started with, under any name."""

    name = "llamacpp"
    closes_after_stream = True
    closes_after_error = True
    keep_alive_s = 5.0
    json_type = "application/json; charset=utf-8"
    id_prefix = dict.fromkeys((CHAT, "/v1/completions"), "chatcmpl-")

    def headers(self) -> dict[str, str]:
        # It promises keep-alive, also where it closes the connection after a stream.
        promise = {"keep-alive": "timeout=5, max=100"}
        return {"server": "llama.cpp", "access-control-allow-origin": "", **promise}

    def stream_headers(self) -> dict[str, str]:
        return {**super().stream_headers(), "x-accel-buffering": "no"}

    def refuse(
        self, status: int, message: str, kind: str = "", param: str | None = None
    ) -> Refusal:
        kind = kind or "invalid_request_error"
        return Refusal(
            PlainAnswer({"error": {"code": status, "message": message, "type": kind}}, status)
        )

    # Control requests

    async def control(self, request: Received) -> PlainAnswer:
        self._refuse_while_loading()
        match request.method, request.path:
            case "GET", "/health" | "/v1/health":
                return PlainAnswer({"status": "ok"})
            case "GET", "/v1/models" | "/models":
                return PlainAnswer({"models": [], "object": "list", "data": [self._listed()]})
            case "GET", "/props":
                return PlainAnswer(self._props())
            case "GET", "/slots":
                busy = self.process.running
                slots = range(self.process.slots)
                context = self.process.context
                return PlainAnswer(
                    [{"id": i, "n_ctx": context, "is_processing": i < busy} for i in slots]
                )
            case "GET", "/metrics":
                return PlainAnswer(self._metrics(), type="text/plain; version=0.0.4")
        raise self.refuse(404, "File Not Found", "not_found_error")

    def _refuse_while_loading(self) -> None:
        if self.process.loading:
            raise self.refuse(503, "Loading model", "unavailable_error")

    def _listed(self) -> Json:
        name = self.names()[0]
        meta = {
            "vocab_type": 2,
            "n_vocab": 49152,
            "n_ctx": self.process.context,
            "n_ctx_train": self.process.context,
            "n_embd": 576,
            "n_params": 134515008,
            "size": 96576768,
        }
        return {
            "id": name,
            "aliases": [name],
            "object": "model",
            "created": 1700000000,
            "owned_by": "llamacpp",
            "meta": meta,
        }

    def _props(self) -> Json:
        return {
            "default_generation_settings": {"n_ctx": self.process.context},
            "total_slots": self.process.slots,
            "build_info": self.process.version or LLAMACPP_VERSION,
            "model_ftype": "Q4_1",
            "model_path": f"/models/{self.names()[0]}.gguf",
            "model_alias": self.names()[0],
            "modalities": {"vision": False, "video": False, "audio": False},
            "chat_template": TOOLS_TEMPLATE if self.process.tools else "{{ messages }}",
            "chat_template_caps": {"supports_tools": self.process.tools},
            "is_sleeping": False,
        }

    def _metrics(self) -> str:
        gauges = {
            "requests_processing": self.process.running,
            "requests_deferred": self.process.waiting,
        }
        lines = (
            f"# HELP llamacpp:{name} Number of requests.\n# TYPE llamacpp:{name} gauge\n"
            f"llamacpp:{name} {value}\n"
            for name, value in gauges.items()
        )
        return "".join(lines)

    # Generating

    def job(self, request: Received) -> Job:
        self._refuse_while_loading()
        body = request.body
        if not isinstance(body, dict):
            message = "[json.exception.parse_error.101] parse error at line 1, column 1"
            raise self.refuse(400, message)
        if request.path == EMBEDDINGS:
            return self._embedding(request, body)
        required = "messages" if request.path == CHAT else "prompt"
        if required not in body:
            raise self.refuse(400, f"'{required}' is required")
        if required == "messages" and not isinstance(body["messages"], list):
            raise self.refuse(400, "Expected 'messages' to be an array")
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        if limit is not None and not isinstance(limit, int | float):
            message = "[json.exception.type_error.302] type must be number, but is string"
            raise self.refuse(400, f"Field 'max_tokens': {message}")
        if limit is not None:
            limit = max(1, int(limit)) if limit >= 0 else None
        job = self.new_job(request, body, limit)
        job.model = self.names()[0]
        job.choices = body.get("n") or 1
        self._check_length(job)
        return job

    def _embedding(self, request: Received, body: Json) -> Job:
        if not self.process.embedding:
            message = "This server does not support embeddings. Start it with `--embeddings`"
            raise self.refuse(501, message, "not_supported_error")
        if "input" not in body:
            raise self.refuse(400, '"input" or "content" must be provided')
        return self.new_job(request, body)

    def _check_length(self, job: Job) -> None:
        if job.prompt_tokens < self.process.context:
            return
        size = f"request ({job.prompt_tokens} tokens) exceeds the available context size"
        message = f"{size} ({self.process.context} tokens), try increasing it"
        refusal = self.refuse(400, message, "exceed_context_size_error")
        assert isinstance(refusal.answer.body, dict)  # noqa: S101 - for the type checker
        refusal.answer.body["error"] |= {
            "n_prompt_tokens": job.prompt_tokens,
            "n_ctx": self.process.context,
        }
        raise refusal

    def token(self, job: Job, index: int) -> Iterator[bytes]:
        for choice in range(job.choices):
            content = event(self._chunk(job, choice, {"content": text(index)}))
            if index == 0 and job.path == CHAT:
                role = {"role": "assistant", "content": None}
                content = event(self._chunk(job, choice, role)) + content
            yield content

    def closing(self, job: Job) -> Iterator[bytes]:
        for choice in range(job.choices):
            end = self._chunk(job, choice, {}, job.finish)
            if job.path != CHAT:  # reported without being asked for
                yield event(end | {"usage": self._counts(job)})
            elif job.usage and choice == job.choices - 1:
                yield event(end) + event(end | {"choices": [], "usage": self._counts(job)})
            else:
                yield event(end)
        yield DONE

    def whole(self, job: Job) -> bytes:
        if job.path == EMBEDDINGS:
            counts = {"prompt_tokens": job.prompt_tokens, "total_tokens": job.prompt_tokens}
            body: Json = {"model": job.model, "object": "list", "usage": counts}
            return PlainAnswer(body | {"data": vectors(job)}).encoded
        fields: Json = {"text": job.text, "logprobs": None}
        if job.path == CHAT:
            fields = {"message": {"role": "assistant", "content": job.text}}
        choices = [
            {**fields, "index": index, "finish_reason": job.finish} for index in range(job.choices)
        ]
        body = self._frame(job, "chat.completion" if job.path == CHAT else "text_completion")
        return PlainAnswer(body | {"choices": choices, "usage": self._counts(job)}).encoded

    def _chunk(self, job: Job, index: int, delta: Json, finish: str | None = None) -> Json:
        what, fields = "text_completion", {"text": delta.get("content", ""), "logprobs": None}
        if job.path == CHAT:
            what, fields = "chat.completion.chunk", {"delta": delta}
        choice: Json = {"finish_reason": finish, "index": index, **fields}
        return {"choices": [choice], **self._frame(job, what)}

    def _frame(self, job: Job, what: str) -> Json:
        return {
            "created": job.created,
            "id": job.id,
            "model": job.model,
            "system_fingerprint": "b0-unknown",
            "object": what,
        }

    def _counts(self, job: Job) -> Json:
        # It counts only one of several answers.
        counts = usage(job.prompt_tokens, job.tokens)
        return {**counts, "prompt_tokens_details": {"cached_tokens": 0}}
