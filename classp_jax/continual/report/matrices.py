"""The picture of the accuracy matrices."""

import itertools
import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from classp_jax.continual.report.align import drawn
from classp_jax.continual.report.curves import num_columns
from classp_jax.continual.report.styles import (
    FONT_SIZE,
    WIDTH,
    shortened,
    with_left_out,
)
from classp_jax.continual.results.records import Results

_MAX_NUMBERED = 12  # tasks, beyond which a cell is too small for its number


def matrix_picture(results: Results) -> Figure:
    """Heat maps: a panel per method, the mean of R over its seeds."""
    num_tasks = len(results.stream["task_names"])
    methods = drawn(results)
    columns = num_columns(len(methods)) if len(methods) > 1 else 1
    if num_tasks > 6:
        # Cells must be wide enough for their numbers.
        columns = min(columns, 3)
    num_rows = max(1, math.ceil(len(methods) / columns))
    size = min(3.3, 1.6 + 0.4 * num_tasks, WIDTH / columns)
    figure = Figure(
        figsize=(min(WIDTH, size * columns + 1), 0.7 + size * num_rows),
        layout="constrained",
    )
    panels = list(figure.subplots(num_rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.set_axis_off()
    cmap = matplotlib.colormaps["cividis"].with_extremes(bad="0.92")
    means = [
        100 * np.mean([r.matrix for r in v.runs], axis=0) for v in methods.values()
    ]
    known = [value for R in means for value in R.flat if np.isfinite(value)]
    norm = Normalize(10 * math.floor(min(known, default=0) / 10.001), 100)
    # The row before training takes part where anything in it was evaluated.
    first = 0 if any(np.isfinite(R[0]).any() for R in means) else 1
    for i, (label, R) in enumerate(zip(methods, means, strict=True)):
        panels[i].set_axis_on()
        panels[i].imshow(R, cmap=cmap, norm=norm, aspect="auto")
        panels[i].set_title(shortened(label, int(11 * size)), loc="left")
        _finish_axes(panels[i], R)
        panels[i].set_ylim(num_tasks + 0.5, first - 0.5)
        if num_tasks <= _MAX_NUMBERED:
            _write_numbers(panels[i], R, norm, 9 if num_tasks <= 6 else 7)
        panels[i].tick_params(labelleft=i % columns == 0)
    bar = figure.colorbar(
        ScalarMappable(norm, cmap), ax=panels, shrink=min(1, 3 / (size * num_rows))
    )
    bar.set_label("test accuracy (%)")
    figure.supxlabel(
        with_left_out("test accuracy on task", results), fontsize=FONT_SIZE
    )
    figure.supylabel("after training on task", fontsize=FONT_SIZE)
    return figure


def _finish_axes(axes: Axes, R: np.ndarray) -> None:
    num_tasks = R.shape[1]
    if np.isfinite(np.triu(R)[:-1]).all() and num_tasks <= _MAX_NUMBERED:
        # Between the cells of tasks trained by then, and those still to come.
        axes.plot(
            np.repeat(np.arange(num_tasks + 1), 2)[1:-1] - 0.5,
            np.repeat(np.arange(num_tasks), 2) + 0.5,
            color="white",
            lw=1.5,
        )
    least = num_tasks / _MAX_NUMBERED
    step = next(
        s for s in itertools.chain([1, 2, 5], itertools.count(10, 10)) if s >= least
    )
    ticks = range(step - 1, num_tasks, step)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=2)
    axes.set_xticks(ticks, [str(task + 1) for task in ticks])
    axes.set_yticks(
        [0, *(task + 1 for task in ticks)], ["none", *(str(task + 1) for task in ticks)]
    )
    axes.set_xlim(-0.5, num_tasks - 0.5)


def _write_numbers(axes: Axes, R: np.ndarray, norm: Normalize, size: float) -> None:
    for (row, column), value in np.ndenumerate(R):
        if np.isfinite(value):
            axes.text(
                column,
                row,
                f"{value:.0f}",
                ha="center",
                va="center",
                fontsize=size,
                color="white" if norm(value) < 0.55 else "black",
            )
