"""Runs to rows: every method's metrics and costs, over its seeds."""

import math
from typing import NamedTuple

import numpy as np

from classp_jax.continual.metrics import METRICS
from classp_jax.continual.results import Results, Run


class Statistic(NamedTuple):
    """A mean over seeds and its sample standard deviation (NaN for one seed)."""

    mean: float
    sd: float


class Row(NamedTuple):
    """One method's line in the table."""

    method: str
    seeds: tuple[int, ...]
    diverged: int
    """How many of the seeds diverged."""
    told_boundary: bool
    statistics: dict[str, Statistic | None]
    """By the names of :data:`metrics.METRICS` and of the cost fields of ``Run``. None
    where a seed diverged: a mean over those that survived would flatter the method."""


_COSTS = ("seconds", "state_bytes_per_parameter", "update_density")

# Of a diverged run, only the size of its state still means something.
_ALWAYS_KNOWN = "state_bytes_per_parameter"


def rows(results: Results) -> tuple[Row, ...]:
    """Aggregates the runs over seeds: a row a method, in the order of the runs.

    Args:
      results: the runs, of one or more methods and seeds.

    Returns:
      Mean and sample standard deviation (over n - 1) of every metric, as a share of 1,
      and of every cost: seconds, bytes per parameter, update density. A metric that is
      undefined, such as the transfer of one task, is NaN.

    Example:
      >>> from classp_jax.continual.results import Results, Run
      >>> stream = dict(name="s", scenario="domain-incremental", task_names=["a"],
      ...               task_ends=[10])
      >>> runs = tuple(Run("sgd", seed, [[0.0], [accuracy]], [10], [[accuracy]], 1.0,
      ...                  0.0, 1.0, False, False, {})
      ...              for seed, accuracy in enumerate([0.5, 0.75]))
      >>> row, = rows(Results({}, {}, "cpu", "2024-05-16", stream, runs))
      >>> print(f"{row.statistics['average_accuracy'].mean:.3f}")
      0.625
    """
    return tuple(
        _row(method, [run for run in results.runs if run.method == method])
        for method in dict.fromkeys(run.method for run in results.runs)
    )


def _row(method: str, runs: list[Run]) -> Row:
    diverged = sum(run.diverged for run in runs)
    values = {
        name: [metric.function(run.matrix) for run in runs]
        for name, metric in METRICS.items()
    } | {name: [getattr(run, name) for run in runs] for name in _COSTS}
    return Row(
        method=method,
        seeds=tuple(run.seed for run in runs),
        diverged=diverged,
        told_boundary=any(run.told_boundary for run in runs),
        statistics={
            name: None if diverged and name != _ALWAYS_KNOWN else _statistic(numbers)
            for name, numbers in values.items()
        },
    )


def _statistic(numbers: list[float]) -> Statistic:
    sd = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else math.nan
    return Statistic(float(np.mean(numbers)), sd)
