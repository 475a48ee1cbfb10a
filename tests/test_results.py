"""Results files: round trip, atomicity, files that are damaged or not ours, merging."""

import dataclasses
import errno
import json
import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from classp_jax.continual import results as results_module
from classp_jax.continual.results import (
    Results,
    ResultsError,
    Run,
    load,
    merge,
    save,
)


def make_run(method="classp", seed: Any = 0, **changes: Any):
    rng = np.random.default_rng([seed, len(method)])
    run = Run(
        method=method,
        seed=seed,
        matrix=rng.uniform(size=(3, 2)).tolist(),
        curve_steps=[0, 5, 10, 20],
        curve=rng.uniform(size=(4, 2)).tolist(),
        seconds=0.1 + 0.2,
        state_bytes_per_parameter=4.0,
        update_density=1 / 3,
        told_boundary=False,
        diverged=False,
        settings={"learning_rate": 0.1, "power": 1, "scaling": True, "fisher": "exact"},
        kept_bytes_per_parameter=4.0,
    )
    return dataclasses.replace(run, **changes)


def make_results(*runs, **changes):
    results = Results(
        configuration={"model": "mlp", "hidden": [128, 128], "seeds": [0, 1]},
        versions={"jax": "0.10.2", "python": "3.11"},
        device="CPU (2 cores), übertaktet",
        date="2024-05-16",
        stream={
            "name": "permuted",
            "scenario": "domain-incremental",
            "task_names": ["a", "b"],
            "task_ends": [10, 20],
        },
        runs=runs,
    )
    return dataclasses.replace(results, **changes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "results.json"


# ---- round trip ------------------------------------------------------------------


def test_round_trip_to_the_last_bit(path):
    odd = [[5e-324, 1 / 3], [1.0, 0.0], [np.nextafter(1, 0), 1e-17]]
    results = make_results(
        make_run(matrix=odd), make_run(seed=1), make_run("sgd", seed=2**63)
    )
    save(results, path)
    assert load(path) == results
    assert load(path.parent) == results


def test_what_came_after_version_0_1_is_kept(path):
    new = {
        "kept_bytes_per_parameter": 1 / 3,
        "steps": [12, 0],
        "training_accuracy": [0.25, 1 / 7],
    }
    save(make_results(make_run(**new)), path)
    (found,) = load(path).runs
    for name, value in new.items():
        assert getattr(found, name) == value
    save(
        make_results(
            make_run(kept_bytes_per_parameter=math.nan, training_accuracy=[math.nan, 1])
        ),
        path,
    )
    (found,) = load(path).runs
    assert math.isnan(found.kept_bytes_per_parameter)
    np.testing.assert_array_equal(found.training_accuracy, [math.nan, 1])


def test_a_file_of_version_0_1_still_loads(path):
    run = make_run(steps=[3, 4], training_accuracy=[0.5, 0.5])
    save(make_results(run), path)
    content = json.loads(path.read_text())
    for name in ("kept_bytes_per_parameter", "steps", "training_accuracy"):
        del content["runs"][0][name]
    path.write_text(json.dumps(content))
    (found,) = load(path).runs
    assert math.isnan(found.kept_bytes_per_parameter)
    assert found.steps == found.training_accuracy == []
    same = {"steps": [3, 4], "training_accuracy": [0.5, 0.5]}
    assert dataclasses.replace(found, **same, kept_bytes_per_parameter=4.0) == run


def test_no_runs(path):
    save(make_results(), path)
    assert load(path) == make_results()


def test_nan_is_null_in_the_file_and_nan_again(path):
    nan = math.nan
    run = make_run(
        matrix=[[0.5, 0.5], [nan, 0.5], [nan, nan]],
        curve=[[nan, nan]] * 4,
        seconds=nan,
        update_density=nan,
        diverged=True,
    )
    save(make_results(run), path)
    text = path.read_text()
    assert "NaN" not in text
    assert json.loads(text)["runs"][0]["matrix"] == [
        [0.5, 0.5],
        [None, 0.5],
        [None, None],
    ]
    (found,) = load(path).runs
    np.testing.assert_array_equal(found.matrix, run.matrix)
    np.testing.assert_array_equal(found.curve, run.curve)
    assert math.isnan(found.seconds)
    assert math.isnan(found.update_density)
    assert found.diverged


def test_numbers_of_numpy_and_jax_and_tuples_are_stored_as_plain_ones(path):
    import jax.numpy as jnp

    run = make_run(
        seed=np.int64(3),
        matrix=np.full((3, 2), 0.5, np.float32),
        state_bytes_per_parameter=np.float32(4),
        update_density=jnp.float32(0.25),
        told_boundary=np.bool_(True),
        settings={"eps": np.float32(0.5)},
    )
    save(make_results(run, configuration={"seeds": (0, 1), "out": path}), path)
    found = load(path)
    assert found.configuration == {"seeds": [0, 1], "out": str(path)}
    (run,) = found.runs
    assert run.seed == 3
    assert run.matrix == [[0.5, 0.5]] * 3
    assert run.told_boundary is True
    assert run.settings == {"eps": 0.5}
    assert type(run.update_density) is float


def test_the_file_says_what_it_is(path):
    save(make_results(make_run()), path)
    content = json.loads(path.read_text())
    assert content["format"] == 1
    assert content["file"] == "classp-jax results"
    # A line a run, so that files can be compared.
    assert sum('"method"' in line for line in path.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matrix": [[0.5, 0.5]] * 2}, "matrix must have 3 x 2"),
        ({"matrix": [[0.5, 0.5, 0.5]] * 3}, "matrix must have 3 x 2"),
        ({"curve": [[0.5, 0.5]] * 3}, "curve must have 4 x 2"),
        ({"matrix": [[0.5, 50.0]] * 3}, r"accuracies in \[0, 1\]"),
        ({"curve_steps": [0, 5, 5, 10]}, "curve_steps must be ascending"),
        ({"seconds": -1.0}, "seconds must be at least 0"),
        ({"seconds": math.inf}, "cannot be stored"),
        ({"settings": {"eps": [1]}}, "settings must be numbers"),
        ({"settings": {"eps": object()}}, "cannot be stored"),
        ({"diverged": 0}, "diverged must be of type bool"),
    ],
)
def test_what_cannot_be_loaded_is_not_saved(path, changes, message):
    save(make_results(make_run()), path)
    with pytest.raises(ResultsError, match=message) as error:
        save(make_results(make_run(**changes)), path)
    assert "\n" not in str(error.value)
    assert load(path) == make_results(make_run())


# ---- atomicity -------------------------------------------------------------------


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("fault", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ResultsError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_fault_while_saving_leaves_the_old_file(
    path, monkeypatch, function, fault, raised
):
    old = make_results(make_run())
    save(old, path)

    def fail(*_):
        raise fault

    monkeypatch.setattr(results_module.os, function, fail)
    with pytest.raises(raised) as error:
        save(make_results(make_run(), make_run(seed=1)), path)
    if raised is ResultsError:
        assert "No space left on device" in str(error.value)
        assert str(path) in str(error.value)
    monkeypatch.undo()
    assert load(path) == old
    assert os.listdir(path.parent) == ["results.json"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_crash_while_saving_leaves_the_old_file(path, function):
    old = make_results(make_run())
    save(old, path)
    # Half of the new text is on disk when the process dies without any clean-up.
    script = f"""
import dataclasses, os, sys
from classp_jax.continual.results import load, save
old = load({str(path)!r})
os.{function} = lambda *_: os._exit(7)
new = dataclasses.replace(old, device="x" * 100_000)
save(new, {str(path)!r})
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == 7
    assert load(path) == old
    # And the next save is not disturbed by what lies about.
    save(make_results(), path)
    assert load(path) == make_results()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="Cannot write the results"):
        save(make_results(), tmp_path / "file" / "results.json")


# ---- files that are damaged or not ours ------------------------------------------


def load_error(path):
    with pytest.raises(ResultsError) as error:
        load(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_missing(tmp_path):
    assert "No results" in load_error(tmp_path / "results.json")
    assert "No results" in load_error(tmp_path)


def test_cut_off_anywhere(path):
    save(make_results(make_run()), path)
    text = path.read_text().rstrip()
    for length in range(0, len(text), 7):
        path.write_text(text[:length])
        assert "damaged or cut off" in load_error(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "no text file"),
        (b"[1, 2]", "something else"),
        (b"null", "something else"),
        (b'{"format": 1}', "something else"),
        (b'{"file": "classp-jax results"}', "format None"),
        (b'{"file": "classp-jax results", "format": 2}', "format 2"),
        (b'{"file": "classp-jax results", "format": 1}', "has no stream"),
        (b"[" * 100_000, "damaged"),
    ],
)
def test_foreign(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    assert message in load_error(path)


def remove(*keys):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


def put(value, *keys):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


NEEDED = [
    field.name
    for field in dataclasses.fields(Run)
    if field.default is field.default_factory is dataclasses.MISSING
]


@pytest.mark.parametrize(
    "change",
    [
        *(remove(field.name) for field in dataclasses.fields(Results)),
        *(remove("runs", 0, name) for name in NEEDED),
        *(remove("stream", k) for k in ("name", "scenario", "task_names", "task_ends")),
        put([], "stream", "task_names"),
        put(["a"], "stream", "task_names"),
        put(["a", 1], "stream", "task_names"),
        put([10], "stream", "task_ends"),
        put([20, 10], "stream", "task_ends"),
        put([10, "20"], "stream", "task_ends"),
        put({"jax": 1}, "versions"),
        put([], "configuration"),
        put(None, "device"),
        put({}, "runs"),
        put("run", "runs", 0),
        put(True, "runs", 0, "seed"),
        put(0.5, "runs", 0, "seed"),
        put(1, "runs", 0, "method"),
        put("yes", "runs", 0, "diverged"),
        put([[0.5, "0.5"]] * 3, "runs", 0, "matrix"),
        put([[0.5, True]] * 3, "runs", 0, "matrix"),
        put([0.5, 0.5, 0.5], "runs", 0, "matrix"),
        put([[0.5, -0.1]] * 3, "runs", 0, "matrix"),
        put([[0.5, 1.1]] * 4, "runs", 0, "curve"),
        put([0, 1, 2, 2.5], "runs", 0, "curve_steps"),
        put("1 s", "runs", 0, "seconds"),
        put({"eps": None}, "runs", 0, "settings"),
        put(-1, "runs", 0, "kept_bytes_per_parameter"),
        put("4", "runs", 0, "kept_bytes_per_parameter"),
        put(3, "runs", 0, "steps"),
        put([3], "runs", 0, "steps"),
        put([3, 2.5], "runs", 0, "steps"),
        put([3, -1], "runs", 0, "steps"),
        put([0.5], "runs", 0, "training_accuracy"),
        put([0.5, 1.5], "runs", 0, "training_accuracy"),
        put([0.5, "1"], "runs", 0, "training_accuracy"),
    ],
)
def test_a_wrong_field(path, change):
    save(make_results(make_run()), path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    load_error(path)


def test_two_runs_of_one_seed(path):
    with pytest.raises(ResultsError, match="two runs with the same seed"):
        save(make_results(make_run(), make_run()), path)


# ---- merge -----------------------------------------------------------------------


def test_merge_keeps_order_and_drops_identical_runs(path):
    a = make_results(make_run("sgd"), make_run("classp"))
    b = make_results(make_run("classp", seed=1), make_run("sgd"))
    merged = merge([a, b])
    assert [(run.method, run.seed) for run in merged.runs] == [
        ("sgd", 0),
        ("classp", 0),
        ("classp", 1),
    ]
    assert merged.configuration == a.configuration
    save(merged, path)
    assert load(path) == merged


def test_merge_takes_nan_as_equal():
    # One NaN object in two places would be equal to itself.
    parts = [
        make_results(make_run(matrix=[[float("nan")] * 2] * 3, diverged=True))
        for _ in range(2)
    ]
    assert parts[0].runs != parts[1].runs
    assert len(merge(parts).runs) == 1


def test_merge_of_one_is_itself():
    results = make_results(make_run())
    assert merge([results]) == results


def test_merge_tells_what_differs():
    a = make_results(
        make_run("sgd"), configuration={"model": "mlp", "methods": ["sgd"], "lr": 0.1}
    )
    b = make_results(
        make_run("adam"),
        configuration={"model": "mlp", "methods": ["adam"]},
        versions={"jax": "0.9.0", "optax": "0.2.8"},
        device="GPU",
    )
    merged = merge([a, b])
    assert merged.configuration == {
        "model": "mlp",
        "merged": [{"methods": ["sgd"], "lr": 0.1}, {"methods": ["adam"]}],
    }
    assert merged.versions == {
        "jax": "0.10.2; 0.9.0",
        "python": "3.11",
        "optax": "0.2.8",
    }
    assert merged.device == f"{a.device}; GPU"
    assert merged.date == a.date


def test_merge_refuses_other_streams_and_other_training():
    a = make_results(make_run())
    for key, value in (("name", "rotated"), ("task_ends", [10, 30])):
        b = make_results(make_run("sgd"), stream=a.stream | {key: value})
        with pytest.raises(ResultsError, match=f"same stream.*{key}"):
            merge([a, b])
    for changed in ({"hidden": [64]}, {"source": ["npz:other"]}):
        b = make_results(make_run("sgd"), configuration=a.configuration | changed)
        with pytest.raises(ResultsError, match=f"same stream.*{next(iter(changed))}"):
            merge([a, b])


def test_merge_refuses_two_outcomes_and_two_settings():
    a = make_results(make_run())
    with pytest.raises(ResultsError, match="classp with seed 0"):
        merge([a, make_results(make_run(seconds=5.0))])
    settings = a.runs[0].settings | {"learning_rate": 0.2}
    with pytest.raises(ResultsError, match=r"classp.*learning_rate is 0\.1 and 0\.2"):
        merge([a, make_results(make_run(seed=1, settings=settings))])
    with pytest.raises(ResultsError, match="no results"):
        merge([])
