"""Streams of batches: what an array in memory gives, and no more memory than needed."""

import functools
import itertools
import threading

import faults_devices
import jax
import numpy as np
import pytest

from classp_jax import continual
from classp_jax.continual.train import feed
from tests.continual import forks

pytestmark = pytest.mark.usefixtures("quick_compilation")

FEATURES, CLASSES, SIZE, BATCH = 6, 3, 48, 8
MODEL = (
    lambda key: {"w": 0.3 * jax.random.normal(key, (FEATURES, CLASSES))},
    lambda params, x: x @ params["w"],
)


def _data(tasks=2):
    rng = np.random.default_rng(0)
    for _ in range(tasks):
        y = rng.integers(0, CLASSES, 2 * SIZE)
        x = rng.normal(size=(2 * SIZE, FEATURES)) + rng.normal(size=(3, FEATURES))[y]
        yield x[:SIZE].astype("f4"), y[:SIZE], x[SIZE:].astype("f4"), y[SIZE:]


def _reader(x, y, sizes=(5, 11, 1, 20), end=None):
    def read(rng):
        start = 0
        for size in itertools.cycle(sizes):
            if start >= len(y):
                return
            yield x[start : start + size], y[start : start + size]
            start += size

    return read


def _run(stream, methods, **options):
    options = {"seeds": [0, 1], "epochs": 2, "batch_size": BATCH, "points": 3} | options
    return continual.run(
        stream,
        MODEL,
        methods,
        normalisation=(0.1, 2.0),
        order="stored",
        fisher_examples=SIZE,
        save_weights=True,
        **options,
    )


@pytest.mark.parametrize("steps", [4, 100])
def test_batches_train_as_arrays_do(steps, monkeypatch):
    """Batches of odd sizes, blocks that end within and at points, three methods."""
    monkeypatch.setattr(feed, "BLOCK_BYTES", steps * BATCH * FEATURES * 4)
    data = list(_data())
    methods = ["replay+online-ewc"] if steps == 4 else ["sgd"]
    arrays = _run(continual.stream(data, validation_fraction=0), methods)
    stream = continual.stream_of_batches(
        [(_reader(*d[:2]), *d[2:]) for d in data], examples=SIZE, num_classes=CLASSES
    )
    batches = _run(stream, methods)
    assert [t for t in threading.enumerate() if t.name.startswith("feed")] == []
    for a, b in zip(arrays.runs, batches.runs, strict=True):
        np.testing.assert_equal((a.matrix, a.curve_steps), (b.matrix, b.curve_steps))
    # Fisher information is of the same examples in another order: all of the task's.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        *({k: v.params for k, v in r.params.items()} for r in (arrays, batches)),
    )


def test_each_pass_has_an_order_of_its_own_and_a_seed_the_same_again():
    seen = []

    def read(rng):
        x, y = next(_data())[:2]
        order = rng.permutation(SIZE)
        seen.append(order[:4].tolist())
        yield x[order], y[order]

    x, y = next(_data())[2:]
    stream = continual.stream_of_batches(
        [(read, x, y)] * 2, examples=SIZE, num_classes=CLASSES
    )
    first = _run(stream, ["sgd"], seeds=[3])
    assert len({tuple(order) for order in seen}) == 2 * 2
    again = _run(stream, ["sgd"], seeds=[3])
    assert seen[:4] == seen[4:]
    np.testing.assert_equal(first.runs[0].matrix, again.runs[0].matrix)


def test_only_a_few_blocks_are_read_ahead(monkeypatch):
    """However long a task is: what has been read and not trained stays small."""
    monkeypatch.setattr(feed, "BLOCK_BYTES", BATCH * FEATURES * 4)
    read_so_far, ahead = [0], []

    def read(rng):
        for _ in range(200):
            read_so_far[0] += BATCH
            yield rng.normal(size=(BATCH, FEATURES)).astype("f4"), np.zeros(BATCH, "i4")

    def at_a_point(record):
        ahead.append(read_so_far[0] // BATCH - record["step"])

    x, y = next(_data())[2:]
    stream = continual.stream_of_batches(
        [(read, x, y)], examples=200 * BATCH, num_classes=CLASSES
    )
    _run(stream, ["sgd"], seeds=[0], epochs=1, points=50, on_metrics=at_a_point)
    assert len(ahead) == 50
    assert max(ahead) <= 3


def test_memory_is_that_of_a_few_blocks_however_many_tasks_go_by(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", forks.QUICK)
    # It may grow by 47 MB where 189 MB go by.
    faults_devices.memory_of_batches(tmp_path, tasks=20, steps=80, block=2**20)


def _broken(rng):
    raise OSError("the disk is gone")
    yield


GOOD = next(_data())


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (_reader(GOOD[0][:40], GOOD[1][:40]), "ends after 40 of the 48 examples"),
        (_broken, "task 1: reading its batches fails with OSError: the disk is gone"),
        (_reader(GOOD[0][:, :5], GOOD[1]), r"inputs float32 \[5, 5\] and 5 labels"),
        (_reader(GOOD[0].astype(int), GOOD[1]), "inputs int64"),
        (_reader(GOOD[0], GOOD[1] + 1), "labels from .* there are 3 outputs"),
        (_reader(GOOD[0], GOOD[1] + 0.5), "labels must be integers, a batch has float"),
        (_reader(GOOD[0], np.eye(3)[GOOD[1]]), r"one number for each example, .* 3\]"),
        (lambda rng: iter([GOOD[0]]), r"must be a pair \(x, y\), got ndarray"),
    ],
)
def test_bad_batches_are_one_line(read, words):
    stream = continual.stream_of_batches(
        [(read, *GOOD[2:])], examples=SIZE, num_classes=CLASSES
    )
    with pytest.raises(continual.ContinualError, match=words) as error:
        _run(stream, ["sgd"])
    assert "\n" not in str(error.value)


def test_a_reader_that_ends_the_process_ends_training():
    def read(rng):
        raise SystemExit(3)
        yield

    stream = continual.stream_of_batches(
        [(read, *GOOD[2:])], examples=SIZE, num_classes=CLASSES
    )
    with pytest.raises(SystemExit):
        _run(stream, ["sgd"])


def test_an_empty_batch_changes_nothing():
    def with_empty_ones(rng):
        for x, y in _reader(*GOOD[:2])(rng):
            yield x[:0], y[:0]
            yield x, y

    plain, other = (
        _run(
            continual.stream_of_batches(
                [(read, *GOOD[2:])], examples=SIZE, num_classes=CLASSES
            ),
            ["ewc+classp"],
        )
        for read in (_reader(*GOOD[:2]), with_empty_ones)
    )
    np.testing.assert_equal(plain.runs[0].matrix, other.runs[0].matrix)


def test_what_needs_all_data_is_refused_before_training():
    stream = continual.stream_of_batches(
        [(_broken, *GOOD[2:])], examples=SIZE, num_classes=CLASSES
    )
    with pytest.raises(continual.ContinualError, match="'joint' needs the data of all"):
        _run(stream, ["joint"])
    with pytest.raises(continual.ContinualError, match="score_training needs all"):
        _run(stream, ["sgd"], score_training=True)
    with pytest.raises(continual.ContinualError, match="need normalisation"):
        continual.run(stream, MODEL, ["sgd"], batch_size=BATCH)
    with pytest.raises(continual.ContinualError, match="no validation examples"):
        continual.tune(stream, MODEL, ["sgd"], normalisation=(0.0, 1.0))
    for arguments, words in {
        (48, 2): "label 2 is outside the 2 outputs",
        (0, 3): "examples must be >= 1",
        (3.5, 3): "examples must be >= 1 for each task, whole numbers, got 3.5",
    }.items():
        with pytest.raises(continual.ContinualError, match=words):
            continual.stream_of_batches(
                [(_broken, *GOOD[2:])], examples=arguments[0], num_classes=arguments[1]
            )


def test_an_interrupted_run_reads_on_to_the_same_bits(tmp_path, monkeypatch):
    """Interrupted within a task and within a block."""
    monkeypatch.setattr(feed, "BLOCK_BYTES", 4 * BATCH * FEATURES * 4)
    stream = continual.stream_of_batches(
        [(_reader(*d[:2]), *d[2:]) for d in _data()], examples=SIZE, num_classes=CLASSES
    )
    expected = _run(stream, ["replay+online-ewc"])
    calls = itertools.count()

    def interrupt(record):
        if next(calls) == 3:
            raise InterruptedError

    options = {"folder": tmp_path, "checkpoint_every": 3, "resume": True}
    with pytest.raises(InterruptedError):
        _run(stream, ["replay+online-ewc"], on_metrics=interrupt, **options)
    assert list((tmp_path / "checkpoints").rglob("seed-*"))
    found = _run(stream, ["replay+online-ewc"], **options)
    for key, trained in expected.params.items():
        for a, b in zip(
            jax.tree.leaves(trained), jax.tree.leaves(found.params[key]), strict=True
        ):
            assert np.array_equal(_numbers(a), _numbers(b))
    matrices = [np.array([r.matrix for r in x.runs]) for x in (found, expected)]
    np.testing.assert_equal(matrices[0], matrices[1])


def _numbers(leaf):
    is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)
