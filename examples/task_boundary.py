"""Changing hyperparameters between two tasks, with optax.inject_hyperparams."""

import jax.numpy as jnp
import optax
from digits import accuracy, batches, init_network, permuted_digits, step

import classp_jax

# Injected hyperparameters are values in the state. The power stays a number of the
# program: with a power that the compiler does not know, a step takes longer.
optimizer = optax.inject_hyperparams(classp_jax.classp, static_args="power")(
    learning_rate=0.1, threshold=0.0, power=1.0, eps=0.01
)

old, new = permuted_digits(2)
params = init_network()
state = optimizer.init(params)
for x, y in batches(old, passes=10):
    params, state = step(optimizer, params, state, x, y)
print(f"after the first task: old {accuracy(params, old):.1%}")


def learn_new(params, state):
    for x, y in batches(new, passes=10):
        params, state = step(optimizer, params, state, x, y)
    return f"old {accuracy(params, old):.1%}, new {accuracy(params, new):.1%}"


# The accumulator goes on, with other values beside it. Arrays and not Python numbers,
# which are another type to the compiler: so the step is not compiled again.
print(f"second task, nothing changed: {learn_new(params, state)}")
slower = optax.tree.set(state, learning_rate=jnp.float32(0.03))
print(f"second task, learning rate 0.03: {learn_new(params, slower)}")
sparser = optax.tree.set(state, threshold=jnp.float32(1e-3))
print(f"second task, threshold 1e-3: {learn_new(params, sparser)}")
