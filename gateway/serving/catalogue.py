"""The models that are served, their lanes, and what each lane can serve.

`/v1/models` is answered from here, so it works while an engine hangs.
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
    """A public name and what serves it.

    Attributes:
        name: The public name.
        admission: The way into its lanes.
        profile: Measured or assumed seconds by lane and concurrency.
        changed: What has changed since the profile was measured, by replica's URL.
        can: What each lane can serve. What is unknown is tried.
        created: When it was put into service, seconds since the epoch.
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
    def most_slots(self) -> int:
        """Slots of the server that has the most."""
        return self.admission.scheduler.largest

    @property
    def context(self) -> int | None:
        """The longest known context of any lane, tokens."""
        return max((c.context for c in self.can.values() if c.context), default=None)

    def offers(self, capability: str) -> bool | None:
        """Whether any lane has a capability; None: unknown."""
        known = [getattr(self.can.get(lane, Capabilities()), capability) for lane in self.lanes]
        return True if True in known else None if None in known else False

    def eligible_lanes(self, needs: Needs) -> tuple[frozenset[str], str]:
        """The lanes that can serve a request, and why the others cannot, in words.

        The request's length is an estimate, so it only chooses between lanes: a request that
        seems too long for every lane is still sent.

        Raises:
            BadRequest: No lane can serve it, and that is certain.
        """
        required = {
            "chat": needs.chat,
            "embeddings": needs.embeddings,
            "images": needs.images,
            "tools": needs.tools,
            "multiple_choices": needs.multiple_choices,
        }
        eligible = set(self.lanes)
        reason = ""
        for name, is_required in required.items():
            if not is_required:
                continue
            unfit = {la for la in eligible if getattr(self.can.get(la, _UNKNOWN), name) is False}
            if unfit == eligible:
                raise BadRequest(f"The model {self.name!r} {_CANNOT[name]}.", param=_PARAM[name])
            if unfit:
                eligible -= unfit
                reason = f"{', '.join(sorted(unfit))} {_CANNOT[name]}"
        short = {
            lane
            for lane in eligible
            if (self.can.get(lane, _UNKNOWN).context or needs.tokens) < needs.tokens
        }
        if short and short != eligible:
            eligible -= short
            lanes = ", ".join(sorted(short))
            reason = f"about {needs.tokens} tokens exceed the context of {lanes}"
        return frozenset(eligible), reason


_UNKNOWN = Capabilities()
_CANNOT = {
    "chat": "does not chat",
    "embeddings": "makes no embeddings",
    "images": "accepts no images",
    "tools": "accepts no tools",
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
        """Serve a model no longer; running requests are not affected."""
        return self._models.pop(name)

    def find(self, name: str) -> tuple[Model, str | None]:
        """A model by the name that a client sent, and the lane that it pinned with `name@lane`.

        Ollama's `:latest` may be left out, as with Ollama itself.

        Raises:
            ModelNotFound: There is no such model; the message lists none.
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
