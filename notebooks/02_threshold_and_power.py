# %% [markdown]
# # Threshold and power: what each does to updates, accumulator and accuracy
#
# For every weight, with gradient $g$, accumulator $A$ (zero at first), learning rate
# $\alpha$, threshold $\tau$, power $p$ and $\varepsilon$, CLASSP does
#
# $$g^2 > \tau: \qquad A \leftarrow A + |g|^p, \qquad
# w \leftarrow w - \alpha\, \frac{g}{(\varepsilon + A)^{1/p}}$$
#
# and nothing where $g^2 \le \tau$. Four numbers to choose. What does each do?

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
# ## The first step of a weight
#
# A weight that was never touched has $A = 0$. Its first accepted gradient moves it by
#
# $$|\Delta w| = \alpha\, \frac{|g|}{(\varepsilon + |g|^p)^{1/p}} \approx
# \begin{cases}
# \alpha\, \varepsilon^{-1/p}\, |g| & \text{where } |g| \ll \varepsilon^{1/p} \\
# \alpha & \text{where } |g| \gg \varepsilon^{1/p}
# \end{cases}$$
#
# So $e = \varepsilon^{1/p}$ is a gradient size. Weights with smaller gradients start as
# in plain gradient descent with the learning rate $\alpha / e$. Those with larger ones
# jump by $\alpha$, whatever their gradient. The threshold has no part in how far a
# weight moves: it decides which weights are still untouched, and so have this large
# first step before them.

# %%
sizes = np.logspace(-7, 1, 200).astype(np.float32)


def first_step(power, e):
    """|dw| / alpha of a weight's first step, for gradients of the given sizes."""
    optimizer = classp_jax.classp(learning_rate=1.0, power=power, eps=e**power)
    updates, _ = optimizer.update(sizes, optimizer.init(sizes))
    return np.abs(np.asarray(updates))


figure, panel = plt.subplots(figsize=(6.5, 4), layout="constrained")
colours = {1.0: "#0072B2", 2.0: "#D55E00", 3.0: "#009E73"}  # Okabe and Ito's
styles = {1.0: "-", 2.0: "--", 3.0: ":"}
for e in (1e-5, 1e-1):
    for power in colours:
        panel.loglog(
            sizes,
            first_step(power, e),
            styles[power],
            color=colours[power],
            label=f"p = {power:g}" if e == 1e-5 else None,
        )
    panel.text(e / 5, 0.03, f"e = {e:g}")
panel.set_xlabel("size of the gradient, |g|")
panel.set_ylabel(r"first step, |Δw| / $\alpha$")
panel.legend(frameon=False, loc="lower right")
plt.show()

# %% [markdown]
# ## Two tasks, and a loop that measures
#
# The tasks are scikit-learn's handwritten digits and the same digits turned by a
# quarter. One network with a shared output layer learns first one, then the other, and
# nobody tells the optimizer. As many runs follow, the whole of one is a single compiled
# function here: `lax.scan` is the loop over the batches.

# %%
images, labels = load_digits(return_X_y=True)
images = np.asarray(images / 16, np.float32)  # [image, pixel], from 0 to 1
labels = np.asarray(labels, np.int32)
turned_images = np.rot90(images.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)
both = np.stack([images, turned_images])  # [task, image, pixel]

order = np.random.default_rng(0).permutation(len(images))
for_test, for_validation, for_training = np.split(order, [360, 650])
x, y = jnp.asarray(both[:, for_training]), jnp.asarray(labels[for_training])
validation = both[:, for_validation], labels[for_validation]
test = both[:, for_test], labels[for_test]

LAYERS = {"layer 1": (64, 64), "layer 2": (64, 64), "layer 3": (64, 10)}
PASSES, BATCH = 5, 20
BATCHES = len(y) // BATCH  # a pass


def init_network(rng):
    """Weights and biases by layer."""
    return {
        name: {
            "w": rng.normal(0, (2 / m) ** 0.5, (m, n)).astype(np.float32),
            "b": np.zeros(n, np.float32),
        }
        for name, (m, n) in LAYERS.items()
    }


def scores(network, x):
    """What the network says about each image, one number per digit."""
    for layer in ("layer 1", "layer 2"):
        x = jax.nn.relu(x @ network[layer]["w"] + network[layer]["b"])
    return x @ network["layer 3"]["w"] + network["layer 3"]["b"]


def loss(network, x, y):
    """The mean cross-entropy."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(
        scores(network, x), y
    ).mean()


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(make, power, threshold, settings, network, tasks, batches):
    """Takes the optimizer that ``make`` makes through all batches.

    Returns the network, the optimizer's state and the density of each update.
    """
    learning_rate, e = settings
    optimizer = make(learning_rate, threshold, power, e**power)

    def step(carry, task_and_batch):
        network, state = carry
        task, batch = task_and_batch
        gradient = jax.grad(loss)(network, x[task, batch], y[batch])
        updates, state = optimizer.update(gradient, state, network)
        network = optax.apply_updates(network, updates)
        return (network, state), classp_jax.update_density(updates)

    (network, state), densities = jax.lax.scan(
        step, (network, optimizer.init(network)), (tasks, batches)
    )
    return network, state, densities


def learn_in_turn(make, power, threshold, settings, seed):
    """Learns task after task with a new network, as in ``train``."""
    rng = np.random.default_rng(seed)
    network = init_network(rng)
    orders = [rng.permutation(len(y))[: BATCHES * BATCH] for _ in range(2 * PASSES)]
    batches = np.reshape(orders, (-1, BATCH))
    tasks = np.repeat([0, 1], PASSES * BATCHES)
    return train(make, power, threshold, settings, network, tasks, batches)


@jax.jit
def accuracies(network, x, y):
    """Accuracy on the old and on the new task."""
    return (scores(network, x).argmax(axis=-1) == y).mean(axis=-1)


# %% [markdown]
# ## A fair choice of the learning rate for every threshold and power
#
# A threshold or a power can only be judged with an $\alpha$ and an $\varepsilon$ that
# suit it. So each pair of $p$ and $\tau$ gets the same tries, and the best is the one
# with the highest mean accuracy over both tasks on validation data.

# %%
POWERS = (1.0, 2.0, 3.0)
THRESHOLDS = (0.0, 1e-6, 1e-4, 1e-2)
TRIES = [(rate, e) for rate in (0.03, 0.1, 0.3) for e in (1e-5, 1e-3, 1e-1)]


def choose(make, power, threshold):
    """The best of the tries on validation data."""

    def quality(settings):
        network, _, _ = learn_in_turn(make, power, threshold, settings, 100)
        return accuracies(network, *validation).mean()

    return max(TRIES, key=quality)


def at_the_end(make, power, threshold, settings):
    """Test accuracy in percent of three new networks, [network, old or new]."""
    return 100 * np.array(
        [
            accuracies(learn_in_turn(make, power, threshold, settings, seed)[0], *test)
            for seed in range(3)
        ]
    )


chosen = {
    (power, threshold): choose(classp_jax.classp, power, threshold)
    for power in POWERS
    for threshold in THRESHOLDS
}
print(len(TRIES), "tries for each of", len(chosen), "pairs of power and threshold")

# %% [markdown]
# ## What the threshold does to the updates
#
# The density of an update is the share of weights that it moves. Here $p = 1$, and only
# $\tau$ varies.

# %%
SHOWN = {0.0: "#0072B2", 1e-6: "#E69F00", 1e-4: "#009E73", 1e-2: "#CC79A7"}
DASHES = {0.0: "-", 1e-6: "--", 1e-4: "-.", 1e-2: (0, (1, 1))}
states = {}
mean_density = {}
figure, panel = plt.subplots(figsize=(7.5, 4), layout="constrained")
for threshold, colour in SHOWN.items():
    _, states[1.0, threshold], density = learn_in_turn(
        classp_jax.classp, 1.0, threshold, chosen[1.0, 0.0], 0
    )
    mean_density[threshold] = float(density.mean())
    # The mean over a third of a pass is a point.
    points = 100 * np.asarray(density).reshape(2 * PASSES * 3, -1).mean(axis=1)
    panel.semilogy(
        (np.arange(len(points)) + 0.5) / 3,
        points,
        ls=DASHES[threshold],
        color=colour,
        label=rf"$\tau$ = {threshold:g}",
    )
panel.axvline(PASSES, color="black", lw=1, ls=":")
panel.text(PASSES + 0.1, 0.15, "task 2 begins")
panel.set_xlabel("passes over the training digits")
panel.set_ylabel("weights that an update moves (%)")
panel.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
panel.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

for threshold, density in mean_density.items():
    free = classp_jax.free_fraction(states[1.0, threshold])
    print(
        f"threshold {threshold:<6g} moves {density:6.1%} of the weights in a step; "
        f"{free:6.1%} never moved"
    )

# %% [markdown]
# Even without a threshold many gradients are exactly zero: behind a ReLU that is off,
# and from pixels that are blank. At the third threshold fewer and fewer pass while the
# first task is learned, and when the second begins they are large again. The highest
# lets so few pass that nothing is learned well, as we shall see.
#
# ## What both do to the accumulator
#
# $A^{1/p}$ is a gradient size again: the $p$-norm of all gradients that the weight has
# accepted. After $t$ gradients of one size it is $|g|\, t^{1/p}$. With $p = 1$ the
# effective learning rate of a weight falls like $1/t$, with $p = 2$ (AdaGrad) like
# $1/\sqrt t$, with $p = 3$ like $1/\sqrt[3] t$. A high power remembers how large the
# largest gradients were, a low one also how many there have been.

# %%
for power in POWERS[1:]:
    _, states[power, 0.0], _ = learn_in_turn(
        classp_jax.classp, power, 0.0, chosen[1.0, 0.0], 0
    )

bins = np.logspace(-5, 3, 65)
rows = [
    [((p, 0.0), f"p = {p:g}", colours[p], styles[p]) for p in POWERS],
    [((1.0, t), rf"$\tau$ = {t:g}", SHOWN[t], DASHES[t]) for t in SHOWN],
]
figure, panels = plt.subplots(
    2, 3, figsize=(10, 5.5), sharex=True, sharey="row", layout="constrained"
)
for row, lines in zip(panels, rows, strict=True):
    for panel, layer in zip(row, LAYERS, strict=True):
        for (power, threshold), label, colour, style in lines:
            accumulators = optax.tree.get(states[power, threshold], "accumulator")
            in_units_of_g = np.ravel(accumulators[layer]["w"]) ** (1 / power)
            share = np.histogram(in_units_of_g, bins)[0] / in_units_of_g.size
            panel.stairs(100 * share, bins, color=colour, ls=style, lw=1.5, label=label)
        panel.set_xscale("log")
        panel.set_title(layer)
    row[0].set_ylabel("weights (%)")
    row[2].legend(frameon=False, fontsize="small", loc="upper left")
panels[0, 0].set_title("layer 1, by power", loc="center")
panels[1, 0].set_title("layer 1, by threshold", loc="center")
for panel in panels[1]:
    panel.set_xlabel("$A^{1/p}$ after both tasks")
plt.show()

print("weights that never moved, of each layer (they are not in the picture):")
for (power, threshold), state in sorted(states.items()):
    free = classp_jax.free_fraction(state, per_leaf=True)
    shares = ", ".join(f"{free[layer]['w']:.1%}" for layer in LAYERS)
    print(f"p = {power:g}, threshold {threshold:<6g} {shares}")

# %% [markdown]
# What the power moves is the right end: with $p = 1$ the weights that mattered stand
# apart from the others. The threshold cuts the left side off: weights that only ever
# get small gradients stay at $A = 0$, untouched, with their large first step still
# before them.
#
# ## What both do to old and new accuracy
#
# Each point has its own best $\alpha$ and $\varepsilon$ from above. Lines are means
# over three new networks on the test digits, shades span them.

# %%
accuracy = {
    pair: at_the_end(classp_jax.classp, *pair, settings)
    for pair, settings in chosen.items()
}  # [network, old or new]

figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
for task, panel in enumerate(panels):
    where = np.arange(len(THRESHOLDS))
    for power in POWERS:
        percent = np.array([accuracy[power, t][:, task] for t in THRESHOLDS])
        panel.fill_between(
            where, percent.min(1), percent.max(1), color=colours[power], alpha=0.2, lw=0
        )
        panel.plot(
            where,
            percent.mean(1),
            styles[power],
            marker="o",
            color=colours[power],
            label=f"p = {power:g}",
        )
    panel.set_xticks(where, [f"{t:g}" for t in THRESHOLDS])
    panel.set_xlabel(r"threshold $\tau$")
    panel.set_title(["old task, after the new one", "new task"][task])
panels[0].set_ylabel("test accuracy (%)")
panels[0].legend(frameon=False, loc="lower left")
plt.show()

for power in POWERS:
    for threshold in THRESHOLDS:
        rate, e = chosen[power, threshold]
        old, new = accuracy[power, threshold].mean(axis=0)
        print(
            f"p = {power:g}, threshold {threshold:<6g} rate {rate:<5g} e {e:<6g} "
            f"old {old:5.1f} %  new {new:5.1f} %"
        )

# %% [markdown]
# Of these powers the lowest keeps most of the old task, and the new one is learned
# about as well. The threshold buys sparse updates rather than accuracy: at the lower
# thresholds the differences go with the $\alpha$ and $\varepsilon$ that were chosen as
# much as with the threshold, at the highest too little moves to learn either task well.
# That is one stream and one small network. What a good threshold is depends on the size
# of the squared gradients, and so on the network, the loss and the batch size. Where
# that is not known, `mask_to_density` takes the share of weights that may move
# instead.
#
# ## What the published class does instead
#
# The PyTorch class published with the paper computes something else under the same
# names. It compares the threshold with a *truth value of a whole tensor*, and it sums
# $|g|$ *whatever the power is*:
#
# $$[\exists i: g_i^2 \ne 0] > \tau: \qquad A \leftarrow A + |g|, \qquad
# w \leftarrow w - \alpha\, \frac{g}{(\varepsilon + A)^{1/p}}$$
#
# `classp_published` reproduces it step for step. The same thresholds in both:

# %%
published = {}
for threshold in (-1.0, 0.0, 0.5, 0.99, 1.0):
    for name, make in (
        ("published", classp_jax.classp_published),
        ("classp", classp_jax.classp),
    ):
        if name == "classp" and threshold < 0:
            continue  # a squared gradient is never negative: classp refuses
        network, _, density = learn_in_turn(make, 1.0, threshold, chosen[1.0, 0.0], 0)
        old, new = accuracies(network, *test)
        published[name, threshold] = network, float(density.mean())
        print(
            f"{name:9} threshold {threshold:5.2f} moves {density.mean():6.1%} of the "
            f"weights in a step; old {old:6.1%} new {new:6.1%}"
        )


def same(one, other):
    """Whether two networks have the same weights, bit for bit."""
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one[0], other[0])))


print(
    "published: thresholds 0 and 0.99 give the same network:",
    same(published["published", 0.0], published["published", 0.99]),
)

# %% [markdown]
# In the class every threshold from 0 up to 1 means the same, and 1 freezes the network.
# A threshold found with it says nothing about `classp`, where 0.5 is far above the
# square of any ordinary gradient.
#
# With $p = 1$ and $\tau = 0$ both rules are the same. With $p = 2$ the class is not
# AdaGrad: it divides by the root of a sum of magnitudes. The first step of a weight is
# then $\alpha\, |g| / \sqrt{\varepsilon + |g|}$, and the same gradients give other
# accumulators:

# %%
g = jnp.array([0.01, 0.1, 1.0])
for name, make in (
    ("classp", classp_jax.classp),
    ("published", classp_jax.classp_published),
):
    optimizer = make(learning_rate=1.0, threshold=0.0, power=2.0, eps=0.0)
    state = optimizer.init(g)
    for count in range(100):
        updates, state = optimizer.update(g, state)
        if count in (0, 99):
            print(f"{name:9} p = 2, step {count + 1:3d}: {updates}")
    print(f"{name:9} p = 2, accumulator: {optax.tree.get(state, 'accumulator')}")

# %% [markdown]
# In `classp` these steps do not depend on the size of the gradients, in the class they
# do. With the same tries for $\alpha$ and $\varepsilon$ as above:

# %%
settings = choose(classp_jax.classp_published, 2.0, 0.5)
accuracy_published = at_the_end(classp_jax.classp_published, 2.0, 0.5, settings)
for name, percent in (
    ("classp, p = 1", accuracy[1.0, 0.0]),
    ("classp, p = 2", accuracy[2.0, 0.0]),
    ("published, p = 2", accuracy_published),
):
    old, new = percent.mean(axis=0)
    print(f"{name:17} old {old:5.1f} %  new {new:5.1f} %")

# %% [markdown]
# Next: keeping what a network learned elsewhere, in
# `03_fine_tune_without_forgetting.py`.
