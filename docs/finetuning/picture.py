"""The picture of what is kept against what is learned."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

COLOURS = {
    "AdamW": "#D55E00",
    "averaging": "#E69F00",
    "EWC": "#009E73",
    "LoRA": "#CC79A7",
    "replay of 1 %": "#000000",
    "protect(AdamW), frozen": "#56B4E9",
    "CLASSP, filled": "#7B2D8B",
    "EWC, merged by importance": "#0072B2",
}
"""Okabe and Ito's and a violet; the methods that are not named here are grey."""


def drawn(
    problem: str,
    frontiers: Mapping[str, Sequence[tuple[float, float]]],
    kept: Mapping[str, np.ndarray],
    target: float,
    seeds: int,
) -> Figure:
    """Each method's points (old, new), and what each seed kept at the target."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    known = {name: x for name, x in kept.items() if np.isfinite(x).any()}
    by_mean = sorted(known, key=lambda name: np.nanmean(known[name]))
    for method, points in frontiers.items():
        colour = COLOURS.get(method, "0.7")
        style, order = ("-", 2) if method in COLOURS else ("--", 1)
        old, new = np.array(points).T
        label = method if method in COLOURS else None
        left.plot(new, old, style, color=colour, zorder=order, label=label)
    for row, method in enumerate(by_mean):
        colour = COLOURS.get(method, "0.7")
        x = known[method]
        right.plot(x, np.full(len(x), row), "o", mfc="none", color=colour)
        right.plot(np.nanmean(x), row, "|", ms=16, mew=2.5, color=colour)
    left.legend(frameon=False, fontsize=8, loc="lower left")
    right.set_yticks(range(len(by_mean)), by_mean)
    for label in right.get_yticklabels():
        label.set_color(COLOURS.get(label.get_text(), "0.45"))
    unit = " %" if target > 0 else ""  # else hundredths of a nat a word
    left.set(
        title=f"every setting, mean of {seeds} seeds, test data ({problem})",
        xlabel="new ability",
        ylabel="old ability kept",
    )
    right.set(
        title=f"chosen settings at {target:.0f}{unit} new ability, test data",
        xlabel="old ability kept",
    )
    for axis in (left, right):
        axis.grid(color="0.92")
    return figure
