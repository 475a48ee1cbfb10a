"""What the examples share: real handwritten digits as tasks, and a small network."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits


class Task(NamedTuple):
    """Images ``[n, 64]`` with pixels from 0 to 1, and their labels ``[n]``."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def permuted_digits(number: int) -> list[Task]:
    """The digits as they are, then with their pixels in another order for each task."""
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(labels))
    x = (np.asarray(images)[order] / 16).astype(np.float32)
    y = np.asarray(labels)[order].astype(np.int32)
    pixels = [np.arange(64)] + [rng.permutation(64) for _ in range(number - 1)]
    return [Task(x[:1400, p], y[:1400], x[1400:, p], y[1400:]) for p in pixels]


def batches(task: Task, passes: int, size: int = 20) -> Iterator[Any]:
    """Batches ``(x, y)`` of the training images, in a new order for each pass."""
    rng = np.random.default_rng(1)
    for _ in range(passes):
        order = rng.permutation(len(task.y_train))
        for chosen in order[: len(order) // size * size].reshape(-1, size):
            yield task.x_train[chosen], task.y_train[chosen]


def init_network() -> dict[str, Any]:
    """Weights of a network 64-128-128-10."""
    rng = np.random.default_rng(2)

    def layer(m: int, n: int) -> dict[str, jax.Array]:
        kernel = rng.normal(scale=(2 / m) ** 0.5, size=(m, n))
        return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(n)}

    return {"first": layer(64, 128), "second": layer(128, 128), "head": layer(128, 10)}


@jax.jit
def logits(params: Any, x: Any) -> jax.Array:
    """The network's outputs, ``[n, 10]``."""
    for name in ("first", "second"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def loss(params: Any, x: Any, y: Any) -> jax.Array:
    """The mean cross-entropy of a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


def accuracy(params: Any, task: Task) -> float:
    """The share of a task's test images that the network reads correctly."""
    return float(
        np.mean(np.argmax(logits(params, task.x_test), axis=-1) == task.y_test)
    )


@functools.partial(jax.jit, static_argnames="optimizer")
def step(optimizer: Any, params: Any, state: Any, x: Any, y: Any) -> tuple[Any, Any]:
    """The step of plain_jax.py for any optimizer: new parameters and new state."""
    updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
    return optax.apply_updates(params, updates), state
