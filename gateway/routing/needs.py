"""What a request needs of a lane."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Needs:
    """What a request requires of a lane.

    Attributes:
        multiple_choices: It asks for several answers (`n` > 1).
        tokens: Length of prompt and answer, estimated.
    """

    chat: bool = False
    embeddings: bool = False
    tools: bool = False
    forced_tools: bool = False
    images: bool = False
    multiple_choices: bool = False
    tokens: int = 0
