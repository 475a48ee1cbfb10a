"""How many weights move in a step: a threshold by schedule, or a density."""

import jax
import numpy as np
import optax
from digits import accuracy, batches, init_network, loss, permuted_digits

import classp_jax

(digits,) = permuted_digits(1)
data = list(batches(digits, passes=10))


def train(optimizer):
    @jax.jit
    def step(params, state, x, y):
        updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
        density = classp_jax.update_density(updates)
        return optax.apply_updates(params, updates), state, density

    params = init_network()
    state = optimizer.init(params)
    densities = []
    for x, y in data:
        params, state, density = step(params, state, x, y)
        densities.append(density)
    fifths = np.mean(np.reshape(densities, (5, -1)), axis=1)
    print("weights that moved, by fifths of the run:", *(f"{d:.1%}" for d in fifths))
    print(f"test accuracy: {accuracy(params, digits):.1%}")


# The threshold on the squared gradient may be any schedule of the step. This one grows
# a thousandfold over the run.
growing = optax.exponential_decay(1e-7, transition_steps=len(data), decay_rate=1e3)
print("threshold by schedule")
train(classp_jax.classp(learning_rate=0.1, threshold=growing, eps=0.01))

# Nobody knows the scale of gradients in advance, and it falls as training goes on. A
# density names the share of weights that may move, and the mask finds the threshold.
# It takes the threshold's place in the chain that classp is.
print("threshold by density, 10 %")
train(
    optax.chain(
        classp_jax.mask_to_density(0.1),
        classp_jax.scale_by_generalized_adagrad(power=1.0, eps=0.01),
        optax.scale_by_learning_rate(0.1),
    )
)
