"""A-GEM, a method that the library does not have, as a user would write it."""

import jax
import jax.numpy as jnp
import optax

from classp_jax import continual
from classp_jax.continual.methods import Hooks, Part, compose


def _hooks(settings, problem):
    count = int(settings["remembered"])

    def init(params, key):
        x = jnp.zeros((count, *problem.example.shape), problem.example.dtype)
        y = jnp.zeros(count, jnp.int32)
        return continual.Batch(x, y, y, problem.classes[y], jnp.zeros(count))

    def gradients(memory, gradients, params, batch, key):
        counts = memory._replace(weight=jnp.maximum(memory.weight, 1e-12))
        old, _ = jax.grad(problem.loss, has_aux=True)(params, counts)
        product = optax.tree.vdot(gradients, old)
        share = jnp.minimum(product, 0) / (optax.tree.vdot(old, old) + 1e-12)
        share = jnp.where(memory.weight[0] > 0, share, 0)
        return memory, jax.tree.map(lambda g, o: g - share * o, gradients, old)

    def end_of_task(memory, end, sample, key):
        places = jnp.arange(count) % len(sample.y)
        return jax.tree.map(lambda a: a[places], sample), end

    return Hooks(init, gradients=gradients, end_of_task=end_of_task)


AGEM = Part(
    "A-GEM, Chaudhry et al. 2019, equation 11",
    {"remembered": continual.Setting(64, integer=True)},
    _hooks,
)
SGD = Part("SGD", {"learning_rate": continual.Setting(0.1, 1e-3, 1.0)}, optax.sgd)
METHOD = compose("a-gem", SGD, [AGEM])
