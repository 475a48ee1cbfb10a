"""EWC as the published script does it, with a second network of its own."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from classp_jax import regularizers
from classp_jax.continual.methods.compose import Hooks, Part
from classp_jax.continual.methods.protocol import Batch, Problem, Setting


class _Published(NamedTuple):
    regularizer: Any
    params: Any
    """Weights of the second network."""
    squares: Any
    """The sum of its squared batch-mean gradients so far."""
    key: jax.Array
    """What the second network's weights are drawn from."""
    steps: jax.Array
    """Steps so far."""


def _hooks(settings: Mapping[str, Any], problem: Problem) -> Hooks:
    transform = regularizers.ewc(settings["strength"])

    def init(params: Any, key: jax.Array) -> _Published:
        second = problem.init(key)
        squares = jax.tree.map(jnp.zeros_like, second)
        start = jnp.zeros([], jnp.int32)
        return _Published(transform.init(params), second, squares, key, start)

    def second_step(state: _Published, batch: Batch, key: jax.Array) -> _Published:
        gradients, _ = jax.grad(problem.loss, has_aux=True)(state.params, batch, key)
        rate = settings["learning_rate"]
        return state._replace(
            params=jax.tree.map(lambda w, g: w - rate * g, state.params, gradients),
            squares=jax.tree.map(lambda s, g: s + g * g, state.squares, gradients),
        )

    def consolidated(state: _Published) -> _Published:
        examples = problem.train_sizes[0].astype(jnp.float32)
        fisher = jax.tree.map(lambda s: s / examples, state.squares)
        # The second network has done its work and is not kept.
        return state._replace(
            regularizer=regularizers.consolidate(
                state.regularizer, state.params, fisher=fisher
            ),
            params=problem.init(state.key),
            squares=jax.tree.map(jnp.zeros_like, state.squares),
        )

    def gradients(
        state: _Published, updates: Any, params: Any, batch: Batch, key: jax.Array
    ) -> tuple[_Published, Any]:
        updates, regularizer = transform.update(updates, state.regularizer, params)
        state = state._replace(regularizer=regularizer)
        first_pass = problem.steps_per_pass[0]
        state = jax.lax.cond(
            state.steps < first_pass,
            lambda s: second_step(s, batch, key),
            lambda s: s,
            state,
        )
        state = state._replace(steps=state.steps + 1)
        state = jax.lax.cond(
            state.steps == first_pass, consolidated, lambda s: s, state
        )
        return state, updates

    return Hooks(init=init, gradients=gradients)


EWC_PUBLISHED = Part(
    "the published script's EWC: Fisher information of batch-mean gradients and anchor "
    "from another network, after the first pass",
    {"strength": Setting(10_000.0, 1e-1, 1e5)},
    _hooks,
    task_boundary_known=True,
    replaces_gradient=True,
)
