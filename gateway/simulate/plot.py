"""The results as a picture. matplotlib comes with the extra `load` and is imported here only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gateway import installation
from gateway.errors import UsageError
from gateway.simulate.choices import ALWAYS, CLAIRVOYANT, OURS
from gateway.simulate.comparison import SimulationRecord


def check_plot(path: Path) -> None:
    """Check that a picture can be drawn to this path, before the minutes of simulation.

    Raises:
        UsageError: The format is not supported, or matplotlib is not installed.
    """
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise UsageError(f"--plot {path}: choose a name that ends in .svg, .png or .pdf")
    try:
        import matplotlib as mpl  # noqa: PLC0415 - only a picture needs it
    except ImportError as exc:
        raise UsageError(
            "--plot needs matplotlib, which comes with the extra `load`: "
            f"{installation.install('load')}"
        ) from exc
    mpl.use("agg")


def draw(path: Path, records: Sequence[SimulationRecord]) -> None:
    """Draw one panel per profile: by trace, each policy's ratio to the better single lane.

    Raises:
        UsageError: The file cannot be written.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - see `check_plot`

    labels = list(dict.fromkeys(record.profile for record in records))
    names = list(dict.fromkeys(f"{record.trace} ({record.people})" for record in records))
    policies = [
        policy
        for policy in dict.fromkeys(record.policy for record in records)
        if not policy.startswith(ALWAYS)
    ]
    figure = Figure(figsize=(4 + 4 * len(labels), 2 + 0.35 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(labels), sharey=True, squeeze=False)[0]
    marks = {OURS: ("o", "tab:blue"), CLAIRVOYANT: ("|", "tab:green")}
    for panel, label in zip(panels, labels, strict=True):
        for policy in policies:
            points = [r for r in records if r.profile == label and r.policy == policy]
            mark, colour = marks.get(policy, ("x", "tab:orange" if "-" in policy else "tab:red"))
            panel.scatter(
                [point.ratio_fixed for point in points],
                [names.index(f"{point.trace} ({point.people})") for point in points],
                marker=mark, color=colour, label=policy, alpha=0.7,
            )  # fmt: skip
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set_xscale("log")
        panel.set_title(label)
        panel.set_xlabel("mean seconds per request / the better single engine's")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    panels[-1].legend()
    try:
        figure.savefig(path)
    except OSError as exc:
        raise UsageError(f"--plot {path}: {exc.strerror}") from exc
