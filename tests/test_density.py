"""mask_by_threshold and mask_to_density: which weights move, and how many."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import classp_jax

SIZE = 4_000


def log_uniform(key: jax.Array, shape: Any) -> jax.Array:
    return 10 ** jax.random.uniform(key, shape, minval=-4.0, maxval=0.0)


def log_normal(key: jax.Array, shape: Any) -> jax.Array:
    return jnp.exp(2 * jax.random.normal(key, shape))


DISTRIBUTIONS: dict[str, Callable[[jax.Array, Any], jax.Array]] = {
    "normal": jax.random.normal,
    "laplace": jax.random.laplace,
    "uniform": jax.random.uniform,
    "cauchy": jax.random.cauchy,
    "log-normal": log_normal,
    "log-uniform": log_uniform,
}


@functools.partial(jax.jit, static_argnames=("gradient", "steps", "per_leaf"))
def densities(
    gradient: Callable[[jax.Array, jax.Array], Any],
    density: Any,
    steps: int,
    *,
    seed: int = 0,
    per_leaf: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """The density of each step, over all and by leaf, and the last state."""
    keys = jax.random.split(jax.random.key(seed), steps)
    tx: Any = classp_jax.mask_to_density(
        lambda count: density[count] if jnp.ndim(density) else density,
        per_leaf=per_leaf,
    )

    def step(state: Any, x: Any) -> Any:
        updates, state = tx.update(gradient(*x), state)
        seen = (
            classp_jax.update_density(updates),
            classp_jax.update_density(updates, per_leaf=True),
        )
        return state, seen

    state = tx.init(gradient(keys[0], jnp.int32(0)))
    state, (whole, by_leaf) = jax.lax.scan(step, state, (keys, jnp.arange(steps)))
    return whole, by_leaf, state


@functools.cache
def stationary(name: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return lambda key, step: DISTRIBUTIONS[name](key, (SIZE,))


# Holding a density.


@pytest.mark.parametrize("density", [0.01, 0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_settles_at_the_density(name, density):
    seen, _, _ = densities(stationary(name), jnp.float32(density), 300)
    late = np.asarray(seen)[150:]
    assert late.mean() == pytest.approx(density, rel=0.05)
    # At the edge of a bounded distribution a small step of the threshold is many
    # weights, and the density swings.
    if (name, density) != ("uniform", 0.01):
        sampling = (density * (1 - density) / SIZE) ** 0.5
        assert late.std() < 3 * sampling + density / 30
        assert density / 5 < np.asarray(seen)[20:].min()


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_scale_does_not_matter(scale, dtype):
    def gradient(key: jax.Array, step: jax.Array) -> jax.Array:
        return (jax.random.normal(key, (SIZE,)) * scale).astype(dtype)

    seen, _, _ = densities(gradient, jnp.float32(0.1), 120)
    np.testing.assert_allclose(np.asarray(seen)[60:].mean(), 0.1, rtol=0.05)
    # A right guess at the first step.
    assert 0.05 < seen[0] < 0.2


def test_follows_a_falling_scale():
    """Gradients that shrink a thousandfold, as losses fall. The threshold lags."""

    def gradient(key: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.normal(key, (SIZE,)) * jnp.exp(-7 * step / 500)

    seen, _, _ = densities(gradient, jnp.float32(0.2), 500)
    late = np.asarray(seen)[100:]
    assert late.min() > 0.1
    assert late.max() < 0.25


def test_keeps_the_largest_unchanged():
    g = jax.random.normal(jax.random.key(1), (SIZE,))
    tx: Any = classp_jax.mask_to_density(0.1)
    state = tx.init(g)
    for _ in range(3):
        updates, state = tx.update(g, state)
        kept = np.asarray(updates != 0)
        np.testing.assert_array_equal(updates[kept], g[kept])
        assert np.abs(g)[kept].min() > np.abs(g)[~kept].max()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 30])
@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9])
def test_small_leaves_move_that_often_on_average(size, density):
    """A bias of three weights cannot move a tenth of them; a tenth of the time it can.

    At one weight and a density of 1 % that is one step in a hundred.
    """
    seen, _, _ = densities(small(size), jnp.float32(density), 8_000)
    late = np.asarray(seen)[2_000:]
    assert late.mean() == pytest.approx(density, rel=0.1, abs=0.002)


@functools.cache
def small(size: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return lambda key, step: jax.random.normal(key, (size,))


# Trees.


def two_scales(key: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
    a, b = jax.random.split(key)
    return {
        "large": 100 * jax.random.normal(a, (40, 50)),
        "small": jax.random.normal(b, (3_000,)),
        "none": jnp.zeros((0, 4)),
    }


def test_per_leaf_every_leaf_has_the_density():
    _, by_leaf, state = densities(two_scales, jnp.float32(0.2), 200)
    for leaf in ("large", "small"):
        late = np.asarray(by_leaf[leaf])[100:].mean()
        assert late == pytest.approx(0.2, rel=0.05)
    ratio = state.log_threshold["large"] - state.log_threshold["small"]
    # On |g|^2: a factor of 100 squared.
    assert float(ratio) == pytest.approx(2 * np.log(100), abs=0.5)


def test_over_the_whole_tree_the_density_is_that_of_all():
    whole, by_leaf, state = densities(two_scales, jnp.float32(0.2), 200, per_leaf=False)
    assert np.asarray(whole)[100:].mean() == pytest.approx(0.2, rel=0.05)
    # 1,000 of 5,000 weights: they are all in the large leaf.
    assert np.asarray(by_leaf["large"])[100:].mean() == pytest.approx(0.5, rel=0.05)
    assert np.asarray(by_leaf["small"])[100:].max() == 0
    thresholds = {float(t) for t in jax.tree.leaves(state.log_threshold)[:1]}
    assert {float(state.log_threshold[k]) for k in ("large", "small")} == thresholds


def test_state_is_one_scalar_a_leaf():
    params = two_scales(jax.random.key(0), jnp.int32(0))
    tx: Any = classp_jax.mask_to_density(0.1)
    state = tx.init(params)
    assert jax.tree.structure(state.log_threshold) == jax.tree.structure(params)
    for leaf in jax.tree.leaves(state.log_threshold):
        assert leaf.shape == ()
        assert leaf.dtype == jnp.float32


@pytest.mark.parametrize("per_leaf", [True, False])
def test_scalar_leaves_and_complex_gradients(per_leaf):
    tx: Any = classp_jax.mask_to_density(0.5, per_leaf=per_leaf)
    g = {"a": jnp.float32(2.0), "b": jnp.asarray([3 + 4j, 0.1j, 0, 1j], jnp.complex64)}
    state, update = tx.init(g), jax.jit(tx.update)
    for _ in range(30):
        _, state = update(g, state)
    updates, state = update(g, state)
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(
        lambda u: u.dtype, g
    )
    assert updates["b"][0] == 3 + 4j
    assert updates["b"][2] == 0


# Gradients that are not like that.


@pytest.mark.parametrize("per_leaf", [True, False])
def test_an_all_zero_step_keeps_the_threshold(per_leaf):
    tx: Any = classp_jax.mask_to_density(0.2, per_leaf=per_leaf)
    g = {"a": jax.random.normal(jax.random.key(0), (500,))}
    zero = jax.tree.map(jnp.zeros_like, g)
    state = tx.init(g)
    for _ in range(5):
        _, state = tx.update(g, state)
    updates, after = tx.update(zero, state)
    np.testing.assert_array_equal(updates["a"], 0)
    assert after.log_threshold == state.log_threshold
    assert after.count == state.count + 1


def test_gradients_that_start_late():
    """A leaf may get its first gradient after many steps: its first threshold, too."""

    def gradient(key: jax.Array, step: jax.Array) -> jax.Array:
        g = 1e-3 * jax.random.normal(key, (SIZE,))
        return jnp.where(step < 30, 0.0, g)

    seen, _, _ = densities(gradient, jnp.float32(0.1), 150)
    np.testing.assert_array_equal(seen[:30], 0)
    assert 0.05 < seen[30] < 0.2
    assert np.asarray(seen)[80:].mean() == pytest.approx(0.1, rel=0.05)


def test_if_too_few_gradients_are_nonzero_all_of_them_move():
    """Rows of an embedding: 5 % of the gradients are there, 20 % are asked for."""

    def gradient(key: jax.Array, step: jax.Array) -> jax.Array:
        there, size = jax.random.split(key)
        g = jax.random.normal(size, (SIZE,))
        return jnp.where(jax.random.uniform(there, (SIZE,)) < 0.05, g, 0.0)

    seen, _, _ = densities(gradient, jnp.float32(0.2), 400)
    assert np.asarray(seen)[300:].mean() == pytest.approx(0.05, rel=0.05)


def test_sparse_gradients_at_a_density_below_theirs():
    def gradient(key: jax.Array, step: jax.Array) -> jax.Array:
        there, size = jax.random.split(key)
        g = jax.random.normal(size, (SIZE,))
        return jnp.where(jax.random.uniform(there, (SIZE,)) < 0.05, g, 0.0)

    seen, _, _ = densities(gradient, jnp.float32(0.01), 300)
    assert np.asarray(seen)[150:].mean() == pytest.approx(0.01, rel=0.05)


def test_recovers_from_a_long_sparse_time():
    """The threshold must not run away while all nonzero gradients pass it anyway."""

    def gradient(key: jax.Array, step: jax.Array) -> jax.Array:
        g = jax.random.normal(key, (SIZE,))
        return jnp.where((step >= 1_000) | (jnp.arange(SIZE) < SIZE // 20), g, 0.0)

    seen, _, _ = densities(gradient, jnp.float32(0.2), 1_200)
    assert np.asarray(seen)[1_100:].mean() == pytest.approx(0.2, rel=0.05)


def test_a_schedule_of_the_density():
    schedule = optax.linear_schedule(0.5, 0.05, 200)
    wanted = np.asarray([schedule(t) for t in range(400)])
    seen, _, _ = densities(stationary("normal"), jnp.asarray(wanted), 400)
    seen = np.asarray(seen)
    assert np.abs(seen[50:200] / wanted[50:200] - 1).max() < 0.5
    assert seen[300:].mean() == pytest.approx(0.05, rel=0.05)


def test_a_schedule_that_starts_at_1():
    """All weights at first, then fewer: the usual way in."""
    wanted = np.concatenate([np.ones(100), np.linspace(1, 0.1, 100), np.full(200, 0.1)])
    seen, _, _ = densities(stationary("normal"), jnp.asarray(wanted, jnp.float32), 400)
    seen = np.asarray(seen)
    np.testing.assert_array_equal(seen[:100], 1)
    assert seen[199] < 0.25
    assert seen[250:].mean() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_density_1_masks_nothing(scale):
    g = jax.random.normal(jax.random.key(0), (SIZE,)) * scale
    for density in (1.0, jnp.float32(1), lambda _: 1.0):
        tx: Any = classp_jax.mask_to_density(density)
        state, update = tx.init(g), jax.jit(tx.update)
        for _ in range(5):
            updates, state = update(g, state)
            np.testing.assert_array_equal(updates, g)


def test_one_nan_passes_and_does_not_spoil_the_threshold():
    """Not at the first step either, where the threshold comes from the gradients."""

    def gradient(key: jax.Array, step: jax.Array) -> jax.Array:
        g = jax.random.normal(key, (SIZE,))
        return jnp.where((step % 50 == 0) & (jnp.arange(SIZE) == 7), jnp.nan, g)

    seen, _, state = densities(gradient, jnp.float32(0.1), 150)
    assert jnp.isfinite(state.log_threshold)
    assert np.asarray(seen)[5:40].mean() == pytest.approx(0.1, rel=0.2)
    assert np.asarray(seen)[100:].mean() == pytest.approx(0.1, rel=0.05)

    g = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf, 1.0, 0.0])
    tx: Any = classp_jax.mask_to_density(0.2)
    updates, _ = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(updates[:3], g[:3])
    assert updates[4] == 0


def test_replicas_keep_the_same_thresholds():
    """Data parallel over four devices, on averaged gradients: as on one device."""
    tx: Any = classp_jax.mask_to_density(0.2)
    local = jax.random.normal(jax.random.key(0), (4, 20, 300))

    def scan(gradients: jax.Array, average: Callable[[Any], Any]) -> Any:
        def step(state: Any, g: jax.Array) -> Any:
            updates, state = tx.update(average(g), state)
            return state, updates

        return jax.lax.scan(step, tx.init(gradients[0]), gradients)

    parallel = jax.pmap(
        lambda g: scan(g, lambda g: jax.lax.pmean(g, "data")), axis_name="data"
    )
    state, updates = parallel(local)
    thresholds = np.asarray(state.log_threshold)
    assert (thresholds == thresholds[0]).all()
    assert (np.asarray(updates) == np.asarray(updates)[0]).all()
    alone, _ = jax.jit(lambda g: scan(g, lambda g: g))(local.mean(0))
    np.testing.assert_allclose(thresholds[0], alone.log_threshold, rtol=1e-5)


def test_in_a_chain_with_the_accumulator():
    """Masked weights neither move nor accumulate; the accumulator sees the rest."""
    tx: Any = optax.chain(
        classp_jax.mask_to_density(0.1),
        classp_jax.scale_by_generalized_adagrad(),
        optax.scale_by_learning_rate(0.1),
    )
    g = jax.random.normal(jax.random.key(0), (SIZE,))
    updates, state = jax.jit(tx.update)(g, tx.init(g))
    moved = np.asarray(updates != 0)
    assert 0.05 < moved.mean() < 0.2
    accumulator = np.asarray(state[1].accumulator)
    np.testing.assert_array_equal(accumulator[~moved], 0)
    np.testing.assert_allclose(accumulator[moved], np.abs(g)[moved], rtol=1e-6)
