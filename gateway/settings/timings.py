"""Intervals and deadlines of the gateway itself: no operator sets them, tests shorten them.

`Timings()` is what a gateway runs with. It is made once, at the top, and passed to the
parts that wait, and no part keeps such a number itself.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timings:
    """How often the gateway looks, and how long it waits, in seconds."""

    # Starting

    first_probe_wait_s: float = 2.0
    """The start waits this long for a first probe of each engine, then serves anyway."""
    embedded_start_s: float = 120.0
    """Deadline for the embedded engine to start."""

    # Engines and their models

    probe_interval_healthy_s: float = 5.0
    """Between two probes of a replica that is ready."""
    probe_interval_unhealthy_s: float = 0.5
    """Between two probes of a replica that is not ready."""
    relist_interval_s: float = 10.0
    """Between two requests for an engine's model list, where no models are configured."""
    identity_interval_s: float = 600.0
    """Between two checks that an engine is still the one its profile was measured on.

    An engine that was replaced between two probes is noticed here.
    """

    # Loading and unloading by hand

    load_answer_s: float = 20.0
    """`/models/load` and `/models/unload` answer 202 after this long and go on.

    Open WebUI gives an eject half a minute.
    """
    shared_unload_s: float = 60.0
    """Deadline for an engine in shared placement to unload a model that may be in use."""

    # The GPU's hand-over

    gpu_poll_s: float = 0.1
    """Between two looks at an engine, or at the memory, while a step waits for it."""
    gpu_retry_min_s: float = 1.0
    """First pause between attempts while no engine can be made to hold the GPU."""
    gpu_retry_max_s: float = 30.0
    """Longest pause between such attempts; each is twice the one before, up to this."""
    gpu_leftover_s: float = 15.0
    """Deadline for the engines of a gateway that was killed to end."""
    engine_stop_s: float = 15.0
    """Grace between SIGTERM and SIGKILL for an engine that the gateway started."""

    # Answers

    status_event_s: float = 1.0
    """A stream that waits for the GPU receives its first status event after this long."""
    background_hold_s: float = 0.5
    """A background call is held back this long, so that the answer it belongs to goes first.

    Open WebUI requests a chat's title just before the answer.
    """

    # Watching

    meter_interval_s: float = 1.0
    """Between two looks at the machine: running requests, and the cards' readings."""
    driver_retry_s: float = 60.0
    """Pause after the GPU driver could not answer: there may be none."""
    readings_valid_s: float = 10.0
    """Age at which a card's readings are no longer shown, if the driver hangs."""
