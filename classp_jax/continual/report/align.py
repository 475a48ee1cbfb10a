"""Curves of several seeds on one axis, whatever the number of steps of each."""

from typing import NamedTuple

import numpy as np

from classp_jax.continual.results.records import Results, Run
from classp_jax.continual.results.variants import Variant, variants


class Curves(NamedTuple):
    """What the seeds of one method have at common positions in the stream.

    A position counts tasks: 2.5 is half of the way through the training on task 3.
    """

    positions: np.ndarray
    """Ascending, [points]."""
    tasks: np.ndarray
    """Accuracy in %, [seeds, points, N]; NaN where not evaluated."""
    seen: np.ndarray
    """The mean accuracy in % over the tasks whose training has begun, [seeds, points];
    NaN where one of them is not evaluated."""


def drawn(results: Results) -> dict[str, Variant]:
    """By label, what can be drawn: all of which no seed has diverged."""
    return {
        variant.label: variant
        for variant in variants(results.runs)
        if not any(run.diverged for run in variant.runs)
    }


def aligned(runs: tuple[Run, ...]) -> Curves:
    """The seeds' curves at the positions of the first.

    Seeds may have different numbers of steps, as where each draws its own classes. Each
    seed's steps become positions by its own task ends, and its accuracies are
    interpolated linearly between the points at which they were taken; nothing is
    extrapolated. Seeds with the same steps are left as they are, to the last bit. A run
    without a curve has the rows of its matrix.
    """
    grid, _ = _curve(runs[0])
    tasks, seen = [], []
    for run in runs:
        positions, curve = _curve(run)
        tasks.append(
            np.stack([_interpolated(grid, positions, c) for c in curve.T], axis=1)
        )
        seen.append(_interpolated(grid, positions, _seen(positions, curve)))
    return Curves(grid, np.stack(tasks), np.stack(seen))


def _curve(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Positions [points] and accuracies in % [points, N]."""
    if not run.curve:
        # The rows of the matrix are a curve, too, with a point per task.
        return np.arange(len(run.matrix)), 100 * np.asarray(run.matrix, float)
    ends = [0, *run.task_ends]
    positions = np.interp(run.curve_steps, ends, np.arange(len(ends)))
    return positions, 100 * np.asarray(run.curve, float)


def _seen(positions: np.ndarray, curve: np.ndarray) -> np.ndarray:
    seen = np.arange(curve.shape[1]) < positions[:, None]
    total = np.sum(np.where(seen, curve, 0.0), axis=1)
    count = np.sum(seen, axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _interpolated(
    grid: np.ndarray, positions: np.ndarray, values: np.ndarray
) -> np.ndarray:
    known = np.isfinite(values)
    if np.array_equal(grid, positions) or not known.any():
        return values if len(values) == len(grid) else np.full(len(grid), np.nan)
    return np.interp(grid, positions[known], values[known], left=np.nan, right=np.nan)
