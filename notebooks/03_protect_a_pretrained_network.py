# %% [markdown]
# # Protect a pretrained network: fine-tune it without losing what it knew
#
# A network was trained by somebody else, with another optimizer, and shall learn
# something new. CLASSP knows nothing of its past: all accumulators are zero. But a pass
# over data that the network knows already can fill them: `accumulate_importance` runs
# the optimizer and throws its updates away. Weights that matter to the old data have
# large accumulators by then, and hardly move in the fine-tuning.
#
# Here is what that keeps and what it costs, against fine-tuning with Adam.

# %%
import functools
import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import classp_jax

# %% [markdown]
# ## Old data, new data
#
# The old data are scikit-learn's handwritten digits; the new data are the same digits
# turned by a quarter. The output layer is the same for both.

# %%
images, labels = load_digits(return_X_y=True)
images = np.asarray(images / 16, np.float32)  # [image, pixel], from 0 to 1
labels = np.asarray(labels, np.int32)
turned_images = np.rot90(images.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)
both = np.stack([images, turned_images])  # [old or new, image, pixel]
OLD, NEW = 0, 1

order = np.random.default_rng(0).permutation(len(images))
for_test, for_validation, for_training = np.split(order, [360, 650])
x, y = jnp.asarray(both[:, for_training]), jnp.asarray(labels[for_training])
validation = both[:, for_validation], labels[for_validation]
test = both[:, for_test], labels[for_test]

BATCH = 20
BATCHES = len(y) // BATCH  # a pass


def init_network(rng, sizes=(64, 64, 64, 10)):
    """Weights and biases of each layer."""
    return [
        {
            "w": rng.normal(0, (2 / m) ** 0.5, (m, n)).astype(np.float32),
            "b": np.zeros(n, np.float32),
        }
        for m, n in itertools.pairwise(sizes)
    ]


def scores(network, x):
    """What the network says about each image, a number a digit."""
    for layer in network[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ network[-1]["w"] + network[-1]["b"]


def loss(network, x, y):
    """The mean cross-entropy."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(
        scores(network, x), y
    ).mean()


@jax.jit
def accuracies(network, x, y):
    """Accuracy on old and on new data."""
    return (scores(network, x).argmax(axis=-1) == y).mean(axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def train(make, settings, network, state, kinds, batches):
    """Takes the optimizer ``make(learning_rate, eps)`` through all batches."""
    learning_rate, eps = settings
    optimizer = make(learning_rate, eps=eps)

    def step(carry, kind_and_batch):
        network, state = carry
        kind, batch = kind_and_batch
        gradient = jax.grad(loss)(network, x[kind, batch], y[batch])
        updates, state = optimizer.update(gradient, state, network)
        return (optax.apply_updates(network, updates), state), None

    (network, _), _ = jax.lax.scan(step, (network, state), (kinds, batches))
    return network


def passes(rng, count):
    """Shuffled batches for some passes over the data, as indices."""
    orders = [rng.permutation(len(y))[: BATCHES * BATCH] for _ in range(count)]
    return np.reshape(orders, (-1, BATCH))


# %% [markdown]
# ## The pretrained networks
#
# Four networks, trained on the old data with Adam.

# %%
NETWORKS = 4


def pretrain(seed):
    """A network that knows the old data."""
    rng = np.random.default_rng(seed)
    network = init_network(rng)
    batches = passes(rng, 10)
    kinds = np.full(len(batches), OLD)
    state = optax.adam(0.0).init(network)
    return train(optax.adam, (2e-3, 1e-8), network, state, kinds, batches)


pretrained = [pretrain(seed) for seed in range(NETWORKS)]
before = 100 * np.mean([accuracies(network, *test) for network in pretrained], axis=0)
print(f"before fine-tuning: old {before[OLD]:.1f} %, new {before[NEW]:.1f} %")

# %% [markdown]
# ## What matters to the old data
#
# One pass over the old training data fills the accumulators and moves no weight. Here
# the gradients are those of single examples: in the mean over a batch the gradients of
# different examples cancel, and what cancels is not counted. How strongly the old
# knowledge is protected grows with the number of gradients.


# %%
@jax.jit
def protect(network):
    """The state of ``classp`` after one pass over the old data, no weight moved."""
    optimizer = classp_jax.classp(learning_rate=0.0)

    def body(state, example):
        image, label = example
        gradient = jax.grad(loss)(network, image[None], label[None])
        return classp_jax.accumulate_importance(
            optimizer, state, network, gradient
        ), None

    state, _ = jax.lax.scan(body, optimizer.init(network), (x[OLD], y))
    return state


protected = [protect(network) for network in pretrained]
print("mean accumulator:", classp_jax.mean_accumulator(protected[0]))
free = classp_jax.free_fraction(protected[0], per_leaf=True)
for layer in range(3):
    print(f"layer {layer + 1}: {free[layer]['w']:.1%} of the weights were not touched")

# %% [markdown]
# ## Fine-tuning, with the same number of tries
#
# Both optimizers have a learning rate and an epsilon; each gets the same number of
# values of both, its own default epsilon among them. The best pair is the one with the
# highest mean of old and new accuracy on *validation* data over the four networks. What
# is shown is accuracy on *test* data. As a check on what it is that protects, CLASSP
# also runs with empty accumulators, with the same tries again.

# %%
methods = {
    "Adam": (
        optax.adam,
        np.logspace(-5, -1, 9),
        (1e-8, 1e-4, 1e-2),
        [optax.adam(0.0).init(network) for network in pretrained],
    ),
    "CLASSP, not protected": (
        classp_jax.classp,
        np.logspace(-3, 1, 9),
        (1e-5, 1e-3, 1e-1),
        [classp_jax.classp(0.0).init(network) for network in pretrained],
    ),
    "CLASSP, protected": (
        classp_jax.classp,
        np.logspace(-3, 1, 9),
        (1e-5, 1e-3, 1e-1),
        protected,
    ),
}


def fine_tune(make, settings, network, state, seed):
    """Learns the new data; accuracy in percent, [validation or test, old or new]."""
    batches = passes(np.random.default_rng(seed), 5)
    kinds = np.full(len(batches), NEW)
    network = train(make, settings, network, state, kinds, batches)
    return [100 * accuracies(network, *validation), 100 * accuracies(network, *test)]


results, chosen = {}, {}
for name, (make, rates, epsilons, states) in methods.items():
    tried = np.array(
        [
            [
                [
                    fine_tune(make, (rate, eps), pretrained[k], states[k], seed=k)
                    for k in range(NETWORKS)
                ]
                for eps in epsilons
            ]
            for rate in rates
        ]
    ).mean(axis=2)  # [rate, epsilon, validation or test, old or new]
    quality = tried[:, :, 0].mean(axis=-1)
    i, j = np.unravel_index(quality.argmax(), quality.shape)
    results[name], chosen[name] = tried[:, :, 1], (i, j)
    old, new = results[name][i, j]
    print(
        f"{name:21} best of {quality.size}: rate {rates[i]:.2g}, eps {epsilons[j]:g}; "
        f"old {old:.1f} %, new {new:.1f} %"
    )

# %%
colours = {
    "Adam": "#D55E00",
    "CLASSP, not protected": "#009E73",
    "CLASSP, protected": "#0072B2",
}  # three of Okabe and Ito's
markers = {"Adam": "s", "CLASSP, not protected": "^", "CLASSP, protected": "o"}

figure, panels = plt.subplots(2, 2, figsize=(9, 7.5), layout="constrained")
for panel, (name, (_, rates, epsilons, _)) in zip(
    panels.flat[:3], methods.items(), strict=True
):
    i, j = chosen[name]
    old, new = results[name][:, j].T
    panel.semilogx(rates, old, "-", marker="o", color=colours[name], label="old data")
    panel.semilogx(
        rates, new, "--", marker="o", mfc="white", color=colours[name], label="new data"
    )
    panel.axhline(before[OLD], color="black", lw=0.8, ls=":")
    panel.axvline(rates[i], color="black", lw=0.8)
    panel.set_title(f"{name}, eps = {epsilons[j]:g}")
    panel.set_xlabel("learning rate (line: the chosen one)")
    panel.set_ylabel("test accuracy (%)")
    panel.set_ylim(0, 100)
    panel.legend(frameon=False)

for name, percent in results.items():
    panels[1, 1].plot(
        percent[..., NEW].ravel(),
        percent[..., OLD].ravel(),
        markers[name],
        color=colours[name],
        mfc="none",
        label=name,
    )
    i, j = chosen[name]
    panels[1, 1].plot(
        percent[i, j, NEW], percent[i, j, OLD], markers[name], color=colours[name], ms=9
    )
panels[1, 1].set_title("all tries (filled: the chosen ones)")
panels[1, 1].set_xlabel("new data: test accuracy (%)")
panels[1, 1].set_ylabel("old data: test accuracy (%)")
panels[1, 1].set_xlim(0, 100)
panels[1, 1].set_ylim(0, 100)
panels[1, 1].legend(frameon=False, loc="center left")
plt.show()

# %% [markdown]
# The dotted line is the accuracy on old data before fine-tuning. Adam has no learning
# rate that does both: where it learns the new data it loses the old. CLASSP with empty
# accumulators is no better, so it is not the optimizer as such that protects. With the
# importance of the old data in its accumulators there are learning rates where nearly
# all of the old is kept and the new is learned about as well as with Adam. It must be
# looked for all the same: too high a learning rate destroys a protected network too.
#
# ## When you may keep the old data
#
# `accumulate_importance` needs the old data once, before fine-tuning. If they are there
# during fine-tuning too, training on both is the simplest remedy and sets the bar. Here
# Adam sees old and new batches in turn, with as many new ones as before; its settings
# are chosen by the same tries.


# %%
def fine_tune_on_both(settings, network, seed):
    """As ``fine_tune``, with an old batch after every new one."""
    rng = np.random.default_rng(seed)
    batches = np.stack([passes(rng, 5), passes(rng, 5)], axis=1).reshape(-1, BATCH)
    kinds = np.tile([NEW, OLD], len(batches) // 2)
    state = optax.adam(0.0).init(network)
    network = train(optax.adam, settings, network, state, kinds, batches)
    return [100 * accuracies(network, *validation), 100 * accuracies(network, *test)]


_, rates, epsilons, _ = methods["Adam"]
on_both = np.array(
    [
        [fine_tune_on_both(pair, pretrained[k], seed=k) for k in range(NETWORKS)]
        for pair in itertools.product(rates, epsilons)
    ]
).mean(axis=1)  # [try, validation or test, old or new]
with_old_data = on_both[on_both[:, 0].mean(axis=-1).argmax(), 1]
print(
    f"Adam on old and new data: old {with_old_data[OLD]:.1f} %, "
    f"new {with_old_data[NEW]:.1f} %"
)

# %% [markdown]
# That keeps the old and learns more of the new. Importance is for when the old data
# cannot come along: whoever has them runs the pass, and hands on the network together
# with the optimizer's state.
