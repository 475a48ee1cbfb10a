"""Windows, units for epsilon, narrow sums and the brake, against float64."""

import functools
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import classp_jax
from classp_jax import regularizers

pytestmark = pytest.mark.usefixtures("quick_compilation")

POWERS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 1.7)
RNG = np.random.default_rng(0)
# Two leaves, 60 steps, a third of the gradients 0, sizes over six orders.
SHAPES = {"a": (6, 5), "b": (7,)}
GRADIENTS = {
    name: (
        RNG.normal(size=(60, *shape))
        * 10 ** RNG.uniform(-3, 3, shape)
        * (RNG.random((60, *shape)) > 1 / 3)
    ).astype(np.float32)
    for name, shape in SHAPES.items()
}


def reference(
    gradients: dict[str, np.ndarray],
    *,
    power: float = 1.0,
    eps: float = 0.1,
    prior: float = 0.0,
    window: Any = None,
    eps_unit: str | None = None,
    threshold: float = 0.0,
    scaling: bool = True,
    include_current: bool = True,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Updates and accumulators of every step, by the formulas, in float64."""
    names = list(gradients)
    sums = {n: np.zeros(g.shape[1:]) for n, g in gradients.items()}
    squares: dict[str, Any] = dict.fromkeys(names, 0.0)
    updates: dict[str, list[Any]] = {n: [] for n in names}
    stored: dict[str, list[Any]] = {n: [] for n in names}
    for t in range(len(next(iter(gradients.values())))):
        sizes = {n: gradients[n][0].size for n in names}
        units: Any = {
            n: np.sqrt(squares[n] / (1 - 0.99**t)) if t else 0.0 for n in names
        }
        if eps_unit == "tree":
            total = sum(units[n] ** 2 * sizes[n] for n in names) / sum(sizes.values())
            units = dict.fromkeys(names, np.sqrt(total))
        for n in names:
            g = gradients[n][t].astype(np.float64)
            taken = g**2 > threshold if threshold else np.full(g.shape, True)
            term = np.where(taken, np.abs(g) ** power, 0)
            before = sums[n]
            if window is not None:
                steps: Any = window(t) if callable(window) else window
                before = before * (1 - 1 / steps)
            before = np.where(before == 0, prior * term, before)
            sums[n] = before + term
            divisor = sums[n] if include_current else before
            with np.errstate(divide="ignore", invalid="ignore"):
                if eps_unit is None:
                    u = g / (eps + divisor) ** (1 / power)
                elif units[n] == 0:
                    u = np.zeros_like(g)
                else:
                    u = g / (eps * units[n] ** power + divisor) ** (1 / power)
            u = np.where(taken & (g != 0), u if scaling else g, 0)
            updates[n].append(u)
            stored[n].append(sums[n])
            squares[n] = 0.99 * squares[n] + 0.01 * np.mean(g**2)
    return (
        {n: np.stack(u) for n, u in updates.items()},
        {n: np.stack(a) for n, a in stored.items()},
    )


def run(tx: optax.GradientTransformation, gradients: Any = None) -> tuple[Any, Any]:
    """The same of a transform: every step's updates and accumulators."""
    gradients = GRADIENTS if gradients is None else gradients

    def step(state: Any, g: Any) -> Any:
        updates, state = tx.update(g, state)
        return state, (updates, optax.tree.get(state, "accumulator"))

    first = jax.tree.map(lambda g: g[0], gradients)
    return jax.lax.scan(step, tx.init(first), gradients)[1]


def check(found: tuple[Any, Any], wanted: tuple[Any, Any], rtol: float = 2e-5) -> None:
    for part, want in zip(found, wanted, strict=True):
        for name in want:
            np.testing.assert_allclose(part[name], want[name], rtol=rtol, atol=0)


CASES: dict[str, dict[str, Any]] = {
    "window": {"window": 10.0},
    "window_of_one": {"window": 1.0},
    "window_schedule": {"window": lambda t: t + 2},
    "window_prior": {"window": 7.0, "prior": 3.0, "eps": 0.0},
    "window_unscaled": {"window": 7.0, "scaling": False},
    "window_threshold": {"window": 7.0, "threshold": 1.0},
    "leaf": {"eps_unit": "leaf", "eps": 4.0},
    "tree": {"eps_unit": "tree", "eps": 4.0},
    "leaf_window_threshold": {
        "eps_unit": "leaf",
        "eps": 4.0,
        "window": 9.0,
        "threshold": 1.0,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_formula(name: str):
    options = CASES[name]
    # What the others add does not depend on the power's form.
    powers = POWERS if name in ("window", "leaf_window_threshold") else (1.0, 1.7)
    found = jax.jit(
        lambda: {
            power: run(classp_jax.classp(1.0, power=power, **options))
            for power in powers
        }
    )()
    for power in powers:
        updates, sums = found[power]
        negated = jax.tree.map(lambda u: -u, updates)
        check((negated, sums), reference(GRADIENTS, power=power, **options))


@pytest.mark.parametrize("options", [{"window": 5.0}, {"eps_unit": "leaf"}])
def test_the_sum_before_the_step_divides(options: dict[str, Any]):
    tx = classp_jax.scale_by_generalized_adagrad(2.0, include_current=False, **options)
    wanted = reference(GRADIENTS, power=2.0, include_current=False, **options)
    check(jax.jit(functools.partial(run, tx))(), wanted)


def test_traced_window_and_power():
    @jax.jit
    def traced(power: Any, eps: Any, prior: Any, window: Any) -> Any:
        return run(
            classp_jax.scale_by_generalized_adagrad(
                power, eps, prior=prior, window=window, eps_unit="leaf"
            )
        )

    found = traced(*(jnp.float32(x) for x in (1.3, 2.0, 0.5, 6.0)))
    options: dict[str, Any] = {"power": 1.3, "eps": 2.0, "prior": 0.5, "window": 6.0}
    check(found, reference(GRADIENTS, eps_unit="leaf", **options), rtol=1e-4)


def test_injected_window():
    tx = classp_jax.inject_hyperparams(classp_jax.scale_by_generalized_adagrad)(
        1.0, window=10.0
    )
    state: Any = tx.init(jnp.ones(3))
    assert set(state.hyperparams) == {"eps", "prior", "window"}
    check(jax.jit(functools.partial(run, tx))(), reference(GRADIENTS, window=10.0))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_window_in_other_dtypes(dtype: str):
    with jax.enable_x64(dtype == "float64"):
        gradients = jax.tree.map(
            lambda g: jnp.asarray(np.clip(g, -100, 100), dtype), GRADIENTS
        )
        tx = classp_jax.scale_by_generalized_adagrad(window=10.0, eps_unit="leaf")
        updates, sums = run(tx, gradients)
        exact = jax.tree.map(lambda g: np.asarray(g.astype("float32")), gradients)
        if dtype == "float64":
            exact = jax.tree.map(np.asarray, gradients)
        want_updates, want_sums = reference(exact, window=10.0, eps_unit="leaf")
        for name in SHAPES:
            assert updates[name].dtype == dtype
            np.testing.assert_allclose(sums[name], want_sums[name], rtol=2e-5)
            np.testing.assert_allclose(
                updates[name].astype("float32"),
                want_updates[name],
                rtol=1e-2 if dtype != "float64" else 2e-5,
                atol=1e-4 if dtype == "float16" else 0,
            )


def test_a_constant_gradient_fills_a_window_and_a_silent_weight_becomes_free():
    tx: Any = classp_jax.scale_by_generalized_adagrad(2.0, window=50.0)
    constant = jnp.asarray([3.0, 0.0])

    def step(g: jax.Array, state: Any, steps: int) -> Any:
        return jax.lax.fori_loop(0, steps, lambda _, s: tx.update(g, s)[1], state)

    state = step(constant, tx.init(constant), 2000)
    np.testing.assert_allclose(state.accumulator, [50 * 9, 0], rtol=1e-5)
    state = step(jnp.zeros(2), state, 50)
    np.testing.assert_allclose(state.accumulator[0], 450 * 0.98**50, rtol=1e-4)
    # Also where a threshold refuses every gradient.
    masked: Any = classp_jax.classp(0.1, threshold=1e6, power=2.0, window=50.0)
    _, state = masked.update(constant, state)
    np.testing.assert_allclose(state.accumulator[0], 450 * 0.98**51, rtol=1e-4)


def test_a_long_window_keeps_its_length_in_float32():
    """The factor 1 - 1/N has few digits of 1/N: at a million they are 3 % off."""
    window = 1e6
    tx: Any = classp_jax.scale_by_generalized_adagrad(window=window)
    g = jnp.zeros(1)
    state = tx.init(g)._replace(accumulator=jnp.asarray([1000.0]))
    steps = 100_000
    state = jax.lax.fori_loop(0, steps, lambda _, s: tx.update(g, s)[1], state)
    lost = 1000 - float(state.accumulator[0])
    np.testing.assert_allclose(lost, 1000 * -np.expm1(-steps / window), rtol=0.01)


@pytest.mark.parametrize(("window", "tolerance"), [(1e5, 0.01), (1e6, 0.1)])
def test_the_limit_of_a_constant_gradient_in_a_long_window(window, tolerance):
    """A float32 stands still once what it gains and loses round to the same number."""
    tx: Any = classp_jax.scale_by_generalized_adagrad(window=window)
    g = jnp.asarray(np.geomspace(1e-3, 1e3, 64), jnp.float32)
    state = tx.init(g)._replace(accumulator=0.8 * window * g)
    steps = int(5 * window)
    state = jax.lax.fori_loop(0, steps, lambda _, s: tx.update(g, s)[1], state)
    np.testing.assert_allclose(state.accumulator, window * g, rtol=tolerance)


# Epsilon in units of the gradient.


@pytest.mark.parametrize("unit", ["leaf", "tree"])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_a_unit_makes_the_steps_independent_of_the_gradients_scale(unit, power):
    tx = classp_jax.scale_by_generalized_adagrad(power, 5.0, eps_unit=unit)
    updates, _ = run(tx)
    scaled, _ = run(tx, jax.tree.map(lambda g: 1024 * g, GRADIENTS))
    for name in SHAPES:
        np.testing.assert_allclose(scaled[name], updates[name], rtol=1e-5)


def test_a_leaf_without_a_unit_does_not_move_and_bad_numbers_show():
    tx: Any = classp_jax.classp(1.0, eps_unit="leaf")
    params = {"dead": jnp.zeros(2), "live": jnp.zeros(2)}
    g = {"dead": jnp.zeros(2), "live": jnp.ones(2)}
    updates, state = tx.update(g, tx.init(params))
    assert not np.any(updates["live"])
    updates, state = tx.update(g, state)
    assert np.all(updates["live"] != 0)
    # The first gradient of a leaf, in a later step, is of no unit, either.
    both = {"dead": jnp.asarray([1.0, jnp.nan]), "live": jnp.ones(2)}
    updates, state = tx.update(both, state)
    assert float(updates["dead"][0]) == 0
    assert np.isnan(updates["dead"][1])
    updates, _ = tx.update(g, state)
    assert np.isnan(updates["dead"]).all()
    assert np.isfinite(updates["live"]).all()


@pytest.mark.parametrize("unit", ["leaf", "tree"])
@pytest.mark.parametrize("power", POWERS)
def test_a_finite_gradient_whose_square_overflows_does_not_stop_the_others(power, unit):
    for tx in (
        classp_jax.classp(1.0, 0.0, power, eps_unit=unit),
        classp_jax.protect(optax.sgd(1.0), power, eps_unit=unit),
    ):
        state: Any = tx.init(jnp.zeros(3))
        updates: Any = None
        for large in (1.0, 1.0, 1e20, 1e38, 1.0):
            updates, state = tx.update(jnp.asarray([large, 1.0, -2.0]), state)
            assert np.isfinite(updates).all()
        assert np.all(updates[1:] != 0)
        # Whose power overflows, but not its square: epsilon does, too.
        state = tx.init(jnp.zeros(1))
        for _ in range(2):
            updates, state = tx.update(jnp.asarray([1e10]), state)
            assert np.isfinite(updates).all()


# Sums in bfloat16.


def test_sums_in_bfloat16_are_the_same_bits_again_and_differ_by_weight_and_leaf():
    tx: Any = classp_jax.classp(0.1, accumulator_dtype=jnp.bfloat16)
    g = {"a": jnp.full((4, 8), 1e-2), "b": jnp.full((4, 8), 1e-2)}

    def sums() -> Any:
        def body(_: Any, s: Any) -> Any:
            return tx.update(g, s)[1]

        return jax.lax.fori_loop(0, 1000, body, tx.init(g)).accumulator

    first, second = sums(), sums()
    for name in g:
        assert first[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(first[name], second[name])
        assert len(np.unique(first[name])) > 4
    assert (first["a"] != first["b"]).any()


def test_bad_numbers_show_in_bfloat16_sums():
    tx: Any = classp_jax.classp(0.1, accumulator_dtype=jnp.bfloat16)
    g = jnp.asarray([jnp.inf, jnp.nan, 1.0])
    _, state = tx.update(g, tx.init(g))
    sums = np.asarray(state.accumulator.astype(jnp.float32))
    assert np.isposinf(sums[0])
    assert np.isnan(sums[1])
    assert sums[2] == 1


# The brake on another optimizer.


@pytest.mark.parametrize("power", [*POWERS, "traced"])
def test_protected_sgd_is_classp(power: Any):
    rate, eps = 0.3, 0.7
    p = 1.3 if power == "traced" else power
    value = jnp.float32(p) if power == "traced" else power
    options: dict[str, Any] = {"prior": 0.5, "window": 9.0}
    braked = classp_jax.protect(optax.sgd(rate), value, eps, **options)
    ours = classp_jax.classp(rate * eps ** (1 / p), 0.0, value, eps, **options)
    check(*jax.jit(lambda: (run(braked), run(ours)))())


def test_the_brake_sums_raw_gradients_and_is_in_0_to_1():
    inner = optax.adamw(0.1)
    braked: Any = classp_jax.protect(inner, 2.0, 0.5, eps_unit="leaf")
    params = jax.tree.map(lambda g: jnp.ones(g.shape[1:]), GRADIENTS)
    free: Any
    state, plain = braked.init(params), inner.init(params)
    _, wanted = reference(GRADIENTS, power=2.0)
    squares: dict[str, Any] = {n: 0.0 for n in SHAPES}
    for t in range(5):
        g = jax.tree.map(lambda g, t=t: jnp.asarray(g[t]), GRADIENTS)
        # optax.adamw mixes dtypes.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = jax.jit(braked.update)(g, state, params)
            free, plain = jax.jit(inner.update)(g, plain, params)
        for name in SHAPES:
            a = wanted[name][t]
            np.testing.assert_allclose(state.importance.accumulator[name], a, rtol=1e-5)
            unit = squares[name] / (1 - 0.99**t) if t else 0.0
            with np.errstate(divide="ignore", invalid="ignore"):
                brake = np.where(a == 0, 1, np.sqrt(0.5 * unit / (0.5 * unit + a)))
            assert ((brake >= 0) & (brake <= 1)).all()
            want = brake * np.asarray(free[name])
            np.testing.assert_allclose(updates[name], want, rtol=1e-4)
            squares[name] = 0.99 * squares[name] + 0.01 * np.mean(
                np.asarray(g[name], np.float64) ** 2
            )


@pytest.mark.parametrize("unit", [None, "leaf", "tree"])
def test_derivatives_through_the_brake_are_finite(unit):
    tx: Any = classp_jax.protect(optax.sgd(1.0), eps=2.0, eps_unit=unit)
    g = jnp.asarray([1.0, 0.0, -2.0])

    def loss(scale: Any) -> Any:
        state = tx.init(g)
        total = 0.0
        for _ in range(2):
            updates, state = tx.update(scale * g, state)
            total = total + jnp.sum(updates * jnp.asarray([1.0, 1.0, 3.0]))
        return total

    high, low = loss(1.01), loss(0.99)
    found = jax.grad(loss)(1.0)
    np.testing.assert_allclose(found, (high - low) / 0.02, rtol=1e-3, atol=1e-3)


def test_frozen_accumulators_stay_unless_they_are_filled():
    g = jnp.asarray([2.0, 0.0])
    for frozen in (True, jnp.asarray(True), lambda step: True):
        tx: Any = classp_jax.protect(optax.sgd(1.0), eps=1.0, frozen=frozen)
        state = tx.init(g)
        updates, state = tx.update(g, state)
        np.testing.assert_array_equal(state.importance.accumulator, [0, 0])
        np.testing.assert_array_equal(updates, [-2, 0])
        state = classp_jax.accumulate_importance(tx, state, g, g)
        np.testing.assert_array_equal(state.importance.accumulator, [2, 0])
        updates, state = tx.update(g, state)
        np.testing.assert_allclose(updates, [-2 / 3, 0], rtol=1e-6)


def test_pull_inside_the_brake_is_the_stated_step():
    """w - alpha eps (g + rho (w - w0)) / (eps + A), with a window."""
    rate, eps, rho, window = 0.2, 0.5, 0.3, 6.0
    tx: Any = classp_jax.protect(
        optax.chain(regularizers.l2_to_anchor(rho), optax.sgd(rate)),
        eps=eps,
        window=window,
    )
    rng = np.random.default_rng(5)
    start = rng.normal(size=8)
    params: Any = jnp.asarray(start, jnp.float32)
    state = tx.init(params)
    w, a = start.copy(), np.zeros(8)
    for _ in range(30):
        g = rng.normal(size=8) * (rng.random(8) > 0.3)
        updates, state = tx.update(jnp.asarray(g, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        a = a * (1 - 1 / window) + np.abs(g)
        w = w - rate * eps * (g + rho * (w - start)) / (eps + a)
    np.testing.assert_allclose(params, w, rtol=1e-4)


# One count, and hyperparameters in the state.


def test_a_state_has_one_count():
    tx = classp_jax.classp(optax.linear_schedule(0.1, 0.0, 10), threshold=1e-3)
    g = jnp.ones(3)
    _, state = tx.update(g, tx.init(g))
    assert int(optax.tree.get(state, "count")) == 1


def test_injecting_keeps_the_power_and_small_numbers():
    g = jnp.asarray([1e-3, -1.0], jnp.float16)
    # In float16 an epsilon of 1e-9 would be 0.
    tx: Any = classp_jax.inject_hyperparams(classp_jax.classp)(0.1, eps=1e-9)
    plain: Any = classp_jax.classp(0.1, eps=1e-9)
    state = tx.init(g)
    assert float(state.hyperparams["eps"]) == np.float32(1e-9)
    assert "power" not in state.hyperparams
    updates, state = tx.update(g, state)
    np.testing.assert_array_equal(updates, plain.update(g, plain.init(g))[0])
    free: Any = classp_jax.inject_hyperparams(classp_jax.classp, fixed=())(0.1)
    assert "power" in free.init(g).hyperparams


@pytest.mark.parametrize(
    "build",
    [
        functools.partial(classp_jax.inject_hyperparams(classp_jax.classp), 0.1),
        classp_jax.inject_hyperparams(classp_jax.scale_by_generalized_adagrad),
        functools.partial(
            classp_jax.inject_hyperparams(classp_jax.protect), optax.sgd(0.1)
        ),
        functools.partial(
            classp_jax.inject_hyperparams(classp_jax.classp, fixed=()), 0.1
        ),
    ],
    ids=["classp", "scale_by_generalized_adagrad", "protect", "nothing fixed"],
)
def test_an_injected_dtype_is_no_schedule(build):
    """``jnp.bfloat16`` can be called, which makes a schedule of it elsewhere."""
    g = jnp.ones(3)
    for dtype in (jnp.bfloat16, "bfloat16", np.dtype(jnp.bfloat16)):
        tx: Any = build(accumulator_dtype=dtype)
        state = tx.init(g)
        assert "accumulator_dtype" not in state.hyperparams
        _, state = jax.jit(tx.update)(g, state)
        assert classp_jax.accumulators(state).dtype == jnp.bfloat16


def test_a_dtype_that_optax_took_for_a_schedule_is_refused():
    tx = optax.inject_hyperparams(classp_jax.classp)(
        0.1, accumulator_dtype=jnp.bfloat16
    )
    with pytest.raises(TypeError, match="accumulator_dtype must be"):
        tx.init(jnp.ones(3))


# Derivatives through the update.

RATE, EPS = 0.3, 0.2


def loss_after_two_steps(numbers: dict[str, Any], scale: Any, power: Any) -> Any:
    """A loss after two steps whose gradients are in part exactly 0."""
    g = scale * jnp.asarray([0.7, 0.0, -1.2, 0.05])
    h = scale * jnp.asarray([0.4, 0.0, 0.0, -0.3])
    tx = classp_jax.classp(RATE, power=power, **numbers)
    w: Any = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    state = tx.init(w)
    for gradient in (g, h):
        updates, state = tx.update(gradient, state)
        w = optax.apply_updates(w, updates)
    return jnp.sum(w**2)


@pytest.mark.parametrize("power", [0.5, 0.9, 1.0, 1.5, 2.0, 3.0, 1.7])
@pytest.mark.parametrize("eps", [0.0, EPS])
def test_meta_gradients_are_finite_and_those_of_finite_differences(power, eps):
    with jax.enable_x64(True):
        numbers = {"eps": jnp.float64(eps), "threshold": jnp.float64(1e-4)}
        args = (numbers, jnp.float64(1.0), jnp.float64(power))
        static = jax.grad(lambda n, s: loss_after_two_steps(n, s, power), (0, 1))
        found = (*static(*args[:2]), jax.grad(loss_after_two_steps, 2)(*args))
        assert all(np.isfinite(x) for x in jax.tree.leaves(found))
        assert float(found[0]["threshold"]) == 0
        assert jax.grad(loss_after_two_steps)(*args)["threshold"] == 0
        step = 1e-6
        for value, move in (
            (found[1], lambda d: (numbers, 1 + d, power)),
            (found[2], lambda d: (numbers, 1.0, power + d)),
            (found[0]["eps"], lambda d: ({**numbers, "eps": eps + d}, 1.0, power)),
        ):
            if eps == 0 and value is found[0]["eps"]:
                continue  # one-sided
            high, low = (
                loss_after_two_steps(*jax.tree.map(jnp.float64, move(d)))
                for d in (step, -step)
            )
            np.testing.assert_allclose(
                value, (high - low) / (2 * step), rtol=1e-5, atol=1e-8
            )


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5, 2.0, 3.0, 1.7])
def test_the_derivative_at_a_gradient_of_0_is_that_of_the_formula(power):
    tx: Any = classp_jax.scale_by_generalized_adagrad(power, EPS)

    def update(g: jax.Array) -> jax.Array:
        return tx.update(g, tx.init(g))[0][0]

    found = jax.grad(update)(jnp.zeros(1))
    np.testing.assert_allclose(found, [EPS ** (-1 / power)], rtol=1e-5)


@pytest.mark.parametrize("unit", ["leaf", "tree"])
@pytest.mark.parametrize("power", [*POWERS, "traced"])
def test_meta_gradients_where_there_is_no_unit_yet(power, unit):
    """In the first step, and in a leaf whose first gradient comes in the second."""
    early = {"a": np.asarray([2.0, 1.0, 0.0]), "b": np.asarray([0.0])}
    late = {"a": np.asarray([0.0, -0.3, 1.5]), "b": np.asarray([0.7])}

    def moved(numbers: Any, steps: int) -> Any:
        w, rate, eps, p = numbers
        tx = classp_jax.classp(
            rate, power=p if power == "traced" else power, eps=eps, eps_unit=unit
        )
        state: Any = tx.init(w)
        for direction in (early, late)[:steps]:
            # Of the weights, so that the second step has the first one's derivative.
            g = jax.tree.map(lambda w, d: w * jnp.asarray(d, w.dtype), w, direction)
            updates, state = tx.update(g, state)
            w = optax.apply_updates(w, updates)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w))

    with jax.enable_x64(True):
        w = {"a": jnp.asarray([1.0, -2.0, 0.5]), "b": jnp.asarray([0.3])}
        p = 1.3 if power == "traced" else power
        numbers = (w, jnp.float64(0.1), jnp.float64(0.4), jnp.float64(p))
        for steps in (1, 2):
            flat, unflatten = jax.flatten_util.ravel_pytree(numbers)
            along = jax.jit(
                lambda d, flat=flat, steps=steps, unflatten=unflatten: moved(
                    unflatten(flat + d), steps
                )
            )
            # Of fourth order, as the unit's own float32 forbids a small step.
            want = [
                (8 * (along(d) - along(-d)) - (along(2 * d) - along(-2 * d))) / 0.12
                for d in 1e-2 * np.eye(flat.size)
            ]
            for dtype in (jnp.float64, jnp.float32):
                cast = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), numbers)
                found, _ = jax.flatten_util.ravel_pytree(jax.grad(moved)(cast, steps))
                np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-4)


# Numbers from elsewhere.


def test_numpy_float64_gradients_and_eps_0():
    tx: Any = classp_jax.classp(1.0, power=2.0, eps=0.0)
    g = np.asarray([1e-30, 2.0])
    updates, _ = tx.update(g, tx.init(g))
    assert updates.dtype == jnp.float32
    # 1e-60 is no float32: nothing is known of that weight, and it stays.
    np.testing.assert_allclose(updates, [0, -1], rtol=1e-6)


def test_an_injected_prior_of_0_changes_nothing():
    g = jnp.asarray([1e30, 1.0])
    for prior in (0.0, jnp.float32(0.0)):
        tx: Any = classp_jax.classp(1.0, power=4.0, prior=prior)
        updates, _ = tx.update(g, tx.init(g))
        assert float(updates[0]) == 0


def test_no_false_alarm_of_debug_nans():
    g = jnp.asarray([0.0, 1.0, -2.0])
    with jax.debug_nans(True):
        for power in POWERS:
            tx: Any = classp_jax.classp(1.0, power=power, eps=0.0)
            updates, _ = tx.update(g, tx.init(g))
            assert np.isfinite(updates).all()
        tx = classp_jax.classp(1.0, accumulator_dtype=jnp.bfloat16)
        updates, _ = tx.update(g, tx.init(g))
        assert np.isfinite(updates).all()


def test_scalars_of_ml_dtypes_are_numbers():
    rate = np.asarray(0.5, jnp.bfloat16)[()]
    g = jnp.ones(2)
    tx: Any = classp_jax.classp(rate, eps=np.float16(0.5))
    np.testing.assert_allclose(tx.update(g, tx.init(g))[0], [-1 / 3] * 2, rtol=1e-6)
