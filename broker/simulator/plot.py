"""The picture of a sweep. Knows matplotlib, which is optional; nothing else imports it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from penstock.broker.simulator.experiment import Setup
from penstock.broker.simulator.sweep import Series

COLOURS: Final = ("#8a8f98", "#0b6e99")
"""What is compared with, and what was chosen."""


class PlotError(Exception):
    """No picture can be drawn; the text says what to do."""


def check(path: Path) -> None:
    """Whether a picture can be drawn there, asked before anything takes long.

    Raises:
        PlotError: what to install, or why not there.
    """
    if not path.parent.is_dir() or path.is_dir():
        raise PlotError(f"--plot {path}: there is no such folder, or it is one itself")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PlotError("--plot needs matplotlib: pip install 'penstock[plot]'") from None


def draw(setup: Setup, series: Sequence[Series], path: Path) -> None:
    """Latency above, throughput below, against the offered load; as the kind of file that the name says.

    Raises:
        PlotError: the file cannot be written, or pictures of its kind.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(8, 7.5), sharex=True, height_ratios=(3, 2), layout="constrained"
    )  # fmt: skip
    for one, colour in zip(series, COLOURS[-len(series) :], strict=True):
        _draw_one(above, below, one, colour)
    _finish(setup, series, figure, above, below)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as e:
        raise PlotError(f"cannot write {path}: {e}") from e
    finally:
        pyplot.close(figure)


def _draw_one(above: Any, below: Any, one: Series, colour: str) -> None:
    means = [point["latency"]["mean"] for point in one.points]
    tails = [point["latency"]["p95"] for point in one.points]
    above.plot(one.rates, tails, "--", color=colour, marker="o", markersize=3.5, linewidth=1.5, label=f"{one.label}: p95")
    above.plot(one.rates, means, "-", color=colour, marker="o", markersize=3.5, linewidth=2, label=f"{one.label}: mean")
    served = [point["goodput"] for point in one.points]
    label = f"{one.label}: capacity {one.capacity:.4g} (dotted)"
    below.plot(one.rates, served, "-", color=colour, marker="o", markersize=3.5, linewidth=2, label=label)
    for axis in (above, below):
        axis.axvline(one.capacity, color=colour, linewidth=1, linestyle=":")


def _finish(setup: Setup, series: Sequence[Series], figure: Any, above: Any, below: Any) -> None:
    unit, rates = setup.unit, series[-1].rates
    below.plot([0, rates[-1]], [0, rates[-1]], color="black", linewidth=0.8, alpha=0.4, zorder=0, label="all that is offered")
    above.set_yscale("log")
    above.set_ylabel(f"latency ({unit})")
    below.set_ylabel(f"throughput (tasks/{unit})")
    below.set_xlabel(f"offered load (tasks/{unit})")
    below.set_xlim(0, rates[-1] * 1.02)
    below.set_ylim(bottom=0)
    for axis in (above, below):
        axis.grid(True, which="major", alpha=0.25)
        axis.legend(loc="upper left", fontsize=9, framealpha=0.9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{setup.service.text} {unit}, batches of {setup.batch_size}, servers: {setup.num_servers}, policy {setup.policy}",
        fontsize=11,
    )
