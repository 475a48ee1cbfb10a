"""Experience replay: one stored example beside each new one."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from classp_jax.continual.methods.compose import Hooks, Part
from classp_jax.continual.methods.protocol import Batch, Problem, Setting


class Reservoir(NamedTuple):
    """A uniform sample of the examples seen so far."""

    x: jax.Array
    y: jax.Array
    task: jax.Array
    seen: jax.Array
    """How many examples have been seen, int32."""


def add(
    reservoir: Reservoir, x: jax.Array, y: jax.Array, task: jax.Array, key: jax.Array
) -> Reservoir:
    """Reservoir sampling (Vitter's algorithm R) of a whole batch at once."""
    size = reservoir.y.shape[0]
    position = reservoir.seen + jnp.arange(y.shape[0], dtype=jnp.int32)
    drawn = jax.random.randint(key, y.shape, 0, position + 1)
    # A place behind the end is dropped: the example is not kept.
    place = jnp.where(position < size, position, drawn)
    return Reservoir(
        x=reservoir.x.at[place].set(x, mode="drop"),
        y=reservoir.y.at[place].set(y, mode="drop"),
        task=reservoir.task.at[place].set(task, mode="drop"),
        seen=reservoir.seen + y.shape[0],
    )


def _hooks(settings: Mapping[str, Any], problem: Problem) -> Hooks:
    size = int(settings["replay_size"])

    def init(params: Any, key: jax.Array) -> Reservoir:
        del params, key
        example = problem.example
        return Reservoir(
            x=jnp.zeros((size, *example.shape), example.dtype),
            y=jnp.zeros(size, jnp.int32),
            task=jnp.zeros(size, jnp.int32),
            seen=jnp.zeros([], jnp.int32),
        )

    def batch(state: Reservoir, new: Batch, key: jax.Array) -> tuple[Reservoir, Batch]:
        draw_key, add_key = jax.random.split(key)
        filled = jnp.minimum(state.seen, size)
        drawn = jax.random.randint(draw_key, new.y.shape, 0, jnp.maximum(filled, 1))
        task = state.task[drawn]
        # With nothing stored yet the stored examples count for nothing.
        counts = jnp.where(filled > 0, jnp.ones_like(new.weight), 0)
        old = Batch(state.x[drawn], state.y[drawn], task, problem.classes[task], counts)
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), new, old)
        return add(state, new.x, new.y, new.task, add_key), both

    return Hooks(init=init, batch=batch)


REPLAY = Part(
    "experience replay from a reservoir, one stored example beside each new one",
    {"replay_size": Setting(200, integer=True, least=1)},
    _hooks,
    stored_data=True,
)
