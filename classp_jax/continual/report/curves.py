"""The picture of accuracy while training goes on."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from classp_jax.continual.report.align import Curves, aligned, drawn
from classp_jax.continual.report.styles import (
    FONT_SIZE,
    WIDTH,
    Style,
    literal,
    method_styles,
    shortened,
    with_left_out,
)
from classp_jax.continual.results.records import Results
from classp_jax.continual.results.variants import variants

_MAX_PANELS = 12
# Tasks, beyond which lines at their ends would be all that one sees: in the upper
# panel, in the small ones.
_MAX_BOUNDARIES = (25, 10)
_X_LABEL = "training (tasks)"


def accuracy_picture(results: Results) -> Figure:
    """Curves: the average over the tasks seen so far, then a panel per task.

    The x axis counts tasks. The upper panel begins at the end of the first task: how
    that one is learned from nothing would take most of its scale, and is in the task's
    own panel. Beyond 12 tasks, 12 evenly spaced ones have a panel.
    """
    names = results.stream["task_names"]
    look = method_styles(results)
    curves = {label: aligned(v.runs) for label, v in drawn(results).items()}
    # With one task, its panel would be the upper one once more.
    shown = _evenly(len(names), _MAX_PANELS) if len(names) > 1 else []
    columns = num_columns(len(shown))
    num_rows = math.ceil(len(shown) / columns)
    heights = [max(3.0, 0.8 + 0.21 * len(curves))]
    heights += [0.6 + 1.7 * num_rows] if shown else []
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)
    top = parts[0, 0].add_subplot()
    panels: list[Axes] = []
    if shown:
        grid = list(parts[1, 0].subplots(num_rows, columns, squeeze=False).flat)
        panels = grid[: len(shown)]
        for panel in grid[len(shown) :]:
            panel.set_axis_off()

    for label, curve in curves.items():
        later = curve.positions >= min(1, len(names) - 1)
        positions, seen = curve.positions[later], curve.seen[:, later]
        _draw(top, positions, seen, look[label], 1.8, label)
        for panel, task in zip(panels, shown, strict=True):
            values = curve.tasks[:, :, task]
            _draw(panel, curve.positions, values, look[label], 1.2, label)

    _finish_axes(top, min(1, len(names) - 1), len(names), 10, _MAX_BOUNDARIES[0])
    top.set_ylim(_lowest([top], 5), 100.5)
    low = _lowest(panels, 25)
    for i, (panel, task) in enumerate(zip(panels, shown, strict=True)):
        _finish_axes(panel, 0, len(names), 4, _MAX_BOUNDARIES[1])
        panel.set_ylim(low - 1, 101)
        panel.set_yticks(range(low, 101, 25))
        panel.axvspan(task, task + 1, color="0.92", lw=0, zorder=0)
        number = f"task {task + 1}"
        name = number if names[task] == number else f"{number}: {names[task]}"
        panel.set_title(shortened(name, 96 // columns), loc="left")
        panel.tick_params(
            labelleft=i % columns == 0, labelbottom=i + columns >= len(panels)
        )
    title = "average over the tasks seen so far" if shown else names[0]
    top.set_title(literal(title), loc="left", weight="bold")
    top.set_title(_band_note(results), loc="right", fontsize=9, color="0.3")
    top.set_ylabel("test accuracy (%)")
    if shown:
        top.set_xlabel(_X_LABEL)
        parts[1, 0].supylabel("test accuracy (%)", fontsize=FONT_SIZE)
    parts[-1, 0].supxlabel(with_left_out(_X_LABEL, results), fontsize=FONT_SIZE)
    _add_key(top, curves, look)
    return figure


def num_columns(count: int) -> int:
    """Two columns for few panels, four for many, else whichever leaves fewer holes."""
    if count <= 2:
        return 2
    if count > 9:
        return 4
    return min((4, 3), key=lambda columns: -count % columns)


def _evenly(count: int, limit: int) -> list[int]:
    """``range(count)``, thinned to ``limit`` evenly spaced numbers if it is longer."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, limit))})


def _lowest(panels: list[Axes], step: int) -> int:
    """A multiple of ``step`` that lies below all curves and bands."""
    lows = [panel.dataLim.y0 for panel in panels]
    low = min((y for y in lows if np.isfinite(y)), default=0.0)
    return max(0, step * math.floor((low - 1) / step))


def _draw(
    axes: Axes,
    positions: np.ndarray,
    values: np.ndarray,
    style: Style,
    width: float,
    label: str,
) -> None:
    """The mean over seeds as a line and one sd as a band; values [seeds, points]."""
    if not values.size:
        return
    mean = np.mean(values, axis=0)
    known = np.isfinite(mean)
    positions, mean, values = positions[known], mean[known], values[:, known]
    axes.plot(
        positions,
        mean,
        color=style.color,
        ls=style.line,
        lw=width,
        label=label,
        # A method that was evaluated once has a point instead of a line.
        marker=style.marker if len(positions) == 1 else "",
        clip_on=len(positions) != 1,
        zorder=3 if len(positions) == 1 else 2,
    )
    if len(values) > 1 and len(positions):
        sd = np.std(values, axis=0, ddof=1)
        low, high = np.clip([mean - sd, mean + sd], 0, 100)
        axes.fill_between(positions, low, high, color=style.color, alpha=0.13, lw=0)


def _finish_axes(
    axes: Axes, start: float, num_tasks: int, ticks: int, max_boundaries: int
) -> None:
    if num_tasks <= max_boundaries:
        for end in range(1, num_tasks):
            axes.axvline(end, color="0.75", lw=0.7, zorder=0.5)
    axes.set_xlim(start, num_tasks)
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))


def _add_key(axes: Axes, curves: dict[str, Curves], look: dict[str, Style]) -> None:
    """Names the curves at their right, in the order in which they end."""
    finals = {}
    for label, curve in curves.items():
        mean = np.mean(curve.seen, axis=0) if curve.seen.size else np.zeros(0)
        known = mean[np.isfinite(mean)]
        if known.size:
            finals[label] = (known[-1], len(known))
    order = sorted(finals, key=lambda label: -finals[label][0])
    if not order:
        return
    handles = [
        Line2D(
            [],
            [],
            color=look[label].color,
            ls=look[label].line if finals[label][1] > 1 else "",
            marker=look[label].marker if finals[label][1] == 1 else "",
            lw=1.8,
            label=shortened(label, 36),
        )
        for label in order
    ]
    axes.legend(
        handles=handles,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        labelspacing=0.25,
        handlelength=2.6,
        borderaxespad=0,
    )


def _band_note(results: Results) -> str:
    """What the bands mean."""
    counts = {len(variant.runs) for variant in variants(results.runs)}
    if max(counts) == 1:
        return ""
    seeds = f"{max(counts)} seeds" if len(counts) == 1 else "the seeds"
    return f"mean ± sd over {seeds}"
