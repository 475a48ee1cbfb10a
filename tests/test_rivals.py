"""Rivals, implicit EWC and MAS over three tasks, against float64 formulas in numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from classp_jax import regularizers, rivals
from classp_jax.rivals._noise import noise_like

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Three tasks with losses 1/2 sum A_k (w - B_k)^2, so that an error shows in all later
# steps.
TASKS, STEPS, SIZE = 3, 12, 7
RNG = np.random.default_rng(0)
CURVATURES = RNG.uniform(0.1, 2.0, (TASKS, SIZE))
MINIMA = RNG.normal(size=(TASKS, SIZE))
FISHERS = RNG.exponential(size=(TASKS, SIZE)) * (RNG.random((TASKS, SIZE)) < 0.8)
START = RNG.normal(size=SIZE)
RATE = 0.1
consolidate: Any = regularizers.consolidate


def as_tree(vector: Any) -> Any:
    vector = jnp.asarray(np.asarray(vector), jnp.float32)
    return {"kernel": vector[:6].reshape(2, 3), "bias": [vector[6]]}


def as_vector(tree: Any) -> np.ndarray:
    leaves = [np.ravel(tree["kernel"]), np.ravel(tree["bias"][0])]
    return np.concatenate(leaves).astype(np.float64)


def gradient(task: int, w: np.ndarray) -> np.ndarray:
    return CURVATURES[task] * (w - MINIMA[task])


_noise = jax.jit(lambda key: noise_like(as_tree(START), key, "test"))


def noise_of(key: jax.Array) -> np.ndarray:
    return as_vector(_noise(key))


def assert_follows(optimizer: Any, reference: Any, end_of_task: Any = None) -> None:
    """Trains on three tasks, every step compared with ``reference(w, g, t, noise)``."""
    params, w, t = as_tree(START), START.copy(), 0
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for task in range(TASKS):
        for _ in range(STEPS):
            t += 1
            key = jax.random.fold_in(jax.random.key(3), t)
            g = as_tree(gradient(task, as_vector(params)))
            updates, state = update(g, state, params, key=key)
            params = optax.apply_updates(params, updates)
            w = reference(w, gradient(task, w), t, noise_of(key))
            np.testing.assert_allclose(as_vector(params), w, rtol=2e-4, atol=2e-5)
        if end_of_task is not None:
            state = end_of_task(task, state, params, w)


def test_upgd():
    beta, sigma, decay = 0.9, 0.3, 0.2
    utility = np.zeros(SIZE)

    def step(w, g, t, noise):
        nonlocal utility
        utility = beta * utility - (1 - beta) * g * w
        corrected = utility / (1 - beta**t)
        most = corrected.max()
        scaled = 1 / (1 + np.exp(-corrected / most)) if most > 0 else 0.5
        return (1 - RATE * decay) * w - 2 * RATE * (g + sigma * noise) * (1 - scaled)

    assert_follows(rivals.upgd(RATE, beta, sigma, decay), step)


@pytest.mark.parametrize("kind", ["squared", "absolute"])
def test_streaming_importance(kind):
    strength, beta, gamma = 0.7, 0.8, 0.9
    importance, anchor = np.zeros(SIZE), START.copy()

    def step(w, g, t, noise):
        nonlocal importance, anchor
        corrected = importance / (1 - beta ** (t - 1)) if t > 1 else 0
        moved = w - RATE * (g + strength * corrected * (w - anchor))
        size = g**2 if kind == "squared" else np.abs(g)
        importance = beta * importance + (1 - beta) * size
        anchor = gamma * anchor + (1 - gamma) * w
        return moved

    penalty = rivals.streaming_importance(strength, beta, gamma, kind=kind)
    assert_follows(optax.chain(penalty, optax.sgd(RATE)), step)


def test_shrink_and_perturb():
    optimizer = optax.chain(optax.sgd(RATE), rivals.shrink_and_perturb(0.1, 0.2))
    assert_follows(optimizer, lambda w, g, t, xi: 0.9 * w - RATE * g + 0.2 * xi)


@pytest.mark.parametrize("window", [None, 20.0])
@pytest.mark.parametrize("samples", [1, 3])
def test_bayesian_gradient_descent(window, samples):
    # The first-order step with a window needs smaller ones.
    evidence, prior = 5.0, 0.3 if window is None else 0.1
    optimizer = rivals.bayesian_gradient_descent(evidence, prior, window=window)
    params, mu, sigma = as_tree(START), START.copy(), np.full(SIZE, prior)
    state: Any = optimizer.init(params)
    t, update = 0, jax.jit(optimizer.update)

    @jax.jit
    def gradients_of(w: Any, state: Any, key: Any, a: Any, b: Any) -> Any:
        def loss(w: Any) -> Any:
            each = jax.tree.map(lambda a, b, w: jnp.sum(a * (w - b) ** 2) / 2, a, b, w)
            total = sum(jax.tree.leaves(each), jnp.float32(0))
            return total, total

        draw = rivals.value_and_expected_gradients
        return draw(loss, w, state, key, samples=samples)[1]

    for task in range(TASKS):
        a, b = as_tree(CURVATURES[task]), as_tree(MINIMA[task])
        for _ in range(STEPS):
            t += 1
            key = jax.random.fold_in(jax.random.key(3), t)
            gradients = gradients_of(params, state, key, a, b)
            updates, state = update(gradients, state, params)
            params = optax.apply_updates(params, updates)

            keys = [key] if samples == 1 else jax.random.split(key, samples)
            noises = [noise_of(k) for k in keys]
            drawn = [gradient(task, mu + sigma * e) for e in noises]
            of_mean = evidence * np.mean(drawn, axis=0)
            of_sigma = evidence * np.mean(np.multiply(drawn, noises), axis=0)
            back = 0 if window is None else 1 / (window * prior**2)
            half = sigma * of_sigma / 2
            mu = mu - sigma**2 * (of_mean + back * mu)
            if window is None:
                sigma = sigma * (np.sqrt(1 + half**2) - half)
            else:
                sigma = sigma * (1 - half + back * (prior**2 - sigma**2) / 2)
            np.testing.assert_allclose(as_vector(params), mu, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(as_vector(state.deviation), sigma, rtol=1e-3)
    assert window is not None or sigma.min() > 0


@pytest.mark.parametrize("strength", [0.3, 1e8])
def test_implicit_ewc(strength):
    fishers, anchors = [], []

    def step(w, g, t, noise):
        pull = strength * sum(
            (f * a for f, a in zip(fishers, anchors, strict=True)), np.zeros(SIZE)
        )
        stiffness = strength * sum(fishers, np.zeros(SIZE))
        return (w - RATE * g + pull) / (1 + stiffness)

    def end_of_task(task, state, params, w):
        fishers.append(FISHERS[task])
        anchors.append(w.copy())
        return consolidate(state, params, as_tree(FISHERS[task]))

    optimizer = optax.chain(optax.sgd(RATE), regularizers.implicit_ewc(strength))
    assert_follows(optimizer, step, end_of_task)


def test_mas_importance_is_pytorch_s():
    rng = np.random.default_rng(1)
    kernel, x = rng.normal(size=(4, 3)), rng.normal(size=(5, 4))
    expected = np.zeros((4, 3))
    for row in x:
        weight = torch.tensor(kernel, requires_grad=True)
        (torch.tensor(row) @ weight).tanh().square().sum().backward()
        assert weight.grad is not None
        expected += np.abs(weight.grad.numpy()) / len(x)
    found = jax.jit(
        lambda w, x: regularizers.mas_importance(lambda w, x: jnp.tanh(x @ w), w, x)
    )(jnp.asarray(kernel, jnp.float32), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rivals.upgd(0.1, utility_decay=1.0), "utility_decay"),
        (lambda: rivals.bayesian_gradient_descent(0.0), "evidence"),
        (lambda: rivals.bayesian_gradient_descent(1.0, window=0.5), "window"),
        (lambda: rivals.shrink_and_perturb(-0.1, 0.0), "shrink"),
        (lambda: rivals.streaming_importance(1.0, kind="cubed"), "kind"),
        (lambda: regularizers.implicit_ewc(-1.0), "strength"),
        (
            lambda: regularizers.mas_importance(jnp.multiply, jnp.ones(1), [[1.0]]),
            "at least one example",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_noise_needs_a_key():
    optimizer: Any = rivals.upgd(0.1)
    with pytest.raises(ValueError, match="upgd is random"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), jnp.ones(2))
