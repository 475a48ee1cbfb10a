# %% [markdown]
# # Fine-tune without forgetting
#
# Somebody else has trained a network, and you have new data. Fine-tuning on them
# teaches the network the new and costs it the old. Here is how to keep both, in four
# steps:
#
# 1. put a brake on the optimizer that you would have used: `classp_jax.protect`;
# 2. measure on old data, once, which weights matter: `accumulate_importance`;
# 3. save that beside the checkpoint, so that nobody needs the old data again;
# 4. fine-tune as ever.
#
# The data come with scikit-learn, and the network is written in Flax NNX.

# %%
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import classp_jax
from classp_jax import finetune

# %% [markdown]
# ## Old data, new data, a pretrained network
#
# Old are scikit-learn's handwritten digits; new are the same digits turned by a
# quarter.

# %%
images, labels = load_digits(return_X_y=True)
images = np.asarray(images / 16, np.float32)  # [image, pixel], from 0 to 1
labels = np.asarray(labels, np.int32)
turned = np.rot90(images.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)

order = np.random.default_rng(0).permutation(len(images))
for_test, for_training = np.split(order, [360])
OLD, NEW = images, turned


class Network(nnx.Module):
    """A network 64-64-10."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.hidden(x)))


def loss(model, batch):
    """The mean cross-entropy of a batch."""
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def batches(data, passes, size=40):
    """Shuffled batches of the training images."""
    rng = np.random.default_rng(1)
    for _ in range(passes):
        shuffled = rng.permutation(for_training)
        for chosen in shuffled[: len(shuffled) // size * size].reshape(-1, size):
            yield data[chosen], labels[chosen]


def accuracy(model, data):
    """The share of test images that are read correctly, in %."""
    guesses = model(data[for_test]).argmax(axis=-1)
    return 100 * float(jnp.mean(guesses == labels[for_test]))


@nnx.jit
def step(model, optimizer, batch):
    """One step of any optimizer."""
    optimizer.update(model, nnx.grad(loss)(model, batch))


model = Network(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adamw(4e-3), wrt=nnx.Param)
for batch in batches(OLD, passes=8):
    step(model, optimizer, batch)
pretrained = model
before = accuracy(pretrained, OLD), accuracy(pretrained, NEW)
print(f"pretrained: old {before[0]:.1f} %, new {before[1]:.1f} %")

# %% [markdown]
# ## Which weights matter to the old data
#
# `finetune.gradients` takes the gradients of a loss on batches; `accumulate_importance`
# adds up their sizes, one sum per weight, and moves nothing. `per_example=True` takes
# the gradient of every image by itself: in the mean of a batch images cancel, and what
# cancels is not counted.

# %%
params = nnx.state(pretrained, nnx.Param)


def protected(rate, eps):
    """AdamW with the brake; what the old data says is all that counts."""
    return classp_jax.protect(optax.adamw(rate), eps=eps, frozen=True)


# Its numbers lie in its state: one compiled step will do for all settings.
tx = optax.inject_hyperparams(protected)(rate=1e-2, eps=0.1)
old_gradients = finetune.gradients(
    loss, pretrained, batches(OLD, passes=1), per_example=True
)
state = classp_jax.accumulate_importance(
    tx, tx.init(params), params, old_gradients, per_example=True
)
folder = tempfile.TemporaryDirectory()
file = pathlib.Path(folder.name) / "digits.importance.safetensors"
finetune.save_importance(file, state, params)
print(f"{file.stat().st_size} bytes for {file.name}")

sums = np.concatenate(
    [a.ravel() for a in jax.tree.leaves(classp_jax.accumulators(state))]
)
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
axis.hist(np.log10(sums + 1e-6), bins=60, color="#0072B2")
axis.set_xlabel("importance of a weight (power of ten)")
axis.set_ylabel("weights")
plt.show()
print(f"{np.mean(sums == 0):.0%} of the weights do not matter at all")

# %% [markdown]
# ## Fine-tuning
#
# From here on the old data are gone: there is the checkpoint and the file beside it.
# Each optimizer gets the same number of settings, and every run is drawn, so that it
# shows what each can do at best. AdamW has a learning rate only; along its runs it is
# looked at after every pass, so that stopping early is among what it may do.


# %%
def fine_tune(tx, importance=None, passes=4, **settings):
    """Old and new accuracy after each pass."""
    model = nnx.clone(pretrained)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for name, number in settings.items():
        optimizer.opt_state.hyperparams[name][...] = number
    if importance is not None:
        optimizer.opt_state = finetune.load_importance(importance, optimizer.opt_state)
    found = []
    for k, batch in enumerate(batches(NEW, passes), start=1):
        step(model, optimizer, batch)
        if k % (len(for_training) // 40) == 0:
            found.append((accuracy(model, OLD), accuracy(model, NEW)))
    return np.array(found)  # [pass, old or new]


adamw = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)
curves = {
    "AdamW": [
        fine_tune(adamw, learning_rate=rate) for rate in (5e-4, 1e-3, 2e-3, 5e-3)
    ],
    "protect(AdamW)": [
        fine_tune(tx, file, rate=rate, eps=eps)
        for rate in (5e-3, 2e-2)
        for eps in (0.03, 0.3)
    ],
}

# %%
colours = {"AdamW": "#D55E00", "protect(AdamW)": "#0072B2"}  # two of Okabe and Ito's
figure, axis = plt.subplots(figsize=(6, 5), layout="constrained")
for name, runs in curves.items():
    for k, run in enumerate(runs):
        label = name if k == 0 else None
        axis.plot(run[:, 1], run[:, 0], "o-", color=colours[name], ms=4, label=label)
axis.axhline(before[0], color="black", lw=0.8, ls=":")
axis.set_xlabel("new data: test accuracy (%)")
axis.set_ylabel("old data: test accuracy (%)")
axis.legend(frameon=False, loc="lower left")
plt.show()

best = {}
for name, runs in curves.items():
    points = np.concatenate(runs)
    best[name] = points[points.mean(axis=1).argmax()]
    old, new = best[name]
    print(f"{name:15} best mean of old and new: old {old:.1f} %, new {new:.1f} %")

# %% [markdown]
# The dotted line is the accuracy on old data before fine-tuning; every line is a run,
# every dot a pass. AdamW loses the old data before it has learned the new. With the
# brake the network learns most of the new while it stays near the dotted line.
#
# ## What to take home
#
# - `eps` against the importance decides how much is protected: tune it like the
#   learning rate, which may be higher than without the brake.
# - No old data? `finetune.importance_from_magnitude(params)` and
#   `finetune.put_importance` need none, and are worth less.
# - The study with transformers, against EWC, LoRA, replay and others, is in
#   `docs/finetuning.md`.

# %%
folder.cleanup()
