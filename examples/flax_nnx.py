"""CLASSP with Flax NNX: it goes into nnx.Optimizer like any other optimizer."""

import jax.numpy as jnp
import optax
from digits import batches, permuted_digits
from flax import nnx

import classp_jax


class Network(nnx.Module):
    """A network 64-128-10."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.hidden(x)))


model = Network(nnx.Rngs(0))
optimizer = nnx.Optimizer(
    model, classp_jax.classp(learning_rate=0.1, eps=0.01), wrt=nnx.Param
)


@nnx.jit
def step(model, optimizer, x, y):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    optimizer.update(model, nnx.grad(loss)(model))


old, new = permuted_digits(2)
for task in (old, new):
    for x, y in batches(task, passes=5):
        step(model, optimizer, x, y)

for name, task in (("old", old), ("new", new)):
    guesses = jnp.argmax(model(task.x_test), axis=-1)
    print(f"{name} task: {jnp.mean(guesses == task.y_test):.1%}")

# The accumulators are in the optimizer's state, one for each weight.
print(f"mean accumulator: {classp_jax.mean_accumulator(optimizer.opt_state):.2f}")
