"""What an experiment will take: parameters, steps, memory and, roughly, time."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from classp_jax.continual.errors import ContinualError
from classp_jax.continual.train.experiment import Experiment, check
from classp_jax.continual.train.job import Job

_RATE = 7e10
"""Floating-point operations per second and core that networks reach."""
_STEP_SECONDS = 6e-5
"""What a step takes however small the network is."""


class Cost(NamedTuple):
    """An estimate; nothing has been allocated for it."""

    parameters: int
    steps: int
    """Of all methods and seeds together."""
    memory: int
    """Bytes for the data and the runs of the method that needs most."""
    seconds: float
    """Of training; on a CPU, right within a factor of about 3."""

    def describe(self) -> str:
        """One line.

        Example:
          >>> Cost(26_122, 40_000, 50_000_000, 75.0).describe()
          '26,122 parameters, 40,000 steps in all, 0.05 GB, about 1 minute'
        """
        minutes = self.seconds / 60
        time = (
            f"{minutes / 60:.0f} hours"
            if minutes >= 120
            else f"{minutes:.0f} minute{'s' * (round(minutes) != 1)}"
            if minutes >= 1
            else f"{max(self.seconds, 1):.0f} s"
        )
        return (
            f"{self.parameters:,} parameters, {self.steps:,} steps in all, "
            f"{self.memory / 1e9:.2f} GB, about {time}"
        )


def estimate(experiment: Experiment, jobs: Sequence[Job], copies: int = 1) -> Cost:
    """Estimates what training will take, and checks every method's settings.

    Args:
      experiment: data, plans and network.
      jobs: the methods, each with the seeds that are left to train.
      copies: how many times each seed is trained.

    Raises:
      ContinualError: if a method refuses its settings, or the machine has too little
        memory.
    """
    params = jax.eval_shape(experiment.model.init, jax.random.key(0))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    data = experiment.stored.nbytes * sum(len(p.devices) for p in experiment.places)
    most = steps = 0
    for job in jobs:
        state = check(experiment, job.method, job.settings)
        plans = job.experiment.plans
        runs = len(plans) * copies
        # A step holds parameters, gradients, updates, and one state being written.
        memory = data + runs * (size + state) + 4 * size + 2 * state
        if runs and memory > _machine_memory():
            raise ContinualError(
                f"method {job.name!r} needs about {memory / 1e9:,.1f} GB for "
                f"{runs} run{'s' * (runs != 1)}, and this machine has "
                f"{_machine_memory() / 1e9:,.1f} GB"
            )
        most = max(most, memory)
        steps += copies * sum(sum(plan.steps) for plan in plans)
    operations = _operations_of_gradient(experiment, params)
    cores = os.cpu_count() or 1
    seconds = steps * (_STEP_SECONDS + operations / _RATE) / cores
    return Cost(parameters, steps, most, seconds)


def _operations_of_gradient(experiment: Experiment, params: Any) -> float:
    """What XLA counts in one batch's gradient, before it optimizes anything."""
    model, stored = experiment.model, experiment.stored
    tokens = jnp.issubdtype(stored.dtype, jnp.signedinteger)
    shape = (experiment.training.batch_size, *stored.shape[1:])
    x = jax.ShapeDtypeStruct(shape, stored.dtype if tokens else jnp.float32)

    def gradient(params: Any, x: jax.Array) -> Any:
        key = jax.random.key(0)
        return jax.grad(lambda params: model.apply(params, x, key).sum())(params)

    analysis: Any = jax.jit(gradient).lower(params, x).cost_analysis()
    return (analysis or {}).get("flops", 0.0)


def _machine_memory() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, AttributeError, OSError):
        return float("inf")
