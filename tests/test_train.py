"""The training loop, on real digits: against a plain loop, seed by seed, bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from classp_jax.continual import learner as learner_module
from classp_jax.continual.learner import Buffer, Training
from classp_jax.continual.methods import parse_method, resolve_settings
from classp_jax.continual.metrics import average_accuracy
from classp_jax.continual.models import make_model
from classp_jax.continual.sources import load_source
from classp_jax.continual.streams import Split, make_stream
from classp_jax.continual.train import train

SHORT = Training(epochs=(1,), batch_size=32, points_per_task=2)


@pytest.fixture(scope="module")
def streams():
    return [
        make_stream(
            "permuted",
            [load_source("digits", seed=s)],
            num_tasks=3,
            seed=s,
            max_train=640,
        )
        for s in (0, 1)
    ]


@pytest.fixture(scope="module")
def model():
    return make_model("mlp", (8, 8, 1), 10, hidden=(32,))


def _settings(name, **changes):
    method = parse_method(name)
    return method, resolve_settings(method) | changes


def test_equals_a_plain_loop(streams, model):
    method, settings = _settings("sgd", learning_rate=0.1)
    ((run,),) = train(method, [settings], model, streams[:1], [3], SHORT)

    # The same training, written out: numpy data, one jitted step, a Python loop.
    stream = streams[0]
    init_key, _ = jax.random.split(jax.random.key(3))
    params = model.init(init_key)
    pixels = stream.tasks[0].train.x.astype(np.float64)

    def inputs(x):
        return jnp.asarray(((x - pixels.mean()) / pixels.std()).astype(np.float32))

    @jax.jit
    def step(params, x, y):
        def loss(params):
            logits = model.apply(params, x, None)
            return jnp.mean(
                -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)
            )

        return jax.tree.map(lambda w, g: w - 0.1 * g, params, jax.grad(loss)(params))

    def accuracies():
        return [
            np.mean(
                np.argmax(model.apply(params, inputs(t.test.x), None), 1) == t.test.y
            )
            for t in stream.tasks
        ]

    matrix = [accuracies()]
    for k, task in enumerate(stream.tasks):
        size = len(task.train.y)
        order = np.random.default_rng([3, k]).permutation(size)
        for batch in order[: size // 32 * 32].reshape(-1, 32):
            x, y = inputs(task.train.x[batch]), jnp.asarray(task.train.y[batch])
            params = step(params, x, y)
        matrix.append(accuracies())
    # One test image in 360 may fall to the other side of a rounding error.
    np.testing.assert_allclose(run.matrix, matrix, atol=1.01 / 360)


def test_runs_together_equal_runs_alone(streams, model):
    method, settings = _settings("replay+ewc+classp", strength=1.0)
    other = settings | {"learning_rate": settings["learning_rate"] / 2}
    together = train(method, [settings, other], model, streams, [0, 1], SHORT)
    for i, setting, seed in ((0, settings, 0), (1, other, 1)):
        ((alone,),) = train(method, [setting], model, [streams[seed]], [seed], SHORT)
        run = together[i][seed]
        np.testing.assert_allclose(run.matrix, alone.matrix, atol=4.01 / 360)
        assert run.settings == setting
        assert run.seed == seed
    assert together[0][0].matrix != together[1][0].matrix
    assert together[0][0].matrix != together[0][1].matrix


def test_same_configuration_same_bits(streams, model):
    method, settings = _settings("replay+classp")
    first, second = (
        train(method, [settings], model, streams, [0, 1], SHORT) for _ in range(2)
    )
    for a, b in zip(first[0], second[0], strict=True):
        assert a.matrix == b.matrix
        assert a.curve == b.curve


def test_traced_once_for_all_tasks(streams, model):
    def count(tasks):
        traces = []

        def counted(params, x, key):
            traces.append(x.shape)
            return model.apply(params, x, key)

        method, settings = _settings("ewc+classp")
        stream = streams[0]._replace(tasks=streams[0].tasks[:tasks])
        how = SHORT._replace(fisher_examples=50)
        model_ = model._replace(apply=counted)
        train(method, [settings], model_, [stream], [0], how)
        return len(traces)

    assert 0 < count(1) == count(3)


def test_every_task_s_fisher_enters(streams, model, monkeypatch):
    """The trap of an importance that was baked in when the step was compiled."""
    seen = []
    consolidate = learner_module.regularizers.consolidate

    def spy(state, params, fisher=None):
        state = consolidate(state, params, fisher=fisher)
        total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(fisher))
        jax.debug.callback(lambda t: seen.append(float(t)), total)
        return state

    monkeypatch.setattr(learner_module.regularizers, "consolidate", spy)
    method, settings = _settings("ewc")
    train(method, [settings], model, streams[:1], [0], SHORT)
    jax.effects_barrier()
    assert len(seen) == 3
    assert len(set(seen)) == 3


def test_learns_and_forgets(streams, model):
    """Eight passes of SGD learn each task; what EWC or CLASSP keep, SGD forgets."""
    how = Training(epochs=(8,), batch_size=32, points_per_task=1)
    scores = {}
    for name in ("sgd", "classp", "joint"):
        method, settings = _settings(name)
        (runs,) = train(method, [settings], model, streams, [0, 1], how)
        scores[name] = np.mean([average_accuracy(r.matrix) for r in runs])
        if name != "joint":
            assert np.mean([np.diag(np.array(r.matrix)[1:]) for r in runs]) > 0.75
    assert scores["sgd"] < scores["classp"] < scores["joint"]


def test_divergence_is_marked(streams, model):
    method, settings = _settings("sgd")
    bad = settings | {"learning_rate": 1e30}
    ((good,), (run,)) = train(method, [settings, bad], model, streams[:1], [0], SHORT)
    assert not good.diverged
    assert np.all(np.isfinite(good.matrix))
    assert run.diverged
    assert np.all(np.isnan(run.matrix[1:]))


def test_state_bytes_are_those_of_the_live_state(streams, model):
    def measured(name):
        method, settings = _settings(name)
        stream = streams[0]._replace(tasks=streams[0].tasks[:1])
        # Optax's Adam itself mixes dtypes.
        with jax.numpy_dtype_promotion("standard"):
            ((run,),) = train(method, [settings], model, [stream], [0], SHORT)
        return run.state_bytes_per_parameter

    assert measured("classp") == pytest.approx(4, abs=0.02)
    assert measured("adam") == pytest.approx(8, abs=0.02)
    parameters = 64 * 32 + 32 + 32 * 10 + 10
    expected = 200 * (64 + 4 + 4) / parameters
    assert measured("replay") == pytest.approx(expected, abs=0.02)


def test_reservoir_holds_a_uniform_sample():
    size, seen, batch = 20, 200, 8

    def fill(key):
        buffer = Buffer(
            x=jnp.zeros((size, 1)),
            y=jnp.full(size, -1),
            task=jnp.zeros(size, jnp.int32),
            seen=jnp.zeros([], jnp.int32),
        )

        def body(buffer, item):
            i, key = item
            y = i * batch + jnp.arange(batch, dtype=jnp.int32)
            x = y[:, None].astype(jnp.float32)
            return learner_module._store(buffer, x, y, y * 0, key), None

        items = (
            jnp.arange(seen // batch, dtype=jnp.int32),
            jax.random.split(key, seen // batch),
        )
        return jax.lax.scan(body, buffer, items)[0]

    buffers = jax.jit(jax.vmap(fill))(jax.random.split(jax.random.key(0), 2000))
    kept = np.asarray(buffers.y)
    np.testing.assert_array_equal(kept, np.asarray(buffers.x)[..., 0])
    assert kept.min() >= 0
    counts = np.bincount(kept.ravel(), minlength=seen) / len(kept)
    # Each of 200 examples is kept with probability 1/10; 5 standard errors either way.
    assert np.all(np.abs(counts - size / seen) < 5 * np.sqrt(0.1 * 0.9 / 2000) + 0.005)


def test_replay_uses_stored_labels_of_their_own_task(model):
    stream = make_stream(
        "split",
        [load_source("digits")],
        num_tasks=5,
        scenario="task-incremental",
        seed=0,
    )
    method, settings = _settings("replay")
    how = Training(epochs=(3,), batch_size=16, points_per_task=1)
    ((run,),) = train(method, [settings], model, [stream], [0], how)
    # Two classes a task, masked to these: chance is 1/2 and replay keeps all tasks.
    assert np.min(run.matrix[-1]) > 0.85


def test_convolution_in_a_python_loop_equals_the_compiled_loop(streams, monkeypatch):
    cnn = make_model("cnn", (8, 8, 1), 10)
    stream = streams[0]._replace(tasks=streams[0].tasks[:2])
    how = SHORT._replace(batch_size=160, points_per_task=1)
    method, settings = _settings("classp")
    ((plain,),) = train(method, [settings], cnn, [stream], [0], how)
    looped_model = cnn._replace(convolutional=False)
    ((looped,),) = train(method, [settings], looped_model, [stream], [0], how)
    np.testing.assert_allclose(plain.matrix, looped.matrix, atol=4.01 / 360)


def test_seeds_with_other_numbers_of_steps_still_train(streams, model):
    """As when classes are divided by seed: such runs cannot train together."""
    task = streams[1].tasks[0]
    fewer = task._replace(train=Split(task.train.x[:320], task.train.y[:320]))
    ragged = [
        streams[0]._replace(tasks=streams[0].tasks[:1]),
        streams[1]._replace(tasks=(fewer,)),
    ]
    method, settings = _settings("sgd")
    (runs,) = train(method, [settings], model, ragged, [0, 1], SHORT)
    assert [r.seed for r in runs] == [0, 1]
    assert [r.curve_steps[-1] for r in runs] == [20, 10]
    assert not any(r.diverged for r in runs)


def test_one_stream_a_seed(streams, model):
    method, settings = _settings("sgd")
    with pytest.raises(ValueError, match="one stream for each seed"):
        train(method, [settings], model, streams, [0], SHORT)
