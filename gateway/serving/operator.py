"""What the operator may do with the lanes of a running gateway: pin, and release the GPU."""

from __future__ import annotations

from gateway.errors import BadRequest
from gateway.gpu.handover import Gpu
from gateway.serving.catalogue import Catalogue


class Operator:
    """Carries out the operator's commands.

    Args:
        catalogue: The models.

    Attributes:
        gpu: The GPU that the models in exclusive placement share; None without any.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self.gpu: Gpu | None = None
        self._catalogue = catalogue

    def pin(self, lane: str | None) -> None:
        """Keep the work of all models that have this lane on it; None: the policy decides.

        Raises:
            BadRequest: No model has this lane.
        """
        models = self._catalogue.models.values()
        lanes = dict.fromkeys(name for model in models for name in model.lanes)
        if lane is not None and lane not in lanes:
            names = ", ".join(lanes) or "none yet"
            raise BadRequest(f"No model is served by {lane}. The lanes are: {names}.", param="lane")
        if self.gpu is not None and (lane is None or lane in self.gpu.layouts):
            self.gpu.pin(lane)
        for model in models:
            if not model.admission.scheduler.exclusive:
                known = lane is not None and lane in model.lanes
                model.admission.pin(lane if known else None)

    def release(self) -> None:
        """Release the GPU's memory until the next `pin`.

        Raises:
            BadRequest: No model is in an exclusive placement.
        """
        if self.gpu is None:
            raise BadRequest("No model is in an exclusive placement: there is no GPU to release.")
        self.gpu.release()
