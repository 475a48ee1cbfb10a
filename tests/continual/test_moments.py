"""Inputs standardised by running moments, against sums in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from classp_jax import continual
from classp_jax.continual.train.moments import Moments

pytestmark = pytest.mark.usefixtures("quick_compilation")

FEATURES, CLASSES, BATCH, RATE = 5, 3, 8, 0.1
START = 0.3 * np.random.default_rng(9).normal(size=(FEATURES, CLASSES))


def _task(seed, shift):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, 64)
    x = rng.normal(size=(64, FEATURES)) + rng.normal(size=(CLASSES, FEATURES))[y]
    x = shift + np.geomspace(0.1, 30, FEATURES) * x
    x[:, 2] = 0.1  # Never varies.
    return x.astype(np.float32), y


def _by_hand(tasks):
    """SGD on inputs by the moments of all examples so far; its accuracies."""
    w, seen, matrix = START.copy(), np.zeros((0, FEATURES)), []
    for k, (x, y) in enumerate(tasks):
        for start in range(0, len(x), BATCH):
            seen = np.concatenate([seen, x[start : start + BATCH].astype(np.float64)])
            shown = _standardised(seen[-BATCH:], seen)
            logits = shown @ w
            p = np.exp(logits - logits.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            p[np.arange(BATCH), y[start : start + BATCH]] -= 1
            w -= RATE * shown.T @ p / BATCH
        answers = [
            np.argmax(_standardised(a.astype(np.float64), seen) @ w, axis=1) == b
            for a, b in tasks[: k + 1]
        ]
        matrix.append([float(np.mean(right)) for right in answers])
    return w, matrix


def _standardised(x, seen):
    deviation = np.std(seen, axis=0)
    return (x - np.mean(seen, axis=0)) / np.where(deviation > 1e-5, deviation, 1)


def test_training_and_evaluation_use_the_moments_of_all_examples_so_far():
    tasks = [_task(0, 2.0), _task(1, -5.0)]
    found: Any = continual.run(
        continual.stream([(x, y, x, y) for x, y in tasks], validation_fraction=0.0),
        (
            lambda key: {"w": jnp.asarray(START, jnp.float32)},
            lambda params, x: x @ params["w"],
        ),
        ["sgd"],
        seeds=[0],
        settings={"sgd": {"learning_rate": RATE}},
        epochs=1,
        batch_size=BATCH,
        points=2,
        order="stored",
        moments="running",
        save_weights=True,
    )
    w, matrix = _by_hand(tasks)
    np.testing.assert_allclose(found.params["sgd", 0].params["w"], w, atol=2e-5)
    for row, wanted in zip(found.runs[0].matrix[1:], matrix, strict=True):
        np.testing.assert_allclose(row[: len(wanted)], wanted, atol=1e-6)
    assert found.configuration["training"]["moments"] == "running"
    # Mean and sum of squares of each number, their count, and that of tasks.
    wanted = 4 * (2 * FEATURES + 2) / START.size
    assert found.runs[0].state_bytes_per_parameter == pytest.approx(wanted)


def test_moments_of_many_batches_far_from_zero_keep_their_digits():
    rng = np.random.default_rng(3)
    batches = 1000 + rng.normal(size=(300, 16, 4)).astype(np.float32)
    moments = Moments.none((4,))
    many = jnp.asarray(batches)
    moments, _ = jax.lax.scan(lambda m, x: (m.after(x), None), moments, many)
    every = batches.reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(moments.mean, every.mean(0), rtol=1e-6)
    wanted = (every[:8] - every.mean(0)) / every.std(0)
    shown = moments.standardised(jnp.asarray(batches[0, :8]))
    np.testing.assert_allclose(shown, wanted, atol=2e-3)
    assert float(moments.count) == 4800


def test_texts_have_no_moments():
    tokens, y = np.ones((16, 3), np.int32), np.arange(16) % 2
    stream = continual.stream([(tokens, y, tokens, y)])
    with pytest.raises(continual.ContinualError, match="images and vectors, not text"):
        continual.run(stream, "transformer", ["sgd"], seeds=[0], moments="running")
