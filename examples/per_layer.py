"""A threshold and a power for each layer, with optax.partition."""

import optax
from digits import accuracy, batches, init_network, permuted_digits, step

import classp_jax

# In the first layer only large gradients move a weight. In the head steps shrink more
# slowly: with the root of a sum of squares, not with a sum.
optimizer = optax.partition(
    {
        "sparse": classp_jax.classp(0.1, threshold=1e-4, eps=0.01),
        "dense": classp_jax.classp(0.1, eps=0.01),
        "quick": classp_jax.classp(0.02, power=2.0, eps=0.01),
    },
    {"first": "sparse", "second": "dense", "head": "quick"},
)

old, new = permuted_digits(2)
params = init_network()
state = optimizer.init(params)
for task in (old, new):
    for x, y in batches(task, passes=10):
        params, state = step(optimizer, params, state, x, y)
print(f"old {accuracy(params, old):.1%}, new {accuracy(params, new):.1%}")

# What looks into a state finds every accumulator in it, by the weight's place.
free = classp_jax.free_fraction(state, per_leaf=True)
for layer in ("first", "second", "head"):
    print(f"{layer}: {free[layer]['kernel']:.1%} of the weights never moved")
