"""Equinox: what stands in the README for trees holds for a filtered module, too."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import classp_jax

pytestmark = pytest.mark.usefixtures("quick_compilation")

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).normal(size=(8, 2)), jnp.float32)
TRANSFORMS = {
    "classp": classp_jax.classp(0.1, threshold=1e-6),
    "protect": classp_jax.protect(optax.sgd(0.1, momentum=0.9)),
}


def loss(model: eqx.nn.MLP, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_filtered_module_trains_as_its_tree_does(name: str):
    tx = TRANSFORMS[name]
    # Its activations are functions, which the filter leaves out.
    model = eqx.nn.MLP(3, 2, 4, depth=1, activation=jnp.tanh, key=jax.random.key(0))
    one = [model.layers[0].weight, model.layers[0].bias]
    tree = [*one, model.layers[1].weight, model.layers[1].bias]

    def per_example(model):
        gradient = eqx.filter_vmap(
            eqx.filter_grad(lambda model, x, y: loss(model, x[None], y[None])),
            in_axes=(None, 0, 0),
        )
        return gradient(model, X, Y)

    @eqx.filter_jit
    def fill(model, state):
        return classp_jax.accumulate_importance(
            tx,
            state,
            eqx.filter(model, eqx.is_inexact_array),
            per_example(model),
            per_example=True,
        )

    @eqx.filter_jit
    def step(model, state):
        gradients = eqx.filter_grad(loss)(model, X, Y)
        updates, state = tx.update(
            gradients, state, eqx.filter(model, eqx.is_inexact_array)
        )
        return eqx.apply_updates(model, updates), state

    state = fill(model, tx.init(eqx.filter(model, eqx.is_inexact_array)))
    for _ in range(3):
        model, state = step(model, state)

    def tree_loss(tree, x, y):
        first, first_bias, second, second_bias = tree
        hidden = jnp.tanh(x @ first.T + first_bias)
        return jnp.mean((hidden @ second.T + second_bias - y) ** 2)

    @jax.jit
    def train(tree):
        gradients = jax.vmap(
            jax.grad(lambda w, x, y: tree_loss(w, x[None], y[None])), (None, 0, 0)
        )
        state = classp_jax.accumulate_importance(
            tx, tx.init(tree), tree, gradients(tree, X, Y), per_example=True
        )
        for _ in range(3):
            updates, state = tx.update(jax.grad(tree_loss)(tree, X, Y), state, tree)
            tree = optax.apply_updates(tree, updates)
        return tree, classp_jax.accumulators(state)

    expected, sums = train(tree)
    filtered = eqx.filter(model, eqx.is_inexact_array)
    for ours, theirs in ((filtered, expected), (classp_jax.accumulators(state), sums)):
        pairs = zip(jax.tree.leaves(ours), theirs, strict=True)
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert not np.allclose(filtered.layers[0].weight, tree[0])
    means = classp_jax.mean_accumulator(state, per_leaf=True)
    assert means.layers[1].weight > 0
