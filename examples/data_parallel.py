"""Data-parallel training: jit with NamedSharding, and pmap, beside one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import accuracy, batches, init_network, loss, permuted_digits
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import classp_jax

# Eight virtual devices where there is only a CPU, to be asked for before JAX is used.
# Accelerators are taken as they are.
jax.config.update("jax_num_cpu_devices", 8)
devices = jax.devices()
(digits,) = permuted_digits(1)
data = list(batches(digits, passes=2, size=10 * len(devices)))
optimizer = classp_jax.classp(learning_rate=0.1, eps=0.1)


def step(params, state, x, y, axis_name=None):
    gradients = jax.grad(loss)(params, x, y)
    if axis_name:
        gradients = jax.lax.pmean(gradients, axis_name)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def train(step, params, state, place):
    for batch in data:
        params, state = step(params, state, *map(place, batch))
    return params


# One device.
params = init_network()
state = optimizer.init(params)
one = train(jax.jit(step), params, state, place=jnp.asarray)

# jit: every device holds the whole network and a part of the batch. The compiler sees
# that the mean over the batch goes over all devices.
mesh = Mesh(np.array(devices), ("batch",))
whole = NamedSharding(mesh, PartitionSpec())
divided = NamedSharding(mesh, PartitionSpec("batch"))
sharded = train(
    jax.jit(step, out_shardings=whole),
    *jax.device_put((params, state), whole),
    place=lambda a: jax.device_put(a, divided),
)

# pmap: every array has one axis more, over devices, and the step takes the mean itself.
# It does so before the optimizer, which is to see the gradient of the whole batch.
copies = jax.tree.map(lambda a: jnp.stack([a] * len(devices)), (params, state))
mapped = train(
    jax.pmap(lambda *args: step(*args, axis_name="batch"), axis_name="batch"),
    *copies,
    place=lambda a: a.reshape(len(devices), -1, *a.shape[1:]),
)
mapped = jax.tree.map(lambda w: w[0], mapped)


def largest_difference(a, b):
    differences = jax.tree.map(lambda v, w: np.max(np.abs(v - np.asarray(w))), a, b)
    return max(jax.tree.leaves(differences))


print(f"{len(devices)} devices, test accuracy {accuracy(one, digits):.1%}")
print(f"jit:  largest difference to one device {largest_difference(one, sharded):.0e}")
print(f"pmap: largest difference to one device {largest_difference(one, mapped):.0e}")
