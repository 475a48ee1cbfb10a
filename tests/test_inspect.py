"""What a state and an update tell, wherever the state is; filling it beforehand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

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
MEANS = {"layer/kernel": 2 * 3.0 / 6, "layer/bias": 2 * 3.0 / 4, "none": 0.0}
MEAN = 2 * 6.0 / 10
FREE = {"layer/kernel": 3 / 6, "layer/bias": 3 / 4, "none": 0.0}
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
    means = floats(classp_jax.mean_accumulator(state, per_leaf=True))
    assert means == pytest.approx(MEANS, rel=1e-6)
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
    assert floats(classp_jax.mean_accumulator(state)) == pytest.approx(
        MEANS["layer/kernel"]
    )
    assert floats(classp_jax.free_fraction(state)) == 0.5
    assert floats(classp_jax.free_fraction(state, per_leaf=True)) == {
        "layer/kernel": 0.5
    }


def test_a_new_state_is_free():
    state = classp_jax.classp(0.1).init(PARAMS)
    assert floats(classp_jax.mean_accumulator(state)) == 0
    assert floats(classp_jax.free_fraction(state)) == 1


def test_a_single_array():
    g = jnp.asarray([1.0, 0.0, 2.0, 0.0])
    state = after_two_steps(classp_jax.classp(0.1), g, g)
    assert floats(classp_jax.mean_accumulator(state, per_leaf=True)) == {"": 1.5}
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


class Model(nnx.Module):
    def __init__(self):
        self.head = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(x)


def test_nnx_optimizer():
    """Through ``nnx.Optimizer``, whose state holds variables in the arrays' places."""
    model = Model()
    optimizer = nnx.Optimizer(model, classp_jax.classp(0.1), wrt=nnx.Param)
    x = jnp.asarray([[1.0, 0.0, 2.0]])
    gradients = nnx.grad(lambda m: m(x).sum())(model)
    optimizer.update(model, gradients)
    states: list[Any] = [optimizer.opt_state, optimizer]
    for state in states:
        # |g| is x for the kernel's columns and 1 for the biases.
        mean = (2 * (1 + 0 + 2) + 2) / 8
        assert floats(classp_jax.mean_accumulator(state)) == pytest.approx(mean)
        assert floats(classp_jax.free_fraction(state)) == pytest.approx(2 / 8)
        leaves = classp_jax.free_fraction(state, per_leaf=True)
        by_name = {path.split("/")[1]: float(v) for path, v in leaves.items()}
        assert by_name == pytest.approx({"kernel": 2 / 6, "bias": 0.0})
    assert floats(classp_jax.update_density(gradients)) == pytest.approx(6 / 8)


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
    "look", [classp_jax.mean_accumulator, classp_jax.free_fraction]
)
def test_a_state_without_an_accumulator(look, state):
    for per_leaf in (True, False):
        with pytest.raises(ValueError, match="holds no CLASSP accumulator"):
            look(state, per_leaf=per_leaf)


def test_two_accumulators_for_one_weight():
    tx: Any = optax.chain(classp_jax.classp(0.1), classp_jax.classp(0.1))
    with pytest.raises(ValueError, match="two accumulators for 'layer/"):
        classp_jax.mean_accumulator(tx.init(PARAMS))


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
    assert floats(classp_jax.update_density(GRADIENTS, per_leaf=True)) == pytest.approx(
        {"layer/kernel": 3 / 6, "layer/bias": 1 / 4, "none": 0.0}
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_update_density_of_other_dtypes(dtype):
    updates = jnp.asarray([0.0, 1.0, jnp.nan, jnp.inf, -0.0], dtype)
    assert floats(classp_jax.update_density(updates)) == pytest.approx(3 / 5)


def test_update_density_of_many_weights():
    """Beyond 2^24 = 16.7 million, where counting by ones in float32 stands still."""
    updates = jnp.ones(20_000_000, jnp.bfloat16).at[:5_000_000].set(0)
    assert floats(classp_jax.update_density(updates)) == pytest.approx(0.75, rel=1e-6)


def test_update_density_of_a_masked_update():
    tx: Any = classp_jax.classp(0.1, threshold=1.5)
    updates, _ = tx.update(GRADIENTS, tx.init(PARAMS))
    assert floats(classp_jax.update_density(updates)) == pytest.approx(2 / 10)


# Filling the accumulator beforehand.


def batches(steps: int = 12) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    g = {
        "w": rng.normal(size=(steps, 5, 4)) * 10 ** rng.uniform(-3, 0, (steps, 5, 4)),
        "b": rng.normal(size=(steps, 3)),
    }
    g["w"][:, 0] = 0
    return {k: v.astype(np.float32) for k, v in g.items()}


@pytest.mark.parametrize(
    ("tx", "threshold", "power"),
    [
        (classp_jax.classp(0.1), 0.0, 1.0),
        (classp_jax.classp(0.1, 1e-2, 2.0), 1e-2, 2.0),
        (classp_jax.classp(0.1, 1e-2, 1.5, scaling=False), 1e-2, 1.5),
        (
            optax.chain(optax.identity(), classp_jax.classp(0.1, 0.1, 3)),
            0.1,
            3.0,
        ),
        (classp_jax.scale_by_generalized_adagrad(0.5), 0.0, 0.5),
    ],
)
def test_accumulate_importance_is_the_sum(tx, threshold, power):
    gradients = batches()
    params = {k: jnp.ones(g.shape[1:]) for k, g in gradients.items()}

    def body(state: Any, g: Any) -> Any:
        return classp_jax.accumulate_importance(tx, state, params, g), None

    scanned, _ = jax.jit(lambda: jax.lax.scan(body, tx.init(params), gradients))()
    looped = tx.init(params)
    for t in range(12):
        g = {k: v[t] for k, v in gradients.items()}
        looped = classp_jax.accumulate_importance(tx, looped, params, g)

    want = {}
    for name, g in gradients.items():
        g = g.astype(np.float64)
        want[name] = np.where(g * g > threshold, np.abs(g) ** power, 0).sum(0)
    assert jax.tree.structure(scanned) == jax.tree.structure(tx.init(params))
    for state in (scanned, looped):
        assert floats(
            classp_jax.mean_accumulator(state, per_leaf=True)
        ) == pytest.approx({k: v.mean() for k, v in want.items()}, rel=2e-6)
        leaves = [a for a in jax.tree.leaves(state) if jnp.ndim(a)]
        for a, name in zip(leaves, sorted(want), strict=True):
            np.testing.assert_allclose(a, want[name], rtol=2e-6)


def test_fine_tuning_starts_with_the_accumulators_filled():
    tx: Any = classp_jax.classp(0.5, eps=0.1)
    params = jnp.asarray([1.0, -2.0, 3.0])
    before = np.asarray(params).tobytes()
    state = tx.init(params)
    for g in ([3.0, 0.0, 1.0], [-6.0, 0.0, 1.0]):
        state = classp_jax.accumulate_importance(tx, state, params, jnp.asarray(g))
    assert np.asarray(params).tobytes() == before
    updates, _ = tx.update(jnp.ones(3), state, params)
    np.testing.assert_allclose(
        updates, [-0.5 / (9 + 1 + 0.1), -0.5 / 1.1, -0.5 / (2 + 1 + 0.1)], rtol=1e-6
    )


def test_accumulate_importance_passes_the_parameters():
    """A transform may need them, such as weight decay in front."""
    tx: Any = optax.chain(optax.add_decayed_weights(0.5), classp_jax.classp(0.1))
    params = jnp.asarray([2.0, -4.0])
    state = classp_jax.accumulate_importance(tx, tx.init(params), params, jnp.zeros(2))
    assert floats(classp_jax.mean_accumulator(state)) == pytest.approx(1.5)
