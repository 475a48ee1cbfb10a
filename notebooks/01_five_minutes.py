# %% [markdown]
# # Five minutes: a network forgets, and the same network with CLASSP forgets less
#
# A small network learns to read handwritten digits. Then it learns to read the same
# digits turned by a quarter, and sees the upright ones no more. What is left of the
# first task?
#
# Everything happens in this page: the data come with scikit-learn, the network is ten
# lines of JAX, the loop is one function, and the only thing that differs between the
# two runs is the optimizer.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import classp_jax

# %% [markdown]
# ## Two tasks
#
# The digits have 8 by 8 pixels. Some are set aside for testing, and some for choosing
# learning rates.

# %%
images, labels = load_digits(return_X_y=True)
images = np.asarray(images / 16, np.float32)  # [image, pixel], from 0 to 1
labels = np.asarray(labels)

order = np.random.default_rng(0).permutation(len(images))
for_test, for_validation, for_training = np.split(order, [360, 650])
x, y = images[for_training], labels[for_training]
x_validation, y_validation = images[for_validation], labels[for_validation]
x_test, y_test = images[for_test], labels[for_test]


def turned(x):
    """The same digits, turned by a quarter to the left."""
    return np.rot90(x.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)


tasks = [(x, y), (turned(x), y)]
validation = [(x_validation, y_validation), (turned(x_validation), y_validation)]
test = [(x_test, y_test), (turned(x_test), y_test)]
print(len(x), "for training,", len(x_validation), "for choosing,", len(x_test), "test")

# %% [markdown]
# ## One network, one loop
#
# Two hidden layers and one output layer that both tasks share.


# %%
def init_network(seed, sizes=(64, 64, 64, 10)):
    """Weights and biases of each layer."""
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    return [
        {"w": jax.random.normal(key, (m, n)) * (2 / m) ** 0.5, "b": jnp.zeros(n)}
        for key, m, n in zip(keys, sizes, sizes[1:], strict=False)
    ]


def scores(network, x):
    """What the network says about each image, one number per digit."""
    for layer in network[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ network[-1]["w"] + network[-1]["b"]


def loss(network, x, y):
    """The mean cross-entropy."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(
        scores(network, x), y
    ).mean()


@jax.jit
def accuracy(network, x, y):
    """The share of images that the network reads correctly."""
    return (scores(network, x).argmax(axis=1) == y).mean()


# %% [markdown]
# The loop is the usual one, compiled for a pass at a time and for all learning rates of
# an optimizer. It is told nothing when the task changes: the optimizer and its state
# just go on.


# %%
@functools.partial(jax.jit, static_argnums=0)
def one_pass(make, rate, network, state, x, y):
    """Batch after batch, with x [batch, image, pixel] and y [batch, image]."""
    optimizer = make(rate)

    def step(network_and_state, batch):
        network, state = network_and_state
        gradient = jax.grad(loss)(network, *batch)
        updates, state = optimizer.update(gradient, state, network)
        return (optax.apply_updates(network, updates), state), None

    return jax.lax.scan(step, (network, state), (x, y))[0]


def learn_in_turn(make, rate, tasks, measured_on, seed, passes=10):
    """Learns task after task; accuracy on each after every pass, [passes, tasks]."""
    network = init_network(seed)
    state = make(rate).init(network)
    rng = np.random.default_rng(seed)
    curve = []
    for x, y in tasks:
        for _ in range(passes):
            order = rng.permutation(len(x))[: len(x) // 20 * 20].reshape(-1, 20)
            network, state = one_pass(make, rate, network, state, x[order], y[order])
            curve.append([float(accuracy(network, *data)) for data in measured_on])
    return np.array(curve)


# %% [markdown]
# ## A fair choice of learning rates
#
# Adam and CLASSP get the same number of tries. Only the learning rate is varied; all
# else stays at the libraries' defaults. The best is the one with the highest mean
# accuracy over both tasks at the end, on validation data.

# %%
tries = {
    "Adam": (optax.adam, [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
    "CLASSP": (classp_jax.classp, [0.01, 0.03, 0.1, 0.3, 1.0]),
}

chosen = {}
for name, (make, rates) in tries.items():
    at_end = np.array(
        [learn_in_turn(make, rate, tasks, validation, seed=100)[-1] for rate in rates]
    )
    best = at_end.mean(axis=1).argmax()
    chosen[name] = make, rates[best]
    for i, (first, second) in enumerate(at_end):
        mark = "  <- chosen" if i == best else ""
        print(f"{name:6} rate {rates[i]:<6g} {first:6.1%} and {second:6.1%}{mark}")

# %% [markdown]
# ## The picture
#
# Three new networks with each optimizer, measured on the test digits. No choice was
# made on these.

# %%
curves = {
    name: np.array([learn_in_turn(make, rate, tasks, test, seed) for seed in range(3)])
    for name, (make, rate) in chosen.items()
}  # [network, pass, task]

figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
colours = {"Adam": "#D55E00", "CLASSP": "#0072B2"}  # two of Okabe and Ito's
styles = {"Adam": "--", "CLASSP": "-"}
examples = [np.argmax(y_test == digit) for digit in (2, 3, 4, 5)]
titles = ["Task 1: upright digits", "Task 2: turned digits"]
for task, panel in enumerate(panels):
    for name, curve in curves.items():
        percent = 100 * curve[:, :, task]
        passes = np.arange(1, percent.shape[1] + 1)
        panel.fill_between(
            passes, percent.min(0), percent.max(0), color=colours[name], alpha=0.2, lw=0
        )
        panel.plot(
            passes, percent.mean(0), styles[name], color=colours[name], label=name
        )
    panel.axvline(10, color="black", lw=1, ls=":")
    panel.set_title(titles[task])
    panel.set_xlabel("passes over the training digits")
    panel.set_xticks(range(0, 21, 5))
    for i, digit in enumerate(test[task][0][examples]):
        sample = panel.inset_axes((0.05 + 0.09 * i, 0.3, 0.08, 0.14))
        sample.imshow(digit.reshape(8, 8), cmap="gray_r")
        sample.axis("off")
panels[0].set_ylabel("test accuracy (%)")
panels[0].set_ylim(0, 100)
panels[0].text(10.3, 40, "task 2 begins", rotation=90, va="center")
panels[1].legend(loc="center right", frameon=False)
figure.suptitle("Three networks each: mean, lowest and highest")
plt.show()

# %%
first_learned = {name: curve[:, 9, 0].mean() for name, curve in curves.items()}
at_end = {name: curve[:, -1].mean(axis=0) for name, curve in curves.items()}
for name, (first, second) in at_end.items():
    print(
        f"{name:6} task 1: {first_learned[name]:.1%} when it was learned, "
        f"{first:.1%} at the end; task 2: {second:.1%} at the end"
    )

# %% [markdown]
# Both learn the first task. While the second is learned, Adam overwrites the first and
# CLASSP keeps most of it. The price: it learns the second task a little less well.
#
# ## What CLASSP does
#
# It remembers for every weight how much gradient the weight has received, and divides
# by it. With the gradient $g$, the accumulator $A$ (zero at first), the learning rate
# $\alpha$, the threshold $\tau$, the power $p$ and $\varepsilon$:
#
# $$g^2 > \tau: \qquad A \leftarrow A + |g|^p, \qquad
# w \leftarrow w - \alpha\, \frac{g}{(\varepsilon + A)^{1/p}}$$
#
# and nothing happens where $g^2 \le \tau$. Here $p = 1$ and $\tau = 0$. A weight that
# the first task worked on hard has a large $A$ by the time the second task comes, and
# hardly moves; the second task is learned by the others. There is no penalty in the
# loss, no stored data, no second copy of the weights, and nobody tells the optimizer
# that the task has changed.

# %%
make, rate = chosen["CLASSP"]
network = init_network(0)
state = make(rate).init(network)
order = np.arange(len(x) // 20 * 20).reshape(-1, 20)
network, state = one_pass(make, rate, network, state, x[order], y[order])
print("mean accumulator after one pass:", classp_jax.mean_accumulator(state))
print("share of weights that never moved:", classp_jax.free_fraction(state))

# %% [markdown]
# ## Where it does not help
#
# It is no cure for everything. Here the first task is the digits 0 to 4 and the second
# the digits 5 to 9, with one output for each digit. Now the second task also teaches
# that 0 to 4 do not occur, and the network believes it.

# %%


def only(x, y, digits):
    """The images of some digits."""
    kept = np.isin(y, list(digits))
    return x[kept], y[kept]


halves = [only(x, y, range(5)), only(x, y, range(5, 10))]
test_halves = [only(x_test, y_test, range(5)), only(x_test, y_test, range(5, 10))]
halves_at_end = {}
for name, (make, rate) in chosen.items():
    halves_at_end[name] = learn_in_turn(make, rate, halves, test_halves, seed=0)[-1]
    first, second = halves_at_end[name]
    print(f"{name:6} digits 0 to 4: {first:.1%}, digits 5 to 9: {second:.1%}")

# %% [markdown]
# And accumulators only grow: a network that has learned for long learns slowly. What
# the threshold and the power do is in `02_threshold_and_power.py`.
