"""16-bit training against a plain loop, and batches that hold NaN."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import classp_jax
from classp_jax import continual

pytestmark = pytest.mark.usefixtures("quick_compilation")

FEATURES, CLASSES, STEPS, BATCH = 6, 3, 12, 8
START = 0.3 * np.random.default_rng(9).normal(size=(FEATURES, CLASSES))
SETTINGS: Any = {"learning_rate": 0.1, "eps": 0.05, "threshold": 1e-4, "power": 1.5}


def _data(size=STEPS * BATCH, stretch=1.0, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, size)
    x = rng.normal(size=(size, FEATURES)) + rng.normal(size=(CLASSES, FEATURES))[y]
    return (stretch * x).astype(np.float32), y


def _run(stream, methods, seen=None, **options):
    def apply(params, x):
        if seen is not None:
            seen.append((params["w"].dtype, x.dtype))
        return x @ params["w"]

    return continual.run(
        stream,
        (lambda key: {"w": jnp.asarray(START, jnp.float32)}, apply),
        methods,
        seeds=[0],
        epochs=1,
        batch_size=BATCH,
        points=1,
        order="stored",
        normalisation=(0.0, 1.0),
        save_weights=True,
        **options,
    )


def _loop(x, y, dtype):
    """Loss scaling written out: the optimizer gets plain float32 gradients."""
    tx: Any = classp_jax.classp(**SETTINGS)
    w, scale, skipped = jnp.asarray(START, jnp.float32), 2.0**15, 0
    state = tx.init(w)

    @jax.jit
    def gradient(w, x, y, scale):
        def loss(narrow):
            logits = (x.astype(dtype) @ narrow).astype(jnp.float32)
            own = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)
            return -scale * jnp.mean(own)

        return jax.grad(loss)(w.astype(dtype)).astype(jnp.float32) / scale

    for start in range(0, len(y), BATCH):
        part = slice(start, start + BATCH)
        g = gradient(w, jnp.asarray(x[part]), jnp.asarray(y[part]), jnp.float32(scale))
        if not np.all(np.isfinite(g)):
            scale, skipped = scale / 2, skipped + 1
            continue
        updates, state = tx.update(g, state)
        w = w + updates
    return w, state, skipped


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float32_weights_and_16_bit_computation(dtype):
    x, y = _data()
    seen = []
    stream = continual.stream([(x, y, x, y)], validation_fraction=0)
    options = {"settings": {"classp": SETTINGS}, "compute_dtype": dtype}
    results = _run(stream, ["classp"], seen, **options)
    trained, (run,) = results.params["classp", 0], results.runs
    assert (jnp.dtype(dtype), jnp.dtype(dtype)) in seen
    w, state, skipped = _loop(x, y, dtype)
    assert trained.params["w"].dtype == jnp.float32
    assert run.skipped_steps == skipped == 0
    np.testing.assert_allclose(trained.params["w"], w, rtol=1e-5, atol=1e-6)
    accumulator = trained.state.optimizer.accumulator["w"]
    np.testing.assert_allclose(accumulator, state.accumulator, rtol=1e-5, atol=1e-7)
    # It matters: in float32 other weights come out, and the threshold masks some.
    assert 0 < run.update_density[0] < 1
    wide = _run(stream, ["classp"], settings={"classp": SETTINGS})
    difference = np.abs(trained.params["w"] - wide.params["classp", 0].params["w"])
    assert 1e-5 < difference.max() < 1e-2


def test_a_step_that_overflows_changes_nothing_but_the_scale():
    x, y = _data(stretch=60.0)
    stream = continual.stream([(x, y, x, y)], validation_fraction=0)
    options = {"settings": {"classp": SETTINGS}, "compute_dtype": "float16"}
    results = _run(stream, ["classp"], **options)
    trained, (run,) = results.params["classp", 0], results.runs
    w, state, skipped = _loop(x, y, "float16")
    assert 0 < skipped < STEPS
    assert run.skipped_steps == skipped
    assert not run.diverged
    np.testing.assert_allclose(trained.params["w"], w, rtol=1e-4, atol=1e-5)
    accumulator = trained.state.optimizer.accumulator["w"]
    np.testing.assert_allclose(accumulator, state.accumulator, rtol=1e-4)


def test_fisher_information_in_float16_is_that_of_float32():
    x, y = _data()
    stream = continual.stream([(x, y, x, y)] * 2, validation_fraction=0)
    found = [
        _run(stream, ["ewc"], compute_dtype=dtype, fisher_examples=32)
        for dtype in ("float16", "float32")
    ]
    for narrow, wide in zip(
        *(jax.tree.leaves(r.params["ewc", 0].state.additions) for r in found),
        strict=True,
    ):
        np.testing.assert_allclose(narrow, wide, rtol=0.02, atol=2e-3)


def _streams(broken):
    """A task whose third batch is broken, the same without it, and one after it."""
    x, y = _data()
    spoilt = x.copy()
    spoilt[2 * BATCH : 3 * BATCH] = broken
    rest = np.r_[: 2 * BATCH, 3 * BATCH : len(y)]
    for inputs, labels in ((spoilt, y), (x[rest], y[rest])):
        reads = [
            lambda rng, x=inputs, y=labels: [(x, y)],
            lambda rng: [_data(seed=1)],
        ]
        yield continual.stream_of_batches(
            [(read, *_data(seed=2)) for read in reads],
            examples=[len(labels), len(y)],
            num_classes=CLASSES,
        )


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_broken_batch_is_skipped_and_counted(broken):
    method = "ewc+classp"
    spoilt, without = (
        _run(stream, [method], nonfinite="skip", fisher_examples=16)
        for stream in _streams(broken)
    )
    assert [r.runs[0].skipped_steps for r in (spoilt, without)] == [1, 0]
    assert not spoilt.runs[0].diverged
    a, b = (r.params[method, 0] for r in (spoilt, without))
    np.testing.assert_array_equal(a.params["w"], b.params["w"])
    for r, s in zip(
        jax.tree.leaves(a.state.optimizer),
        jax.tree.leaves(b.state.optimizer),
        strict=True,
    ):
        np.testing.assert_array_equal(r, s)
    np.testing.assert_allclose(
        spoilt.runs[0].online_accuracy, without.runs[0].online_accuracy, rtol=1e-6
    )


def test_or_the_run_stops_there():
    spoilt, _ = _streams(np.nan)
    (run,) = _run(spoilt, ["sgd"]).runs
    assert run.diverged
    assert run.skipped_steps == 0
    assert np.all(np.isnan(run.matrix[1:]))


def test_a_run_that_can_take_no_step_has_diverged():
    stream = continual.stream_of_batches(
        [
            (
                lambda rng: [(np.full((16, FEATURES), np.nan), np.arange(16) % 2)],
                *_data(),
            )
        ],
        examples=16,
        num_classes=CLASSES,
    )
    (run,) = _run(stream, ["sgd"], nonfinite="skip").runs
    assert run.diverged
    assert run.skipped_steps == 2
    # As is the loss scale of float16 where the network itself overflows.
    (run,) = _run(stream, ["sgd"], compute_dtype="float16").runs
    assert run.diverged
