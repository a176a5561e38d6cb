"""Prompts that are in no engine's prefix cache, and the same for all targets.

Each begins with a number of its own, so no cached prefix matches; the words after it are the
same for every target at the same place of a run.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

TOPICS = ["sea", "moon", "wind", "garden", "harbour", "mountain", "library", "river", "desert"]
PROMPT_WORDS = ["calm", "bright", "narrow", "distant", "early", "silver", "open", "quiet", "gentle",
         "golden", "hidden", "frozen", "patient", "eager", "ancient", "curious"]  # fmt: skip
#: Tokens of a prompt besides the words: the number, the question and the chat template.
TEMPLATE_TOKENS = 30


class PromptsError(Exception):
    """A file of prompts cannot be used; the message says where and why."""


class Prompts:
    """The prompts of a run.

    Args:
        tokens: Tokens of a prompt, about; the raw file has the servers' counts.
        seed: Seed of the random numbers.
        path: A file of prompts instead of generated ones, one a line: text, a JSON string or
            a JSON object with a `prompt`.

    Raises:
        PromptsError: The file cannot be used.
    """

    def __init__(self, tokens: int = 80, seed: int = 1, path: Path | None = None) -> None:
        self._words = max(1, tokens - TEMPLATE_TOKENS)
        self._seed = seed
        self._listed = read(path) if path is not None else []

    def prompt(self, target: str, repetition: int, level: float, user: int, number: int) -> str:
        """The prompt of a place of the run; the same place has the same prompt again."""
        place = f"{self._seed}/{repetition}/{level:g}/{user}/{number}"
        own = f"{random.Random(f'{place}/{target}').randrange(10**9):09d}"
        rng = random.Random(place)
        if self._listed:
            return f"{own}. {rng.choice(self._listed)}"
        words = " ".join(rng.choices(PROMPT_WORDS, k=self._words))
        return (
            f"{own}. Write a long story about the {rng.choice(TOPICS)}, "
            f"and use these words: {words}."
        )


def read(path: Path) -> list[str]:
    """The prompts of a file; raises `PromptsError`."""
    try:
        text = path.read_bytes()
    except OSError as exc:
        raise PromptsError(f"{path} cannot be read: {exc.strerror}") from exc
    try:
        lines = text.decode("utf-8-sig").split("\n")  # splitlines() splits at U+2028, too
    except UnicodeDecodeError as exc:
        number = text.count(b"\n", 0, exc.start) + 1
        raise PromptsError(f"{path}, line {number}: this is not UTF-8") from exc
    prompts = [_prompt(path, n, line) for n, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise PromptsError(f"{path} has no prompt: write one a line")
    return prompts


def _prompt(path: Path, number: int, line: str) -> str:
    line = line.strip()
    if line[0] not in '{["':
        return line
    try:
        value = json.loads(line)
    except json.JSONDecodeError as exc:
        raise PromptsError(
            f"{path}, line {number}: it begins like JSON and is not valid JSON ({exc}); write a "
            "text that begins so as a JSON string"
        ) from exc
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str) or not prompt.strip():
        raise PromptsError(f"{path}, line {number}: neither a string nor an object with a `prompt`")
    return prompt
