"""mask_to_density: which share of the weights moves, in the long run and each step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import classp_jax

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE, STEPS = 2_000, 600
DENSITIES = np.asarray([0.001, 0.01, 0.1, 0.5, 0.9], np.float32)
DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, Any], np.ndarray]] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "uniform": lambda rng, shape: rng.uniform(size=shape),
    "cauchy": lambda rng, shape: rng.standard_cauchy(shape),
    "log-normal": lambda rng, shape: np.exp(2 * rng.normal(size=shape)),
    "log-uniform": lambda rng, shape: 10 ** rng.uniform(-4, 0, shape),
}


@functools.partial(jax.jit, static_argnames="per_leaf")
def _run(gradients: Any, densities: Any, rate: Any, per_leaf: bool) -> Any:
    def run(density: Any) -> Any:
        tx: Any = classp_jax.mask_to_density(
            lambda count: density[count], per_leaf=per_leaf, rate=rate
        )

        def step(state: Any, g: Any) -> Any:
            updates, state = tx.update(g, state)
            return state, jax.tree.map(
                lambda u: jnp.count_nonzero(u) / max(u.size, 1), updates
            )

        state = tx.init(jax.tree.map(lambda g: g[0], gradients))
        state, seen = jax.lax.scan(step, state, gradients)
        return seen, state

    return jax.vmap(run)(densities)


def shares(
    gradients: Any, densities: Any, *, per_leaf: bool = True, rate: float = 0.1
) -> Any:
    """The share of each leaf that moves, [densities, steps], and the last states.

    A density is a number or has a value for each step. What is compiled depends on
    shapes alone, which many tests share.
    """
    gradients = jax.tree.map(lambda g: g.astype(np.float32), gradients)
    densities = np.asarray(densities, np.float32)
    if densities.ndim == 1:
        steps = len(jax.tree.leaves(gradients)[0])
        densities = np.repeat(densities[:, None], steps, axis=1)
    found = _run(gradients, densities, np.float32(rate), per_leaf)
    return jax.tree.map(np.asarray, found)


def drawn(seed: int, *shape: int, kind: str = "normal") -> jax.Array:
    return jnp.float32(getattr(np.random.default_rng(seed), kind)(size=shape))


@functools.cache
def normal() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(STEPS, SIZE))


def sparse() -> np.ndarray:
    """Rows of an embedding: 5 % of the gradients are there."""
    there = np.random.default_rng(1).uniform(size=(STEPS, SIZE)) < 0.05
    return np.where(there, normal(), 0.0)


@functools.cache
def shares_of_sparse() -> tuple[np.ndarray, np.ndarray]:
    densities = np.asarray([0.01, 0.03, 0.2, 0.3, 0.5])
    return densities, shares(sparse(), densities)[0]


# Holding a density.


@pytest.mark.parametrize(
    ("name", "noise"), [("normal", 0.0), *((name, 1.0) for name in DISTRIBUTIONS)]
)
def test_holds_the_density_whatever_the_scale_does(name, noise):
    rng = np.random.default_rng(0)
    factors = np.exp(noise * rng.normal(size=(STEPS, 1)))
    seen, _ = shares(factors * DISTRIBUTIONS[name](rng, (STEPS, SIZE)), DENSITIES)
    late = seen[:, 150:]
    # At the edge of a bounded distribution a small step of the threshold is many
    # weights.
    bounded = name in ("uniform", "log-uniform")
    np.testing.assert_allclose(late.mean(1), DENSITIES, rtol=0.2 if bounded else 0.1)
    # Single steps, where some weights move in each.
    if not bounded:
        sampling = (DENSITIES * (1 - DENSITIES) / SIZE) ** 0.5
        assert (late.std(1) < 2 * sampling + DENSITIES / 20).all()


LONG = 4_000


def regimes(size: int) -> np.ndarray:
    """Gradients of another kind and scale every few steps; all nonzero."""
    rng = np.random.default_rng(size)
    kinds: list[Callable[[np.ndarray, int], np.ndarray]] = [
        lambda g, t: g,
        lambda g, t: np.ones_like(g),
        lambda g, t: np.exp(5 * g),
        lambda g, t: np.where(np.arange(size) == t % size, 1e6, 1e-6),
        lambda g, t: np.sign(g) * (1 + 1e-3 * g),
    ]
    rows, kind = [], kinds[0]
    for t in range(LONG):
        if t % 7 == 0:
            kind = kinds[rng.integers(len(kinds))]
        row = kind(rng.normal(size=size), t)
        rows.append(np.exp(10 * rng.normal()) * np.where(row == 0, 1.0, row))
    return np.stack(rows)


REGIMES, SMALL = (1, 7, 200), (1, 3, 10)


@functools.cache
def shares_of_small_leaves(rate: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    leaves = {f"regimes of {size}": regimes(size) for size in REGIMES}
    leaves |= {f"normal of {size}": rng.normal(size=(LONG, size)) for size in SMALL}
    leaves["equal"] = rng.choice([-1.0, 1.0], size=(LONG, 6))
    return shares(leaves, DENSITIES, rate=rate)[0]


@pytest.mark.parametrize("size", REGIMES)
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_number_of_moves_is_within_its_bounds_at_any_step(size, rate):
    """Whatever comes: ties, outliers, a single weight, another scale every step."""
    seen = shares_of_small_leaves(rate)[f"regimes of {size}"]
    d = DENSITIES.astype(np.float64)
    excess = np.cumsum(seen.astype(np.float64) - d[:, None], axis=1)
    unit = 8 / rate * d * (1 - d)
    highest = (np.pi / (4 * d**2 * np.log(1 / d))) ** 0.25
    assert (excess.min(1) >= -d - unit - 0.01).all()
    assert (excess.max(1) <= 1 - d + unit * (np.maximum(highest, 1) - 1) + 0.01).all()
    if rate == 0.1:
        assert np.abs(excess).max() < 21


def test_equal_magnitudes_move_together_and_at_the_right_rate():
    seen = shares_of_small_leaves(0.1)["equal"]
    assert set(np.unique(seen)) == {0.0, 1.0}
    np.testing.assert_allclose(seen.mean(1), DENSITIES, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("size", SMALL)
def test_small_leaves_move_that_often_on_average(size):
    late = shares_of_small_leaves(0.1)[f"normal of {size}"][:, 1_000:].mean(1)
    np.testing.assert_allclose(late, DENSITIES, rtol=0.05, atol=4e-4)


def update_many(tx: Any, gradients: list[Any]) -> tuple[list[Any], list[Any]]:
    state, updates, states = tx.init(gradients[0]), [], []
    update = jax.jit(tx.update)
    for g in gradients:
        u, state = update(g, state)
        updates.append(u)
        states.append(state)
    return updates, states


@pytest.mark.parametrize("per_leaf", [True, False])
def test_a_factor_on_all_gradients_of_a_step_changes_nothing(per_leaf):
    """Also a fall or a rise by 1e45 from one step to the next."""
    rng = np.random.default_rng(0)
    gradients = [
        {"a": rng.laplace(size=(40, 5)), "b": rng.laplace(size=9)} for _ in range(25)
    ]
    gradients = jax.tree.map(jnp.float32, gradients)
    exponents = rng.integers(-50, 25, len(gradients))
    exponents[:4] = [24, -50, -50, 24]
    # Powers of 4, whose square roots are exact, from 8e-31 to 3e14.
    factors = [jnp.float32(4.0**k) for k in exponents]
    scaled = [
        jax.tree.map(lambda x, f=f: x * f, g)
        for g, f in zip(gradients, factors, strict=True)
    ]
    tx: Any = classp_jax.mask_to_density(0.2, per_leaf=per_leaf)
    plain, states = update_many(tx, gradients)
    others, other_states = update_many(tx, scaled)
    for u, v, f in zip(plain, others, factors, strict=True):
        jax.tree.map(
            lambda x, y, f=f: np.testing.assert_array_equal(np.float32(x) * f, y), u, v
        )
    assert states == other_states
    moved = np.concatenate([np.ravel(x) for x in jax.tree.leaves(plain)]) != 0
    assert 0.1 < moved.mean() < 0.3


@pytest.mark.parametrize("per_leaf", [True, False])
def test_follows_its_formula(per_leaf):
    """Against float64, with a schedule that begins at 0 and another rate."""
    rng = np.random.default_rng(1)
    gradients = [
        [rng.normal(size=(30, 11)), 10 * rng.laplace(size=50)] for _ in range(40)
    ]
    wanted = np.linspace(0, 0.6, 40)
    tx: Any = classp_jax.mask_to_density(
        lambda count: jnp.asarray(wanted, jnp.float32)[count],
        per_leaf=per_leaf,
        rate=0.2,
    )
    updates, states = update_many(tx, [[jnp.float32(x) for x in g] for g in gradients])
    level = np.ones(2)
    for t, (g, d) in enumerate(zip(gradients, wanted, strict=True)):
        groups = [[0], [1]] if per_leaf else [[0, 1]]
        for group in groups:
            values = np.abs(np.concatenate([g[i].ravel() for i in group]))
            root = np.mean(np.sqrt(values))
            with np.errstate(divide="ignore"):
                log = np.log(1 / d)
            threshold = 4 / np.pi * root**2 * log * max(level[group[0]], 0) ** 4
            for i in group:
                np.testing.assert_array_equal(
                    np.asarray(updates[t][i]) != 0, np.abs(g[i]) > threshold
                )
            if d > 0:
                error = (np.mean(values > threshold) - d) / (d * (1 - d))
                level[group] = max(
                    level[group[0]] + 0.2 / 8 * error, -0.2 / 8 / (1 - d)
                )
        np.testing.assert_allclose(np.float64(states[t].level), level, atol=1e-4)


def test_keeps_the_largest_unchanged():
    g = drawn(1, SIZE)
    for u in update_many(classp_jax.mask_to_density(0.1), [g, g, g])[0]:
        kept = np.asarray(u != 0)
        np.testing.assert_array_equal(u[kept], g[kept])
        assert np.abs(g)[kept].min() > np.abs(g)[~kept].max()
        assert 0.02 < kept.mean() < 0.2


# Trees.


def two_scales() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "large": 100 * rng.normal(size=(150, 40, 20)),
        "small": rng.normal(size=(150, 1_200)),
        "none": np.zeros((150, 0, 4)),
    }


def test_per_leaf_every_leaf_has_the_density():
    seen, _ = shares(two_scales(), [0.2])
    for leaf in ("large", "small"):
        assert seen[leaf][0, 50:].mean() == pytest.approx(0.2, rel=0.05)


def test_over_the_whole_tree_the_density_is_that_of_all():
    seen, state = shares(two_scales(), [0.2], per_leaf=False)
    # 400 of 2,000 weights: they are all in the large leaf.
    assert seen["large"][0, 50:].mean() == pytest.approx(0.5, rel=0.05)
    assert seen["small"][0, 50:].max() == 0
    assert len({float(level[0]) for level in jax.tree.leaves(state.level)}) == 1


@pytest.mark.parametrize(
    ("per_leaf", "jitted"), [(True, True), (False, True), (False, False)]
)
def test_state_is_one_scalar_a_leaf_with_a_buffer_of_its_own(per_leaf, jitted):
    params = jax.tree.map(lambda g: jnp.float32(g[0]), two_scales())
    tx: Any = classp_jax.mask_to_density(0.1, per_leaf=per_leaf)
    update = jax.jit(tx.update) if jitted else tx.update
    state = tx.init(params)
    for _ in range(3):
        assert jax.tree.structure(state.level) == jax.tree.structure(params)
        levels = jax.tree.leaves(state.level)
        assert {(x.shape, x.dtype) for x in levels} == {((), np.dtype("float32"))}
        assert len({x.unsafe_buffer_pointer() for x in levels}) == len(levels)
        _, state = update(params, state)
    donating = jax.jit(tx.update, donate_argnums=1)
    _, state = donating(params, donating(params, state)[1])
    assert int(state.count) == 5


def test_no_leaves_and_empty_leaves():
    for tree in ({}, {"a": jnp.zeros((0, 3))}):
        for per_leaf in (True, False):
            tx: Any = classp_jax.mask_to_density(0.1, per_leaf=per_leaf)
            updates, state = tx.update(tree, tx.init(tree))
            assert jax.tree.structure(updates) == jax.tree.structure(tree)
            assert all(float(x) == 1 for x in jax.tree.leaves(state.level))


@pytest.mark.parametrize("per_leaf", [True, False])
def test_every_dtype(per_leaf):
    rng = np.random.default_rng(0)
    tx: Any = classp_jax.mask_to_density(0.3, per_leaf=per_leaf)
    with jax.enable_x64(True):
        values = rng.laplace(size=(2, 500))
        g: Any = {
            "half": jnp.asarray(values[0], jnp.float16),
            "brain": jnp.asarray(values[0], jnp.bfloat16),
            "single": jnp.asarray(values[0], jnp.float32),
            "double": jnp.asarray(values[0], jnp.float64),
            "complex": jnp.asarray(values[0] + 1j * values[1], jnp.complex64),
            "scalar": jnp.float32(2.0),
        }
        updates, states = update_many(tx, [g] * 40)
        for name, u in updates[-1].items():
            assert u.dtype == g[name].dtype
            kept = np.asarray(u != 0)
            np.testing.assert_array_equal(u[kept], g[name][kept])
            if name != "scalar" and (per_leaf or name != "complex"):
                assert 0.2 < kept.mean() < 0.4, name
        assert all(x.dtype == jnp.float32 for x in states[-1].level.values())


def test_double_precision_beyond_the_range_of_single():
    with jax.enable_x64(True):
        g = jnp.asarray(np.random.default_rng(0).laplace(size=500))
        tx: Any = classp_jax.mask_to_density(0.3)
        for scale in (1e-250, 1e250):
            updates, _ = update_many(tx, [g * scale] * 3)
            assert 0.2 < np.mean(np.asarray(updates[-1]) != 0) < 0.4


# Gradients that are not like that.


@pytest.mark.parametrize("per_leaf", [True, False])
def test_an_all_zero_step_keeps_the_threshold(per_leaf):
    g = {"a": drawn(0, 500)}
    zero = jax.tree.map(jnp.zeros_like, g)
    tx: Any = classp_jax.mask_to_density(0.2, per_leaf=per_leaf)
    updates, states = update_many(tx, [g, g, zero])
    np.testing.assert_array_equal(updates[2]["a"], 0)
    assert states[2].level == states[1].level != states[0].level
    assert states[2].count == 3


def test_if_too_few_gradients_are_nonzero_all_of_them_move():
    densities, seen = shares_of_sparse()
    there = np.mean(sparse() != 0, axis=1)
    for share in seen[densities > 0.1]:
        np.testing.assert_allclose(share[200:], there[200:], rtol=1e-6)


def test_sparse_gradients_at_a_density_below_theirs():
    densities, seen = shares_of_sparse()
    late = seen[:2, 300:].mean(1)
    np.testing.assert_allclose(late, densities[:2], rtol=0.05)


def test_recovers_from_a_long_sparse_time_within_a_few_steps():
    """The threshold must not run away while all nonzero gradients pass it anyway."""
    g = normal().copy()
    g[:500, SIZE // 20 :] = 0
    densities = np.asarray([0.1, 0.2, 0.3, 0.4, 0.5])
    seen, _ = shares(g, densities)
    np.testing.assert_allclose(seen[:, 560:].mean(1), densities, rtol=0.05)
    np.testing.assert_allclose(seen[:, 530:].min(1), densities, rtol=0.3)


@pytest.mark.parametrize("per_leaf", [True, False])
def test_what_is_not_finite_passes_and_leaves_the_threshold_alone(per_leaf):
    g = drawn(0, 500)
    tx: Any = classp_jax.mask_to_density(0.2, per_leaf=per_leaf)
    for bad in ([jnp.nan], [jnp.inf], [-jnp.inf, jnp.nan]):
        spoiled = g.at[: len(bad)].set(jnp.asarray(bad))
        updates, states = update_many(tx, [g, spoiled, g])
        np.testing.assert_array_equal(updates[1][: len(bad)], jnp.asarray(bad))
        np.testing.assert_array_equal(updates[1][len(bad) :], 0)
        assert states[1].level == states[0].level
        assert 0.05 < np.mean(np.asarray(updates[2]) != 0) < 0.4
        updates, states = update_many(tx, [spoiled, g])
        assert states[0].level == 1
        assert 0.05 < np.mean(np.asarray(updates[1]) != 0) < 0.4


def test_the_largest_finite_gradient_does_not_pass_for_infinite():
    g = np.full(100, np.finfo(np.float32).max)
    g[0] = np.inf
    (updates,), _ = update_many(classp_jax.mask_to_density(0.2), [jnp.asarray(g)])
    np.testing.assert_array_equal(np.nonzero(np.asarray(updates))[0], [0])


# The density itself.


def scheduled(*parts: Any) -> Any:
    """A schedule of these parts, its last value from then on; and what it does."""
    wanted = np.concatenate([np.atleast_1d(part) for part in parts])
    wanted = np.concatenate([wanted, np.full(STEPS - len(wanted), wanted[-1])])
    seen, _ = shares(normal(), np.tile(wanted, (len(DENSITIES), 1)))
    return wanted, seen[0]


def test_a_schedule_may_begin_at_0():
    wanted, seen = scheduled(np.zeros(20), np.linspace(0, 0.2, 200))
    np.testing.assert_array_equal(seen[:21], 0)
    np.testing.assert_allclose(seen[100:220], wanted[100:220], rtol=0.4)
    assert seen[60:220].mean() == pytest.approx(wanted[60:220].mean(), rel=0.05)
    assert seen[220:].mean() == pytest.approx(0.2, rel=0.03)


def test_a_schedule_that_begins_at_1():
    wanted, seen = scheduled(np.ones(50), np.linspace(1, 0.1, 100))
    np.testing.assert_array_equal(seen[:50], 1)
    np.testing.assert_allclose(seen[55:150], wanted[55:150], rtol=0.4)
    assert seen[160:].mean() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15])
def test_density_1_masks_nothing(scale):
    g = drawn(0, SIZE) * scale
    for density in (1.0, jnp.float32(1), lambda _: 1.0):
        for u in update_many(classp_jax.mask_to_density(density), [g] * 3)[0]:
            np.testing.assert_array_equal(u, g)


@pytest.mark.parametrize("per_leaf", [True, False])
def test_derivatives_are_those_of_the_mask(per_leaf):
    """With zeros among the gradients, and through several steps."""
    g = jnp.asarray([0.0, 0.1, -0.4, 1.0, 0.0, 3.0])

    def moved(g: jax.Array, density: jax.Array, rate: jax.Array) -> jax.Array:
        tx: Any = classp_jax.mask_to_density(density, rate=rate, per_leaf=per_leaf)
        updates, state = g, tx.init(g)
        for _ in range(3):
            updates, state = tx.update(g, state)
        return jnp.sum(updates) + state.level

    values = (g, jnp.float32(0.3), jnp.float32(0.1))
    for derivative in (jax.grad, jax.jacfwd):
        by_g, *others = derivative(moved, argnums=(0, 1, 2))(*values)
        kept = update_many(classp_jax.mask_to_density(0.3), [g] * 3)[0][-1] != 0
        np.testing.assert_array_equal(by_g, kept.astype(jnp.float32))
        np.testing.assert_array_equal(others, 0)


# Where it is used.


@pytest.mark.parametrize("per_leaf", [True, False])
def test_the_compiled_module_grows_no_faster_than_the_leaves(per_leaf):
    def lines(leaves):
        tx = classp_jax.mask_to_density(0.1, per_leaf=per_leaf)
        gradients = {f"{k}": jnp.ones(8) for k in range(leaves)}
        step = jax.jit(tx.update).lower(gradients, tx.init(gradients))
        return str(step.compile().as_text()).count("\n")

    assert lines(32) < 2.5 * lines(16)


def test_an_eager_call_compiles_nothing_the_second_time():
    g = {str(n): jnp.arange(1.0, n + 2) for n in range(4)}
    tx: Any = classp_jax.mask_to_density(0.1)
    state = tx.init(g)
    for _ in range(2):
        _, state = tx.update(g, state)
    compilations = []

    def note(event: str, duration_secs: float, **kwargs: Any) -> None:
        compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        _, state = tx.update(g, state)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not [name for name in compilations if "compile" in name]


def test_injected_multi_step_and_vmapped():
    g = drawn(0, 4, 300, kind="laplace")
    tx: Any = classp_jax.mask_to_density(0.2)
    expected, states = update_many(tx, [g[0]] * 5)
    injected: Any = optax.inject_hyperparams(classp_jax.mask_to_density)(
        density=0.2, rate=0.1
    )
    np.testing.assert_array_equal(
        update_many(injected, [g[0]] * 5)[0][-1], expected[-1]
    )
    several: Any = optax.MultiSteps(tx, 2)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = update_many(several, [g[0]] * 10)
    np.testing.assert_array_equal(updates[8], 0)
    np.testing.assert_array_equal(updates[9], expected[-1])
    state = jax.vmap(tx.init)(g)
    for _ in range(5):
        updates, state = jax.vmap(tx.update)(g, state)
    np.testing.assert_array_equal(updates[0], expected[-1])
    np.testing.assert_allclose(state.level[0], states[-1].level, rtol=1e-6)


def shard_mapped(tx: Any, specs: Any, levels: Any, **options: Any) -> Any:
    """One update, with gradients laid out by ``specs`` and levels by ``levels``."""
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    count: Any = P()
    state_specs = classp_jax.MaskToDensityState(count, levels)
    update = jax.shard_map(
        tx.update,
        mesh=mesh,
        in_specs=(specs, state_specs),
        out_specs=(specs, state_specs),
        **options,
    )
    put = functools.partial(
        jax.tree.map, lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    )
    return lambda g, state: jax.jit(update)(put(g, specs), put(state, state_specs))


@pytest.mark.parametrize("per_leaf", [True, False])
def test_inside_shard_map_a_leaf_is_the_whole_leaf(per_leaf):
    rng = np.random.default_rng(0)
    g = jax.tree.map(
        jnp.float32, {"a": rng.laplace(size=(8, 30)), "b": 3 * rng.laplace(size=7)}
    )
    # Shards of very different scale.
    g["a"] = g["a"] * jnp.exp(jnp.arange(8.0))[:, None]
    tx: Any = classp_jax.mask_to_density(0.2, per_leaf=per_leaf)
    expected, states = update_many(tx, [g] * 10)
    update = shard_mapped(tx, {"a": P("x", "y"), "b": P()}, {"a": P(), "b": P()})
    state = tx.init(g)
    for t in range(10):
        updates, state = update(g, state)
        jax.tree.map(np.testing.assert_array_equal, updates, expected[t])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), state, states[-1]
    )


def test_inside_shard_map_members_with_states_of_their_own_stay_apart():
    g = drawn(0, 4, 300, kind="laplace") * jnp.logspace(0, 3, 4)[:, None]
    tx: Any = classp_jax.mask_to_density(0.2)
    expected = [update_many(tx, [member] * 5) for member in g]
    state = classp_jax.MaskToDensityState(jnp.int32(0), jnp.ones(4))

    class Members:
        """The transform on one member's gradients and level."""

        @staticmethod
        def update(g: jax.Array, state: Any) -> Any:
            updates, state = tx.update(g[0], state._replace(level=state.level[0]))
            return updates[None], state._replace(level=state.level[None])

    for options in ({}, {"check_vma": False}):
        update = shard_mapped(Members, P("x"), P("x"), **options)
        updates, after = g, state
        for _ in range(5):
            updates, after = update(g, after)
        updates, levels = np.asarray(updates), np.asarray(after.level)
        for member in range(4):
            updates_alone, states_alone = expected[member]
            np.testing.assert_array_equal(updates[member], updates_alone[-1])
            np.testing.assert_allclose(
                levels[member], states_alone[-1].level, rtol=1e-5
            )


def test_replicas_keep_the_same_thresholds():
    """Data parallel over four devices, on averaged gradients: as on one device."""
    tx: Any = classp_jax.mask_to_density(0.2)
    local = drawn(0, 4, 10, 300)

    def scan(gradients: jax.Array, average: Callable[[Any], Any]) -> Any:
        def step(state: Any, g: jax.Array) -> Any:
            updates, state = tx.update(average(g), state)
            return state, updates

        return jax.lax.scan(step, tx.init(gradients[0]), gradients)

    parallel = jax.pmap(
        lambda g: scan(g, lambda g: jax.lax.pmean(g, "data")), axis_name="data"
    )
    state, updates = parallel(local)
    levels = np.asarray(state.level)
    assert (levels == levels[0]).all()
    assert (np.asarray(updates) == np.asarray(updates)[0]).all()
    alone, _ = jax.jit(lambda g: scan(g, lambda g: g))(local.mean(0))
    np.testing.assert_allclose(levels[0], alone.level, rtol=1e-5)


def test_counts_beyond_what_single_steps_of_a_float32_can():
    """A sum that adds ones to a float32 one by one stands still at 2**24."""
    g = jnp.ones(40_000_000)
    tx: Any = classp_jax.mask_to_density(0.5, rate=8.0)
    _, state = tx.update(g, tx.init(g)._replace(level=jnp.float32(0.0)))
    # The level moves by (1 - 0.5) / 0.25.
    assert float(state.level) == pytest.approx(2.0, rel=1e-4)


def test_in_a_chain_with_the_accumulator():
    """Masked weights neither move nor accumulate; the accumulator sees the rest."""
    tx: Any = optax.chain(
        classp_jax.mask_to_density(0.1),
        classp_jax.scale_by_generalized_adagrad(),
        optax.scale_by_learning_rate(0.1),
    )
    g = drawn(0, SIZE, kind="laplace")
    updates, state = jax.jit(tx.update)(g, tx.init(g))
    moved = np.asarray(updates != 0)
    assert 0.05 < moved.mean() < 0.2
    accumulator = np.asarray(state[1].accumulator)
    np.testing.assert_array_equal(accumulator[~moved], 0)
    np.testing.assert_allclose(accumulator[moved], np.abs(g)[moved], rtol=1e-6)
