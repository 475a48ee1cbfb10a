"""Results made up for tests: numbers are drawn, nothing is trained."""

import numpy as np
from numpy.typing import ArrayLike

from classp_jax.continual.results import Provenance, Results, Run

PROVENANCE = Provenance(
    date="2026-11-23T18:40:00+00:00",
    device="CPU (x86_64, 2 cores)",
    versions={"python": "3.11.7", "jax": "0.10.2"},
    command="classp-jax run",
)


def make_run(
    method="sgd",
    seed=0,
    num_tasks=3,
    *,
    steps_per_task: ArrayLike = 40,
    unseen=False,
    level=0.8,
    **changes,
):
    """A run with two points of evaluation per task, none of tasks not seen yet."""
    rng = np.random.default_rng([seed, *method.encode()])
    length = np.broadcast_to(steps_per_task, num_tasks)
    ends = np.cumsum(length)
    steps = np.sort([0, *ends, *(ends - length // 2)])
    curve = rng.normal(level, 0.02, (len(steps), num_tasks)).clip(0, 1)
    if not unseen:
        curve[steps[:, None] <= ends - length] = np.nan
    at_ends = curve[np.searchsorted(steps, [0, *ends])]
    fields = {
        "settings": {"learning_rate": 0.1, "eps": 1e-3},
        "matrix": at_ends,
        "curve_steps": steps,
        "curve": curve,
        "task_ends": ends,
        "online_accuracy": rng.uniform(0.4, 0.6, num_tasks),
        "update_density": rng.uniform(0.5, 1.0, num_tasks),
        "seconds": 0.25,
        "compile_seconds": 1.5,
        "state_bytes_per_parameter": 4.0,
        "kept_bytes_per_parameter": 4.0,
        "parameters": 25_000,
        "provenance": PROVENANCE,
    }
    return Run(method=method, seed=seed, **(fields | changes))


def make_results(*runs, **configuration):
    """Results over a stream with as many tasks as the runs have; three if none."""
    num_tasks = len(runs[0].matrix[0]) if runs else 3
    return Results(
        configuration={"data": {"fingerprint": "0123abcd"}, "training": {"epochs": 2}}
        | configuration,
        stream={
            "name": "permuted",
            "scenario": "domain-incremental",
            "task_names": [f"permutation {i}" for i in range(1, num_tasks + 1)],
            "kind": "image",
        },
        runs=runs,
    )
