"""What a state and an update tell, wherever the state is."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import classp_jax

PARAMS = {
    "layer": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(4)},
    "none": jnp.ones((0, 5)),
}
GRADIENTS = {
    "layer": {
        "kernel": jnp.asarray([[1.0, 0.0, -2.0], [0.0, 1e-30, 0.0]]),
        "bias": jnp.asarray([0.0, 3.0, 0.0, 0.0]),
    },
    "none": jnp.ones((0, 5)),
}
# After two such gradients, at power 1.
MEANS = {"layer": {"kernel": 2 * 3.0 / 6, "bias": 2 * 3.0 / 4}, "none": 0.0}
MEAN = 2 * 6.0 / 10
FREE = {"layer": {"kernel": 3 / 6, "bias": 3 / 4}, "none": 0.0}
ALL_FREE = 6 / 10
KERNEL_ONLY = {"layer": {"kernel": True, "bias": False}, "none": False}
LABELS = {"layer": {"kernel": "a", "bias": "b"}, "none": "a"}


def multi_steps(tx: Any) -> Any:
    return optax.MultiSteps(tx, 1).gradient_transformation()


WRAPPED = {
    "classp": classp_jax.classp(0.1),
    "classp_published": classp_jax.classp_published(0.1),
    "scale": classp_jax.scale_by_generalized_adagrad(),
    "chain": optax.chain(optax.clip(1e9), classp_jax.classp(0.1), optax.identity()),
    "named_chain": optax.named_chain(
        ("clip", optax.clip(9)), ("x", classp_jax.classp(1))
    ),
    "density": optax.chain(
        classp_jax.mask_to_density(1.0), classp_jax.scale_by_generalized_adagrad()
    ),
    "inject": optax.inject_hyperparams(classp_jax.classp)(0.1, threshold=0.0),
    "inject(chain)": optax.inject_hyperparams(
        lambda lr: optax.chain(optax.clip(9.0), classp_jax.classp(lr))
    )(0.1),
    "multi_steps": multi_steps(classp_jax.classp(0.1)),
    "apply_if_finite": optax.apply_if_finite(classp_jax.classp(0.1), 3),
    "partition": optax.partition(
        {"a": classp_jax.classp(0.1), "b": classp_jax.classp(0.2, power=1)}, LABELS
    ),
    "all of them": optax.chain(
        optax.clip(1e9),
        optax.apply_if_finite(
            optax.partition(
                {
                    "a": optax.inject_hyperparams(classp_jax.classp)(0.1),
                    "b": multi_steps(classp_jax.classp(0.2)),
                },
                LABELS,
            ),
            3,
        ),
    ),
}


def after_two_steps(tx: Any, gradients: Any = GRADIENTS, params: Any = PARAMS) -> Any:
    # optax.MultiSteps mixes int32 and float32 by itself.
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(params)
        for _ in range(2):
            _, state = jax.jit(tx.update)(gradients, state, params)
    return state


def floats(tree: Any) -> Any:
    return jax.tree.map(float, tree)


@pytest.mark.parametrize("name", WRAPPED)
def test_finds_the_accumulator(name):
    state = after_two_steps(WRAPPED[name])
    mean, free = classp_jax.mean_accumulator(state), classp_jax.free_fraction(state)
    for value in (mean, free):
        assert isinstance(value, jax.Array)
        assert value.dtype == jnp.float32
        assert value.shape == ()
    assert floats(mean) == pytest.approx(MEAN, rel=1e-6)
    assert floats(free) == pytest.approx(ALL_FREE, rel=1e-6)
    expected = jax.tree.map(lambda g: 2 * jnp.abs(g), GRADIENTS)
    chex.assert_trees_all_close(classp_jax.accumulators(state), expected)
    means = classp_jax.mean_accumulator(state, per_leaf=True)
    chex.assert_trees_all_close(floats(means), MEANS)
    assert floats(classp_jax.free_fraction(state, per_leaf=True)) == FREE


@pytest.mark.parametrize(
    "tx",
    [
        optax.masked(classp_jax.classp(0.1), KERNEL_ONLY),
        optax.partition(
            {"a": classp_jax.classp(0.1), "b": optax.set_to_zero()},
            {"layer": {"kernel": "a", "bias": "b"}, "none": "b"},
        ),
        optax.partition(
            {"a": classp_jax.classp(0.1), "b": optax.adam(0.1)},
            {"layer": {"kernel": "a", "bias": "b"}, "none": "b"},
        ),
    ],
    ids=["masked", "frozen", "beside adam"],
)
def test_counts_only_the_weights_it_owns(tx):
    state = after_two_steps(tx)
    mean = floats(classp_jax.mean_accumulator(state))
    assert mean == pytest.approx(MEANS["layer"]["kernel"])
    assert floats(classp_jax.free_fraction(state)) == 0.5
    leaves = classp_jax.free_fraction(state, per_leaf=True)
    assert jax.tree.leaves(floats(leaves)) == [0.5]
    assert floats(leaves["layer"]["kernel"]) == 0.5


@pytest.mark.parametrize("swapped", [False, True])
def test_parts_of_different_depth_are_put_together(swapped):
    """A mask may stand for a whole layer."""
    params = {"a": {"w": jnp.ones(2), "b": jnp.ones(3)}, "c": {"w": jnp.ones(4)}}
    parts = [
        optax.masked(classp_jax.classp(0.1), {"a": True, "c": False}),
        optax.masked(classp_jax.classp(0.1), {"a": False, "c": {"w": True}}),
    ]
    tx = optax.chain(*(parts[::-1] if swapped else parts))
    found = classp_jax.accumulators(tx.init(params))
    chex.assert_trees_all_equal(found, jax.tree.map(jnp.zeros_like, params))


def test_paths_that_print_alike_are_two_weights():
    params = {"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(6)}
    tx: Any = classp_jax.classp(0.1)
    gradients = {"a": {"b": jnp.ones(2)}, "a/b": jnp.zeros(6)}
    _, state = tx.update(gradients, tx.init(params))
    assert floats(classp_jax.free_fraction(state)) == 0.75
    free = floats(classp_jax.free_fraction(state, per_leaf=True))
    assert free == {"a": {"b": 0.0}, "a/b": 1.0}


def test_free_is_what_nothing_holds_back():
    """Known from the accumulator alone: what has been added, not what has moved."""
    tx: Any = classp_jax.classp(1.0, power=3.0, eps=1.0, prior=2.0)
    # The third power of 1e-20 is 0 in float32, of 1e-13 below its normal numbers.
    g = jnp.asarray([1e-20, 1e-13, 0.0, 1e-3])
    updates, state = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(updates != 0, [True, True, False, True])
    assert floats(classp_jax.free_fraction(state)) == 0.75
    # Those are as free as before: the next step is what the first one was.
    again, state = tx.update(g, state)
    np.testing.assert_allclose(again[:2], updates[:2], rtol=1e-6)
    assert floats(classp_jax.free_fraction(state)) == 0.75
    spoilt = optax.tree.set(state, accumulator=jnp.asarray([jnp.nan, 0.0]))
    assert floats(classp_jax.free_fraction(spoilt)) == 0.5


def test_a_new_state_is_free():
    state = classp_jax.classp(0.1).init(PARAMS)
    assert floats(classp_jax.mean_accumulator(state)) == 0
    assert floats(classp_jax.free_fraction(state)) == 1


def test_a_single_array():
    g = jnp.asarray([1.0, 0.0, 2.0, 0.0])
    state = after_two_steps(classp_jax.classp(0.1), g, g)
    assert floats(classp_jax.mean_accumulator(state, per_leaf=True)) == 1.5
    assert floats(classp_jax.free_fraction(state)) == 0.5


def test_thresholds_and_powers_show():
    state = after_two_steps(classp_jax.classp(0.1, threshold=1.5, power=2))
    # Only -2 and 3 are accepted.
    assert floats(classp_jax.mean_accumulator(state)) == pytest.approx(2 * (4 + 9) / 10)
    assert floats(classp_jax.free_fraction(state)) == pytest.approx(0.8)


def test_no_weights_at_all():
    state = classp_jax.classp(0.1).init({})
    assert floats(classp_jax.mean_accumulator(state)) == 0
    assert floats(classp_jax.free_fraction(state)) == 0
    assert floats(classp_jax.update_density({})) == 0
    assert classp_jax.free_fraction(state, per_leaf=True) == {}


@pytest.mark.parametrize(
    "state",
    [
        optax.adam(0.1).init(PARAMS),
        optax.chain(classp_jax.mask_by_threshold(0.1), optax.sgd(0.1)).init(PARAMS),
        optax.masked(optax.sgd(0.1), KERNEL_ONLY).init(PARAMS),
        (),
        None,
        PARAMS,
    ],
    ids=["adam", "mask only", "masked sgd", "empty", "None", "parameters"],
)
@pytest.mark.parametrize(
    "look",
    [
        classp_jax.accumulators,
        classp_jax.mean_accumulator,
        classp_jax.free_fraction,
    ],
)
def test_a_state_without_an_accumulator(look, state):
    with pytest.raises(ValueError, match="holds no CLASSP accumulator"):
        look(state)


def test_two_accumulators_for_one_weight():
    tx: Any = optax.chain(classp_jax.classp(0.1), classp_jax.classp(0.1))
    with pytest.raises(ValueError, match="two accumulators for 'layer/bias'"):
        classp_jax.accumulators(tx.init(PARAMS))
    # One of them has a part only.
    half: Any = optax.masked(classp_jax.classp(0.1), KERNEL_ONLY)
    tx = optax.chain(classp_jax.classp(0.1), half)
    with pytest.raises(ValueError, match="two accumulators for 'layer/kernel'"):
        classp_jax.accumulators(tx.init(PARAMS))


def test_two_networks():
    tx: Any = classp_jax.classp(0.1)
    states = (tx.init(PARAMS), tx.init({"other": jnp.ones(2)}))
    with pytest.raises(ValueError, match="different trees of parameters"):
        classp_jax.accumulators(states)


def test_under_jit_and_vmap():
    tx: Any = classp_jax.classp(0.1)
    state = after_two_steps(tx)
    assert floats(jax.jit(classp_jax.mean_accumulator)(state)) == pytest.approx(MEAN)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), state)
    means = jax.vmap(classp_jax.mean_accumulator)(stacked)
    np.testing.assert_allclose(means, [MEAN, 2 * MEAN], rtol=1e-6)


# The density of an update.


def test_update_density():
    assert floats(classp_jax.update_density(GRADIENTS)) == pytest.approx(4 / 10)
    assert floats(classp_jax.update_density(GRADIENTS, per_leaf=True)) == {
        "layer": {"kernel": 3 / 6, "bias": 1 / 4},
        "none": 0.0,
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_update_density_of_other_dtypes(dtype):
    updates = jnp.asarray([0.0, 1.0, jnp.nan, jnp.inf, -0.0], dtype)
    assert floats(classp_jax.update_density(updates)) == pytest.approx(3 / 5)


def test_update_density_of_plain_numbers():
    updates = {"a": 1.5, "b": [0.0, 2.0], "c": np.zeros(2)}
    assert floats(classp_jax.update_density(updates)) == pytest.approx(2 / 5)


def test_update_density_of_many_weights():
    """Beyond 2^24 = 16.7 million, where counting by ones in float32 stands still."""
    updates = jnp.ones(20_000_000, jnp.bfloat16).at[:5_000_000].set(0)
    assert floats(classp_jax.update_density(updates)) == pytest.approx(0.75, rel=1e-6)


def test_update_density_of_a_masked_update():
    tx: Any = classp_jax.classp(0.1, threshold=1.5)
    updates, _ = tx.update(GRADIENTS, tx.init(PARAMS))
    assert floats(classp_jax.update_density(updates)) == pytest.approx(2 / 10)
