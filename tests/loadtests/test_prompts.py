"""Prompts are the same for all targets, and in no prefix cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests.measure.prompts import Prompts, PromptsError, read


def test_targets_get_the_same_words_after_a_number_of_their_own() -> None:
    a, b = (Prompts().prompt(target, 1, 4, 2, 3) for target in "ab")

    assert a != b
    assert a.partition(". ")[2] == b.partition(". ")[2]


def test_no_prompt_occurs_twice_and_the_same_place_has_the_same_one() -> None:
    def everything() -> list[str]:
        prompts = Prompts()
        return [
            prompts.prompt("a", repetition, level, user, number)
            for repetition in (1, 2)
            for level in (1, 4)
            for user in range(4)
            for number in range(5)
        ]

    assert len(set(everything())) == len(everything())
    assert everything() == everything()


def test_numbers_in_front_are_equally_long() -> None:
    numbers = {Prompts().prompt("a", 1, 1, 0, n).partition(". ")[0] for n in range(200)}

    assert (len(numbers), {len(number) for number in numbers}) == (200, {9})


def test_more_tokens_are_more_words() -> None:
    short, long = (Prompts(tokens).prompt("a", 1, 1, 0, 0) for tokens in (80, 400))

    assert 280 < len(long.split()) - len(short.split()) < 360


def test_a_file_of_lines_or_json_replaces_the_generated_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text('\ufeffWhy?\n\n"How\u2028so?"\r\n{"prompt": "When?", "other": 1}\n', "utf-8")

    assert read(path) == ["Why?", "How\u2028so?", "When?"]
    assert Prompts(path=path).prompt("a", 1, 1, 0, 0).partition(". ")[2] in read(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "has no prompt"),
        (b"\n \n", "has no prompt"),
        (b"ok\n{broken\n", "line 2"),
        (b'ok\n\n{"question": "?"}', "line 3"),
        (b"[1]", "line 1"),
        (b"ok\n\xff\xfe\x00", "line 2: this is not UTF-8"),
    ],
)
def test_a_broken_file_is_refused_with_the_line(tmp_path: Path, text: bytes, why: str) -> None:
    path = tmp_path / "prompts"
    path.write_bytes(text)

    with pytest.raises(PromptsError, match=why):
        read(path)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(PromptsError, match="cannot be read"):
        read(Path("no-such-file"))
