"""What changes at a task boundary: rate, scaling, optimizer state; joint training."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from classp_jax.continual.methods.compose import Hooks, Part, TaskEnd
from classp_jax.continual.methods.protocol import Problem, Setting


def _lower_rate(settings: Mapping[str, Any], problem: Problem) -> Hooks:
    del problem

    def later(tasks_done: jax.Array) -> dict[str, Any]:
        rates = settings["later_learning_rate"], settings["learning_rate"]
        return {"learning_rate": jnp.where(tasks_done > 0, *map(jnp.float32, rates))}

    return Hooks(settings=later)


def _scale(settings: Mapping[str, Any], problem: Problem) -> Hooks:
    del settings, problem
    return Hooks(settings=lambda tasks_done: {"scaling": tasks_done > 0})


def _reset(settings: Mapping[str, Any], problem: Problem) -> Hooks:
    del settings, problem

    def end_of_task(state: Any, end: TaskEnd, *_: Any) -> tuple[Any, TaskEnd]:
        return state, end._replace(optimizer_state=end.new_optimizer_state)

    return Hooks(end_of_task=end_of_task)


LOWER_RATE_LATER = Part(
    "another learning rate from the second task on",
    {"later_learning_rate": Setting(0.01, 1e-4, 1.0)},
    _lower_rate,
    task_boundary_known=True,
)
SCALE_LATER = Part(
    "CLASSP's scaling off in the first task and on in later ones, as in the published "
    "script",
    {},
    _scale,
    task_boundary_known=True,
)
RESET_OPTIMIZER = Part(
    "the optimizer's state starts anew with every task",
    {},
    _reset,
    task_boundary_known=True,
)
JOINT = Part(
    "all tasks' data at once, the upper bound",
    {},
    lambda settings, problem: Hooks(),
    stored_data=True,
    plan=lambda plan: plan.joint(),
)
