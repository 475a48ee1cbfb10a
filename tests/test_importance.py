"""Filling accumulators from old data: the sum, and nothing else that changes."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import classp_jax

# The types of Optax name the arguments of functions.
GradientTransformation: Any = optax.GradientTransformation
ExtraArgs: Any = optax.GradientTransformationExtraArgs
fill: Any = classp_jax.accumulate_importance
pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 12
PARAMS = {"w": jnp.ones((5, 4)), "b": jnp.ones(3)}


def gradients() -> dict[str, np.ndarray]:
    """Gradients ``[steps, *shape]`` of mixed size, a row of them always 0."""
    rng = np.random.default_rng(0)
    g = {
        "w": rng.normal(size=(STEPS, 5, 4)) * 10 ** rng.uniform(-3, 0, (STEPS, 5, 4)),
        "b": rng.normal(size=(STEPS, 3)),
    }
    g["w"][:, 0] = 0
    return {k: v.astype(np.float32) for k, v in g.items()}


GRADIENTS = gradients()


def at(step: int) -> dict[str, np.ndarray]:
    return {k: v[step] for k, v in GRADIENTS.items()}


def expected_sum(threshold: float = 0.0, power: float = 1.0) -> dict[str, np.ndarray]:
    wide = {k: v.astype(np.float64) for k, v in GRADIENTS.items()}
    return {
        k: np.where(g * g > threshold, np.abs(g) ** power, 0).sum(0)
        for k, g in wide.items()
    }


@pytest.mark.parametrize(
    ("tx", "threshold", "power"),
    [
        (classp_jax.classp(0.1), 0.0, 1.0),
        (classp_jax.classp(0.1, 1e-2, 2.0), 1e-2, 2.0),
        (classp_jax.classp(0.1, 1e-2, 1.5, scaling=False), 1e-2, 1.5),
        (optax.chain(optax.identity(), classp_jax.classp(0.1, 0.1, 3)), 0.1, 3.0),
        (classp_jax.scale_by_generalized_adagrad(0.5), 0.0, 0.5),
        (
            optax.partition(
                {"a": classp_jax.classp(0.1), "b": classp_jax.classp(0.2)},
                {"w": "a", "b": "b"},
            ),
            0.0,
            1.0,
        ),
    ],
    ids=["p=1", "p=2", "unscaled", "chained", "scale", "partitioned"],
)
def test_the_accumulators_hold_the_sum(tx, threshold, power):
    want = expected_sum(threshold, power)
    looped = tx.init(PARAMS)
    for t in range(STEPS):
        looped = fill(tx, looped, PARAMS, at(t))
    together = fill(tx, tx.init(PARAMS), PARAMS, GRADIENTS, per_example=True)
    inside = jax.jit(lambda g: fill(tx, tx.init(PARAMS), PARAMS, g, per_example=True))
    for state in (looped, together, inside(GRADIENTS)):
        chex.assert_trees_all_equal_structs(state, tx.init(PARAMS))
        chex.assert_trees_all_close(classp_jax.accumulators(state), want, rtol=2e-6)


@pytest.fixture
def lenient():
    """Schedules of Optax do not keep to strict dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("lenient")
def test_only_accumulators_change():
    """Ten batches of old data under a decay of ten steps leave it as it is."""
    tx: Any = optax.chain(
        optax.trace(0.9),
        classp_jax.classp(
            optax.linear_schedule(0.5, 0.0, 10),
            threshold=lambda count: jnp.where(count < 5, 0.0, 1e9),
        ),
        optax.scale_by_adam(),
    )
    state = tx.init(PARAMS)
    _, state = tx.update(at(0), state, PARAMS)
    filled = state
    for _ in range(10):
        filled = fill(tx, filled, PARAMS, at(1))
    filled = fill(tx, filled, PARAMS, GRADIENTS, per_example=True)
    a = classp_jax.accumulators(filled)
    assert float(a["b"].min()) > 1.0
    old = classp_jax.accumulators(state)
    chex.assert_trees_all_equal(optax.tree.set(filled, accumulator=old), state)


def test_strength_scales_what_is_added():
    tx: Any = classp_jax.classp(0.1)
    state = fill(tx, tx.init(PARAMS), PARAMS, at(0))
    before = classp_jax.accumulators(state)
    for strength in (10.0, jnp.float32(10), 0.0):
        new = fill(tx, state, PARAMS, GRADIENTS, per_example=True, strength=strength)
        want = jax.tree.map(
            lambda a, s, strength=strength: a + np.float64(strength) * s,
            before,
            expected_sum(),
        )
        chex.assert_trees_all_close(classp_jax.accumulators(new), want, rtol=1e-5)
    with pytest.raises(ValueError, match="strength must be finite and >= 0"):
        fill(tx, state, PARAMS, at(0), strength=-1.0)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("prior", [0.0, 2.0])
@pytest.mark.parametrize("per_example", [False, True])
def test_strength_multiplies_what_is_added_and_not_what_leaks(
    strength, prior, per_example
):
    tx: Any = classp_jax.classp(0.1, power=2.0, window=2.0, prior=prior)
    start = np.asarray([10.0, 10.0, 0.0, 0.0])
    rows = np.asarray([[0, 1, 2, 0], [0, 0, 3, 0], [0, 0.5, 0, 0]], np.float32)
    want = start
    for g in rows.astype(np.float64):
        term = strength * g**2
        want = np.where(want == 0, prior * term, want / 2) + term
    params = jnp.zeros(4)
    for value in (strength, jnp.float32(strength)):
        state = tx.init(params)._replace(accumulator=jnp.asarray(start, jnp.float32))
        if per_example:
            state = fill(tx, state, params, rows, per_example=True, strength=value)
        else:
            for g in rows:
                state = fill(tx, state, params, g, strength=value)
        found = classp_jax.accumulators(state)
        assert (found >= 0).all()
        np.testing.assert_allclose(found, want, rtol=1e-6)
        # What was empty stays so where nothing is added.
        assert float(found[3]) == 0
        assert (float(found[2]) == 0) == (strength == 0)


def test_narrow_accumulators_do_not_stall():
    """1,000 gradients of 1 would stand still at 256, whichever way they come."""
    tx: Any = classp_jax.classp(0.1, accumulator_dtype=jnp.bfloat16)
    g = jnp.asarray([1.0, 0.5])
    rows = jnp.broadcast_to(g, (1000, 2))
    examples = [rows[:500], rows[500:]]
    for state in (
        fill(tx, tx.init(g), g, rows, per_example=True),
        fill(tx, tx.init(g), g, iter([g] * 1000)),
        fill(tx, tx.init(g), g, iter(examples), per_example=True, strength=1.0),
        fill(tx, tx.init(g), g, iter([g] * 500), strength=2.0),
    ):
        assert state.accumulator.dtype == jnp.bfloat16
        np.testing.assert_allclose(state.accumulator.astype(float), [1000, 500])


def test_fine_tuning_starts_with_the_accumulators_filled():
    tx: Any = classp_jax.classp(0.5, eps=0.1)
    params = jnp.asarray([1.0, -2.0, 3.0])
    state = tx.init(params)
    for g in ([3.0, 0.0, 1.0], [-6.0, 0.0, 1.0]):
        state = fill(tx, state, params, jnp.asarray(g))
    updates, _ = tx.update(jnp.ones(3), state, params)
    np.testing.assert_allclose(
        updates, [-0.5 / (9 + 1 + 0.1), -0.5 / 1.1, -0.5 / (2 + 1 + 0.1)], rtol=1e-6
    )


def test_parameters_and_extra_arguments_reach_the_transform():
    def update(updates: Any, state: Any, params: Any = None, *, scale: Any, **_: Any):
        return jax.tree.map(lambda g: scale * g, updates), state

    scaling = ExtraArgs(lambda _: (), update)
    tx = optax.chain(
        optax.add_decayed_weights(0.5), scaling, classp_jax.classp(0.1, eps=0.1)
    )
    params = jnp.asarray([2.0, -4.0])
    state = fill(tx, tx.init(params), params, jnp.zeros(2), scale=3.0)
    np.testing.assert_allclose(classp_jax.accumulators(state), [3.0, 6.0])
    state = fill(
        tx, tx.init(params), params, jnp.zeros([2, 2]), per_example=True, scale=3.0
    )
    np.testing.assert_allclose(classp_jax.accumulators(state), [6.0, 12.0])


def test_transforms_are_told_that_they_only_accumulate():
    """What is frozen in training is filled here."""

    def update(
        g: Any, state: Any, params: Any = None, *, accumulate_importance=False, **_: Any
    ):
        term = jnp.where(accumulate_importance, g, 0.0)
        return g, state._replace(accumulator=state.accumulator + term)

    inner: Any = classp_jax.scale_by_generalized_adagrad()
    frozen = ExtraArgs(inner.init, update)
    tx = optax.chain(frozen, optax.sgd(0.1))
    state = tx.init(jnp.ones(2))
    _, trained = tx.update(jnp.ones(2), state)
    np.testing.assert_array_equal(classp_jax.accumulators(trained), 0)
    filled = fill(tx, state, jnp.ones(2), jnp.ones(2))
    np.testing.assert_array_equal(classp_jax.accumulators(filled), 1)


def test_an_optimizer_with_a_line_search_is_filled():
    def loss(params: Any, accumulate_importance: bool = False) -> Any:
        del accumulate_importance
        return jnp.sum(params**2)

    tx = classp_jax.protect(optax.lbfgs())
    params = jnp.asarray([1.0, -2.0])
    value, gradients = jax.value_and_grad(loss)(params)
    state = classp_jax.accumulate_importance(
        tx,
        tx.init(params),
        params,
        gradients,
        value=value,
        grad=gradients,
        value_fn=loss,
    )
    np.testing.assert_array_equal(classp_jax.accumulators(state), [2, 4])


def test_a_frozen_brake_is_filled_and_its_optimizer_left_alone():
    tx: Any = classp_jax.protect(optax.sgd(0.1, momentum=0.9), frozen=True)
    state = tx.init(PARAMS)
    _, state = tx.update(at(0), state, PARAMS)
    chex.assert_trees_all_equal(
        classp_jax.accumulators(state), jax.tree.map(jnp.zeros_like, PARAMS)
    )
    filled = fill(tx, state, PARAMS, GRADIENTS, per_example=True)
    found = classp_jax.accumulators(filled)
    chex.assert_trees_all_close(found, expected_sum(), rtol=2e-6)
    chex.assert_trees_all_equal(filled.inner_state, state.inner_state)


def test_accumulators_inside_a_state_with_accumulators_are_filled():
    class Outer(NamedTuple):
        accumulator: Any
        inner: Any

    inner: Any = classp_jax.classp(0.1)

    def init(params: Any) -> Outer:
        return Outer(jnp.zeros_like(params), {"inner": inner.init(params)})

    def update(g: Any, state: Any, params: Any = None) -> Any:
        _, new = inner.update(2 * g, state.inner["inner"])
        return g, Outer(state.accumulator + g, {"inner": new})

    tx: Any = GradientTransformation(init, update)
    state = init(jnp.ones(2))
    new = fill(tx, state, jnp.ones(2), jnp.ones(2))
    np.testing.assert_array_equal(new.accumulator, 1)
    np.testing.assert_array_equal(classp_jax.accumulators(new.inner), 2)
    with pytest.raises(ValueError, match="two accumulators"):
        classp_jax.accumulators(new)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_bad_gradients_are_refused(bad):
    tx: Any = classp_jax.classp(0.1)
    state = fill(tx, tx.init(PARAMS), PARAMS, at(0))
    before = jax.tree.map(np.array, state)
    one = at(1) | {"b": jnp.asarray([1.0, bad, 1.0])}
    every = GRADIENTS | {"b": jnp.asarray(GRADIENTS["b"]).at[3, 1].set(bad)}
    message = "^The old gradients hold NaN or infinity, in 'b'. Nothing has"
    with pytest.raises(ValueError, match=message):
        fill(tx, state, PARAMS, one)
    with pytest.raises(ValueError, match=message):
        fill(tx, state, PARAMS, every, per_example=True)
    message = r"^Batch 1 of the old gradients \(counted from 0\) holds NaN .* 'b'"
    with pytest.raises(ValueError, match=message):
        fill(tx, state, PARAMS, iter([at(0), one]))
    with pytest.raises(ValueError, match=message):
        fill(tx, state, PARAMS, iter([GRADIENTS, every]), per_example=True)
    chex.assert_trees_all_equal(state, before)


def test_bad_gradients_show_where_they_are_traced():
    tx: Any = classp_jax.classp(0.1)
    bad = jnp.asarray([[1.0, 1.0, 1.0], [jnp.nan, jnp.inf, 1.0]])
    state = jax.jit(lambda g: fill(tx, tx.init(g[0]), g[0], g, per_example=True))(bad)
    np.testing.assert_array_equal(classp_jax.accumulators(state), [np.nan, np.inf, 2])
    state = jax.jit(lambda g: fill(tx, tx.init(g[0]), g[0], iter(g)))(bad)
    np.testing.assert_array_equal(classp_jax.accumulators(state), [np.nan, np.inf, 2])


def test_sums_that_leave_the_range_are_refused():
    """Finite gradients, whose powers are not; a weight that was full before may be."""
    tx: Any = classp_jax.classp(0.1, power=4.0)
    g = {"w": jnp.ones(2), "v": jnp.asarray([1e12, 1.0])}
    state = tx.init(g)
    for gradients, options in (
        (g, {}),
        (jax.tree.map(lambda x: x[None], g), {"per_example": True}),
        (iter([g]), {}),
    ):
        message = r"overflow .* in 'v'. Nothing has been changed"
        with pytest.raises(ValueError, match=message):
            fill(tx, state, g, gradients, **options)
    full = state._replace(accumulator=g | {"v": jnp.asarray([jnp.inf, 0.0])})
    ones = jax.tree.map(jnp.ones_like, g)
    filled = fill(tx, full, g, ones)
    np.testing.assert_array_equal(classp_jax.accumulators(filled)["v"], [np.inf, 1])
    shown = jax.jit(lambda g: fill(tx, state, g, g))(g)
    np.testing.assert_array_equal(classp_jax.accumulators(shown)["v"], [np.inf, 1])


def test_leaves_may_be_on_different_devices():
    tx: Any = classp_jax.classp(0.1)
    places = dict(zip(PARAMS, jax.devices(), strict=False))
    params, g = jax.device_put((PARAMS, at(0)), (places, places))
    state = fill(tx, tx.init(params), params, g)
    want = jax.tree.map(np.abs, at(0))
    chex.assert_trees_all_equal(classp_jax.accumulators(state), want)


def test_it_is_compiled_once_for_many_calls():
    tx: Any = classp_jax.classp(0.1)
    state = tx.init(PARAMS)
    state = fill(tx, state, PARAMS, GRADIENTS, per_example=True)
    compilations = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    for _ in range(3):
        state = fill(tx, state, PARAMS, GRADIENTS, per_example=True)
    jax.monitoring.unregister_event_duration_listener(listen)
    assert compilations == []


@pytest.mark.parametrize(
    ("changed", "per_example", "message"),
    [
        ({"w": jnp.ones((5, 4))}, False, "do not have the tree that is needed"),
        (
            {"b": jnp.ones((2, 3))},
            False,
            r"'b' has shape \(2, 3\), but \(3,\) is needed",
        ),
        ({"w": jnp.ones((5, 4))}, True, r"'w' has shape \(5, 4\), but \(12, 5, 4\)"),
        ({"b": jnp.ones((2, 3))}, True, r"'w' has shape \(12, 5, 4\), but \(2, 5, 4\)"),
        ({"b": jnp.float32(1)}, True, r"'b' has shape \(\), but \(12, 3\)"),
    ],
)
def test_gradients_that_do_not_fit(changed, per_example, message):
    tx: Any = classp_jax.classp(0.1)
    whole = GRADIENTS if per_example else at(0)
    bad = changed if "the tree" in message else whole | changed
    with pytest.raises(ValueError, match=message):
        fill(tx, tx.init(PARAMS), PARAMS, bad, per_example=per_example)


def test_states_that_cannot_be_filled():
    adam = optax.adam(0.1)
    with pytest.raises(ValueError, match="holds no CLASSP accumulator"):
        fill(adam, adam.init(PARAMS), PARAMS, at(0))
    # It would hand on nothing, and the accumulators would stay empty.
    tx = optax.MultiSteps(classp_jax.classp(0.1), 4).gradient_transformation()
    with pytest.raises(ValueError, match="fill the accumulators of the optimizer ins"):
        fill(tx, tx.init(PARAMS), PARAMS, at(0))
