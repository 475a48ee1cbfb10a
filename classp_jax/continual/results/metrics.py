"""Continual-learning metrics of one accuracy matrix, each formula said once.

Notation: ``R`` has the shape [N + 1, N], with accuracies in any unit. Row 0 is taken
before training, row i after training on task i; column j is the test accuracy on task
j; tasks count from 1. Entries above the diagonal, accuracies on tasks not trained yet,
may be NaN: only forward transfer needs them.

Each metric takes such a matrix and returns a number in its unit: NaN where an entry
that the formula needs is NaN, or where the formula is a mean over no task. A matrix of
another shape is a ``ValueError``.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from classp_jax.continual.results.records import Run


class Metric(NamedTuple):
    """A metric with what tables and reports say of it."""

    function: Callable[[ArrayLike], float]
    formula: str
    source: str


METRICS: dict[str, Metric] = {}
"""Every metric of the matrix by the name of its function, in the order of tables."""

ONLINE = "average_online_accuracy"
ONLINE_FORMULA = (
    "mean over tasks of the mean accuracy on each batch just before it is learned"
)
ONLINE_SOURCE = "Cai et al. 2021, arXiv:2108.09020"


_Terms = Callable[[np.ndarray], np.ndarray]
_Function = Callable[[ArrayLike], float]


def _metric(formula: str, source: str) -> Callable[[_Terms], _Function]:
    """Makes a metric of a function that returns the terms of the formula's mean."""

    def decorate(terms: _Terms) -> _Function:
        @functools.wraps(terms)
        def function(R: ArrayLike) -> float:
            values = terms(_matrix(R))
            return float(np.mean(values)) if values.size else math.nan

        first, *rest = (terms.__doc__ or "").split("\n\n", 1)
        middle = f"    Formula: ``{formula}`` ({source})."
        function.__doc__ = "\n\n".join([first, middle, *rest])
        METRICS[terms.__name__] = Metric(function, formula, source)
        return function

    return decorate


@_metric("mean over j of R[N, j]", "Lopez-Paz & Ranzato 2017, arXiv:1706.08840")
def average_accuracy(R: np.ndarray) -> np.ndarray:
    """The accuracy over all tasks at the end of the stream.

    Example:
      >>> average_accuracy([[0.1, 0.1], [0.9, 0.2], [0.7, 0.8]])
      0.75
    """
    return R[-1]


@_metric(
    "mean over j < N of R[N, j] - R[j, j]", "Lopez-Paz & Ranzato 2017, arXiv:1706.08840"
)
def backward_transfer(R: np.ndarray) -> np.ndarray:
    """How much later tasks changed the accuracy on earlier ones.

    Negative where tasks were forgotten.

    Example:
      >>> print(f"{backward_transfer([[0.1, 0.1], [0.9, 0.2], [0.7, 0.8]]):.2f}")
      -0.20
    """
    return R[-1, :-1] - np.diagonal(R[1:])[:-1]


@_metric(
    "mean over j > 1 of R[j-1, j] - R[0, j]",
    "Lopez-Paz & Ranzato 2017, arXiv:1706.08840",
)
def forward_transfer(R: np.ndarray) -> np.ndarray:
    """How much earlier tasks raised the accuracy on tasks not trained yet.

    The baseline is the same network before any training.

    Example:
      >>> print(f"{forward_transfer([[0.1, 0.1], [0.9, 0.2], [0.7, 0.8]]):.2f}")
      0.10
    """
    return np.diagonal(R)[1:] - R[0, 1:]


@_metric(
    "mean over j < N of max(R[j, j], ..., R[N-1, j]) - R[N, j]",
    "after Chaudhry et al. 2018, arXiv:1801.10112",
)
def forgetting(R: np.ndarray) -> np.ndarray:
    """The best accuracy that an old task has had since its training, minus its last.

    The last row takes no part in the maximum, so that forgetting is negative where the
    last task helped an old one. In the source, rows before a task's own training take
    part too; here they do not, so that the number is the same whether or not tasks not
    trained yet are evaluated.

    Example:
      >>> print(f"{forgetting([[0.1, 0.1], [0.9, 0.2], [0.7, 0.8]]):.2f}")
      0.20
    """
    rows = np.where(np.tri(R.shape[1], dtype=bool), R[1:], -np.inf)
    return np.max(rows[:-1, :-1], axis=0, initial=-np.inf) - R[-1, :-1]


@_metric("mean over j of R[j, j]", "Riemer et al. 2019, arXiv:1810.11910")
def learning_accuracy(R: np.ndarray) -> np.ndarray:
    """The accuracy on each task right after training on it.

    Low where a method keeps old tasks by not learning new ones.

    Example:
      >>> print(f"{learning_accuracy([[0.1, 0.1], [0.9, 0.2], [0.7, 0.8]]):.2f}")
      0.85
    """
    return np.diagonal(R[1:])


def run_metrics(run: Run) -> dict[str, float]:
    """All metrics of a run: those of its matrix, and the average on-line accuracy.

    Example:
      >>> run = Run(method="sgd", seed=0, matrix=[[0.1], [0.9]], online_accuracy=[0.6])
      >>> run_metrics(run)["average_online_accuracy"]
      0.6
    """
    online = run.online_accuracy
    return {name: metric.function(run.matrix) for name, metric in METRICS.items()} | {
        ONLINE: float(np.mean(online)) if online else math.nan
    }


def formulas() -> dict[str, str]:
    """Every metric's formula, for reports."""
    return {name: metric.formula for name, metric in METRICS.items()} | {
        ONLINE: ONLINE_FORMULA
    }


def _matrix(R: ArrayLike) -> np.ndarray:
    try:
        R = np.asarray(R, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"R must be a matrix of numbers, got {R!r}.") from None
    if R.ndim != 2 or R.shape[0] != R.shape[1] + 1 or R.shape[1] == 0:
        raise ValueError(
            "R must have the shape [N + 1, N], a row before training and one after "
            f"each of the N tasks, got {list(R.shape)}."
        )
    return R
