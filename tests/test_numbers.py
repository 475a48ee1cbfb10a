"""Ten million steps; sums, counts and gradients at the ends of their types."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import classp_jax

STEPS = 10_000_000


@pytest.mark.parametrize("back", [-0.9, 1.0])
def test_ten_million_steps(back: float):
    """Against float64, sums and weights are off by what the documentation says."""
    tx: Any = classp_jax.classp(0.1, eps=0.1)
    there = np.asarray([1e-3, 0.02, 0.1, 0.3, 1.0, 7.0], np.float32)
    other = np.float32(back) * there

    @jax.jit
    def train(w, state):
        def step(i, carry):
            w, state = carry
            updates, state = tx.update(jnp.where(i % 2 == 0, there, other), state)
            return w + updates, state

        return jax.lax.fori_loop(0, STEPS, step, (w, state))

    w, state = train(jnp.zeros(6), tx.init(jnp.zeros(6)))
    assert int(state.count) == STEPS
    weight_errors, sum_errors = [], []
    for i in range(6):
        g = np.where(np.arange(STEPS) % 2 == 0, there[i], other[i]).astype(np.float64)
        total = np.cumsum(np.abs(g))
        sum_errors.append(abs(float(state.accumulator[i]) / total[-1] - 1))
        weight_errors.append(abs(float(w[i]) / np.sum(-0.1 * g / (0.1 + total)) - 1))
    assert 0.05 < max(sum_errors) < 0.12
    assert max(weight_errors) < (0.05 if back < 0 else 0.14)


def test_a_full_sum_stands_still_and_the_step_with_it():
    tx: Any = classp_jax.classp(0.1, eps=0.0)
    g = jnp.full(1, 2.0**-10)
    state = tx.init(g)._replace(accumulator=jnp.full(1, 2.0**15))
    updates, after = jax.jit(tx.update)(g, state)
    assert float(after.accumulator[0]) == 2.0**15
    assert float(updates[0]) == pytest.approx(-0.1 * 2.0**-25, rel=1e-6)
    # A window keeps the sum where gradients count.
    leaking: Any = classp_jax.classp(0.1, eps=0.0, window=1e6)
    _, after = jax.jit(leaking.update)(g, state)
    assert float(after.accumulator[0]) < 2.0**15


def test_the_count_stays_at_its_end():
    last = np.iinfo(np.int32).max
    tx: Any = classp_jax.classp(optax.linear_schedule(0.1, 0.2, 10), eps=1.0)
    g = jnp.ones(1)
    state = tx.init(g)._replace(count=jnp.int32(last))
    updates, after = jax.jit(tx.update)(g, state)
    assert int(after.count) == last
    np.testing.assert_allclose(updates, -0.2 / 2, rtol=1e-6)


@pytest.mark.parametrize(("power", "size"), [(1.0, 3e38), (2.0, 1e19), (4.0, 4e9)])
def test_a_gradient_explodes(power, size):
    """The step has the size of the rate, and weights beside it do not notice."""
    tx: Any = classp_jax.classp(0.1, eps=0.1, power=power)
    g = jnp.array([size, 1e-3])
    updates, state = jax.jit(tx.update)(g, tx.init(g))
    expected = -0.1 * 1e-3 / (0.1 + 1e-3**power) ** (1 / power)
    np.testing.assert_allclose(updates, [-0.1, expected], rtol=1e-5)
    # The weight is braked from then on.
    updates, _ = jax.jit(tx.update)(g / size, state)
    assert abs(float(updates[0])) < 1e-9


@pytest.mark.parametrize("window", [None, 10.0])
def test_a_power_that_overflows_ends_a_weight_and_no_other(window):
    tx: Any = classp_jax.classp(0.1, eps=0.1, power=2.0, window=window)
    g = jnp.array([1e30, 1.0])
    state = tx.init(g)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(g, state)
        assert float(updates[0]) == 0.0
        assert float(updates[1]) < 0.0
        g = g.at[0].set(1.0)
    assert np.isinf(np.asarray(state.accumulator)[0])


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_gradients_vanish(power):
    """They move the weight by their size over epsilon's root; nothing divides by 0."""
    g = jnp.array([1e-30, 1e-38, 0.0])
    tx: Any = classp_jax.classp(0.1, eps=0.01, power=power)
    updates, _ = jax.jit(tx.update)(g, tx.init(g))
    np.testing.assert_allclose(
        updates[:2], -0.1 * g[:2] / 0.01 ** (1 / power), rtol=1e-5, atol=1.2e-38
    )
    assert float(updates[2]) == 0.0
    bare: Any = classp_jax.classp(0.1, eps=0.0, power=power)
    updates, state = jax.jit(bare.update)(g, bare.init(g))
    assert np.all(np.isfinite(updates))
    assert np.all(np.isfinite(state.accumulator))


def test_the_threshold_sees_the_mean_of_accumulated_gradients():
    """Two that cancel move nothing; two that agree do, however small each is."""
    tx: Any = optax.MultiSteps(classp_jax.classp(0.1, threshold=0.04, eps=0.1), 2)
    params = jnp.zeros(3)
    # Means 0.05, 0.3 and 0.25: only the last two are above 0.2, the root of 0.04.
    first, second = jnp.array([1.0, 0.3, 0.1]), jnp.array([-0.9, 0.3, 0.4])
    state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = tx.update(first, state, params)
        assert not np.any(np.asarray(updates))
        updates, state = tx.update(second, state, params)
    np.testing.assert_allclose(
        updates, [0.0, -0.1 * 0.3 / 0.4, -0.1 * 0.25 / 0.35], rtol=1e-6
    )
    inner: Any = state.inner_opt_state
    np.testing.assert_allclose(inner.accumulator, [0.0, 0.3, 0.25], rtol=1e-6)
    assert int(inner.count) == 1
