"""The whole job from Python: run, tune, results; what is refused, and when."""

import dataclasses
import math
import pathlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from classp_jax import continual
from classp_jax.continual.errors import ContinualError
from classp_jax.continual.train import loop, weights
from tests.continual import agem

pytestmark = pytest.mark.usefixtures("quick_compilation")

QUICK: dict[str, Any] = {"epochs": 1, "points": 2}


@pytest.fixture(scope="module")
def digits():
    return continual.permuted("digits", tasks=3, max_train=160)


def _small(key):
    return {"w": jax.random.normal(key, (64, 10)) * 0.1, "b": jnp.zeros(10)}


def _linear(params, x):
    return x.reshape(x.shape[0], -1) @ params["w"] + params["b"]


LINEAR = (_small, _linear)


def test_your_own_model_optimizer_and_method(digits, tmp_path):
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(64, 10, rngs=rngs)

        def __call__(self, x):
            return self.layer(x.reshape(x.shape[0], -1))

    results = continual.run(
        digits,
        lambda rngs: Network(rngs=rngs),
        {"mine": optax.sgd(0.1), "classp": "classp", "a-gem": agem.METHOD},
        seeds=range(2),
        **QUICK,
    )
    assert [(r.method, r.seed) for r in results.runs] == [
        (name, seed) for name in ("mine", "classp", "a-gem") for seed in (0, 1)
    ]
    for run in results.runs:
        matrix = np.array(run.matrix)
        assert matrix.shape == (4, 3)
        # By default only the tasks seen so far are measured.
        later = np.triu(np.ones((3, 3), bool), 1)
        assert np.isnan(matrix[1:][later]).all()
        assert np.isfinite(matrix[1:][~later]).all()
        assert run.task_ends == [5, 10, 15]
        assert run.curve_steps == [0, 2, 5, 7, 10, 12, 15]
        assert len(run.online_accuracy) == len(run.update_density) == 3
        assert 0 < run.seconds < math.inf
        assert run.provenance.versions["jax"] == jax.__version__
        assert run.parameters == 650
        assert [*results.runs[0].settings] == ["transformation"]
    results.save(tmp_path)
    assert {r.method for r in continual.load(tmp_path).runs} == {
        "mine",
        "classp",
        "a-gem",
    }
    results.table()


def test_a_gem_forgets_less_than_plain_sgd():
    stream = continual.permuted("digits", tasks=3)
    results = continual.run(
        stream,
        "mlp",
        {"a-gem": agem.METHOD, "sgd": "sgd"},
        seeds=range(3),
        epochs=3,
        points=1,
        settings={"sgd": {"learning_rate": 0.1}},
    )
    final = {
        name: np.mean([r.matrix[-1] for r in results.runs if r.method == name])
        for name in ("a-gem", "sgd")
    }
    assert final["a-gem"] > final["sgd"] + 0.02
    agem_run = results.runs[0]
    expected = 64 * (64 + 4 + 4 + 10 + 4) / agem_run.parameters
    assert agem_run.state_bytes_per_parameter == pytest.approx(expected, abs=0.01)


def test_your_own_method_can_be_tuned(digits, tmp_path):
    found = continual.tune(
        digits, LINEAR, {"a-gem": agem.METHOD}, trials=3, seeds=[1000], epochs=1
    )
    rates = [trial.settings["learning_rate"] for trial in found.trials["a-gem"]]
    assert len(set(rates)) == 3
    assert all(trial.settings["remembered"] == 64 for trial in found.trials["a-gem"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": []}, "methods: at least one"),
        ({"methods": ["clasp"]}, "did you mean 'classp'"),
        ({"methods": ["sgd", "sgd"]}, "named twice"),
        ({"methods": {"x": 3}}, "must be a name, a Method or an optax"),
        ({"methods": {0.1: "sgd"}}, "a name must be text, got 0.1"),
        ({"stream": "digits"}, "stream must be what permuted"),
        ({"stream": [(np.zeros((9, 4)), np.arange(9) % 2)]}, "stream must be what"),
        ({"settings": {"sgd": 0.1}}, "'sgd' takes a mapping"),
        (
            {"settings": {"replay": {"replay_size": 0}}},
            "replay_size must be at least 1",
        ),
        ({"settings": {"replay": {"replay_size": -5}}}, "replay_size must be at least"),
        ({"settings": {"replay": {"replay_size": 1.5}}}, "must be a whole number"),
        ({"settings": {"replay": {"replay_size": 1e12}}}, "GB"),
        ({"settings": {"sgd": {"learning_rate": math.inf}}}, "finite number, got inf"),
        ({"settings": {"sgd": {"learning_rate": -1.0}}}, "at least 0: -1"),
        ({"settings": {"clasp": {"eps": 1.0}}}, "did you mean 'classp'"),
        ({"settings": {"sgd": {"rate": 1.0}}}, "no setting 'rate'"),
        ({"settings": {"classp": {"power": 0.0}}}, "power"),
        ({"seeds": []}, "at least one"),
        ({"seeds": [1, 1]}, "once each"),
        ({"seeds": [-1]}, "whole number >= 0"),
        ({"batch_size": 5000}, "above the 160 training examples"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1"),
        ({"epochs": 0}, "epochs must be"),
        ({"until_loss": math.nan}, "until_loss must be above 0"),
        ({"normalisation": (math.nan, 1.0)}, "normalisation must be a finite mean"),
        ({"normalisation": (0.5, 0.0)}, "deviation above 0"),
        ({"normalisation": "no"}, "normalisation takes numbers, got 'n'"),
        ({"fisher": "exakt"}, "fisher must be"),
        ({"evaluate": "some"}, "evaluate must be"),
        ({"epoch": 3}, "no option 'epoch'"),
        ({"seeds": None}, "seeds must be whole numbers, got None"),
        ({"methods": None}, "methods must be names or a mapping, got None"),
        ({"model": "mlp", "model_options": {"hidden": (10**9,)}}, "hidden"),
        ({"initial_weights": {"w": 1.0}}, "not a tree like the network's"),
    ],
)
def test_everything_is_checked_before_anything_trains(
    arguments, message, digits, monkeypatch
):
    def never(*_, **__):
        raise AssertionError("compiled before everything was checked")

    monkeypatch.setattr(loop, "start_tracks", never)
    monkeypatch.setattr("classp_jax.continual.train.run.compile_method", never)
    given = {"stream": digits, "methods": ["sgd", "replay", "classp"]}
    given |= {"model": LINEAR, "seeds": [0]} | arguments
    with pytest.raises(ContinualError, match=message) as caught:
        continual.run(**given)
    assert "\n" not in str(caught.value)


def test_seeds_of_any_size(digits):
    results = continual.run(digits, LINEAR, ["sgd"], seeds=[2**70, 2**70 + 1], **QUICK)
    first, second = results.runs
    assert first.seed == 2**70
    assert first.matrix != second.matrix


def test_a_folder_keeps_what_is_done_and_adds_the_rest(digits, tmp_path):
    trained, announced = [], []

    def run(methods, seeds, **more):
        return continual.run(
            digits,
            LINEAR,
            methods,
            seeds=seeds,
            folder=tmp_path,
            announce=announced.append,
            on_metrics=lambda record: trained.append(
                (record["method"], record["seed"])
            ),
            **QUICK,
            **more,
        )

    run(["sgd"], [0])
    before = continual.load(tmp_path).runs[0]
    trained.clear()
    results = run(["sgd", "classp"], [0, 1])
    assert set(trained) == {("sgd", 1), ("classp", 0), ("classp", 1)}
    # One run of 15 steps, then the three that were left.
    assert [line.split(", ")[1] for line in announced] == [
        "15 steps in all",
        "45 steps in all",
    ]
    assert before in results.runs
    trained.clear()
    changed = run(["classp"], [0], settings={"classp": {"eps": 0.5}})
    assert set(trained) == {("classp", 0)}
    assert len(changed.runs) == 5
    with pytest.raises(ContinualError, match="epochs"):
        continual.run(
            digits, LINEAR, ["sgd"], seeds=[0], folder=tmp_path, epochs=2, points=2
        )


def test_weights_come_out_and_go_in(digits, tmp_path):
    results = continual.run(
        digits,
        LINEAR,
        ["classp"],
        seeds=[0, 1],
        save_weights=True,
        folder=tmp_path,
        **QUICK,
    )
    trained = results.params["classp", 1]
    assert jax.tree.structure(trained.params) == jax.tree.structure(
        _small(jax.random.key(0))
    )
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(trained.state))
    (file,) = pathlib.Path(tmp_path, "weights").glob("classp-*-1.npz")
    np.testing.assert_array_equal(np.load(file)["params/w"], trained.params["w"])
    # A run from them begins where that one ended; they are not used up.
    by_seed = {0: results.params["classp", 0], 1: trained}
    again = None
    for _ in range(2):
        again = continual.run(
            digits,
            LINEAR,
            ["sgd"],
            seeds=[1],
            initial_weights=by_seed,
            evaluate="all",
            settings={"sgd": {"learning_rate": 0.0}},
            **QUICK,
        )
        assert again.runs[0].matrix[0] == results.runs[1].matrix[-1]
    assert again is not None
    assert "initial_weights" in again.configuration


def test_another_network_of_the_same_name_is_refused(digits, tmp_path):
    def run(activation):
        model = (_small, lambda params, x: activation(_linear(params, x)))
        return continual.run(
            digits, model, ["sgd"], seeds=[0], folder=tmp_path, **QUICK
        )

    assert len(run(jnp.tanh).runs) == len(run(jnp.tanh).runs) == 1
    with pytest.raises(ContinualError, match="the networks differ"):
        run(jnp.sin)


def test_what_a_stored_run_lacks_is_made_up_for(digits, tmp_path):
    """Weights and rounding copies that are asked for later."""
    # A slash is no folder.
    methods = {"sgd": "sgd", "with/replay": "replay"}

    def run(**more):
        seeds = [0, 1]
        folder = tmp_path
        return continual.run(
            digits, LINEAR, methods, seeds=seeds, folder=folder, **QUICK, **more
        )

    run()
    before = continual.load(tmp_path).runs
    asked = run(save_weights=True, rounding_copies=1)
    stored = continual.load(tmp_path).runs
    assert all(r.ulp_spread is not None for r in stored)
    assert tuple(dataclasses.replace(r, ulp_spread=None) for r in stored) == before
    assert len(list((tmp_path / "weights").iterdir())) == 4
    trained = []
    again = run(save_weights=True, rounding_copies=1, on_metrics=trained.append)
    assert not trained
    assert again.runs == stored
    # They come back as they were, from the files.
    assert set(again.params) == set(asked.params)
    for key, expected in asked.params.items():
        chex.assert_trees_all_equal(again.params[key], expected)
    (file,) = (tmp_path / "weights").glob("sgd-*-0.npz")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ContinualError, match=r"-0.npz is damaged: remove it"):
        run(save_weights=True, rounding_copies=1)


def test_keys_and_narrow_weights_come_back(tmp_path):
    state = {"key": jax.random.key(3), "none": (), "step": jnp.int32(4)}
    trained = weights.Trained(jnp.full(3, 0.1, jnp.bfloat16), state)
    weights.save(tmp_path / "w.npz", trained)
    found = weights.load(tmp_path / "w.npz", jax.eval_shape(lambda: trained))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, trained)
    np.testing.assert_array_equal(found.params, trained.params)
    assert found.state["key"] == state["key"]


def test_results_are_kept_where_weights_do_not_fit(digits, tmp_path, monkeypatch):
    def full(*_):
        raise ContinualError("No space left on device")

    monkeypatch.setattr(weights, "save", full)
    with pytest.raises(ContinualError, match="No space left"):
        continual.run(
            digits,
            LINEAR,
            ["sgd"],
            seeds=[0],
            folder=tmp_path,
            save_weights=True,
            **QUICK,
        )
    assert [run.method for run in continual.load(tmp_path).runs] == ["sgd"]


def test_rounding_copies_measure_what_hangs_on_rounding(digits):
    plain, copied = (
        continual.run(
            digits, LINEAR, ["classp"], seeds=[0], rounding_copies=copies, **QUICK
        ).runs[0]
        for copies in (0, 3)
    )
    assert plain.ulp_spread is None
    assert copied.ulp_spread is not None
    assert 0 <= copied.ulp_spread < 0.2
    assert plain.matrix[-1] == copied.matrix[-1]


def test_progress_and_metrics_as_they_come(digits):
    events, records = [], []
    continual.run(
        digits,
        LINEAR,
        ["sgd"],
        seeds=[0, 1],
        progress=events.append,
        on_metrics=records.append,
        **QUICK,
    )
    finished = [event for event in events if event.task_finished]
    assert [event.task for event in finished] == [0, 1, 2]
    assert (finished[-1].step, finished[-1].steps) == (30, 30)
    assert len(records) == 2 * 3 * 2
    last = [r for r in records if r["seed"] == 1][-1]
    assert {"loss", "online_accuracy", "test_accuracy/task_3"} <= set(last)
