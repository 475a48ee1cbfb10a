"""The training loop, on real digits: against a plain loop, seed by seed, bit by bit."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from classp_jax.continual import learner as learner_module
from classp_jax.continual import train as train_module
from classp_jax.continual.learner import Buffer, Training
from classp_jax.continual.methods import parse_method, resolve_settings
from classp_jax.continual.metrics import average_accuracy
from classp_jax.continual.models import make_model
from classp_jax.continual.sources import load_source
from classp_jax.continual.streams import Split, make_stream, stream_from_arrays
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


# ---- settings that change at a boundary, stop rules and the like: plain loops --------

BATCH = 16
# Otherwise seeds that train together share the first one's mean and deviation.
PIXELS = (0.3, 0.4)
TWO_PASSES = Training(
    epochs=(2,), batch_size=BATCH, points_per_task=1, normalisation=PIXELS
)


@pytest.fixture(scope="module")
def short():
    """Two tasks of six batches a pass, for two seeds."""
    return [
        make_stream(
            "permuted",
            [load_source("digits", seed=s)],
            num_tasks=2,
            seed=s,
            max_train=6 * BATCH,
        )
        for s in (0, 1)
    ]


@pytest.fixture(scope="module")
def tiny():
    return make_model("mlp", (8, 8, 1), 10, hidden=(8,))


@pytest.fixture
def weights(monkeypatch):
    """``weights(index)``: those of a run when accuracy was last taken."""
    seen = []
    correct = train_module._correct

    def spy(params, *args, **kwargs):
        seen.append(jax.tree.map(np.array, params))
        return correct(params, *args, **kwargs)

    monkeypatch.setattr(train_module, "_correct", spy)
    return lambda index=...: jax.tree.map(lambda leaf: leaf[index], seen[-1])


@functools.cache
def _plain_functions(model):
    def loss(params, x, y):
        logits = jax.nn.log_softmax(model.apply(params, x, None))
        return jnp.mean(-jnp.take_along_axis(logits, y[:, None], axis=1))

    return (
        jax.jit(jax.value_and_grad(loss)),
        jax.jit(lambda params, x: model.apply(params, x, None)),
    )


class PlainLoop:
    """Training written out: numpy data, one jitted gradient, Python loops."""

    def __init__(self, model, stream, seed, *, stored=False, unit=255):
        self.model, self.stream = model, stream
        self.seed, self.stored = seed, stored
        key, self.key = jax.random.split(jax.random.key(seed))
        self.params = model.init(key)
        self.mean, self.deviation = unit * PIXELS[0], unit * PIXELS[1]
        self.loss_and_gradient, self.logits = _plain_functions(model)

    def inputs(self, x):
        return jnp.asarray(((x - self.mean) / self.deviation).astype(np.float32))

    def passes(self, k, epochs):
        """The batches of each pass over a task."""
        x, y = self.stream.tasks[k].train
        rng = np.random.default_rng([self.seed, k])
        for _ in range(epochs):
            order = np.arange(len(y)) if self.stored else rng.permutation(len(y))
            batches = order[: len(y) // BATCH * BATCH].reshape(-1, BATCH)
            yield [(self.inputs(x[b]), jnp.asarray(y[b])) for b in batches]

    def train(self, update, *, epochs=2, until=None, after_pass=None):
        """Takes ``update(k, params, gradients)`` for every step; the steps a task."""
        steps = []
        for k in range(len(self.stream.tasks)):
            steps.append(0)
            for number, batches in enumerate(self.passes(k, epochs)):
                value = np.inf
                for x, y in batches:
                    value, gradients = self.loss_and_gradient(self.params, x, y)
                    self.params = update(k, self.params, gradients)
                    steps[-1] += 1
                if after_pass is not None:
                    after_pass(k, number, batches)
                if until is not None and value < until[min(k, len(until) - 1)]:
                    break
        return steps

    def accuracies(self, part):
        return [
            np.mean(
                np.argmax(self.logits(self.params, self.inputs(split.x)), 1) == split.y
            )
            for split in (getattr(task, part) for task in self.stream.tasks)
        ]


def _descent(rate):
    """SGD with a rate of ``rate(k)`` in task k."""

    def update(k, params, gradients):
        return jax.tree.map(lambda w, g: w - rate(k) * g, params, gradients)

    return update


def _assert_same_weights(found, expected, rtol=2e-4):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=2e-6)


def test_second_rate_switches_at_the_boundary(short, tiny, weights):
    rates = [(0.3, 0.02), (0.1, 0.2)]
    settings = [{"learning_rate": a, "second_rate": b} for a, b in rates]
    method = parse_method("second-rate+sgd")
    rows = train(method, settings, tiny, short, [0, 1], TWO_PASSES)
    together = weights
    for (i, rate), seed in itertools.product(enumerate(rates), (0, 1)):
        loop = PlainLoop(tiny, short[seed], seed)
        loop.train(_descent(lambda k, rate=rate: rate[k]))
        _assert_same_weights(together(2 * i + seed), loop.params)
        run = rows[i][seed]
        expected = loop.accuracies("test")
        np.testing.assert_allclose(run.matrix[-1], expected, atol=1.01 / 360)
        assert run.told_boundary
        assert run.settings == settings[i]
    last = together(3)
    ((alone,),) = train(method, settings[1:], tiny, short[1:], [1], TWO_PASSES)
    _assert_same_weights(weights(), last)
    np.testing.assert_allclose(alone.matrix, rows[1][1].matrix, atol=1.01 / 360)


def test_reset_begins_every_task_with_a_fresh_state(short, tiny, weights):
    method, settings = _settings(
        "reset+adagrad", learning_rate=0.1, initial_accumulator=0.5
    )
    train(method, [settings], tiny, short, [0, 1], TWO_PASSES)

    def adagrad():
        of_task = {}

        def update(k, params, gradients):
            sums = of_task.get(k, jax.tree.map(lambda w: 0.5 + 0 * w, params))
            of_task[k] = jax.tree.map(lambda a, g: a + g * g, sums, gradients)
            return jax.tree.map(
                lambda w, g, a: w - 0.1 * g / jnp.sqrt(a), params, gradients, of_task[k]
            )

        return update

    for seed, stream in enumerate(short):
        loop = PlainLoop(tiny, stream, seed)
        loop.train(adagrad())
        _assert_same_weights(weights(seed), loop.params)


def test_reset_leaves_a_regularizer_s_state(short, tiny, weights):
    """The penalty of task 1 lives on; only the optimizer begins anew."""
    how = TWO_PASSES._replace(fisher_examples=20)
    found = []
    for name in ("reset+ewc", "ewc"):
        method, settings = _settings(name, learning_rate=0.1, strength=10.0)
        train(method, [settings], tiny, short[:1], [0], how)
        found.append(weights())
    _assert_same_weights(*found)


def test_scale_later_scales_from_the_second_task_on(short, tiny, weights):
    method, settings = _settings(
        "scale-later+classp-published", learning_rate=0.2, eps=1e-2, power=1.0
    )
    train(method, [settings], tiny, short, [0, 1], TWO_PASSES)

    def published():
        sums = None

        def update(k, params, gradients):
            nonlocal sums
            # The accumulator fills in the first task as well.
            sums = jax.tree.map(
                lambda a, g: a + jnp.abs(g),
                sums or jax.tree.map(jnp.zeros_like, params),
                gradients,
            )
            if k == 0:
                return _descent(lambda _: 0.2)(k, params, gradients)
            return jax.tree.map(
                lambda w, g, a: w - 0.2 * g / (a + 1e-2), params, gradients, sums
            )

        return update

    for seed, stream in enumerate(short):
        loop = PlainLoop(tiny, stream, seed)
        loop.train(published())
        _assert_same_weights(weights(seed), loop.params)


def test_a_task_ends_after_the_pass_whose_last_loss_is_low_enough(short, tiny, weights):
    method, targets = parse_method("sgd"), (1.2, 1.6)
    rates = [0.3, 0.1, 1e-4]
    how = TWO_PASSES._replace(epochs=(7,), points_per_task=4, until_loss=targets)
    settings = [{"learning_rate": rate} for rate in rates]
    rows = train(method, settings, tiny, short, [0, 1], how)
    together, all_steps = weights, []
    for (i, rate), seed in itertools.product(enumerate(rates), (0, 1)):
        loop = PlainLoop(tiny, short[seed], seed)
        steps = loop.train(_descent(lambda _, rate=rate: rate), epochs=7, until=targets)
        assert rows[i][seed].steps == steps
        all_steps.append(steps)
        _assert_same_weights(together(2 * i + seed), loop.params)
    # Some stop early and not at the same pass; the last rate does not get there.
    assert len({tuple(steps) for steps in all_steps}) >= 4
    assert all_steps[-1] == [42, 42]
    assert rows[0][0].curve_steps[-1] == 84

    last = together(3)
    ((alone,),) = train(method, [settings[1]], tiny, short[1:], [1], how)
    assert alone.steps == rows[1][1].steps
    _assert_same_weights(weights(), last)
    np.testing.assert_allclose(alone.matrix, rows[1][1].matrix, atol=1.01 / 360)


def test_steps_are_told_only_where_they_depend_on_the_loss(short, tiny):
    method, settings = _settings("sgd")
    ((run,),) = train(method, [settings], tiny, short[:1], [0], TWO_PASSES)
    assert run.steps == []
    assert run.training_accuracy == []
    # All tasks at once: there is no task to end.
    method, settings = _settings("joint")
    how = TWO_PASSES._replace(until_loss=(1e9,))
    ((run,),) = train(method, [settings], tiny, short[:1], [0], how)
    assert run.steps == [12, 12]


class PlainPublishedEWC(PlainLoop):
    """The Fisher and the anchor come from another network's first pass."""

    fisher = anchor = None
    pull = 0.0

    def update(self, k, params, gradients):
        del k
        if self.fisher is not None:
            pulls = jax.tree.map(
                lambda f, w, a: STRENGTH * f * (w - a), self.fisher, params, self.anchor
            )
            largest = [float(jnp.max(jnp.abs(p))) for p in jax.tree.leaves(pulls)]
            self.pull = max(self.pull, *largest)
            gradients = jax.tree.map(jnp.add, gradients, pulls)
        return jax.tree.map(lambda w, g: w - RATE * g, params, gradients)

    def after_pass(self, k, number, batches):
        if (k, number) != (0, 0):
            return
        other = self.model.init(jax.random.fold_in(self.key, 2**32 - 1))
        total = jax.tree.map(lambda w: np.zeros(w.shape), other)
        for x, y in batches:
            _, gradients = self.loss_and_gradient(other, x, y)
            total = jax.tree.map(
                lambda t, g: t + np.asarray(g, np.float64) ** 2, total, gradients
            )
            other = jax.tree.map(lambda w, g: w - RATE * g, other, gradients)
        size = len(self.stream.tasks[0].train.y)
        self.fisher = jax.tree.map(lambda t: jnp.asarray(t / size, jnp.float32), total)
        self.anchor = other


RATE, STRENGTH = 0.2, 400.0


def test_ewc_as_published(short, tiny, weights, monkeypatch):
    seen = []
    consolidate = learner_module.regularizers.consolidate

    def spy(state, params, fisher=None):
        jax.debug.callback(lambda *trees: seen.append(trees), fisher, params)
        return consolidate(state, params, fisher=fisher)

    monkeypatch.setattr(learner_module.regularizers, "consolidate", spy)
    # The seeds have other numbers of examples, and as many batches.
    first, rest = short[0].tasks[0], short[0].tasks[1:]
    more = Split(*(np.concatenate([part, part[:9]]) for part in first.train))
    streams = [short[0]._replace(tasks=(first._replace(train=more), *rest)), short[1]]
    method, settings = _settings("ewc-published", learning_rate=RATE, strength=STRENGTH)
    how = TWO_PASSES._replace(epochs=(3,))
    train(method, [settings], tiny, streams, [0, 1], how)
    jax.effects_barrier()
    loops = []
    for seed, stream in enumerate(streams):
        loop = PlainPublishedEWC(tiny, stream, seed)
        loop.train(loop.update, epochs=3, after_pass=loop.after_pass)
        _assert_same_weights(weights(seed), loop.params, rtol=1e-3)
        loops.append(loop)
    # It is more than a rounding error that pulls.
    assert max(loop.pull for loop in loops) > 0.01

    # The last ones are those that are kept.
    assert seen
    for found in seen[-2:]:
        errors = [
            max(
                float(np.max(np.abs(a - b)))
                for a, b in zip(
                    jax.tree.leaves(found),
                    jax.tree.leaves((loop.fisher, loop.anchor)),
                    strict=True,
                )
            )
            for loop in loops
        ]
        assert min(errors) < 1e-5


def test_examples_in_stored_order(short, tiny, weights):
    method = parse_method("sgd")
    how = TWO_PASSES._replace(order="stored")
    train(method, [{"learning_rate": 0.2}], tiny, short[:1], [0], how)
    loop = PlainLoop(tiny, short[0], 0, stored=True)
    loop.train(_descent(lambda _: 0.2))
    _assert_same_weights(weights(), loop.params)


@pytest.mark.parametrize("unit", [255, 1])
def test_pixels_are_normalised_as_told(unit, short, tiny, weights):
    stream = short[0]
    if unit == 1:
        # The same pixels, as floats in [0, 1].
        stream = stream_from_arrays(
            [
                (
                    *(t.train.x / np.float32(255), t.train.y),
                    *(t.test.x / np.float32(255), t.test.y),
                )
                for t in stream.tasks
            ],
            validation_fraction=0,
            num_classes=10,
        )
    method = parse_method("sgd")
    train(method, [{"learning_rate": 0.2}], tiny, [stream], [0], TWO_PASSES)
    loop = PlainLoop(tiny, stream, 0, unit=unit)
    loop.train(_descent(lambda _: 0.2))
    _assert_same_weights(weights(), loop.params)


def test_accuracy_on_the_training_data(short, tiny):
    method = parse_method("sgd")
    how = TWO_PASSES._replace(score_training=True)
    settings = [{"learning_rate": 0.3}, {"learning_rate": 0.1}]
    rows = train(method, settings, tiny, short, [0, 1], how)
    for (row, setting), seed in itertools.product(
        zip(rows, settings, strict=True), (0, 1)
    ):
        loop = PlainLoop(tiny, short[seed], seed)
        loop.train(_descent(lambda _, s=setting: s["learning_rate"]))
        expected = loop.accuracies("train")
        np.testing.assert_allclose(
            row[seed].training_accuracy, expected, atol=1.01 / (6 * BATCH)
        )


def test_the_training_data_is_scored_with_dropout_active(short, tiny):
    """With a network that says the opposite while it trains."""

    def apply(params, x, key):
        logits = tiny.apply(params, x, key)
        return logits if key is None else -logits

    method = parse_method("sgd")
    how = TWO_PASSES._replace(epochs=(5,), score_training=True)
    stream = short[0]._replace(tasks=short[0].tasks[:1])
    settings = [{"learning_rate": 0.3}]
    ((run,),) = train(method, settings, tiny._replace(apply=apply), [stream], [0], how)
    assert run.training_accuracy[0] > 0.7
    assert run.matrix[-1][0] < 0.1


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("sgd", 0),
        ("reset+adagrad", 0),
        ("si", 4),
        ("ewc", 8),
        ("adam", 8),
    ],
)
def test_kept_bytes_are_those_that_must_outlive_a_task(name, kept, short, tiny):
    method, settings = _settings(name)
    stream = short[0]._replace(tasks=short[0].tasks[:1])
    how = TWO_PASSES._replace(epochs=(1,), fisher_examples=20)
    # Optax's Adam itself mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        ((run,),) = train(method, [settings], tiny, [stream], [0], how)
    assert run.kept_bytes_per_parameter == pytest.approx(kept, abs=1e-9)


def test_kept_bytes_of_runs_together_and_of_stored_examples(short, tiny):
    parameters = 64 * 8 + 8 + 8 * 10 + 10
    how = TWO_PASSES._replace(epochs=(1,))
    stream = [s._replace(tasks=s.tasks[:1]) for s in short]

    def kept(name):
        method, settings = _settings(name)
        (runs,) = train(method, [settings], tiny, stream, [0, 1], how)
        return [run.kept_bytes_per_parameter for run in runs]

    assert kept("classp") == [4.0] * 2
    # Of 64 pixels, a label and a task each, and their number.
    expected = (200 * (64 + 4 + 4) + 4) / parameters
    assert kept("replay") == pytest.approx([expected] * 2)
