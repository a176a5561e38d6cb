"""Ollama: llama.cpp with a model store. Simple, and fast for one or a few users.

Models are managed through the `ollama` package. Answers go through the gateway's own HTTP
client, which costs a tenth per chunk. Checked against the source and a server of 0.24.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Iterable

import msgspec

from backends import calls, errors
from backends.base import Engine
from backends.calls import Body, BridgedRequest, Call
from backends.errors import Broken, Refused
from backends.ollama_management import Management
from backends.reports import Activity, Capabilities, Identity, Loaded, Readiness

#: Characters of a digest that identify a model, as in `ollama list`.
DIGEST = 12
#: Seconds between two looks at a model that is to leave memory.
UNLOAD_POLL_S = 0.1

#: Fields that /v1 of Ollama reads. It ignores all others silently, so they are removed here
#: and named to the client.
KNOWN = {
    calls.CHAT: frozenset((
        "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens",
        "temperature", "top_p", "frequency_penalty", "presence_penalty", "seed", "stop",
        "response_format", "tools", "reasoning", "reasoning_effort", "logprobs", "top_logprobs",
        "n", "user",
    )),
    calls.COMPLETIONS: frozenset((
        "model", "prompt", "stream", "stream_options", "max_tokens", "temperature", "top_p",
        "frequency_penalty", "presence_penalty", "seed", "stop", "suffix", "n", "user",
    )),
    calls.EMBEDDINGS: frozenset(("model", "input", "dimensions", "encoding_format", "user")),
}  # fmt: skip


def name_with_tag(model: str) -> str:
    """A model's name with its tag, as Ollama lists it; its API also takes it without."""
    return model if ":" in model.rpartition("/")[2] else f"{model}:latest"


class Ollama(Engine):
    """One Ollama server."""

    kind = "ollama"
    sign_path = "/api/version"
    loads_when_asked = True
    fixed_context = False  # the model file or the request sets it
    full_name = staticmethod(name_with_tag)

    @functools.cached_property
    def _management(self) -> Management:
        return Management(self.url, str(self))

    async def models(self) -> list[str]:
        return [stored.name for stored in await self._management.stored()]

    async def ready(self, model: str) -> Readiness:
        # A model on disk is ready: Ollama loads it when a request asks for it.
        try:
            return (
                Readiness.READY if name_with_tag(model) in await self.models() else Readiness.ABSENT
            )
        except errors.BackendError:
            return Readiness.DOWN

    async def capabilities(self, model: str) -> Capabilities:
        file = await self._management.model_file(model)
        return Capabilities(
            context=await self._context(model, file.parameters),
            chat="completion" in file.capabilities,
            tools="tools" in file.capabilities,
            images="vision" in file.capabilities,
            # Any model embeds; one made for it does nothing else.
            embeddings=True,
            multiple_choices=False,
        )

    async def identity(self, model: str) -> Identity:
        version = await self.version()
        for stored in await self._management.stored():
            if stored.name == name_with_tag(model):
                return Identity(version, stored.quantization, stored.digest[:DIGEST])
        return Identity(version)

    async def contexts(self, models: Iterable[str]) -> dict[str, int | None]:
        # None: the model file sets none, so what Ollama was started with counts.
        contexts = {}
        for model in models:
            with contextlib.suppress(Refused):  # it does not have the model
                file = await self._management.model_file(model)
                contexts[model] = _context_of(file.parameters)
        return contexts

    async def _context(self, model: str, parameters: str) -> int | None:
        """Tokens of context: the model file's own, else as loaded, else unknown."""
        if context := _context_of(parameters):
            return context
        for loaded in await self.loaded():
            if loaded.model == name_with_tag(model):
                return loaded.context
        return None

    async def load(self, model: str) -> None:
        await self._management.load(model)
        if name_with_tag(model) not in await self.resident():
            raise Broken(f"{self} confirmed the load of {model}, and does not list it in memory")

    async def unload(self, model: str) -> None:
        # The answer comes at once, the memory later: only /api/ps shows when.
        await self._management.unload(model)
        while name_with_tag(model) in await self.resident():  # noqa: ASYNC110 - Ollama has no event for it
            await asyncio.sleep(UNLOAD_POLL_S)

    async def close(self) -> None:
        await self._management.close()

    async def resident(self) -> list[str]:
        return [loaded.model for loaded in await self.loaded()]

    async def on_gpu(self, model: str) -> float | None:
        # Where memory was short at the load, the rest is on the CPU, and slow.
        for loaded in await self.loaded():
            if loaded.model == name_with_tag(model):
                return loaded.on_gpu / loaded.size if loaded.size else 0.0
        return None

    async def loaded(self) -> list[Loaded]:
        return await self._management.loaded()

    async def activity(self, model: str) -> Activity:
        # Ollama has no metrics: what runs inside it is unknown.
        part = await self.on_gpu(model)
        return Activity(loaded=part is not None, on_gpu=part)

    def bridge(self, call: Call, model: str) -> BridgedRequest:
        known = KNOWN[call.path]
        dropped = tuple(
            name
            for name, value in call.body.items()
            if name not in known or (name == "n" and bytes(value) != b"1")
        )
        changes: dict[str, msgspec.Raw | None] = dict.fromkeys(dropped)
        limit = call.body.get("max_completion_tokens")
        if limit is not None:
            changes["max_completion_tokens"] = None
            if bytes(limit) != b"null":
                changes["max_tokens"] = limit
        if call.path == calls.COMPLETIONS:
            changes["prompt"] = _one_prompt(call.body)
        return BridgedRequest(calls.body_for(call, model, **changes), dropped)


def _context_of(parameters: str) -> int | None:
    """Tokens of context that a model file's `num_ctx` sets; None: it sets none."""
    for line in parameters.splitlines():
        name, _, value = line.partition(" ")
        if name == "num_ctx" and value.strip().isdecimal():
            return int(value)
    return None


def _one_prompt(body: Body) -> msgspec.Raw | None:
    """The prompt as one string, which is all that Ollama takes; other engines take lists.

    Raises:
        Refused: The list holds several prompts, or token numbers.
    """
    prompt = body.get("prompt")
    if prompt is None or bytes(prompt)[:1] == b'"':
        return prompt
    try:
        [only] = msgspec.json.decode(prompt, type=list[str])
    except (msgspec.DecodeError, ValueError) as exc:
        message = "On Ollama `prompt` must be one string; send several prompts one by one."
        raise Refused(message, status=400, param="prompt") from exc
    return msgspec.Raw(msgspec.json.encode(only))
