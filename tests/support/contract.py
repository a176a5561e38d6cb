"""What every engine must do, whichever kind it is and whether it is real or played.

A module that has an engine subclasses `Contract` and gives it a `subject`.
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
    """An engine under test, and its own name of the one model it has."""

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
        """The events of a streamed answer but `[DONE]`, and the answer, read and closed."""
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
        """A whole answer, decoded."""
        whole = await self.engine.fetch_answer(self.call(path, **fields), self.model)
        return msgspec.json.decode(whole.body), whole


def text(events: list[dict[str, Any]]) -> str:
    """The content of a stream."""
    return "".join(
        choice["delta"].get("content") or "" for event in events for choice in event["choices"]
    )


class Contract:
    """The suite; a subclass has the fixture `subject`."""

    async def test_it_lists_its_model(self, subject: Subject) -> None:
        assert subject.model in await subject.engine.models()

    async def test_it_is_ready_for_its_model_and_no_other(self, subject: Subject) -> None:
        assert await subject.engine.ready(subject.model) is Readiness.READY
        assert await subject.engine.ready("no-such-model") is Readiness.ABSENT

    async def test_it_knows_its_context_and_that_it_chats(self, subject: Subject) -> None:
        can = await subject.engine.capabilities(subject.model)

        assert can.chat
        assert can.context is None or can.context >= 1024
        assert can.images is not True  # the model reads text only

    async def test_it_says_what_it_is_and_stays_it(self, subject: Subject) -> None:
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

    async def test_usage_is_in_the_stream_only_if_asked_for(self, subject: Subject) -> None:
        silent, _ = await subject.stream()
        asked, _ = await subject.stream(stream_options={"include_usage": True})

        assert not any(event.get("usage") for event in silent)
        assert asked[-1]["choices"] == []
        assert asked[-1]["usage"]["completion_tokens"] == 8

    async def test_a_whole_answer_has_text_usage_and_a_finish(self, subject: Subject) -> None:
        said, whole = await subject.ask()

        assert said["choices"][0]["message"]["content"]
        assert whole.finish == "length"
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 8

    async def test_max_completion_tokens_is_enforced(self, subject: Subject) -> None:
        call = subject.call(max_completion_tokens=3)
        del call.body["max_tokens"]

        whole = await subject.engine.fetch_answer(call, subject.model)

        assert whole.usage is not None
        assert whole.usage.completion_tokens == 3

    async def test_it_completes_a_text(self, subject: Subject) -> None:
        said, whole = await subject.ask(calls.COMPLETIONS)

        assert said["choices"][0]["text"]
        assert whole.usage is not None
        assert 1 <= whole.usage.completion_tokens <= 8  # it may find an end by itself

    async def test_a_text_may_be_completed_in_a_stream(self, subject: Subject) -> None:
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
        said, _ = await subject.ask(calls.COMPLETIONS, prompt=["The sea is"])

        assert said["choices"][0]["text"]

    async def test_an_unknown_field_does_no_harm(self, subject: Subject) -> None:
        said, whole = await subject.ask(flavour="salty")

        assert said["choices"]
        assert whole.dropped == (("flavour",) if subject.engine.kind == "ollama" else ())

    async def test_a_request_it_cannot_serve_is_refused_with_a_reason(
        self, subject: Subject
    ) -> None:
        with pytest.raises(Refused) as caught:
            await subject.ask(messages="no list")

        assert 400 <= caught.value.status < 500
        assert str(caught.value)

    async def test_embeddings_are_made_or_known_not_to_be(self, subject: Subject) -> None:
        can = await subject.engine.capabilities(subject.model)
        if can.embeddings:
            said, whole = await subject.ask(calls.EMBEDDINGS)
            assert len(said["data"][0]["embedding"]) > 0
            assert whole.usage is not None
        else:
            with pytest.raises(Refused):
                await subject.ask(calls.EMBEDDINGS)

    async def test_a_stream_left_early_stops_the_engine(self, subject: Subject) -> None:
        endless = subject.call(stream=True, max_tokens=1500, ignore_eos=True)
        answer = await subject.engine.open_stream(endless, subject.model)
        await answer.read()
        answer.close()

        # It would otherwise be busy for seconds: with one slot the next answer waits for it.
        events, _ = await subject.stream(max_tokens=2)

        assert text(events)
        activity = await subject.engine.activity(subject.model)
        assert activity.running in (None, 0)

    async def test_what_it_has_loaded_is_resident_and_ready(self, subject: Subject) -> None:
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
