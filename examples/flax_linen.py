"""CLASSP with Flax Linen: it goes into TrainState like any other optimizer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from digits import batches, permuted_digits
from flax.training.train_state import TrainState

import classp_jax


class Network(nn.Module):
    """A network 64-128-10."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x)))


old, new = permuted_digits(2)
network = Network()
state = TrainState.create(
    apply_fn=network.apply,
    params=network.init(jax.random.key(0), old.x_train[:1])["params"],
    tx=classp_jax.classp(learning_rate=0.1, eps=0.01),
)


@jax.jit
def step(state, x, y):
    def loss(params):
        logits = state.apply_fn({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


for task in (old, new):
    for x, y in batches(task, passes=10):
        state = step(state, x, y)

for name, task in (("old", old), ("new", new)):
    logits = state.apply_fn({"params": state.params}, task.x_test)
    print(f"{name} task: {jnp.mean(jnp.argmax(logits, axis=-1) == task.y_test):.1%}")

# The accumulators are in the optimizer's state, one for each weight.
print(f"mean accumulator: {classp_jax.mean_accumulator(state.opt_state):.2f}")
