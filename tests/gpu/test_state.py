"""What a GPU's state says, and that it is made in one place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from gateway.gpu.state import GpuState, Move, Step

ROOT = Path(__file__).parents[2]
MOVE = Move("ollama", "vllm", "the GPU goes from ollama to vllm: it pays")
HELD = GpuState(Step.HELD, "ollama", "ollama", held_before=True)
DRAINING = GpuState(Step.DRAINING, "ollama", "vllm", MOVE)
GIVEN_BACK = GpuState(Step.UNLOADING)
DOWN = GpuState(Step.DOWN, target="vllm", failure="no driver")
TRIED_AGAIN = GpuState(Step.LOADING, target="vllm", failure="no driver")
RELEASED = GpuState(Step.DRAINING, "ollama", "ollama", released=True)


@pytest.mark.parametrize(
    ("state", "holder", "movement", "blocked"),
    [
        (GpuState(), None, "", ""),
        (HELD, "ollama", "", ""),
        (DRAINING, None, "The GPU goes to vllm: draining", ""),
        (GIVEN_BACK, None, "The GPU is released: unloading", ""),
        (DOWN, None, "", "could not be loaded; it is tried again"),
        (TRIED_AGAIN, None, "", "could not be loaded; it is tried again"),
        (
            RELEASED,
            None,
            "The GPU goes to ollama: draining",
            "is not loaded: the operator has released the GPU",
        ),
    ],
    ids=str,
)
def test_holder_movement_and_blocked_reason_follow_from_the_state(
    state: GpuState, holder: str | None, movement: str, blocked: str
) -> None:
    assert (state.holder, state.movement, state.blocked_reason) == (holder, movement, blocked)
    assert state.moving == bool(movement)
    assert [lane for lane in ("ollama", "vllm") if state.serves(lane)] == (
        [holder] if holder else []
    )


def test_a_state_is_one_line() -> None:
    assert str(HELD) == "held, ollama holds"
    assert str(DRAINING) == "draining for vllm, ollama holds"
    assert str(DOWN) == "down, no layout holds: no driver"


def test_the_state_is_assigned_in_one_place() -> None:
    places = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "gateway").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute) and target.attr == "state"
        if ast.unparse(target.value).endswith(("ref", "_ref", "_gpu"))
    }

    # The simulation has a GPU of its own, on a virtual clock.
    assert places == {"gateway/gpu/transitions.py", "gateway/simulate/policies.py"}
