"""Prompts that no engine has in its cache, and that are the same for all of them.

Each begins with a number of its own, so that nothing of it was ever seen before; the words
after it are the same for every target at the same place of a run.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

TOPICS = ["sea", "moon", "wind", "garden", "harbour", "mountain", "library", "river", "desert"]
PROMPT_WORDS = ["calm", "bright", "narrow", "distant", "early", "silver", "open", "quiet", "gentle",
         "golden", "hidden", "frozen", "patient", "eager", "ancient", "curious"]  # fmt: skip
#: Tokens of everything around the words: the number, the question, a chat template.
TEMPLATE_TOKENS = 30


class PromptsError(Exception):
    """A file of prompts cannot be used; the text says where and why."""


class Prompts:
    """What is asked.

    Args:
        tokens: Of a prompt, about; what the servers counted is in the raw file.
        seed: Of the dice.
        path: A file of prompts in place of made ones, one a line: text, or JSON strings or
            objects with a `prompt`.

    Raises:
        PromptsError: The file cannot be used.
    """

    def __init__(self, tokens: int = 80, seed: int = 1, path: Path | None = None) -> None:
        self._words = max(1, tokens - TEMPLATE_TOKENS)
        self._seed = seed
        self._listed = read(path) if path is not None else []

    def prompt(self, target: str, repetition: int, level: float, user: int, number: int) -> str:
        """One prompt; the same again for the same place of a run."""
        place = f"{self._seed}/{repetition}/{level:g}/{user}/{number}"
        own = f"{random.Random(f'{place}/{target}').randrange(10**9):09d}"
        dice = random.Random(place)
        if self._listed:
            return f"{own}. {dice.choice(self._listed)}"
        words = " ".join(dice.choices(PROMPT_WORDS, k=self._words))
        return (
            f"{own}. Write a long story about the {dice.choice(TOPICS)}, "
            f"and use these words: {words}."
        )


def read(path: Path) -> list[str]:
    """The prompts of a file; raises `PromptsError`."""
    try:
        text = path.read_bytes()
    except OSError as exc:
        raise PromptsError(f"{path} cannot be read: {exc.strerror}") from exc
    try:
        lines = text.decode("utf-8-sig").split("\n")  # splitlines() would part prompts, too
    except UnicodeDecodeError as exc:
        number = text.count(b"\n", 0, exc.start) + 1
        raise PromptsError(f"{path}, line {number}: this is not UTF-8") from exc
    found = [_prompt(path, n, line) for n, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise PromptsError(f"{path} has no prompt: write one a line")
    return found


def _prompt(path: Path, number: int, line: str) -> str:
    line = line.strip()
    if line[0] not in '{["':
        return line
    try:
        said = json.loads(line)
    except json.JSONDecodeError as exc:
        raise PromptsError(
            f"{path}, line {number}: no JSON, though it begins like it ({exc}); a text that does "
            "is written as a JSON string"
        ) from exc
    prompt = said.get("prompt") if isinstance(said, dict) else said
    if not isinstance(prompt, str) or not prompt.strip():
        raise PromptsError(f"{path}, line {number}: neither a string nor an object with a `prompt`")
    return prompt
