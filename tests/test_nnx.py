"""Flax: tasks end and accumulators fill in the middle of training, as with trees."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import classp_jax
from classp_jax import regularizers

pytestmark = pytest.mark.usefixtures("quick_compilation")

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).normal(size=(8, 2)), jnp.float32)
TX: Any = optax.chain(
    regularizers.ewc(0.5),
    regularizers.online_ewc(0.5),
    regularizers.si(0.5),
    classp_jax.classp(0.1, threshold=1e-6),
)


class Model(nnx.Module):
    def __init__(self):
        self.hidden = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(4, 2, rngs=nnx.Rngs(1))
        self.calls = nnx.Variable(jnp.zeros([], jnp.int32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(jnp.tanh(self.hidden(x)))


def loss(model: Model) -> jax.Array:
    return jnp.mean((model(X) - Y) ** 2)


def logits(params: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["head"]["kernel"] + params["head"]["bias"]


def tree_loss(params: Any) -> jax.Array:
    return jnp.mean((logits(params, X) - Y) ** 2)


def train_tree(train: Any, end: Any, fill: Any, params: Any) -> Any:
    """Three tasks on plain trees; the accumulators are filled after the first."""
    state = TX.init(params)
    for task in range(3):
        params, state = train(params, state)
        state = end(state, params)
        if task == 0:
            state = fill(state, params)
    return train(params, state)


def of_trees(params: Any, wrap: Callable[..., Any] = lambda f: f) -> Any:
    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = TX.update(jax.grad(tree_loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    def train(params: Any, state: Any) -> Any:
        for _ in range(3):
            params, state = step(params, state)
        return params, state

    def end(state: Any, params: Any) -> Any:
        fisher = regularizers.fisher_diagonal(logits, params, X)
        return wrap(regularizers.consolidate)(state, params, fisher)

    def fill(state: Any, params: Any) -> Any:
        gradients = jax.grad(tree_loss)(params)
        fill = functools.partial(classp_jax.accumulate_importance, TX)
        return wrap(fill)(state, params, gradients)

    return train_tree(train, end, fill, params)


def as_dict(state: Any) -> Any:
    return nnx.to_pure_dict(nnx.as_pure(state))


def assert_same_bits(actual: Any, desired: Any) -> None:
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True)
    for a, d in pairs:
        np.testing.assert_array_equal(a, d)


@pytest.mark.parametrize("jit", [False, True], ids=["outside", "nnx.jit"])
def test_an_nnx_optimizer_goes_on_training(jit: bool):
    wrap: Any = nnx.jit if jit else lambda f: f
    model = Model()
    initial = as_dict(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    traces = 0

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer) -> None:
        nonlocal traces
        traces += 1
        optimizer.update(model, nnx.grad(loss)(model))

    def fisher(model: Model) -> Any:
        graph, params, others = nnx.split(model, nnx.Param, ...)
        return regularizers.fisher_diagonal(
            lambda params, x: nnx.merge(graph, params, others)(x), params, X
        )

    @wrap
    def end(model: Model, optimizer: nnx.Optimizer, fisher: Any) -> None:
        params = nnx.state(model, nnx.Param)
        optimizer.opt_state = regularizers.consolidate(
            optimizer.opt_state, params, fisher
        )

    @wrap
    def fill(model: Model, optimizer: nnx.Optimizer, gradients: Any) -> None:
        params = nnx.state(model, nnx.Param)
        optimizer.opt_state = classp_jax.accumulate_importance(
            optimizer.tx, optimizer.opt_state, params, gradients
        )

    for task in range(4):
        for _ in range(3):
            step(model, optimizer)
        if task < 3:
            end(model, optimizer, fisher(model))
        if task == 0:
            fill(model, optimizer, nnx.grad(loss)(model))
    assert traces == 1

    params, state = of_trees(initial, jax.jit if jit else lambda f: f)
    assert_same_bits(nnx.state(model, nnx.Param), params)
    assert_same_bits(optimizer.opt_state, state)
    # Both the state and what holds it can be looked into.
    mean = classp_jax.mean_accumulator(state)
    for holder in (optimizer, optimizer.opt_state):
        np.testing.assert_array_equal(classp_jax.mean_accumulator(holder), mean)
    found = as_dict(classp_jax.accumulators(optimizer))
    assert jax.tree.structure(found) == jax.tree.structure(initial)


def test_an_nnx_optimizer_may_be_given_as_a_whole():
    model = Model()
    optimizer: Any = nnx.Optimizer(model, TX, wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    assert regularizers.needs_fisher(optimizer)
    whole = regularizers.consolidate(optimizer, params, params)
    part = regularizers.consolidate(optimizer.opt_state, params, params)
    assert_same_bits(whole.opt_state, part)
    whole.update(model, nnx.grad(loss)(model))


def test_examples_of_an_nnx_model():
    model = Model()
    graph, params, others = nnx.split(model, nnx.Param, ...)

    def loss_of_one(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(nnx.merge(graph, params, others)(x[None]) ** 2)

    gradients = jax.vmap(jax.grad(loss_of_one), in_axes=(None, 0))(params, X)
    optimizer: Any = nnx.Optimizer(model, TX, wrt=nnx.Param)
    state = classp_jax.accumulate_importance(
        TX, optimizer.opt_state, params, gradients, per_example=True, strength=2.0
    )
    assert jax.tree.structure(state) == jax.tree.structure(optimizer.opt_state)
    expected = jax.tree.map(
        lambda g: 2 * np.where(np.square(g) > 1e-6, np.abs(g), 0).sum(0),
        as_dict(gradients),
    )
    pairs = zip(
        jax.tree.leaves(classp_jax.accumulators(state)),
        jax.tree.leaves(expected),
        strict=True,
    )
    for a, d in pairs:
        np.testing.assert_allclose(a, d, rtol=1e-5)


def test_a_train_state_of_linen_goes_on_training():
    initial = as_dict(nnx.state(Model(), nnx.Param))

    @jax.jit
    def step(state: TrainState) -> TrainState:
        return state.apply_gradients(grads=jax.grad(tree_loss)(state.params))

    state: Any = TrainState.create(apply_fn=logits, params=initial, tx=TX)
    fisher = functools.partial(regularizers.fisher_diagonal, logits, x=X)
    for task in range(4):
        for _ in range(3):
            state = step(state)
        if task < 3:
            state = regularizers.consolidate(state, state.params, fisher(state.params))
        if task == 0:
            gradients = jax.grad(tree_loss)(state.params)
            filled = classp_jax.accumulate_importance(
                state.tx, state.opt_state, state.params, gradients
            )
            state = state.replace(opt_state=filled)
    params, opt_state = of_trees(initial)
    assert_same_bits(state.params, params)
    assert_same_bits(state.opt_state, opt_state)
    np.testing.assert_array_equal(
        classp_jax.free_fraction(state), classp_jax.free_fraction(opt_state)
    )
