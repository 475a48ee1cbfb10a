"""Saving and restoring with Orbax in the middle of a task."""

import itertools
import pathlib
import tempfile

import jax
import numpy as np
import orbax.checkpoint as ocp
from digits import batches, init_network, permuted_digits, step

import classp_jax

old, new = permuted_digits(2)
optimizer = classp_jax.classp(learning_rate=0.1, threshold=1e-6, eps=0.01)


def start():
    params = init_network()
    return {"params": params, "state": optimizer.init(params), "step": np.int32(0)}


def train(run, until):
    """Goes on from where the run stands in its data to a number of steps."""
    data = itertools.chain(batches(old, passes=5), batches(new, passes=5))
    params, state = run["params"], run["state"]
    for x, y in itertools.islice(data, int(run["step"]), until):
        params, state = step(optimizer, params, state, x, y)
    return {"params": params, "state": state, "step": np.int32(until)}


with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "in_the_middle"
    # Step 500 of 700 is in the second task.
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, train(start(), until=500))

    # The shapes and dtypes of a fresh run say what to restore. No array is made.
    like = jax.eval_shape(start)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(path, like)

print(f"restored at step {restored['step']}")
print(f"mean accumulator {classp_jax.mean_accumulator(restored['state']):.3f}")

continued, uninterrupted = train(restored, until=700), train(start(), until=700)
same = jax.tree.map(np.array_equal, continued, uninterrupted)
print(f"same bits as without a break: {all(jax.tree.leaves(same))}")
