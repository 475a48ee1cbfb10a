"""EWC, online EWC and SI: penalties on moving what mattered to earlier tasks."""

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
    settings: Mapping[str, Any],
    problem: Problem,
) -> Hooks:
    transform = make(**{name: settings[name] for name in names})

    def gradients(state: Any, updates: Any, params: Any, batch: Batch, key: Any) -> Any:
        del batch, key
        updates, state = transform.update(updates, state, params)
        return state, updates

    def end_of_task(
        state: Any, end: TaskEnd, sample: Batch, key: jax.Array
    ) -> tuple[Any, TaskEnd]:
        fisher = None
        if regularizers.needs_fisher(state):
            fisher = regularizers.fisher_diagonal(
                problem.logits,
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
        gradients=gradients,
        end_of_task=end_of_task,
    )


def _part(summary: str, make: Callable[..., Any], settings: dict[str, Setting]) -> Part:
    return Part(
        summary,
        settings,
        functools.partial(_hooks, make, tuple(settings)),
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
