"""mask_by_threshold. Its exact boundary is tested with the numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import classp_jax


def test_mask_by_threshold_on_a_tree():
    g = {"a": jnp.asarray([[0.5, -0.6], [0.0, 2.0]]), "b": (jnp.float32(-0.1),)}
    tx: Any = classp_jax.mask_by_threshold(0.3)
    updates, state = jax.jit(tx.update)(g, tx.init(g))
    np.testing.assert_array_equal(updates["a"], jnp.asarray([[0, -0.6], [0, 2.0]]))
    assert updates["b"][0] == 0
    assert state.count == 1


def test_mask_by_threshold_with_a_schedule():
    tx: Any = classp_jax.mask_by_threshold(lambda count: jnp.where(count < 2, 0.0, 1.0))
    g = jnp.asarray([0.5, 2.0])
    state = tx.init(g)
    seen = []
    for _ in range(4):
        updates, state = tx.update(g, state)
        seen.append(int(jnp.count_nonzero(updates)))
    assert seen == [2, 2, 1, 1]
