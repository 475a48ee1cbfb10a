"""Old and fine-tuned weights merged by importance."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import classp_jax
from classp_jax import finetune

RNG = np.random.default_rng(0)
OLD = {"w": RNG.normal(size=(4, 3)), "layers": [{"b": RNG.normal(size=3)}]}
NEW = jax.tree.map(lambda a: a + RNG.normal(size=a.shape), OLD)
SUMS = jax.tree.map(lambda a: RNG.gamma(0.3, size=a.shape), OLD)
OLD32, NEW32, SUMS32 = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32),
                                    (OLD, NEW, SUMS))  # fmt: skip


@pytest.mark.parametrize("power", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("eps", [1e-3, 0.1, 30.0])
def test_it_is_its_formula(power, eps):
    expected = jax.tree.map(
        lambda a, b, s: a + (eps / (eps + s)) ** (1 / power) * (b - a), OLD, NEW, SUMS
    )
    found = finetune.merge(OLD32, NEW32, SUMS32, eps=eps, power=power)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    traced = jax.jit(finetune.merge)(OLD32, NEW32, SUMS32, eps=eps, power=power)
    chex.assert_trees_all_close(traced, found, rtol=1e-5, atol=1e-6)


def test_from_one_end_to_the_other():
    """Where nothing matters the new weights; where much does, the old ones."""
    nothing = jax.tree.map(jnp.zeros_like, SUMS32)
    chex.assert_trees_all_close(finetune.merge(OLD32, NEW32, nothing), NEW32, rtol=1e-6)
    much = jax.tree.map(lambda a: jnp.full_like(a, 1e30), SUMS32)
    chex.assert_trees_all_equal(finetune.merge(OLD32, NEW32, much, eps=1e-9), OLD32)


def test_importance_out_of_an_optimizer_state_and_flax_nnx():
    model: Any = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, classp_jax.classp(0.1), wrt=nnx.Param)
    old = nnx.state(model, nnx.Param)
    new = jax.tree.map(lambda a: a + 1, old)
    importance = {"kernel": jnp.full([4, 3], 3.0), "bias": jnp.array([0.0, 1.0, 9.0])}
    state = finetune.put_importance(optimizer.opt_state, importance)
    found = finetune.merge(old, new, state, eps=1.0)
    assert jax.tree.structure(found) == jax.tree.structure(old)
    start = np.array(model.kernel[...])
    nnx.update(model, found)
    np.testing.assert_allclose(model.bias[...], [1.0, 0.5, 0.1], rtol=1e-6)
    moved = np.asarray(model.kernel[...]) - start
    np.testing.assert_allclose(moved, 0.25, rtol=1e-5)


def test_narrow_weights_stay_narrow_and_are_merged_wide():
    old, new = (jnp.asarray([x], jnp.bfloat16) for x in (1.0, 1.0078125))
    found = finetune.merge(old, new, jnp.array([0.5]), eps=1.0)
    assert found.dtype == jnp.bfloat16
    assert float(found[0]) == 1.0078125  # 1.0052 is nearer to it than to 1


def test_bad_input_is_named():
    other = {"w": jnp.ones((4, 5)), "layers": [{"scale": jnp.ones(3)}]}
    with pytest.raises(ValueError, match="The importance does not fit") as raised:
        finetune.merge(OLD32, NEW32, other)
    for part in (
        "'layers/0/b' is missing",
        "'layers/0/scale' is not in the network",
        "'w' has shape (4, 5), not (4, 3)",
    ):
        assert part in str(raised.value)
    with pytest.raises(ValueError, match="The new weights' tree does not fit"):
        finetune.merge(OLD32, other, SUMS32)
    for bad in (np.nan, np.inf, -1.0):
        sums = SUMS32 | {"w": SUMS32["w"].at[1, 2].set(bad)}
        with pytest.raises(ValueError, match=r"NaN, infinite or negative .* in 'w'"):
            finetune.merge(OLD32, NEW32, sums)
    with pytest.raises(ValueError, match="eps"):
        finetune.merge(OLD32, NEW32, SUMS32, eps=0.0)
    with pytest.raises(TypeError, match="int32"):
        finetune.merge(jnp.arange(3), jnp.arange(3), jnp.ones(3))
