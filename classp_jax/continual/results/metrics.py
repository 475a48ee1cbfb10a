"""Continual-learning metrics: pure functions of one accuracy matrix."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Metric(NamedTuple):
    """A metric and its formula, as tables and reports show it."""

    function: Callable[[ArrayLike], float]
    """From the accuracy matrix R, of shape [N + 1, N], to the metric."""
    formula: str
    """In the notation of the docstrings: tasks count from 1, row 0 is before all."""


def average_accuracy(R: ArrayLike) -> float:
    r"""The mean accuracy over all tasks at the end of the stream, ACC.

    .. math::
      \mathrm{ACC} = \frac{1}{N} \sum_{j=1}^{N} R_{N,j}

    Args:
      R: accuracies, float of shape [N + 1, N]: row 0 before training, row i after
        training on task i; column j the test accuracy on task j, from 1.

    Returns:
      The metric in the units of ``R``; NaN if an entry that it needs is NaN.

    Raises:
      ValueError: if ``R`` has another shape.

    Example:
      >>> average_accuracy([[0.1, 0.1], [0.9, 0.2], [0.7, 0.8]])
      0.75

    References:
      Lopez-Paz & Ranzato, `Gradient Episodic Memory
      <https://arxiv.org/abs/1706.08840>`_, 2017
    """
    R = _matrix(R)
    return float(np.mean(R[-1]))


def backward_transfer(R: ArrayLike) -> float:
    r"""How much later tasks changed the accuracy on earlier ones, BWT.

    .. math::
      \mathrm{BWT} = \frac{1}{N-1} \sum_{j=1}^{N-1} R_{N,j} - R_{j,j}

    Negative where tasks were forgotten.

    Args:
      R: accuracies, float of shape [N + 1, N]: row 0 before training, row i after
        training on task i; column j the test accuracy on task j, from 1.

    Returns:
      The metric in the units of ``R``; NaN for one task, or if an entry that it needs
      is NaN.

    Raises:
      ValueError: if ``R`` has another shape.

    Example:
      >>> print(f"{backward_transfer([[0.1, 0.1], [0.9, 0.2], [0.7, 0.8]]):.2f}")
      -0.20

    References:
      Lopez-Paz & Ranzato, `Gradient Episodic Memory
      <https://arxiv.org/abs/1706.08840>`_, 2017
    """
    R = _matrix(R)
    return _mean(R[-1, :-1] - np.diagonal(R[1:])[:-1])


def forward_transfer(R: ArrayLike) -> float:
    r"""How much earlier tasks raised the accuracy on tasks not trained yet, FWT.

    .. math::
      \mathrm{FWT} = \frac{1}{N-1} \sum_{j=2}^{N} R_{j-1,j} - R_{0,j}

    The baseline is the same network before any training, row 0.

    Args:
      R: accuracies, float of shape [N + 1, N]: row 0 before training, row i after
        training on task i; column j the test accuracy on task j, from 1.

    Returns:
      The metric in the units of ``R``; NaN for one task, or if an entry that it needs
      is NaN.

    Raises:
      ValueError: if ``R`` has another shape.

    Example:
      >>> print(f"{forward_transfer([[0.1, 0.1], [0.9, 0.2], [0.7, 0.8]]):.2f}")
      0.10

    References:
      Lopez-Paz & Ranzato, `Gradient Episodic Memory
      <https://arxiv.org/abs/1706.08840>`_, 2017
    """
    R = _matrix(R)
    return _mean(np.diagonal(R)[1:] - R[0, 1:])


def forgetting(R: ArrayLike) -> float:
    r"""The best accuracy a task ever had minus its last one, over the old tasks.

    .. math::
      F = \frac{1}{N-1} \sum_{j=1}^{N-1}
        \left(\max_{i \in \{1, \dots, N-1\}} R_{i,j} - R_{N,j}\right)

    The last row takes no part in the maximum, so that forgetting is negative where the
    last task helped an old one. Rows above a task's own training do take part, as they
    do in the source; row 0, before any training, does not.

    Args:
      R: accuracies, float of shape [N + 1, N]: row 0 before training, row i after
        training on task i; column j the test accuracy on task j, from 1.

    Returns:
      The metric in the units of ``R``; NaN for one task, or if an entry that it needs
      is NaN.

    Raises:
      ValueError: if ``R`` has another shape.

    Example:
      >>> print(f"{forgetting([[0.1, 0.1], [0.9, 0.2], [0.7, 0.8]]):.2f}")
      0.20

    References:
      Chaudhry et al., `Riemannian Walk for Incremental Learning
      <https://arxiv.org/abs/1801.10112>`_, 2018
    """
    R = _matrix(R)
    if R.shape[1] == 1:
        return float("nan")
    return _mean(np.max(R[1:-1, :-1], axis=0) - R[-1, :-1])


def learning_accuracy(R: ArrayLike) -> float:
    r"""The mean accuracy on each task right after training on it, LA.

    .. math::
      \mathrm{LA} = \frac{1}{N} \sum_{j=1}^{N} R_{j,j}

    Low where a method keeps old tasks by not learning new ones.

    Args:
      R: accuracies, float of shape [N + 1, N]: row 0 before training, row i after
        training on task i; column j the test accuracy on task j, from 1.

    Returns:
      The metric in the units of ``R``; NaN if an entry that it needs is NaN.

    Raises:
      ValueError: if ``R`` has another shape.

    Example:
      >>> print(f"{learning_accuracy([[0.1, 0.1], [0.9, 0.2], [0.7, 0.8]]):.2f}")
      0.85

    References:
      Riemer et al., `Learning to Learn without Forgetting by Maximizing Transfer and
      Minimizing Interference <https://arxiv.org/abs/1810.11910>`_, 2019
    """
    R = _matrix(R)
    return float(np.mean(np.diagonal(R[1:])))


METRICS: dict[str, Metric] = {
    "average_accuracy": Metric(average_accuracy, "mean over j of R[N, j]"),
    "backward_transfer": Metric(
        backward_transfer, "mean over j < N of R[N, j] - R[j, j]"
    ),
    "forward_transfer": Metric(
        forward_transfer, "mean over j > 1 of R[j-1, j] - R[0, j]"
    ),
    "forgetting": Metric(
        forgetting, "mean over j < N of max(R[1, j], ..., R[N-1, j]) - R[N, j]"
    ),
    "learning_accuracy": Metric(learning_accuracy, "mean over j of R[j, j]"),
}
"""Every metric by the name of its function, in the order of the tables."""


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


def _mean(differences: np.ndarray) -> float:
    """The mean over tasks; NaN over none, without numpy's warning."""
    return float(np.mean(differences)) if differences.size else float("nan")
