"""The three pictures of a report."""

import itertools
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from scipy.optimize import isotonic_regression

from classp_jax.continual.results import Results, Run
from classp_jax.continual.summary import rows


class Style(NamedTuple):
    """How a method is drawn, the same in every picture."""

    color: str
    line: str
    marker: str


# Okabe & Ito's colour-blind safe palette without its yellow, which vanishes on white.
_BLACK, _ORANGE, _SKY, _GREEN, _BLUE, _VERMILLION, _PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)

# The bounds are black; a variant has its method's colour, with another line.
_STYLES = {
    "sgd": Style(_BLACK, "-", "o"),
    "joint": Style(_BLACK, "--", "p"),
    "adam": Style(_ORANGE, "-", "s"),
    "adagrad": Style(_GREEN, "-", "D"),
    "classp": Style(_VERMILLION, "-", "^"),
    "classp-published": Style(_VERMILLION, "--", "v"),
    "ewc": Style(_BLUE, "-", "P"),
    "online-ewc": Style(_BLUE, "--", "X"),
    "si": Style(_PURPLE, "-", "h"),
    "replay": Style(_SKY, "-", "<"),
    "ewc+classp": Style(_PURPLE, "--", ">"),
}
_SPARE_STYLES = tuple(
    Style(color, line, marker)
    for line, marker in (("--", "*"), ("-.", "d"), (":", "8"), ("-", "H"))
    for color in (_GREEN, _ORANGE, _SKY, _PURPLE, _BLUE, _VERMILLION, _BLACK)
)


def styles(methods: Sequence[str]) -> dict[str, Style]:
    """Colour, line and marker of every method.

    The methods of this package always look the same; others take what is spare, in
    their order.

    Example:
      >>> styles(["classp", "mine"])["classp"].color
      '#D55E00'
    """
    chosen = {method: _STYLES[method] for method in methods if method in _STYLES}
    used = {(style.color, style.line) for style in chosen.values()}
    spare = itertools.cycle([s for s in _SPARE_STYLES if (s.color, s.line) not in used])
    return {m: chosen[m] if m in chosen else next(spare) for m in methods}


def picture(results: Results, name: str) -> Figure:
    """One picture of the report, for a notebook or a file of another format.

    Args:
      results: the runs, at least one.
      name: ``"accuracy.png"``, ``"matrix.png"`` or ``"tradeoff.png"``.

    Returns:
      A matplotlib figure, not known to pyplot.

    Raises:
      ValueError: if ``name`` is another.
    """
    if name not in PICTURES:
        raise ValueError(f"name must be one of {', '.join(PICTURES)}, got {name!r}.")
    # The user's own matplotlibrc must not change what the report looks like.
    with matplotlib.rc_context(_RC):
        return PICTURES[name].draw(results)


_RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.usetex": False,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.edgecolor": "0.4",
    "axes.facecolor": "white",
    "axes.axisbelow": True,
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "savefig.dpi": 150,
    "xtick.color": "0.4",
    "xtick.labelcolor": "0.15",
    "xtick.labelsize": 9,
    "ytick.color": "0.4",
    "ytick.labelcolor": "0.15",
    "ytick.labelsize": 9,
}
_WIDTH = 10.0  # inches
_FONT_SIZE = 10  # points
_MAX_PANELS = 24
_MAX_NUMBERED = 12  # tasks, beyond which a cell is too small for its number


def _literal(text: str) -> str:
    """Text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def _drawn(results: Results) -> dict[str, list[Run]]:
    """The runs of every method that has no diverged seed."""
    runs: dict[str, list[Run]] = {}
    for run in results.runs:
        runs.setdefault(run.method, []).append(run)
    return {m: group for m, group in runs.items() if not any(r.diverged for r in group)}


def _with_left_out(label: str, results: Results) -> str:
    """An axis label, with a line below it on the methods that are not drawn."""
    left_out = [
        f"{row.method} ({row.diverged} of {len(row.seeds)} seeds)"
        for row in rows(results)
        if row.diverged
    ]
    if not left_out:
        return label
    note = textwrap.fill(f"Not drawn because diverged: {', '.join(left_out)}", 100)
    return f"{label}\n{_literal(note)}"


def _method_styles(results: Results) -> dict[str, Style]:
    # From all methods, so that a colour does not depend on who diverged.
    return styles([row.method for row in rows(results)])


def _evenly(count: int, limit: int) -> list[int]:
    """``range(count)``, thinned to ``limit`` evenly spaced numbers if it is longer."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, limit))})


def _num_columns(count: int) -> int:
    """Three or four columns, whichever leaves fewer holes; two for few panels."""
    if count <= 2:
        return 2
    return min((4, 3), key=lambda columns: -count % columns)


def _accuracy_picture(results: Results) -> Figure:
    """Curves: the average over the tasks seen so far, then a panel a task."""
    names, ends = results.stream["task_names"], results.stream["task_ends"]
    starts = [0, *ends[:-1]]
    look = _method_styles(results)
    curves = {method: _curve(runs) for method, runs in _drawn(results).items()}
    shown = _evenly(len(names), _MAX_PANELS)
    columns = _num_columns(len(shown))
    num_rows = math.ceil(len(shown) / columns)
    # The names beside the upper panel must find room above each other.
    heights = (max(3.0, 0.8 + 0.21 * len(curves)), 0.5 + 1.7 * num_rows)
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    parts = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
    upper, lower = parts[:, 0]
    top = upper.add_subplot()
    grid = lower.subplots(num_rows, columns, squeeze=False)
    panels = list(grid.flat)[: len(shown)]
    for panel in list(grid.flat)[len(shown) :]:
        panel.set_axis_off()
    last = max([ends[-1], *(steps[-1] for steps, _ in curves.values() if len(steps))])

    lows = []
    for method, (steps, values) in curves.items():
        average = _seen_average(steps, values, starts)
        _draw_curve(top, steps, average, method, look[method], 1.8)
        # How the first task is learned from nothing would take most of the scale.
        later = np.mean(average, axis=0)[steps > ends[0]]
        lows += list(later[np.isfinite(later)])
        for panel, task in zip(panels, shown, strict=True):
            _draw_curve(panel, steps, values[:, :, task], method, look[method], 1.2)

    for i, panel in enumerate([top, *panels]):
        for end in ends[:-1]:
            panel.axvline(end, color="0.75", lw=0.7, zorder=0.5)
        panel.set_xlim(0, last)
        panel.set_ylim(0, 100)
        if panel is not top:
            panel.set_yticks(range(0, 101, 25))
        panel.grid(axis="y")
        panel.xaxis.set_major_locator(MaxNLocator(4 if i else 10, integer=True))
        panel.xaxis.set_major_formatter(_step_label)
    for i, (panel, task) in enumerate(zip(panels, shown, strict=True)):
        panel.axvspan(starts[task], ends[task], color="0.92", lw=0, zorder=0)
        name = textwrap.shorten(names[task], 80 // columns, placeholder="...")
        panel.set_title(_literal(f"task {task + 1}: {name}"), loc="left")
        if i % columns:
            panel.tick_params(labelleft=False)
        if i + columns < len(panels):
            panel.tick_params(labelbottom=False)

    top.set_title("average over the tasks seen so far", loc="left", weight="bold")
    top.set_title(_band_note(results), loc="right", fontsize=9, color="0.3")
    top.set_xlabel("training step (batches)")
    top.set_ylabel("test accuracy (%)")
    lower.supylabel("test accuracy (%)", fontsize=_FONT_SIZE)
    lower.supxlabel(
        _with_left_out("training step (batches)", results), fontsize=_FONT_SIZE
    )
    top.set_ylim(10 * math.floor(max(0.0, min(lows, default=0.0) - 2) / 10), 100)
    _label_line_ends(top, look, heights[0] - 0.9)
    return figure


def _curve(runs: list[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Steps that all seeds have, [points]; accuracies in %, [seeds, points, N]."""
    common = sorted(set.intersection(*(set(run.curve_steps) for run in runs)))
    points = [dict(zip(run.curve_steps, run.curve, strict=True)) for run in runs]
    values = [[curve[step] for step in common] for curve in points]
    shape = (len(runs), len(common), len(runs[0].matrix[0]))
    return np.asarray(common), 100 * np.reshape(np.asarray(values, float), shape)


def _seen_average(
    steps: np.ndarray, values: np.ndarray, starts: Sequence[int]
) -> np.ndarray:
    """The mean over the tasks whose training began before each step, [seeds, points].

    NaN before the first step of all.
    """
    averages = np.full(values.shape[:2], np.nan)
    for i, step in enumerate(steps):
        count = sum(step > start for start in starts)
        if count:
            averages[:, i] = np.mean(values[:, i, :count], axis=1)
    return averages


def _draw_curve(
    axes: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    method: str,
    style: Style,
    width: float,
) -> None:
    """The mean over seeds as a line and one sd as a band; values [seeds, points]."""
    mean = np.mean(values, axis=0)
    known = np.isfinite(mean)
    steps, mean, values = steps[known], mean[known], values[:, known]
    axes.plot(
        steps,
        mean,
        color=style.color,
        ls=style.line,
        lw=width,
        label=method,
        # A method that was evaluated once has a point instead of a line.
        marker=style.marker if len(steps) == 1 else "",
        clip_on=len(steps) != 1,
    )
    if len(values) > 1:
        sd = np.std(values, axis=0, ddof=1)
        axes.fill_between(
            steps, mean - sd, mean + sd, color=style.color, alpha=0.13, lw=0
        )


def _label_line_ends(axes: Axes, look: dict[str, Style], height: float) -> None:
    """Names every line at its right end, spread so that the names do not overlap.

    Args:
      axes: with a line a method whose label is the method.
      look: the methods' styles.
      height: the height of ``axes`` in inches, or less.
    """
    ends = {}
    for line in axes.get_lines():
        method, data = str(line.get_label()), line.get_ydata()
        if method in look and len(np.atleast_1d(data)):
            ends[method] = float(np.atleast_1d(data)[-1])
    order = sorted(ends, key=ends.__getitem__)
    if not order:
        return
    low, high = axes.get_ylim()
    gap = (high - low) * 1.25 * _FONT_SIZE / 72 / height
    # The nearest places (least squares) that keep their order and the gap.
    offsets = gap * np.arange(len(order))
    wanted = [ends[method] for method in order] - offsets
    places = np.clip(isotonic_regression(wanted).x, low, high - offsets[-1]) + offsets
    for method, place in zip(order, places, strict=True):
        style = look[method]
        # The line goes on to its name; this is the key to its dashes, too.
        axes.plot(
            [1.0, 1.02, 1.06],
            [ends[method], place, place],
            transform=axes.get_yaxis_transform(),
            color=style.color,
            ls=style.line,
            lw=1.5,
            clip_on=False,
        )
        axes.text(
            1.067,
            place,
            _literal(method),
            transform=axes.get_yaxis_transform(),
            va="center_baseline",
        )


def _band_note(results: Results) -> str:
    """What band and shade mean."""
    counts = {len(row.seeds) for row in rows(results)}
    note = "shaded: task in training"
    if max(counts) == 1:
        return note
    seeds = f"{max(counts)} seeds" if len(counts) == 1 else "the seeds"
    return f"mean ± sd over {seeds}; {note}"


def _step_label(step: float, _: Any) -> str:
    return f"{step / 1000:g}k" if step >= 10_000 else f"{step:g}"


def _matrix_picture(results: Results) -> Figure:
    """Heat maps: a panel a method, the mean of R over its seeds."""
    num_tasks = len(results.stream["task_names"])
    drawn = _drawn(results)
    columns = _num_columns(len(drawn)) if len(drawn) > 1 else 1
    if num_tasks > 6:
        # Cells must be wide enough for their numbers.
        columns = min(columns, 3)
    num_rows = max(1, math.ceil(len(drawn) / columns))
    size = min(3.3, _WIDTH / columns)
    figure = Figure(
        figsize=(min(_WIDTH, size * columns + 1), 0.6 + size * num_rows),
        layout="constrained",
    )
    panels = figure.subplots(num_rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    cmap = matplotlib.colormaps["cividis"].with_extremes(bad="0.92")
    norm = Normalize(0, 100)
    step = math.ceil(num_tasks / _MAX_NUMBERED)
    ticks = range(step - 1, num_tasks, step)
    # Between the cells of tasks trained by then, and those still to come.
    stairs_x = np.repeat(np.arange(num_tasks + 1), 2)[1:-1] - 0.5
    stairs_y = np.repeat(np.arange(num_tasks), 2) + 0.5
    for i, (method, runs) in enumerate(drawn.items()):
        panel: Axes = panels.flat[i]
        R = 100 * np.mean([run.matrix for run in runs], axis=0)
        panel.set_axis_on()
        panel.imshow(R, cmap=cmap, norm=norm, aspect="auto")
        panel.plot(stairs_x, stairs_y, color="white", lw=1.5)
        panel.set_title(_literal(method), loc="left")
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0, pad=2)
        panel.set_xticks(ticks, [str(task + 1) for task in ticks])
        panel.set_yticks(
            [0, *(task + 1 for task in ticks)],
            ["none", *(str(task + 1) for task in ticks)],
        )
        panel.set_xlim(-0.5, num_tasks - 0.5)
        panel.set_ylim(num_tasks + 0.5, -0.5)
        if i % columns:
            panel.tick_params(labelleft=False)
        if num_tasks <= _MAX_NUMBERED:
            _write_numbers(panel, R, 9 if num_tasks <= 6 else 7)
    bar = figure.colorbar(
        ScalarMappable(norm, cmap), ax=panels, shrink=min(1, 3 / (size * num_rows))
    )
    bar.set_label("test accuracy (%)")
    figure.supxlabel(
        _with_left_out("test accuracy on task (below the line: trained)", results),
        fontsize=_FONT_SIZE,
    )
    figure.supylabel("after training on task", fontsize=_FONT_SIZE)
    return figure


def _write_numbers(axes: Axes, R: np.ndarray, size: float) -> None:
    for (row, column), value in np.ndenumerate(R):
        if np.isfinite(value):
            axes.text(
                column,
                row,
                f"{value:.0f}",
                ha="center",
                va="center",
                fontsize=size,
                color="white" if value < 55 else "black",
            )


def _tradeoff_picture(results: Results) -> Figure:
    """Average accuracy over the size of the state, a mark a method."""
    look = _method_styles(results)
    figure = Figure(figsize=(0.8 * _WIDTH, 5.0), layout="constrained")
    axes = figure.add_subplot()
    points = []
    for row in rows(results):
        state = row.statistics["state_bytes_per_parameter"]
        accuracy = row.statistics["average_accuracy"]
        if state is None or accuracy is None:
            continue
        x, y, sd = state.mean, 100 * accuracy.mean, 100 * accuracy.sd
        if not (math.isfinite(x) and math.isfinite(y)):
            continue
        style = look[row.method]
        sd = sd if math.isfinite(sd) else 0.0
        if sd:
            axes.errorbar(x, y, sd, color=style.color, lw=1.2, capsize=2.5)
        told = row.told_boundary
        axes.plot(
            x,
            y,
            color=style.color,
            marker=style.marker,
            ms=8 if told else 10,
            mfc="white" if told else style.color,
            # A white edge keeps marks apart that lie on each other.
            mec=style.color if told else "white",
            mew=1.5 if told else 0.7,
            zorder=3,
        )
        points.append(_Point(row.method, x, y, sd))
    _scale_bytes(axes, max((point.x for point in points), default=0.0))
    axes.margins(y=0.12)
    axes.grid()
    axes.set_xlabel(
        _with_left_out("optimizer and method state (bytes per parameter)", results)
    )
    axes.set_ylabel("average accuracy after the last task (%)")
    mark: dict[str, Any] = {"ls": "", "marker": "o", "color": "0.3", "mew": 1.5}
    axes.legend(
        handles=[
            Line2D([], [], **mark, label="not told of task boundaries"),
            Line2D([], [], **mark, mfc="white", label="told of task boundaries"),
        ],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=2,
    )
    _label_points(figure, axes, points)
    return figure


class _Point(NamedTuple):
    name: str
    x: float
    y: float
    sd: float


def _scale_bytes(axes: Axes, largest: float) -> None:
    """Sets the x axis: linear, or logarithmic above 4 bytes where one is far out."""
    if largest <= 24:
        room = max(largest, 4)
        axes.set_xlim(-0.06 * room, 1.15 * room)
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 4, 5, 10]))
        return
    axes.set_xscale("symlog", base=2, linthresh=4)
    # Every power of 2, or of 4 and so on where these would be too many.
    step = math.ceil(math.log2(largest / 4) / 8)
    powers = range(2, math.ceil(math.log2(largest)) + 1, step)
    axes.xaxis.set_major_locator(FixedLocator([0, 2, *(2**k for k in powers)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(-0.6, largest * 1.5)


def _label_points(figure: Figure, axes: Axes, points: list[_Point]) -> None:
    """Writes each point's name at the nearest place where it overlaps nothing."""
    # Positions in pixels are known only after the layout, which must not change then.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    scale = figure.dpi / 72
    frame = axes.get_window_extent()
    taken: list[Bbox] = []
    leaders: list[np.ndarray] = []
    for _, x, y, sd in points:
        (px, py), (_, low), (_, high) = axes.transData.transform(
            [(x, y), (x, y - sd), (x, y + sd)]
        )
        taken.append(_box(px, py, 12 * scale, 12 * scale))
        taken.append(Bbox.from_extents(px - 3 * scale, low, px + 3 * scale, high))
    # From the top, so that in a crowd names keep the order of their points.
    for name, x, y, _ in sorted(points, key=lambda point: -point.y):
        text = axes.annotate(
            _literal(name),
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
        )
        extent = text.get_window_extent()
        px, py = axes.transData.transform((x, y))
        width, height = extent.width + 2 * scale, extent.height
        box = _free_place((px, py), (width, height), taken, leaders, frame, scale)
        text.set_position(
            (
                ((box.x0 + box.x1) / 2 - px) / scale,
                ((box.y0 + box.y1) / 2 - py) / scale,
            )
        )
        leader = _leader((px, py), box)
        taken.append(box)
        leaders.append(leader)
        dx, dy = leader[1] - leader[0]
        if math.hypot(dx, dy) > 14 * scale:
            axes.annotate(
                "",
                (x, y),
                xytext=(dx / scale, dy / scale),
                textcoords="offset points",
                arrowprops={
                    "arrowstyle": "-",
                    "color": "0.5",
                    "lw": 0.7,
                    "shrinkA": 1,
                    "shrinkB": 5,
                },
            )


def _box(x: float, y: float, width: float, height: float) -> Bbox:
    return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)


# The sides first, then outwards to above and below.
_DIRECTIONS = (0, 180, 20, 160, 340, 200, 40, 140, 320, 220, 60, 120, 300, 240, 90, 270)


def _leader(point: tuple[float, float], box: Bbox) -> np.ndarray:
    """The straight line from a point to the nearest one of a box, [2, 2]."""
    return np.stack([point, np.clip(point, box.min, box.max)])


def _free_place(
    point: tuple[float, float],
    size: tuple[float, float],
    taken: list[Bbox],
    leaders: list[np.ndarray],
    frame: Bbox,
    scale: float,
) -> Bbox:
    """The nearest box beside a point that is free and inside the frame, in pixels.

    Free is what no taken box overlaps and no leader crosses, and from where its own
    leader crosses none either. If there is no such box, the one with the fewest faults.
    """
    others = [box for box in taken if not box.contains(*point)]
    best, fewest = _box(*point, *size), math.inf
    for distance in (9, 13, 18, 25, 35, 50, 70, 95, 125):
        for degrees in _DIRECTIONS:
            dx, dy = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            box = _box(
                point[0] + dx * (distance * scale + size[0] / 2),
                point[1] + dy * (distance * scale + size[1] / 2),
                *size,
            )
            leader = _leader(point, box)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1
            inside = inside and frame.y0 <= box.y0 and box.y1 <= frame.y1
            faults = (
                100 * (not inside)
                + sum(2 * box.overlaps(other) for other in taken)
                + sum(Path(other).intersects_bbox(box) for other in leaders)
                + sum(Path(leader).intersects_bbox(other) for other in others)
            )
            if faults == 0:
                return box
            if faults < fewest:
                best, fewest = box, faults
    return best


class _Picture(NamedTuple):
    title: str
    caption: str
    draw: Callable[[Results], Figure]


PICTURES: dict[str, _Picture] = {
    "accuracy.png": _Picture(
        "Accuracy on every task while training goes on",
        "Test accuracy while training goes on: the average over the tasks whose "
        "training has begun, and each task alone. Lines and bands are mean and sample "
        "standard deviation over seeds, vertical lines the task boundaries.",
        _accuracy_picture,
    ),
    "matrix.png": _Picture(
        "Accuracy matrices",
        "The accuracy matrix R of every method in %, the mean over seeds. Cells below "
        "the white line are of tasks trained by then; those above tell what was known "
        "before.",
        _matrix_picture,
    ),
    "tradeoff.png": _Picture(
        "Average accuracy against state bytes per parameter",
        "Average accuracy (mean ± sample standard deviation over seeds) against the "
        "bytes of optimizer and method state per parameter.",
        _tradeoff_picture,
    ),
}
