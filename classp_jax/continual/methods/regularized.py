"""EWC, online EWC, SI and MAS: penalties on moving what mattered to earlier tasks."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from classp_jax import regularizers
from classp_jax.continual.methods.compose import Hooks, Part, TaskEnd
from classp_jax.continual.methods.protocol import Batch, Problem, Setting

_FISHER_BATCH = 32


def _hooks(
    make: Callable[..., optax.GradientTransformation],
    names: tuple[str, ...],
    behind: bool,
    settings: Mapping[str, Any],
    problem: Problem,
) -> Hooks:
    transform = make(**{n: settings[n] for n in names if n != "temperature"})
    temperature = settings["temperature"] if "temperature" in names else 1.0

    def gradients(state: Any, updates: Any, params: Any, batch: Any, key: Any) -> Any:
        del batch, key
        updates, state = transform.update(updates, state, params)
        return state, updates

    def after(state: Any, updates: Any, params: Any, key: Any) -> Any:
        return gradients(state, updates, params, None, key)

    def logits(params: Any, batch: Batch) -> jax.Array:
        return problem.logits(params, batch) / temperature

    def end_of_task(
        state: Any, end: TaskEnd, sample: Batch, key: jax.Array
    ) -> tuple[Any, TaskEnd]:
        fisher = None
        if regularizers.needs_fisher(state):
            fisher = regularizers.fisher_diagonal(
                logits,
                end.params,
                sample,
                sample.y,
                kind=problem.fisher,
                key=key,
                batch_size=_FISHER_BATCH,
            )
        return regularizers.consolidate(state, end.params, fisher=fisher), end

    return Hooks(
        init=lambda params, key: transform.init(params),
        gradients=None if behind else gradients,
        updates=after if behind else None,
        end_of_task=end_of_task,
    )


def _mas(settings: Mapping[str, Any], problem: Problem) -> Hooks:
    penalty = regularizers.online_ewc
    hooks = _hooks(penalty, ("strength",), False, settings, problem)

    def end_of_task(
        state: Any, end: TaskEnd, sample: Batch, key: jax.Array
    ) -> tuple[Any, TaskEnd]:
        del key
        found = regularizers.mas_importance(problem.logits, end.params, sample)
        return regularizers.consolidate(state, end.params, fisher=found), end

    return hooks._replace(end_of_task=end_of_task)


def _part(
    summary: str,
    make: Callable[..., Any],
    settings: dict[str, Setting],
    *,
    behind: bool = False,
) -> Part:
    return Part(
        summary,
        settings,
        functools.partial(_hooks, make, tuple(settings), behind),
        task_boundary_known=True,
        replaces_gradient=True,
    )


_STRENGTH = Setting(100.0, 1e-1, 1e5)

EWC = _part(
    "elastic weight consolidation with the Fisher information of every task",
    regularizers.ewc,
    {"strength": _STRENGTH},
)
ONLINE_EWC = _part(
    "online EWC, a decayed sum of Fisher information",
    regularizers.online_ewc,
    {"strength": _STRENGTH, "decay": Setting(1.0, 0.5, 1.0)},
)
SI = _part(
    "synaptic intelligence, importance from the path of the weights",
    regularizers.si,
    {"strength": Setting(1.0, 1e-3, 1e3), "damping": Setting(0.1, 1e-3, 1.0)},
)
IMPLICIT_EWC = _part(
    "EWC as an implicit step, its Fisher information from softened outputs",
    regularizers.implicit_ewc,
    {"strength": _STRENGTH, "temperature": Setting(2.0, 1.0, 20.0, least=1e-3)},
    behind=True,
)
MAS = Part(
    "memory aware synapses, importance from the size of the outputs",
    {"strength": Setting(1.0, 1e-3, 1e3)},
    _mas,
    task_boundary_known=True,
    replaces_gradient=True,
)
