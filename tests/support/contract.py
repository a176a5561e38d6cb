"""What every engine must do, real or fake, whatever its kind.

A test module with an engine subclasses `Contract` and defines the fixture `subject`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from backends import calls
from backends.base import Engine
from backends.calls import Call, StreamedAnswer, WholeAnswer
from backends.errors import Refused, Unsupported
from backends.reports import Readiness
from backends.transport import sse


@dataclass(frozen=True)
class Subject:
    """An engine under test, and its own name of its one model."""

    engine: Engine
    model: str

    def call(self, path: str = calls.CHAT, **fields: Any) -> Call:
        """A short request, as the gateway would have read it."""
        usual: dict[str, dict[str, Any]] = {
            calls.CHAT: {
                "messages": [{"role": "user", "content": "Write a short poem about the sea."}],
                "max_tokens": 8,
            },
            calls.COMPLETIONS: {"prompt": "The sea is", "max_tokens": 8},
            calls.EMBEDDINGS: {"input": ["The sea"]},
        }
        asked = {"model": "public", **usual[path], **fields}
        raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in asked.items()}
        stream = asked.get("stream") is True
        wants = bool((asked.get("stream_options") or {}).get("include_usage"))
        return Call(path, raw, stream=stream, wants_usage=wants)

    async def stream(self, **fields: Any) -> tuple[list[dict[str, Any]], StreamedAnswer]:
        """The events of a streamed answer without `[DONE]`, and the answer, read and closed."""
        answer = await self.engine.open_stream(self.call(stream=True, **fields), self.model)
        raw = b""
        try:
            while data := await answer.read():
                raw += data
        finally:
            answer.close()
        assert raw.endswith(sse.DONE)
        events = [sse.data_of(event + b"\n\n") for event in raw.split(b"\n\n")[:-1]]
        return [msgspec.json.decode(event) for event in events[:-1]], answer

    async def ask(
        self, path: str = calls.CHAT, **fields: Any
    ) -> tuple[dict[str, Any], WholeAnswer]:
        """The body of a whole answer, decoded, and the answer."""
        answer = await self.engine.fetch_answer(self.call(path, **fields), self.model)
        return msgspec.json.decode(answer.body), answer


def text(events: list[dict[str, Any]]) -> str:
    """The content of a stream."""
    return "".join(
        choice["delta"].get("content") or "" for event in events for choice in event["choices"]
    )


class Contract:
    """The suite; a subclass has the fixture `subject`."""

    async def test_its_model_is_listed(self, subject: Subject) -> None:
        assert subject.model in await subject.engine.models()

    async def test_it_is_ready_for_its_model_and_no_other(self, subject: Subject) -> None:
        assert await subject.engine.ready(subject.model) is Readiness.READY
        assert await subject.engine.ready("no-such-model") is Readiness.ABSENT

    async def test_its_capabilities_name_context_and_chat(self, subject: Subject) -> None:
        can = await subject.engine.capabilities(subject.model)

        assert can.chat
        assert can.context is None or can.context >= 1024
        assert can.images is not True  # the model takes text only

    async def test_its_identity_is_reported_and_stable(self, subject: Subject) -> None:
        who = await subject.engine.identity(subject.model)

        assert who.version
        assert who.digest
        assert who == await subject.engine.identity(subject.model)

    async def test_a_stream_has_content_a_finish_and_counted_tokens(self, subject: Subject) -> None:
        events, answer = await subject.stream()

        assert text(events)
        assert answer.filter.content
        assert answer.filter.finish == "length"
        assert answer.filter.usage is not None
        assert answer.filter.usage.completion_tokens == 8
        assert answer.filter.usage.prompt_tokens > 0

    async def test_usage_is_streamed_only_on_request(self, subject: Subject) -> None:
        silent, _ = await subject.stream()
        asked, _ = await subject.stream(stream_options={"include_usage": True})

        assert not any(event.get("usage") for event in silent)
        assert asked[-1]["choices"] == []
        assert asked[-1]["usage"]["completion_tokens"] == 8

    async def test_a_whole_answer_has_text_usage_and_a_finish(self, subject: Subject) -> None:
        body, answer = await subject.ask()

        assert body["choices"][0]["message"]["content"]
        assert answer.finish == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 8

    async def test_max_completion_tokens_is_enforced(self, subject: Subject) -> None:
        call = subject.call(max_completion_tokens=3)
        del call.body["max_tokens"]

        answer = await subject.engine.fetch_answer(call, subject.model)

        assert answer.usage is not None
        assert answer.usage.completion_tokens == 3

    async def test_a_text_is_completed(self, subject: Subject) -> None:
        body, answer = await subject.ask(calls.COMPLETIONS)

        assert body["choices"][0]["text"]
        assert answer.usage is not None
        assert 1 <= answer.usage.completion_tokens <= 8  # the model may stop by itself

    async def test_a_text_is_completed_in_a_stream(self, subject: Subject) -> None:
        call = subject.call(calls.COMPLETIONS, stream=True)
        answer = await subject.engine.open_stream(call, subject.model)
        raw = b""
        while data := await answer.read():
            raw += data
        answer.close()

        assert b'"usage":{' not in raw  # Ollama puts an empty one into each event
        assert answer.filter.usage is not None
        assert 1 <= answer.filter.usage.completion_tokens <= 8

    async def test_a_prompt_in_a_list_of_one_is_a_prompt(self, subject: Subject) -> None:
        body, _ = await subject.ask(calls.COMPLETIONS, prompt=["The sea is"])

        assert body["choices"][0]["text"]

    async def test_an_unknown_field_is_dropped_or_ignored(self, subject: Subject) -> None:
        body, answer = await subject.ask(flavour="salty")

        assert body["choices"]
        assert answer.dropped == (("flavour",) if subject.engine.kind == "ollama" else ())

    async def test_a_request_it_cannot_serve_is_refused_with_a_reason(
        self, subject: Subject
    ) -> None:
        with pytest.raises(Refused) as caught:
            await subject.ask(messages="no list")

        assert 400 <= caught.value.status < 500
        assert str(caught.value)

    async def test_embeddings_are_returned_or_refused_as_reported(self, subject: Subject) -> None:
        can = await subject.engine.capabilities(subject.model)
        if can.embeddings:
            body, answer = await subject.ask(calls.EMBEDDINGS)
            assert len(body["data"][0]["embedding"]) > 0
            assert answer.usage is not None
        else:
            with pytest.raises(Refused):
                await subject.ask(calls.EMBEDDINGS)

    async def test_a_stream_left_early_stops_the_engine(self, subject: Subject) -> None:
        endless = subject.call(stream=True, max_tokens=1500, ignore_eos=True)
        answer = await subject.engine.open_stream(endless, subject.model)
        await answer.read()
        answer.close()

        # A busy engine with one slot would let the next answer wait for seconds.
        events, _ = await subject.stream(max_tokens=2)

        assert text(events)
        activity = await subject.engine.activity(subject.model)
        assert activity.running in (None, 0)

    async def test_a_loaded_model_is_resident_and_ready(self, subject: Subject) -> None:
        await subject.engine.load(subject.model)

        assert subject.model in await subject.engine.resident()
        assert await subject.engine.ready(subject.model) is Readiness.READY

    async def test_it_leaves_memory_and_comes_back_or_says_that_it_cannot(
        self, subject: Subject
    ) -> None:
        engine, model = subject.engine, subject.model
        await engine.load(model)
        try:
            await engine.unload(model)
        except Unsupported:
            assert model in await engine.resident()
        else:
            assert model not in await engine.resident()
            await engine.load(model)

        events, _ = await subject.stream(max_tokens=2)
        assert text(events)
