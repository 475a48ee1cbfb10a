"""The picture of what a method can be set to: learning the new, keeping the old."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from classp_jax.continual.report.styles import RC, WIDTH, literal, styles


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of some points that no other one beats in both numbers, by the first.

    Example:
      >>> frontier([(0.5, 0.2), (0.4, 0.9), (0.4, 0.1), (0.7, 0.2)])
      [(0.4, 0.9), (0.7, 0.2)]
    """
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points, reverse=True):
        if not kept or y > kept[-1][1]:
            kept.append((x, y))
    return kept[::-1]


def frontier_picture(
    points: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str
) -> Figure:
    """One curve a method: the best that its settings reach, of two accuracies.

    Args:
      points: of each method, two accuracies for each of its settings, in [0, 1].
      xlabel: what the first is, such as that on the newest task.
      ylabel: what the second is, such as that on a task learned long ago.

    Returns:
      A matplotlib figure, not known to pyplot: a mark for each setting that no other
      one of the method beats in both, joined by lines, and a pale dot for the others.
    """
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(0.8 * WIDTH, 5.5), layout="constrained")
        axes = figure.add_subplot()
        for name, look in styles(list(points)).items():
            every = 100 * np.array(points[name], float).reshape(-1, 2)
            best = np.array(frontier([(x, y) for x, y in every.tolist()])).reshape(
                -1, 2
            )
            axes.plot(*every.T, ls="", marker=".", ms=4, color=look.color, alpha=0.3)
            axes.plot(
                *best.T,
                color=look.color,
                ls=look.line,
                marker=look.marker,
                ms=7,
                mec="white",
                mew=0.7,
                lw=1.5,
                label=literal(name),
            )
        axes.grid()
        axes.set_xlabel(f"{xlabel} (%)")
        axes.set_ylabel(f"{ylabel} (%)")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
