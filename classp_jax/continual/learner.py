"""One run's state and the pure functions that carry it from step to step."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import classp_jax
from classp_jax import regularizers
from classp_jax.continual.methods import Method, make_transform
from classp_jax.continual.models import Model

_FISHER_BATCH = 100


class Training(NamedTuple):
    """How to train: the same for every method."""

    epochs: tuple[int, ...] = (10,)
    """Passes over each task's training data; the last one holds for later tasks."""
    batch_size: int = 32
    points_per_task: int = 5
    """How often the accuracy on every task is taken during a task."""
    fisher: str = "exact"
    """How EWC takes the Fisher information: exact, sampled or empirical."""
    fisher_examples: int = 1000
    """How many training examples of the ended task it takes it from."""
    evaluate_on: str = "test"
    """The split that accuracies are taken on: test or validation."""
    order: str = "shuffled"
    """Order of the training examples: shuffled in every pass, or stored."""
    normalisation: tuple[float, ...] = ()
    """Mean and deviation of the pixels, by default those of the first task."""
    until_loss: tuple[float, ...] = ()
    """A task ends after the first pass whose last batch has a loss below this, at the
    latest after its passes; the last number holds for later tasks."""
    score_training: bool = False
    """Whether to take the accuracy on the training data too, with dropout active."""


class Data(NamedTuple):
    """One task's training data for every seed, padded to one length.

    ``x [seeds, n, ...]``, ``y [seeds, n]`` and the task of each example
    ``task [seeds, n]``.
    """

    x: jax.Array
    y: jax.Array
    task: jax.Array


class Buffer(NamedTuple):
    """A reservoir sample of the examples seen so far."""

    x: jax.Array
    y: jax.Array
    task: jax.Array
    seen: jax.Array


class Learner(NamedTuple):
    """Everything one run carries from step to step."""

    params: Any
    opt_state: Any
    buffer: Buffer | None
    key: jax.Array
    step: jax.Array


class Other(NamedTuple):
    """The other network that the published script's EWC takes its Fisher from."""

    params: Any
    squares: Any
    """A tree like the parameters: the sum of squared batch-mean gradients so far."""


class Functions(NamedTuple):
    """The pure functions of one method, each for one run."""

    init: Callable[..., Learner]
    step: Callable[..., tuple[Learner, jax.Array]]
    density: Callable[..., jax.Array]
    consolidate: Callable[..., Learner]
    fresh: Callable[..., Any]
    """The optimizer state that the present weights would begin with."""
    reset: Callable[..., Learner]
    other_init: Callable[..., Other]
    other_step: Callable[..., Other]
    consolidate_other: Callable[..., Learner]


def make_functions(
    method: Method,
    fixed: Mapping[str, Any],
    model: Model,
    prepare: Callable[[jax.Array], jax.Array],
    class_table: jax.Array,
    training: Training,
) -> Functions:
    """Builds a method's pure functions.

    Args:
      method: the method.
      fixed: settings that are compiled in; the others come as ``hyper``, a dict of
        scalars, with each call.
      model: the network.
      prepare: turns stored inputs into the network's.
      class_table: bool ``[seeds, tasks, num_classes]``, the logits that may win.
      training: batch size and the like.
    """
    masked = not bool(np.all(class_table))

    def transform(hyper: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
        return make_transform(
            method, {**fixed, **hyper}, later=hyper.get("later", False)
        )

    def logits_of(params: Any, inputs: tuple[Any, Any], key: Any = None) -> Any:
        x, allowed = inputs
        logits = model.apply(params, prepare(x), key)
        return jnp.where(allowed, logits, -1e9) if masked else logits

    def init(key: jax.Array, hyper: Mapping[str, Any], example: jax.Array) -> Learner:
        init_key, key = jax.random.split(key)
        params = model.init(init_key)
        buffer = None
        if "replay" in method.additions:
            size = int(fixed["replay_size"])
            buffer = Buffer(
                x=jnp.zeros((size, *example.shape), example.dtype),
                y=jnp.zeros(size, jnp.int32),
                task=jnp.zeros(size, jnp.int32),
                seen=jnp.zeros([], jnp.int32),
            )
        opt_state = transform(hyper).init(params)
        return Learner(params, opt_state, buffer, key, jnp.zeros([], jnp.int32))

    def gradient(
        learner: Learner, seed_index: Any, data: Data, order: jax.Array, i: Any
    ) -> tuple[jax.Array, Any, Buffer | None]:
        indices = order[seed_index, i]
        x = data.x[seed_index, indices]
        y = data.y[seed_index, indices]
        task = data.task[seed_index, indices]
        weight = jnp.ones(y.shape, jnp.float32)
        key = jax.random.fold_in(learner.key, learner.step)
        dropout_key, draw_key, store_key = jax.random.split(key, 3)
        buffer = learner.buffer
        if buffer is not None:
            old = buffer
            buffer = _store(old, x, y, task, store_key)
            filled = jnp.minimum(old.seen, old.y.shape[0])
            drawn = jax.random.randint(draw_key, y.shape, 0, jnp.maximum(filled, 1))
            x = jnp.concatenate([x, old.x[drawn]])
            y = jnp.concatenate([y, old.y[drawn]])
            task = jnp.concatenate([task, old.task[drawn]])
            replayed = jnp.full(weight.shape, filled > 0).astype(jnp.float32)
            weight = jnp.concatenate([weight, replayed])

        def loss(params: Any) -> jax.Array:
            logits = logits_of(params, (x, class_table[seed_index, task]), dropout_key)
            errors = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return jnp.sum(errors * weight) / jnp.sum(weight)

        value, gradients = jax.value_and_grad(loss)(learner.params)
        return value, gradients, buffer

    def step(
        learner: Learner,
        hyper: Mapping[str, Any],
        seed_index: Any,
        data: Data,
        order: jax.Array,
        i: Any,
    ) -> tuple[Learner, jax.Array]:
        value, gradients, buffer = gradient(learner, seed_index, data, order, i)
        updates, opt_state = transform(hyper).update(
            gradients, learner.opt_state, learner.params
        )
        params = optax.apply_updates(learner.params, updates)
        return Learner(params, opt_state, buffer, learner.key, learner.step + 1), value

    def density(
        learner: Learner,
        hyper: Mapping[str, Any],
        seed_index: Any,
        data: Data,
        order: jax.Array,
        i: Any,
    ) -> jax.Array:
        _, gradients, _ = gradient(learner, seed_index, data, order, i)
        updates, _ = transform(hyper).update(
            gradients, learner.opt_state, learner.params
        )
        return classp_jax.update_density(updates)

    def consolidate(
        learner: Learner, seed_index: Any, data: Data, indices: jax.Array
    ) -> Learner:
        chosen = indices[seed_index]
        fisher = None
        if method.needs_fisher:
            x = data.x[seed_index, chosen]
            task = data.task[seed_index, chosen]
            fisher = regularizers.fisher_diagonal(
                logits_of,
                learner.params,
                (x, class_table[seed_index, task]),
                data.y[seed_index, chosen],
                kind=training.fisher,
                key=jax.random.fold_in(learner.key, -1 - learner.step),
                batch_size=min(_FISHER_BATCH, chosen.shape[0]),
            )
        state = regularizers.consolidate(
            learner.opt_state, learner.params, fisher=fisher
        )
        return learner._replace(opt_state=state)

    def fresh(learner: Learner, hyper: Mapping[str, Any]) -> Any:
        return transform(hyper).init(learner.params)

    def reset(learner: Learner, hyper: Mapping[str, Any]) -> Learner:
        # The optimizer is the chain's last part, behind the regularizer.
        state = (*learner.opt_state[:-1], fresh(learner, hyper)[-1])
        return learner._replace(opt_state=state)

    def other_init(learner: Learner) -> Other:
        params = model.init(jax.random.fold_in(learner.key, 2**32 - 1))
        return Other(params, jax.tree.map(jnp.zeros_like, params))

    def other_step(
        other: Other,
        learner: Learner,
        hyper: Mapping[str, Any],
        seed_index: Any,
        data: Data,
        order: jax.Array,
        i: Any,
    ) -> Other:
        now = learner._replace(params=other.params, buffer=None, step=-1 - i)
        _, gradients, _ = gradient(now, seed_index, data, order, i)
        rate = {**fixed, **hyper}["learning_rate"]
        return Other(
            jax.tree.map(lambda w, g: w - rate * g, other.params, gradients),
            jax.tree.map(lambda s, g: s + g * g, other.squares, gradients),
        )

    def consolidate_other(learner: Learner, other: Other, examples: Any) -> Learner:
        fisher = jax.tree.map(lambda s: s / examples, other.squares)
        state = regularizers.consolidate(learner.opt_state, other.params, fisher=fisher)
        return learner._replace(opt_state=state)

    return Functions(
        init,
        step,
        density,
        consolidate,
        fresh,
        reset,
        other_init,
        other_step,
        consolidate_other,
    )


def _store(
    buffer: Buffer, x: jax.Array, y: jax.Array, task: jax.Array, key: jax.Array
) -> Buffer:
    """Reservoir sampling (Vitter's algorithm R) of a whole batch at once."""
    size = buffer.y.shape[0]
    position = buffer.seen + jnp.arange(y.shape[0], dtype=jnp.int32)
    drawn = jax.random.randint(key, y.shape, 0, position + 1)
    # A place behind the end is dropped: the example is not kept.
    place = jnp.where(position < size, position, drawn)
    return Buffer(
        x=buffer.x.at[place].set(x, mode="drop"),
        y=buffer.y.at[place].set(y, mode="drop"),
        task=buffer.task.at[place].set(task, mode="drop"),
        seen=buffer.seen + y.shape[0],
    )
