"""The numbers: every form against float64, the edges of the range, bad gradients."""

import functools
from typing import Any

import chex
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import Phase, given, settings

import classp_jax

# The same examples on every run and machine.
DETERMINISTIC = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=40,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
OWN_FORM = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
GENERAL_FORM = [0.7, 1.7, 2.5, 5.0]
# The last two are at the edges of the range.
EPS = np.asarray([0.0, 1e-30, 1e-5, 0.1, 100.0, 1e-38, 3e38], np.float32)
USUAL_EPS = EPS[:-2].tolist()
STEPS = 3
FLOAT32 = np.finfo(np.float32)
LARGEST = float(FLOAT32.max)


def bits(low: Any, high: Any) -> st.SearchStrategy[int]:
    """Bit patterns of positive float32 numbers: about log-uniform numbers."""
    return st.integers(*(int(np.float32(x).view(np.uint32)) for x in (low, high)))


def gradients(shape: Any, low: Any = 1e-30, high: Any = 1e15):
    """Gradients of either sign with magnitudes in a range, some exactly 0."""
    signs = st.sampled_from([0, 1 << 31])
    nonzero = st.tuples(bits(low, high), signs).map(sum)
    # No fill value: hypothesis would repeat it almost everywhere in the array.
    return hnp.arrays(
        np.uint32, shape, elements=nonzero | st.just(0), fill=st.nothing()
    ).map(lambda patterns: patterns.view(np.float32))


def sample(low: float, high: float, size: int) -> np.ndarray:
    """Many such, and always the same: [steps, size]."""
    rng = np.random.default_rng(6)
    least, most = (int(np.float32(x).view(np.uint32)) for x in (low, high))
    patterns = rng.integers(least, most + 1, (STEPS, size), dtype=np.uint32)
    patterns |= rng.integers(2, size=patterns.shape, dtype=np.uint32) << np.uint32(31)
    patterns[rng.random(patterns.shape) < 0.1] = 0
    return patterns.view(np.float32)


def in_float64(
    g: np.ndarray, power: float, eps: float, include_current: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mathematics, step by step: updates, sums, and the terms of the sums."""
    g = g.astype(np.float64)
    terms = np.abs(g) ** power
    sums = np.cumsum(terms, axis=0)
    before = np.concatenate([np.zeros_like(terms[:1]), sums[:-1]])
    divisor = (sums if include_current else before) + eps
    with np.errstate(divide="ignore", invalid="ignore"):
        updates = np.where(g == 0, 0, g / divisor ** (1 / power))
    return updates, sums, terms


def normal(x: np.ndarray) -> np.ndarray:
    """Whether numbers lie well within the normal range of float32."""
    return (np.abs(x) > FLOAT32.tiny * 1.001) & (np.abs(x) < FLOAT32.max * 0.999)


def normal_or_0(x: np.ndarray) -> np.ndarray:
    return normal(x) | (x == 0)


def run(tx: optax.GradientTransformation, gradients: Any) -> tuple[Any, Any]:
    """The updates and the accumulators of all steps, stacked."""

    def step(state: Any, g: Any) -> Any:
        updates, state = tx.update(g, state)
        return state, (updates, state.accumulator)

    first = jax.tree.map(lambda g: g[0], gradients)
    return jax.lax.scan(step, tx.init(first), gradients)[1]


@functools.partial(jax.jit, static_argnames=("power", "include_current"))
def run_static(g: Any, power: float, eps: Any, include_current: bool = True) -> Any:
    tx: Any = classp_jax.scale_by_generalized_adagrad(
        power, eps, include_current=include_current
    )
    return run(tx, g)


@functools.partial(jax.jit, static_argnames="include_current")
def run_traced(g: Any, power: Any, eps: Any, include_current: bool = True) -> Any:
    tx: Any = classp_jax.scale_by_generalized_adagrad(
        power, eps, include_current=include_current
    )
    return run(tx, g)


@functools.partial(jax.jit, static_argnames=("power", "include_current"))
def run_each_eps(g: Any, power: float, include_current: bool) -> Any:
    def one(eps: Any) -> Any:
        return run_static(g, power, eps, include_current)

    return jax.vmap(one)(EPS)


def check(
    found: tuple[Any, Any],
    g: np.ndarray,
    power: float,
    eps: float,
    rtol: float,
    include_current: bool = True,
) -> int:
    """Compares where all that is meant to be normal is; says how many it compared."""
    updates, sums, terms = in_float64(g, power, eps, include_current)
    ok = np.logical_and.accumulate(normal_or_0(terms) & normal_or_0(sums), axis=0)
    np.testing.assert_allclose(np.asarray(found[1])[ok], sums[ok], rtol=rtol, atol=0)
    ok &= normal_or_0(updates) & (normal(updates) | (g == 0))
    np.testing.assert_allclose(np.asarray(found[0])[ok], updates[ok], rtol=rtol, atol=0)
    return int(np.count_nonzero(ok & (g != 0)))


# Agreement with float64.


MANY = 3_000


@pytest.mark.parametrize("include_current", [True, False])
@pytest.mark.parametrize("power", OWN_FORM + GENERAL_FORM)
def test_static_power(power, include_current):
    g = sample(1e-30, 1e15, MANY)
    updates, sums = run_each_eps(g, power, include_current)
    rtol = 1e-6 if power in OWN_FORM else 5e-6
    for i, eps in enumerate(USUAL_EPS):
        found = updates[i], sums[i]
        # Powers above 1 leave the normal range in a part of this one.
        assert check(found, g, power, eps, rtol, include_current) > MANY / 10


# Powers with a form of their own, and others.
POWERS = np.asarray(
    [*OWN_FORM, *GENERAL_FORM, *np.random.default_rng(1).uniform(0.25, 8, 10)],
    np.float32,
)


@functools.partial(jax.jit, static_argnames="include_current")
def run_each_power(g: Any, powers: Any, include_current: bool = True) -> Any:
    """[powers, eps, steps, weights]"""

    def one(power: Any, eps: Any) -> Any:
        return run_traced(g, power, eps, include_current)

    each_eps = jax.vmap(one, (None, 0))
    return jax.vmap(each_eps, (0, None))(powers, EPS)


def test_traced_power():
    g = sample(1e-30, 1e15, 100)
    updates, sums = run_each_power(g, POWERS)
    for i, power in enumerate(POWERS.tolist()):
        for k, eps in enumerate(USUAL_EPS):
            check((updates[i, k], sums[i, k]), g, power, eps, 5e-6)


@pytest.mark.parametrize("power", [*OWN_FORM, 1.7])
def test_dense_sweep_of_the_range(power):
    """200,000 gradients per power, and eps as a plain number."""
    rng = np.random.default_rng(7)
    size = (STEPS, 200_000 // STEPS)
    g = (10 ** rng.uniform(-30, 15, size) * rng.choice([-1, 1], size)).astype("float32")
    txs: dict[float, Any] = {
        eps: classp_jax.scale_by_generalized_adagrad(power, eps) for eps in (0.0, 1e-5)
    }
    sweep = jax.jit(lambda g: {eps: run(tx, g) for eps, tx in txs.items()})
    for eps, found in sweep(jnp.asarray(g)).items():
        rtol = 1e-6 if power in OWN_FORM else 5e-6
        # Powers above 1 leave the normal range in a part of this one.
        assert check(found, g, power, eps, rtol) > 80_000 / max(power, 1)


@pytest.mark.parametrize("power", OWN_FORM + GENERAL_FORM)
def test_float64(power):
    rng = np.random.default_rng(8)
    size = (STEPS, 5_000)
    g = 10 ** rng.uniform(-30, 15, size) * rng.choice([-1, 1], size)
    with jax.enable_x64(True):
        for eps in (0.0, 1e-5):
            for include_current in (True, False) if power == 2 else (True,):
                updates, sums = (
                    np.asarray(x)
                    for x in run_static(jnp.asarray(g), power, eps, include_current)
                )
                assert updates.dtype == sums.dtype == np.float64
                want, want_sums, _ = in_float64(g, power, eps, include_current)
                # The first step has no sum before it.
                start = 0 if include_current or eps else 1
                np.testing.assert_allclose(sums, want_sums, rtol=1e-12)
                np.testing.assert_allclose(updates[start:], want[start:], rtol=1e-12)


def test_float64_traced_power():
    rng = np.random.default_rng(9)
    g = 10 ** rng.uniform(-30, 15, (STEPS, 5_000))
    with jax.enable_x64(True):
        for power in OWN_FORM + GENERAL_FORM:
            updates, sums = run_traced(jnp.asarray(g), jnp.float64(power), 1e-5)
            want, want_sums, _ = in_float64(g, power, 1e-5)
            np.testing.assert_allclose(sums, want_sums, rtol=1e-12)
            np.testing.assert_allclose(updates, want, rtol=1e-12)


def test_float32_gradients_into_a_float64_accumulator():
    with jax.enable_x64(True):
        tx: Any = classp_jax.scale_by_generalized_adagrad(accumulator_dtype=jnp.float64)
        large, one = np.full(2, 1e8, np.float32), np.ones(2, np.float32)
        update = jax.jit(tx.update)
        _, state = update(large, tx.init(large))
        updates, state = update(one, state)
        assert updates.dtype == jnp.float32
        np.testing.assert_array_equal(state.accumulator, [1e8 + 1.0] * 2)


SHAPES = st.sampled_from(
    [(), (0,), (1,), (5,), (0, 3), (2, 3), (2, 1, 3), (2, 0, 2, 1), (2, 3, 1, 2)]
)
TREES = st.recursive(
    SHAPES.map(np.empty),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(DETERMINISTIC, max_examples=6)
@given(
    tree=TREES,
    power=st.sampled_from(OWN_FORM),
    threshold=st.sampled_from([0.0, 1e-4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_trees_of_random_shapes(tree, power, threshold, seed):
    """The whole of ``classp``, leaf by leaf."""
    rng = np.random.default_rng(seed)
    trees = [
        jax.tree.map(
            lambda w: np.asarray(
                rng.normal(size=w.shape) * 10 ** rng.uniform(-4, 2), np.float32
            ),
            tree,
        )
        for _ in range(2)
    ]
    tx: Any = classp_jax.classp(0.5, threshold, power)
    update = jax.jit(tx.update)
    state = tx.init(trees[0])
    sums: list[Any] = [0.0] * len(jax.tree.leaves(tree))
    for gradient in trees:
        updates, state = update(gradient, state)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(gradient), strict=True)
        for i, (u, g) in enumerate(pairs):
            assert u.shape == g.shape
            assert u.dtype == g.dtype
            g = g.astype(np.float64)
            accepted = g * g > threshold
            sums[i] = sums[i] + np.where(accepted, np.abs(g) ** power, 0)
            root = (sums[i] + 0.1) ** (1 / power)
            want = np.where(accepted, -0.5 * g / root, 0)
            np.testing.assert_allclose(u, want, rtol=1e-6)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5, 2.0, 3.0, 1.7])
def test_complex_gradients(power):
    rng = np.random.default_rng(3)
    g = rng.normal(size=(4, 50)) + 1j * rng.normal(size=(4, 50))
    g[:, 0] = 0
    g = g.astype(np.complex64)
    tx: Any = classp_jax.classp(0.5, 1.0, power, 0.0)
    state = tx.init(g[0])
    sums = np.zeros(50)
    for row in g:
        updates, state = jax.jit(tx.update)(row, state)
        exact = row.astype(np.complex128)
        accepted = np.abs(exact) ** 2 > 1
        sums = sums + np.where(accepted, np.abs(exact) ** power, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            want = np.where(accepted, -0.5 * exact / sums ** (1 / power), 0)
        assert updates.dtype == np.complex64
        np.testing.assert_allclose(updates, want, rtol=2e-6)
    assert state.accumulator.dtype == np.float32
    np.testing.assert_allclose(state.accumulator, sums, rtol=2e-6)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_include_current_false_is_equation_1(power):
    """Divides by the sum before the step; without such a sum and eps, no step."""
    g = np.asarray([[2.0, 0.0], [-1.0, 3.0], [4.0, 5.0]], np.float32)
    updates, sums = run_static(jnp.asarray(g), power, 0.0, include_current=False)
    want = np.zeros((3, 2))
    want[1, 0] = -1.0 / 2.0
    want[2] = 4.0 / (2**power + 1) ** (1 / power), 5.0 / 3.0
    np.testing.assert_allclose(updates, want, rtol=1e-6)
    np.testing.assert_allclose(sums, np.cumsum(np.abs(g) ** power, axis=0), rtol=1e-6)


# Equal to what it is said to equal.


def test_power_2_is_adagrad():
    rng = np.random.default_rng(4)
    ours: Any = classp_jax.classp(0.3, power=2, eps=0.1)
    theirs: Any = optax.adagrad(0.3, initial_accumulator_value=0.1, eps=0)
    params = jnp.zeros((8, 5))
    states = ours.init(params), theirs.init(params)
    for _ in range(20):
        g = jnp.asarray(rng.normal(size=(8, 5)) * 10 ** rng.uniform(-6, 3), jnp.float32)
        u, ours_state = jax.jit(ours.update)(g, states[0])
        v, theirs_state = jax.jit(theirs.update)(g, states[1])
        states = ours_state, theirs_state
        np.testing.assert_allclose(u, v, rtol=1e-6)


def linear(count: Any) -> Any:
    return 1e-2 * count.astype(jnp.float32)


CHAIN_CASES = [
    (0.0, True),
    (1e-2, True),
    (linear, lambda count: count % 2 == 0),
    (1e-2, False),
]


@pytest.mark.parametrize(
    ("dtype", "power"),
    [("float32", power) for power in [*OWN_FORM, 1.7]]
    + [
        (dtype, p) for dtype in ("bfloat16", "float16", "complex64") for p in (1.0, 3.0)
    ],
)
def test_equals_the_chain_bit_for_bit(dtype, power):
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(3, 40)) * 10 ** rng.uniform(-3, 1, size=(3, 40))
    rows[:, :4] = 0
    g = rows + 1j * rows[::-1] if dtype == "complex64" else rows
    g = g.astype(jnp.dtype(dtype))
    of_all = (dtype, power) == ("float32", 1)
    cases = CHAIN_CASES if of_all else CHAIN_CASES[1:3]
    ones: list[Any] = [
        classp_jax.classp(0.3, threshold, power, scaling=scaling)
        for threshold, scaling in cases
    ]
    chains: list[Any] = [
        optax.chain(
            classp_jax.mask_by_threshold(threshold),
            classp_jax.scale_by_generalized_adagrad(power, scaling=scaling),
            optax.scale_by_learning_rate(0.3),
        )
        for threshold, scaling in cases
    ]
    for wrap in (jax.jit, lambda f: f) if of_all else (jax.jit,):
        found, expected = run_all(ones, g, wrap), run_all(chains, g, wrap)
        for found_row, expected_row in zip(found, expected, strict=True):
            for (a, state), (b, other) in zip(found_row, expected_row, strict=True):
                assert same_bits(a, b)
                assert same_bits(state.accumulator, other[1].accumulator)


def run_all(txs: list[Any], rows: Any, wrap: Any) -> list[list[tuple[Any, Any]]]:
    """Each transform's update and state at each row: one compilation for them all."""
    # In NumPy, where taking a row compiles nothing.
    rows = jax.tree.map(np.asarray, rows)
    length = len(jax.tree.leaves(rows)[0])
    rows = [jax.tree.map(lambda x, i=i: x[i], rows) for i in range(length)]
    states = [tx.init(rows[0]) for tx in txs]
    update = wrap(
        lambda row, states: [
            tx.update(row, state) for tx, state in zip(txs, states, strict=True)
        ]
    )
    found = []
    for row in rows:
        found.append(update(row, states))
        states = [state for _, state in found[-1]]
    return found


def same_bits(a: Any, b: Any) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


# Masked weights.


@pytest.mark.parametrize(
    ("power", "jit"),
    [(power, True) for power in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 1.7, "traced")]
    + [(1.0, False), (1.7, False)],
)
def test_masked_weights_do_not_move(power, jit):
    """Exactly 0, also at ``A = 0, eps = 0``, where they would divide 0 by 0."""
    power = jnp.float32(1.3) if power == "traced" else power
    g = jnp.asarray([0.0, -0.0, 0.01, -0.01, 2.0])
    forms = [
        (1e-3, True),
        (jnp.float32(1e-3), False),
        (lambda _: 1e-3, jnp.asarray(True)),
    ]
    for threshold, scaling in forms if power == 1 else forms[:1]:
        tx: Any = classp_jax.classp(1.0, threshold, power, 0.0, scaling=scaling)
        update = jax.jit(tx.update) if jit else tx.update
        updates, state = update(g, tx.init(g))
        np.testing.assert_array_equal(updates[:4], 0)
        np.testing.assert_array_equal(state.accumulator[:4], 0)
        assert updates[4] < 0
        params = jnp.asarray([1.0, np.pi, -1e-30, 1e30, 0.0])
        moved: Any = optax.apply_updates(params, updates)
        assert same_bits(moved[:4], params[:4])


@pytest.mark.parametrize("power", [0.5, 1.0, 1.7])
def test_the_published_class_leaves_weights_without_a_gradient_alone(power):
    g = jnp.asarray([0.0, -0.0, 2.0])
    tx: Any = classp_jax.classp_published(1.0, power=power, eps=0.0)
    updates, _ = jax.jit(tx.update)(g, tx.init(g))
    np.testing.assert_array_equal(updates[:2], 0)
    assert np.isfinite(updates).all()


def test_the_threshold_is_strict():
    def around_a_half(dtype: str) -> jax.Array:
        # 0.25, 0.5 and their squares are exact in every dtype.
        above = 0.5 + 0.5 * float(jnp.finfo(dtype).eps)
        return jnp.asarray(np.asarray([0.5, -0.5, above, 0.25]), dtype)

    g = {dtype: around_a_half(dtype) for dtype in ("float32", "bfloat16", "float16")}
    for threshold in (0.25, jnp.float32(0.25), lambda _: jnp.float32(0.25)):
        for tx in (
            classp_jax.mask_by_threshold(threshold),
            classp_jax.classp(1.0, threshold),
        ):
            updates, _ = jax.jit(tx.update)(g, tx.init(g))
            for u in jax.tree.leaves(updates):
                assert (np.asarray(u) != 0).tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_gradients_are_squared_in_float32(dtype):
    """Their squares would underflow in float16 and round across the threshold."""
    g = np.asarray([1e-4, 0.1]).astype(jnp.dtype(dtype))
    squares = np.asarray(g, np.float64) ** 2
    for i, square in enumerate(squares):
        below, above = float(square * (1 - 1e-6)), float(square * (1 + 1e-6))
        for threshold, passes in ((below, True), (above, False)):
            for value in (threshold, jnp.float32(threshold)):
                tx: Any = classp_jax.mask_by_threshold(value)
                updates, _ = tx.update(g, tx.init(g))
                assert bool(np.asarray(updates)[i] != 0) == passes


def test_the_threshold_decides_as_the_rounded_square_does():
    """Gradients within a few steps of the root, in float32 as numpy rounds it."""
    rng = np.random.default_rng(11)
    thresholds = (10 ** rng.uniform(-37, 38, 3_000)).astype(np.float32)
    roots = np.sqrt(thresholds)
    g = (roots.view(np.int32)[:, None] + np.arange(-4, 5, dtype=np.int32)).view("f4")
    g[:, ::2] *= -1
    with np.errstate(over="ignore"):
        want = g * g > thresholds[:, None]
    assert want.any(axis=1).all()
    assert not want.all(axis=1).any()

    def kept(threshold: Any, g: Any) -> Any:
        tx: Any = classp_jax.mask_by_threshold(threshold)
        return tx.update(g, tx.init(g))[0] != 0

    np.testing.assert_array_equal(jax.jit(jax.vmap(kept))(thresholds, g), want)
    for i in range(30):
        static = kept(float(thresholds[i]), jnp.asarray(g[i]))
        np.testing.assert_array_equal(static, want[i])


@DETERMINISTIC
@given(g=gradients((32,), 1e-45, FLOAT32.max), bound=bits(1e-18, 1e18))
def test_mask_agrees_with_float64(g, bound):
    threshold = float(np.uint32(bound).view(np.float32))
    squares = g.astype(np.float64) ** 2
    clear = np.abs(squares / threshold - 1) > 1e-6
    tx: Any = classp_jax.mask_by_threshold(jnp.float32(threshold))
    kept = np.asarray(tx.update(jnp.asarray(g), tx.init(g))[0])
    assert ((kept != 0) == (squares > threshold))[clear].all()
    np.testing.assert_array_equal(kept[kept != 0], g[kept != 0])


def test_threshold_0_keeps_gradients_whose_square_underflows():
    g = jnp.asarray([1e-25, -1e-30, 2e-38, 0.0])
    for threshold in (0.0, jnp.float32(0), lambda _: 0.0):
        tx: Any = classp_jax.mask_by_threshold(threshold)
        np.testing.assert_array_equal(tx.update(g, tx.init(g))[0], g)


# Outside the normal range.


def test_a_sum_below_the_smallest_normal_number_gives_no_step():
    for power, g in ((2.0, 1e-20), (4.0, 1e-10), (3.0, 1e-13), (1.0, 1e-39)):
        updates, _ = run_static(jnp.full((STEPS, 1), g) / STEPS, power, 0.0)
        np.testing.assert_array_equal(updates, 0)


def test_a_sum_that_overflows_stops_the_weight():
    for power, g in ((4.0, 1e10), (3.0, 1e13), (2.0, 1e20), (1.5, 1e30), (1.0, 3e38)):
        gradient = jnp.asarray([[g], [g], [1.0]])
        updates, sums = run_static(gradient, power, 0.0)
        assert np.isinf(sums[1:]).all()
        np.testing.assert_array_equal(updates[1:], 0)


@pytest.mark.parametrize("include_current", [True, False])
@pytest.mark.parametrize("power", [0.1, *OWN_FORM, *GENERAL_FORM, 100.0])
def test_finite_gradients_never_give_nan(power, include_current):
    g = sample(1e-45, LARGEST, MANY)
    found = run_each_eps(g, power, include_current)
    assert not any(np.isnan(x).any() for x in found)
    if include_current:
        # The sum holds the gradient's own power: no step is larger than 1.
        assert (np.abs(found[0]) < 1.00001).all()


@pytest.mark.parametrize("include_current", [True, False])
def test_finite_gradients_never_give_nan_with_a_traced_power(include_current):
    g = sample(1e-45, LARGEST, 100)
    powers = np.geomspace(0.125, 100, len(POWERS), dtype=np.float32)
    found = run_each_power(g, powers, include_current)
    assert not any(np.isnan(x).any() for x in found)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 1.7])
def test_finite_gradients_of_other_dtypes_never_give_nan(power):
    def edges(dtype: str) -> jax.Array:
        limit = float(jnp.finfo(dtype).max)
        exponents = np.linspace(-45, np.log10(limit), 300)
        g = np.concatenate([10**exponents, -(10**exponents), [0, limit, -limit]])
        g = jnp.asarray(g.clip(-limit, limit), dtype)
        return g + 1j * g[::-1] if dtype == "complex64" else g

    g = {dtype: edges(dtype) for dtype in ("bfloat16", "float16", "complex64")}
    back = jax.tree.map(lambda g: g[::-1], g)

    @jax.jit
    def update(gradient: Any, state: Any, eps: Any) -> Any:
        return classp_jax.classp(1.0, 0.0, power, eps).update(gradient, state)

    for eps in (0.0, 1e-5, 1e30):
        state: Any = classp_jax.classp(1.0).init(g)
        for gradient in (g, back, g):
            updates, state = update(gradient, state, jnp.float32(eps))
            for x in jax.tree.leaves((updates, state.accumulator)):
                assert not np.isnan(np.asarray(x)).any()


# Bad gradients stay visible.

BAD = [np.nan, np.inf, -np.inf]


def transforms(power: Any = 1.0, eps: float = 0.0) -> dict[str, Any]:
    scale = functools.partial(classp_jax.scale_by_generalized_adagrad, power, eps)
    return {
        "mask_by_threshold": classp_jax.mask_by_threshold(0.5),
        "mask_by_threshold(0)": classp_jax.mask_by_threshold(0.0),
        "mask_by_threshold(1e39)": classp_jax.mask_by_threshold(1e39),
        "mask_to_density": classp_jax.mask_to_density(0.5),
        "scale": scale(),
        "scale(include_current=False)": scale(include_current=False),
        "scale(scaling=False)": scale(scaling=False),
        "classp": classp_jax.classp(0.1, 0.5, power, eps),
        "classp(traced)": classp_jax.classp(0.1, jnp.float32(0.5), jnp.float32(1.2)),
        "classp_published": classp_jax.classp_published(0.1, power=power, eps=eps),
    }


@pytest.mark.parametrize("name", transforms())
def test_a_bad_gradient_shows_and_stays_in_its_place(name):
    no_power = name.startswith("mask") or name in (
        "classp(traced)",
        "scale(scaling=False)",
    )
    for dtypes, powers, wrap in (
        (["float32"], (0.5, 1.0, 1.5, 2.0, 1.7), jax.jit),
        (["float32"], (0.5, 1.0, 1.5, 2.0, 1.7), lambda f: f),
        (["bfloat16", "complex64"], (1.0, 1.7), jax.jit),
    ):
        txs = [transforms(p)[name] for p in (powers[:1] if no_power else powers)]
        values = np.asarray([[2.0, -3.0, 0.0, *BAD]])
        row = {dtype: values.astype(jnp.dtype(dtype)) for dtype in dtypes}
        for updates, _ in run_all(txs, row, wrap)[0]:
            for u in map(np.asarray, updates.values()):
                assert np.isfinite(u[:3]).all()
                assert u[2] == 0
                assert not np.isfinite(u[3:]).any()


@pytest.mark.parametrize(
    "name", ["classp", "classp(traced)", "classp_published", "scale", "mask_to_density"]
)
def test_apply_if_finite_leaves_the_state_untouched(name):
    tx: Any = optax.apply_if_finite(
        transforms(eps=1e-5)[name], max_consecutive_errors=5
    )
    g = {"a": jnp.asarray([1.0, 0.3, -2.0]), "b": jnp.asarray([[1.5]])}
    update = jax.jit(tx.update)
    _, state = update(g, tx.init(g))
    for bad in BAD:
        broken = g | {"a": g["a"].at[1].set(bad)}
        updates, after = update(broken, state)
        assert all(same_bits(u, jnp.zeros_like(u)) for u in jax.tree.leaves(updates))
        jax.tree.map(
            lambda a, b: chex.assert_trees_all_equal(a.tobytes(), b.tobytes()),
            jax.tree.map(np.asarray, state.inner_state),
            jax.tree.map(np.asarray, after.inner_state),
        )
        assert int(after.total_notfinite) == 1
        # And training goes on as if the step had not been.
        for u, v in zip(
            jax.tree.leaves(update(g, after)[0]),
            jax.tree.leaves(update(g, state)[0]),
            strict=True,
        ):
            assert same_bits(u, v)
            assert (np.asarray(u) != 0).any()


# Narrow parameters.


def test_bfloat16_gradients_accumulate():
    """1e5 gradients of 1e-3 make 100; a sum in bfloat16 would stand still at 0.5."""
    tx = classp_jax.classp(0.1)
    g = jnp.full(4, 1e-3, jnp.bfloat16)
    state: Any = jax.lax.fori_loop(
        0, 100_000, lambda _, state: tx.update(g, state)[1], tx.init(g)
    )
    assert state.accumulator.dtype == jnp.float32
    np.testing.assert_allclose(state.accumulator, 100, rtol=0.01)


def test_float64_gradients_do_not_stall_a_sum_in_bfloat16():
    with jax.enable_x64(True):
        tx: Any = classp_jax.classp(0.1, accumulator_dtype=jnp.bfloat16)
        g = jnp.full(512, 0.5, jnp.float64)
        state: Any = jax.lax.fori_loop(
            0, 2000, lambda _, state: tx.update(g, state)[1], tx.init(g)
        )
        sums = np.asarray(state.accumulator, np.float64)
    np.testing.assert_allclose(sums.mean(), 1000, rtol=0.01)


def test_a_sum_in_bfloat16_is_right_on_average_after_a_million_steps():
    """Rounded to nearest it would stand still at about 0.5 of 1000."""
    weights, steps = 512, 1_000_000
    tx: Any = classp_jax.scale_by_generalized_adagrad(accumulator_dtype=jnp.bfloat16)
    g = jnp.full(weights, 1e-3, jnp.float32)
    step = jax.jit(
        lambda state: jax.lax.fori_loop(
            0, steps, lambda _, s: tx.update(g, s)[1], state
        )
    )
    sums = np.asarray(step(tx.init(g)).accumulator.astype(jnp.float32), np.float64)
    errors = sums / 1000 - 1
    assert abs(errors.mean()) < 0.01
    # A sum of n equal terms, each rounded at random in steps of 2^-8 to 2^-7 of it.
    assert 0.02 < np.sqrt((errors**2).mean()) < 0.06
    assert (sums > 500).all()


@pytest.mark.parametrize("include_current", [True, False])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 1.7, "traced"])
def test_prior_equals_gradients_received_before(power, include_current):
    """As if each weight had had ``prior`` gradients of its first one's size."""
    rng = np.random.default_rng(3)
    g = rng.normal(size=(6, 40)).astype(np.float32)
    g[rng.random(g.shape) < 0.4] = 0
    p, prior, eps = (1.3 if power == "traced" else power), 2.5, 1e-3
    number = jnp.float32 if power == "traced" else float
    tx: Any = classp_jax.scale_by_generalized_adagrad(
        number(p), eps, prior=number(prior), include_current=include_current
    )
    found = jax.jit(functools.partial(run, tx))(jnp.asarray(g))
    sums = np.zeros(40)
    for row, updates, accumulator in zip(g, *found, strict=True):
        term = np.abs(row.astype(np.float64)) ** p
        sums = np.where(sums == 0, prior * term, sums)
        divisor = (sums + term if include_current else sums) + eps
        sums = sums + term
        np.testing.assert_allclose(
            updates, row.astype(np.float64) / divisor ** (1 / p), rtol=2e-5
        )
        np.testing.assert_allclose(accumulator, sums, rtol=2e-5)


def test_prior_bounds_the_first_step_whenever_it_comes():
    """Also that of a weight which the threshold kept out at first."""
    optimizer: Any = classp_jax.classp(0.5, threshold=1.0, eps=0.0, prior=4.0)
    state, update = optimizer.init(jnp.zeros(3)), jax.jit(optimizer.update)
    for g, step in (
        ([9.0, 0.5, -0.5], [-0.1, 0.0, 0.0]),
        ([0.0, 30.0, -0.5], [0.0, -0.1, 0.0]),
        ([0.0, 0.0, -2.0], [0.0, 0.0, 0.1]),
    ):
        updates, state = update(np.asarray(g, np.float32), state)
        np.testing.assert_allclose(updates, step, rtol=1e-6)


def test_prior_0_is_no_prior():
    g = jnp.float32(np.random.default_rng(0).normal(size=(4, 50)))
    found = []
    for prior in (0.0, jnp.float32(0.0)):
        optimizer = classp_jax.classp(0.5, threshold=0.1, prior=prior)
        found.append(jax.jit(functools.partial(run, optimizer))(g))
    assert jax.tree.all(jax.tree.map(np.array_equal, *found))


@pytest.mark.parametrize("prior", [-1, np.nan, np.inf])
def test_a_prior_that_cannot_be(prior):
    with pytest.raises(ValueError, match="prior must be finite and >= 0"):
        classp_jax.classp(0.1, prior=prior)
