"""Metrics against numbers worked out by hand and a plain loop over the formulas."""

import math

import numpy as np
import pytest

from classp_jax.continual.results import metrics
from tests.continual.fakes import make_run

# Three tasks; row 0 before training.
R = [
    [0.10, 0.12, 0.08],
    [0.90, 0.20, 0.10],
    [0.95, 0.80, 0.30],
    [0.60, 0.70, 0.85],
]
BY_HAND = {
    # (60 + 70 + 85) / 3
    "average_accuracy": 2.15 / 3,
    # ((60 - 90) + (70 - 80)) / 2
    "backward_transfer": -0.20,
    # ((20 - 12) + (30 - 8)) / 2
    "forward_transfer": 0.15,
    # ((95 - 60) + (80 - 70)) / 2: task 1 was best after task 2
    "forgetting": 0.225,
    # (90 + 80 + 85) / 3
    "learning_accuracy": 0.85,
}


def loop(R):
    """The formulas of the papers, written out with tasks that count from 1."""
    N = len(R[0])

    def r(i, j):
        return R[i][j - 1]

    old = range(1, N)
    return {
        "average_accuracy": math.fsum(r(N, j) for j in range(1, N + 1)) / N,
        "backward_transfer": math.fsum(r(N, j) - r(j, j) for j in old) / (N - 1),
        "forward_transfer": math.fsum(r(j - 1, j) - r(0, j) for j in range(2, N + 1))
        / (N - 1),
        "forgetting": math.fsum(
            max(r(i, j) for i in range(j, N)) - r(N, j) for j in old
        )
        / (N - 1),
        "learning_accuracy": math.fsum(r(j, j) for j in range(1, N + 1)) / N,
    }


def all_metrics(R):
    return {name: metric.function(R) for name, metric in metrics.METRICS.items()}


def test_by_hand():
    assert all_metrics(R) == pytest.approx(BY_HAND, abs=1e-15)


@pytest.mark.parametrize("num_tasks", [2, 3, 20])
def test_against_a_loop(num_tasks):
    R = np.random.default_rng(num_tasks).uniform(size=(num_tasks + 1, num_tasks))
    assert all_metrics(R) == pytest.approx(loop(R.tolist()), abs=1e-14)
    assert all_metrics(R.tolist()) == all_metrics(R)


def test_a_formula_is_said_once_and_shown_in_the_help():
    for name, metric in metrics.METRICS.items():
        assert metric.function is getattr(metrics, name)
        assert f"``{metric.formula}``" in (metric.function.__doc__ or "")
    assert metrics.formulas().keys() == metrics.run_metrics(make_run()).keys()


def test_forgetting_is_negative_where_the_last_task_helped():
    assert metrics.forgetting([[0.0, 0.0], [0.5, 0.0], [0.75, 1.0]]) == -0.25


def test_one_task():
    values = all_metrics([[0.1], [0.8]])
    assert values["average_accuracy"] == values["learning_accuracy"] == 0.8
    for name in ("backward_transfer", "forward_transfer", "forgetting"):
        assert math.isnan(values[name])


def test_tasks_not_seen_yet_are_needed_by_forward_transfer_alone():
    unseen = np.array(R)
    unseen[0] = np.nan
    unseen[1:][np.triu_indices(3, 1)] = np.nan
    values = all_metrics(unseen)
    assert math.isnan(values.pop("forward_transfer"))
    assert values == pytest.approx({name: BY_HAND[name] for name in values}, abs=1e-15)


def test_nan_where_a_needed_entry_is_missing():
    # Joint training: nothing is taken between the first and the last row.
    joint = np.array(R)
    joint[1:-1] = np.nan
    values = all_metrics(joint)
    assert values.pop("average_accuracy") == pytest.approx(2.15 / 3)
    assert all(math.isnan(value) for value in values.values())


def test_average_online_accuracy():
    run = make_run(online_accuracy=[0.5, 0.25, 0.75])
    assert metrics.run_metrics(run)["average_online_accuracy"] == 0.5
    none = metrics.run_metrics(make_run(online_accuracy=[]))
    assert math.isnan(none["average_online_accuracy"])


@pytest.mark.parametrize(
    "bad",
    [
        [[0.1, 0.2], [0.3, 0.4]],
        [0.1, 0.2],
        np.zeros((1, 0)),
        "R",
        [[0.1], [0.2, 0.3]],
        None,
    ],
)
def test_other_shapes_are_refused(bad):
    for metric in metrics.METRICS.values():
        with pytest.raises(ValueError, match="R must"):
            metric.function(bad)
