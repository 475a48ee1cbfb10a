"""The picture of accuracy against the size of the state."""

import math
import textwrap
from typing import Any, NamedTuple

import adjustText
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from classp_jax.continual.report.styles import (
    WIDTH,
    Style,
    literal,
    method_styles,
    with_left_out,
)
from classp_jax.continual.results.records import Results
from classp_jax.continual.results.statistics import Row, rows


class _Point(NamedTuple):
    label: str
    x: float
    y: float
    sd: float


def tradeoff_picture(results: Results) -> Figure:
    """Average accuracy against the size of the state, a mark per method."""
    look = method_styles(results)
    figure = Figure(figsize=(0.8 * WIDTH, 5.0), layout="constrained")
    axes = figure.add_subplot()
    points = [
        point
        for row in rows(results)
        if (point := _draw(axes, row, look[row.label])) is not None
    ]
    _scale_bytes(axes, max((point.x for point in points), default=0.0))
    axes.margins(y=0.12)
    axes.grid()
    axes.set_xlabel(
        with_left_out("optimizer and method state (bytes per parameter)", results)
    )
    axes.set_ylabel("average accuracy after the last task (%)")
    mark: dict[str, Any] = {"ls": "", "marker": "o", "color": "0.3", "mew": 1.5}
    axes.legend(
        handles=[
            Line2D([], [], **mark, label="task boundary not known"),
            Line2D([], [], **mark, mfc="white", label="task boundary known"),
        ],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=2,
    )
    _label(figure, axes, points)
    return figure


def _draw(axes: Axes, row: Row, style: Style) -> _Point | None:
    state = row.estimates["state_bytes_per_parameter"]
    accuracy = row.estimates["average_accuracy"]
    if state is None or accuracy is None:
        return None
    x, y, sd = state.mean, 100 * accuracy.mean, 100 * accuracy.sd
    if not (math.isfinite(x) and math.isfinite(y)):
        return None
    sd = sd if math.isfinite(sd) else 0.0
    if sd:
        axes.errorbar(x, y, sd, color=style.color, lw=1.2, capsize=2.5)
    known = row.task_boundary_known
    axes.plot(
        x,
        y,
        color=style.color,
        marker=style.marker,
        ms=8 if known else 10,
        mfc="white" if known else style.color,
        # A white edge keeps marks apart that lie on each other.
        mec=style.color if known else "white",
        mew=1.5 if known else 0.7,
        zorder=3,
    )
    return _Point(row.label, x, y, sd)


def _scale_bytes(axes: Axes, largest: float) -> None:
    """Sets the x axis: linear, or logarithmic above 4 bytes where one is far out."""
    if largest <= 24:
        room = max(largest, 4)
        axes.set_xlim(-0.06 * room, 1.3 * room)
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 4, 5, 10]))
        return
    axes.set_xscale("symlog", base=2, linthresh=4)
    # Every power of 2, or of 4 and so on where these would be too many.
    step = math.ceil(math.log2(largest / 4) / 8)
    powers = range(2, math.ceil(math.log2(largest)) + 1, step)
    axes.xaxis.set_major_locator(FixedLocator([0, 2, *(2**k for k in powers)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(-0.6, largest * 2)


def _label(figure: Figure, axes: Axes, points: list[_Point]) -> None:
    """Writes each point's name beside it, where it overlaps nothing."""
    if not points:
        return
    # Positions in pixels are known only after the layout, which must not change then.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    centers = axes.transData.transform([(point.x, point.y) for point in points])
    # They begin at the right of their marks, where most can stay.
    begin = axes.transData.inverted().transform(
        centers + np.array([0.14 * figure.dpi, 0])
    )
    texts = [
        axes.text(
            x,
            y,
            literal("\n".join(textwrap.wrap(point.label, 24))),
            fontsize=9,
            linespacing=0.95,
            va="center",
        )
        for point, (x, y) in zip(points, begin, strict=True)
    ]
    # Error bars and marks, as points that no text may cover.
    bars = [
        (point.x, y)
        for point in points
        for y in np.linspace(point.y - point.sd, point.y + point.sd, 7)
    ]
    angles = np.linspace(0, 2 * np.pi, 8, endpoint=False)
    ring = 7 * figure.dpi / 72 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    marks = axes.transData.inverted().transform(
        (centers[:, None] + ring).reshape(-1, 2)
    )
    adjustText.adjust_text(
        texts,
        *np.transpose([*bars, *marks]),
        target_x=[point.x for point in points],
        target_y=[point.y for point in points],
        avoid_self=False,
        ax=axes,
        expand=(1.08, 1.2),
        force_text=(0.3, 0.5),
        force_static=(1.0, 1.0),
        # It swaps texts, also onto marks.
        prevent_crossings=False,
        # By count, not by time: the same results give the same picture.
        iter_lim=150,
        arrowprops={"arrowstyle": "-", "color": "0.5", "lw": 0.7, "shrinkB": 4},
    )
