"""CLASSP in a plain JAX loop, beside Adam: what three tasks leave of the first."""

import jax
import optax
from digits import accuracy, batches, init_network, loss, permuted_digits

import classp_jax

# One network learns to read digits, then the same digits with their pixels in another
# order, then in a third. It never sees an earlier task again.
tasks = permuted_digits(3)


def train(optimizer):
    @jax.jit
    def step(params, state, x, y):
        gradients = jax.grad(loss)(params, x, y)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = init_network()
    state = optimizer.init(params)
    for task in tasks:
        # Nothing tells the optimizer that a new task begins.
        for x, y in batches(task, passes=5):
            params, state = step(params, state, x, y)
    return params, state


print("test accuracy on tasks 1, 2 and 3, after all three:")
params, _ = train(optax.adam(learning_rate=1e-3))
print("Adam  ", *(f"{accuracy(params, task):.1%}" for task in tasks))
params, state = train(classp_jax.classp(learning_rate=0.1, eps=0.01))
print("CLASSP", *(f"{accuracy(params, task):.1%}" for task in tasks))
print(f"weights that never moved: {classp_jax.free_fraction(state):.1%}")
