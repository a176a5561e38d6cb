"""Which models there are, on which lanes, and what each lane can take.

`/v1/models` is answered from here, so that it is there while an engine hangs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from backends.reports import Capabilities
from gateway.errors import BadRequest, ModelNotFound
from gateway.routing.needs import Needs
from gateway.routing.profile import ASSUMED, Profile
from gateway.serving.admission import Admission


@dataclass(slots=True)
class Model:
    """A public name and what is behind it. `can` is by lane; what is not known is let try.

    `profile` is as it was measured (or assumed), `changed` what is otherwise since, by server.
    """

    name: str
    admission: Admission
    profile: Profile = ASSUMED
    changed: dict[str, str] = field(default_factory=dict)
    can: dict[str, Capabilities] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def lanes(self) -> Iterable[str]:
        return self.admission.scheduler.lanes

    @property
    def context(self) -> int | None:
        """The longest context of any lane, tokens, as far as it is known."""
        return max((c.context for c in self.can.values() if c.context), default=None)

    def offers(self, what: str) -> bool | None:
        """Whether any lane has a capability: yes, no, or not known."""
        known = [getattr(self.can.get(lane, Capabilities()), what) for lane in self.lanes]
        return True if True in known else None if None in known else False

    def able(self, needs: Needs) -> tuple[frozenset[str], str]:
        """The lanes that can take a request, and why the others cannot, in words.

        The context is an estimate, so it only chooses between lanes: a request that
        seems too long for all of them still goes to the longest.

        Raises:
            BadRequest: No lane can take it, and that is certain.
        """
        asked = {
            "chat": needs.chat,
            "embeddings": needs.embeddings,
            "images": needs.images,
            "tools": needs.tools,
            "multiple_choices": needs.multiple_choices,
        }
        able = set(self.lanes)
        why = ""
        for what, wanted in asked.items():
            if not wanted:
                continue
            unable = {la for la in able if getattr(self.can.get(la, _ANY), what) is False}
            if unable == able:
                raise BadRequest(f"The model {self.name!r} {_CANNOT[what]}.", param=_PARAM[what])
            if unable:
                able -= unable
                why = f"{', '.join(sorted(unable))} {_CANNOT[what]}"
        short = {
            lane
            for lane in able
            if (self.can.get(lane, _ANY).context or needs.tokens) < needs.tokens
        }
        if short and short != able:
            able -= short
            why = f"about {needs.tokens} tokens are over the context of {', '.join(sorted(short))}"
        return frozenset(able), why


_ANY = Capabilities()
_CANNOT = {
    "chat": "does not chat",
    "embeddings": "makes no embeddings",
    "images": "takes no images",
    "tools": "takes no tools",
    "multiple_choices": "gives one answer at a time (n = 1)",
}
_PARAM = {
    "chat": "model",
    "embeddings": "model",
    "images": "messages",
    "tools": "tools",
    "multiple_choices": "n",
}


class Catalogue:
    """The models, by public name."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}

    @property
    def models(self) -> Mapping[str, Model]:
        return self._models

    def add(self, model: Model) -> None:
        """Serve a model from now on."""
        self._models[model.name] = model

    def remove(self, name: str) -> Model:
        """Serve a model no longer; what runs is not touched."""
        return self._models.pop(name)

    def find(self, name: str) -> tuple[Model, str | None]:
        """A model by the name a client used, and the lane it pinned with `name@lane`.

        Ollama's `:latest` may be left out, as people are used to.

        Raises:
            ModelNotFound: There is none; lists nothing.
        """
        for known in (name, f"{name}:latest"):
            if (model := self._models.get(known)) is not None:
                return model, None
        base, _, lane = name.rpartition("@")
        for known in (base, f"{base}:latest"):
            if (model := self._models.get(known)) is not None and lane in model.lanes:
                return model, lane
        shown = "".join(c for c in name[:80] if c.isprintable())
        raise ModelNotFound(
            f"The model {shown!r} does not exist. GET /v1/models lists those that do.",
            param="model",
        )
