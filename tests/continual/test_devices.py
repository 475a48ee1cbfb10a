"""Runs on eight devices: spread, sharing batches, sharing parameters."""

from typing import Any

import jax
import numpy as np
import pytest

from classp_jax import continual
from classp_jax.continual.methods import method, resolve_settings
from classp_jax.continual.train import places
from classp_jax.continual.train.experiment import problem_maker, stored_at
from classp_jax.continual.train.setup import set_up
from classp_jax.continual.train.step import Traced
from classp_jax.continual.train.track import start_tracks

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH, DEVICES = 16, 8


def _init(key):
    a, b = jax.random.split(key)
    return {
        "a": jax.random.normal(a, (64, 8)) / 8,
        "b": jax.random.normal(b, (8, 10)) / 3,
    }


def _apply(params, x):
    hidden = jax.numpy.tanh(x.reshape(x.shape[0], -1) @ params["a"])
    return hidden @ params["b"]


@pytest.fixture(scope="module")
def digits():
    return continual.permuted("digits", tasks=2, max_train=6 * BATCH)


def _run(stream, methods, **options):
    options = {"seeds": [0], "epochs": 2, "batch_size": BATCH, "points": 1} | options
    return continual.run(
        stream,
        (_init, _apply),
        methods,
        fisher="empirical",
        fisher_examples=32,
        save_weights=True,
        **options,
    )


def _outcome(run):
    return run.method, run.seed, run.matrix, run.curve, run.online_accuracy


METHODS = ["replay+ewc+classp"]


@pytest.fixture(scope="module")
def alone(digits):
    return _run(digits, METHODS, seeds=range(3))


def _same_bits(found, expected):
    for a, b in zip(found.runs, expected.runs, strict=True):
        np.testing.assert_equal(_outcome(a), _outcome(b))
    assert found.params.keys() == expected.params.keys()
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def test_spread_runs_have_the_bits_of_one_device(digits, alone):
    spread = _run(digits, METHODS, seeds=range(3), devices=2)
    used = {
        name: next(iter(trained.params["a"].devices())).id
        for name, trained in spread.params.items()
    }
    assert [used[METHODS[0], seed] for seed in range(3)] == [0, 1, 0]
    _same_bits(spread, alone)


# What rounding makes of sums in another order, in 24 steps.
TOLERANCE: Any = {"rtol": 2e-4, "atol": 2e-5}


def test_devices_that_share_a_run_train_as_one(digits, alone):
    kind = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((1, 4), ("runs", "batch"), axis_types=(kind,) * 2)
    shared = _run(digits, METHODS, seeds=[2], mesh=mesh, shard_parameters=True)
    for key, trained in shared.params.items():
        assert len(trained.params["a"].devices()) == 4
        own = alone.params[key]
        jax.tree.map(
            lambda a, b: (
                np.testing.assert_allclose(a, b, **TOLERANCE)
                if jax.numpy.issubdtype(a.dtype, np.floating)
                else None
            ),
            trained,
            own,
        )
    (a,), b = shared.runs, alone.runs[2]
    np.testing.assert_allclose(a.matrix, b.matrix, atol=2 / 360)
    assert a.kept_bytes_per_parameter == b.kept_bytes_per_parameter
    (trained,) = shared.params.values()
    pieces = [
        (leaf.shape, {shard.data.shape for shard in leaf.addressable_shards})
        for leaf in jax.tree.leaves(trained)
    ]
    # The longest axis that four divides; accumulators, Fisher information and anchors
    # have these shapes, too. Stored examples are on every device.
    cut = {(64, 8): (16, 8), (8, 10): (2, 10)}
    assert [shape for shape, _ in pieces].count((64, 8)) >= 4
    assert ((200, 8, 8, 1), {(200, 8, 8, 1)}) in pieces
    for shape, found in pieces:
        assert found == {cut.get(shape, shape)}


def test_a_shared_batch_is_cut_and_gradients_are_summed(digits):
    """A device sees a quarter of the batch, and there is one sum over devices."""
    setup = set_up(digits, (_init, _apply), [0], batch_size=BATCH, devices_per_run=4)
    experiment, found = setup.experiment, method("sgd")
    (place,) = experiment.places
    track = start_tracks(experiment, found, [resolve_settings(found)], None, 0)[0]
    arguments = track.segment(track.schedule(0), 0, 0)
    traced = Traced(found, {}, problem_maker(experiment), experiment.training)
    lowered = jax.jit(traced.advance).lower(
        stored_at(experiment, place), *place.put(arguments)
    )
    text = str(lowered.compile().as_text())
    assert "all-reduce" in text
    assert f"f32[{BATCH // 4},64]" in text
    assert f"f32[{BATCH},64]" not in text


def test_what_does_not_divide_is_refused_before_training(digits, monkeypatch):
    def never(*_, **__):
        raise AssertionError("something was compiled")

    monkeypatch.setattr("classp_jax.continual.train.run.compile_method", never)
    for options, words in {
        (("devices", 9),): "9 devices are asked for, JAX has 8",
        (("devices", 0),): "devices must be a whole number >= 1, got 0",
        (("devices", "2"),): "devices must be a whole number >= 1, got '2'",
        (("devices_per_run", None),): "devices_per_run must be a whole number",
        (("mesh", "x"),): "mesh must be a jax.sharding.Mesh, got 'x'",
        (("devices", 8), ("devices_per_run", 3)): "do not divide",
        (("devices_per_run", 5),): "batch_size 16 does not divide among the 5",
        (("shard_parameters", True),): "give devices_per_run",
    }.items():
        with pytest.raises(continual.ContinualError, match=words) as error:
            _run(digits, ["sgd"], **dict(options))
        assert "\n" not in str(error.value)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(continual.ContinualError, match="they must be runs, batch"):
        _run(digits, ["sgd"], mesh=mesh)
    with pytest.raises(continual.ContinualError, match="not both"):
        _run(digits, ["sgd"], mesh=mesh, devices=2)


@pytest.mark.parametrize(
    ("runs", "number", "width", "share"),
    [(10, 1, 1, 1), (10, 8, 8, 2), (100, 8, 8, 8), (1, 8, 8, 1), (9, 2, 8, 5)],
)
def test_runs_are_dealt_out_evenly(runs, number, width, share):
    assert places.share_of(runs, number, width) == share
