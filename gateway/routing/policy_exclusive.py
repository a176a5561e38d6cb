"""Which layout should hold a GPU on which only one fits: rent or buy, for all its models.

It decides as `policy_shared` does, but a move is a hand-over: it delays every request, takes
long, may fail, and may be made only so often. Requests that only the other layout can serve
wait for it, and after a while the GPU is moved for them. Who holds the GPU now is read from
`GpuState`; a decision is returned as a `Move`, and the hand-over reports how it ended.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence

from gateway.gpu.state import GpuStateRef, Move
from gateway.routing.lanes import PINNED
from gateway.routing.profile import Profile
from gateway.routing.regret import ModelDemand, RegretRates, RoutedModel, best_of
from gateway.routing.switch_cost import NEGLIGIBLE, HandoverCost


class ExclusivePolicy:
    """The layout that should hold a GPU, chosen by the demand of all models on it.

    Args:
        lanes: The layouts' names, the first to begin with.
        models: All models whose requests follow this policy, by name.
        cost: What a hand-over costs here.
        gpu: Where the GPU's state is read.
        pin: The operator's layout; None: the policy decides.

    Attributes:
        regret: Request-seconds lost by staying, net, since the last move.
        moves: How often it has decided to move.
        pin: Gone to at the next `observe`, and stayed on.
    """

    def __init__(
        self,
        lanes: Sequence[str],
        models: Mapping[str, RoutedModel],
        cost: HandoverCost,
        gpu: GpuStateRef,
        *,
        pin: str | None = None,
    ) -> None:
        self.regret = 0.0
        self.moves = 0
        self.pin = pin
        self._gpu = gpu
        self._cost = cost
        self._rates = RegretRates(lanes, models)
        self._preferred = lanes[0]  # what to load once the GPU is free
        self._at = 0.0
        self._rate_of = dict.fromkeys(lanes[1:], 0.0)
        self._best, self._rate = lanes[min(1, len(lanes) - 1)], 0.0
        self._stranded_since: dict[str, float] = {}

    def __repr__(self) -> str:
        moving = "to " if self._gpu.state.move is not None else ""
        return (
            f"<ExclusivePolicy {moving}{self.lane}, regret {self.regret:.1f} of "
            f"{self.price:.1f}, {self.moves} moves>"
        )

    @property
    def lane(self) -> str:
        """The layout that requests wait for: it holds the GPU, or shall hold it next."""
        state = self._gpu.state
        if state.move is not None:
            return state.move.target
        return state.layout or self._preferred

    @property
    def next_layout(self) -> str:
        """The layout to load while none holds the GPU: the operator's, else the faster one."""
        return self.pin or self.lane

    @property
    def price(self) -> float:
        """What leaving the layout costs now, request-seconds."""
        here = self.lane
        dominates = self._rates.dominates(self._best, here)
        return self._cost.threshold(here, self._best, self._rates.demand, dominates=dominates)

    @property
    def waited(self) -> float:
        """Request-seconds that requests have waited for the GPU, in all."""
        return self._cost.waited_s

    def pinned_lane(self, lanes: Container[str]) -> str | None:
        """The lane to which the operator's pin sends the requests of a model, or None.

        While another layout holds the GPU because the pinned one could not be loaded, that
        layout serves the models it has.

        Args:
            lanes: The lanes of the model.
        """
        holder = self._gpu.state.holder
        if self.pin in lanes and holder is not None and holder in lanes:
            return holder
        return self.pin

    def reason(self, model: str) -> str:
        """Why this lane, in words and numbers for the `X-Gateway-Reason` header."""
        here = self.lane
        if moving := self._gpu.state.reason:
            return moving
        if self.pin == here:
            return PINNED
        if len(self._rates.models[model].lanes) == 1:
            return "the model's only lane"
        return self._comparison(model, here)

    def _comparison(self, model: str, here: str) -> str:
        comparison = self._rates.compare(model, here)
        if comparison is None:
            return "not measured"
        if comparison.stays:
            return str(comparison)
        if len(self._rates.models) > 1 and self._rate <= 0:
            return (
                f"{here} holds the GPU for other models: "
                f"{comparison.there_s:.1f} s on {comparison.there}"
            )
        owed = (
            f"regret {self.regret:.1f} of {self.price:.1f} request-seconds at demand {comparison.n}"
        )
        if self.regret >= self.price - NEGLIGIBLE:
            until = max(0.0, self._allowed_at(here) - self._at)
            return f"the next move to {self._best} is allowed in {until:.0f} s: {owed}"
        return f"a move to {comparison.there} does not pay yet: {owed}"

    def observe(self, now: float, model: str, demand: ModelDemand) -> Move | None:
        """Take the demand of this moment; the move that begins now, or None.

        Args:
            now: Seconds on the clock of `GpuState.since`.
            model: Whose demand it is; that of the others is as last observed.
            demand: Its demand now.
        """
        if len(self._rates.lanes) == 1:
            self._rates.models[model].set_demand(demand)
            return None
        self.advance(now)
        self._rates.set_demand(model, demand)
        self._update_regret_rates()
        if demand.stranded or self._stranded_since:
            self._note_stranded(now)
        if self._gpu.state.layout is None:
            self._prefer_the_faster()
        here = self._settled_layout()
        return self._decide(now, here) if here is not None else None

    def refine(self, now: float, model: str, profile: Profile) -> None:
        """Take a model's better profile; the regret so far stays."""
        if len(self._rates.lanes) > 1:
            self.advance(now)
        self._rates.set_profile(model, profile)
        self._update_regret_rates()

    # What the hand-over reports

    def advance(self, now: float) -> None:
        """Count what the present state has cost until now; called before it changes."""
        passed = now - self._at
        self._at = now
        state = self._gpu.state
        if passed <= 0:
            return
        if state.layout is None or state.move is not None:
            self._cost.add_waiting(passed, max(0, self._rates.demand - self._rates.running))
            return
        self._cost.advance(passed, self._rates.demand, state.layout, self._rate_of)
        # What was lost while no move was allowed must not be held against a later hour.
        self.regret = min(self.price, max(0.0, self.regret + self._rate * passed))

    def on_settled(self, now: float, move: Move | None) -> None:
        """A layout holds the GPU, after this move of the policy or (None) without one."""
        layout = self._gpu.state.layout
        assert layout is not None  # noqa: S101 - it has just come to hold
        if move is None:
            self._cost.on_adopted(now)
        elif layout == move.target:
            self._cost.on_success(now, move.source, layout, forced=move.forced)
        else:
            self._cost.on_failure(now, move.target)
        self.regret = 0.0
        self._stranded_since.pop(layout, None)
        self._update_regret_rates()

    def on_freed(self, now: float, preferred: str, *, failed: Move | None = None) -> None:
        """No layout holds the GPU any more: loading the next one costs no move.

        Args:
            now: The moment.
            preferred: The layout to load next, as long as no other is faster.
            failed: The move of the policy that has ended so.
        """
        if failed is not None:
            self._cost.on_failure(now, failed.target)
        self._preferred = preferred
        self.regret = 0.0
        self._update_regret_rates()

    def due(self) -> float:
        """The moment at which it will move if nothing changes before; inf: never."""
        here = self._settled_layout()
        if here is None:
            return math.inf
        if self.pin is not None:
            wanted = self.pin != here
            return max(self._at, self._cost.not_before) if wanted else math.inf
        due = math.inf
        if self._rate > 0:
            paid = self._at + max(0.0, self.price - self.regret) / self._rate
            due = max(paid, self._allowed_at(here))
        if self._stranded_since:
            due = min(due, self._forced_at(here)[0])
        return due

    # Deciding

    def _settled_layout(self) -> str | None:
        """The layout that holds the GPU and may be left now; None while it moves or is free."""
        state = self._gpu.state
        return state.holder if state.move is None else None

    def _decide(self, now: float, here: str) -> Move | None:
        if self.pin is not None:
            if self.pin == here or now < self._cost.not_before:
                return None
            return self._move(now, here, self.pin, "the operator has pinned it", forced=True)
        if self._rate > 0:
            paid = self.regret >= self.price - NEGLIGIBLE
            if paid and now >= self._allowed_at(here) - NEGLIGIBLE:
                why = f"regret {self.regret:.1f} of {self.price:.1f} request-seconds"
                return self._move(now, here, self._best, why, forced=False)
        if self._stranded_since:
            due, target = self._forced_at(here)
            if now >= due:
                why = "requests that only it can serve have waited long enough"
                return self._move(now, here, target, why, forced=True)
        return None

    def _move(self, now: float, here: str, target: str, why: str, *, forced: bool) -> Move:
        self._cost.on_start(now)
        self.regret = 0.0
        self.moves += 1
        self._stranded_since.pop(target, None)
        reason = f"the GPU goes from {here} to {target}: {why}"
        return Move(here, target, reason, forced)

    def _allowed_at(self, here: str) -> float:
        return self._cost.allowed_at(here, self._best, self._at, self._rate)

    def _forced_at(self, here: str) -> tuple[float, str]:
        return min(
            (self._cost.forced_at(since, here, lane), lane)
            for lane, since in self._stranded_since.items()
        )

    def _prefer_the_faster(self) -> None:
        if self._rate > 0:
            self._preferred = self._best
            self._update_regret_rates()

    def _update_regret_rates(self) -> None:
        if len(self._rates.lanes) > 1:
            self._rate_of = self._rates.against(self.lane)
            self._best, self._rate = best_of(self._rate_of, self.lane)

    def _note_stranded(self, now: float) -> None:
        stranded = self._rates.stranded_lanes() - {self.lane}
        for lane in self._stranded_since.keys() - stranded:
            del self._stranded_since[lane]
        for lane in stranded:
            self._stranded_since.setdefault(lane, now)
