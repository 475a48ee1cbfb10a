"""Records, labels, merging, frames, CSV, and what is written while training goes on."""

import csv
import dataclasses
import io
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from classp_jax.continual.results import Results, ResultsError, Run, merge
from classp_jax.continual.results.flat import csv_text
from classp_jax.continual.results.variants import variants
from classp_jax.continual.results.writers import csv_writer, tensorboard_writer
from tests.continual.fakes import make_results, make_run


def settings(**values):
    return {"learning_rate": 0.1, "eps": 1e-3} | values


def labels(*runs):
    return [variant.label for variant in variants(runs)]


# ---- runs and labels -------------------------------------------------------------


def test_arrays_become_lists():
    arrays: dict[str, Any] = {
        "matrix": jnp.asarray([[0.5], [0.25]]),
        "curve": [np.asarray([0.5])],
        "curve_steps": np.arange(1),
        "task_ends": (3,),
    }
    run = Run(method="sgd", seed=0, **arrays)
    assert run.matrix == [[0.5], [0.25]]
    assert run.curve == [[0.5]]
    assert (run.curve_steps, run.task_ends) == ([0], [3])


def test_a_method_alone_is_called_by_its_name():
    assert labels(make_run("sgd", 0), make_run("sgd", 1), make_run("classp")) == [
        "sgd",
        "classp",
    ]


def test_settings_tell_runs_of_a_method_apart_by_what_differs():
    runs = [
        make_run("classp", 0),
        make_run("sgd", 0),
        make_run("classp", 0, settings=settings(eps=0.5)),
        make_run("classp", 1),
        make_run("classp", 1, settings=settings(eps=0.5)),
    ]
    assert labels(*runs) == ["classp (eps=0.001)", "sgd", "classp (eps=0.5)"]
    assert [[run.seed for run in v.runs] for v in variants(runs)] == [
        [0, 1],
        [0],
        [0, 1],
    ]


def test_settings_that_look_alike_are_written_out():
    assert labels(
        make_run(settings={"eps": 0.1}), make_run(settings={"eps": 0.1000000001})
    ) == ["sgd (eps=0.1)", "sgd (eps=0.1000000001)"]


def test_another_outcome_of_the_same_run_stands_beside_it():
    runs = [make_run(seed=0), make_run(seed=1), make_run(seed=0, level=0.5)]
    assert labels(*runs) == ["sgd", "sgd (repeat=2)"]


def test_finished():
    results = make_results(
        make_run("classp", 3), make_run("classp", 4, settings=settings(eps=0.5))
    )
    assert results.finished("classp", settings()) == {3}
    assert results.finished("classp", settings(eps=0.5)) == {4}
    assert results.finished("sgd", settings()) == set()


# ---- merging ---------------------------------------------------------------------


def test_merge_keeps_order_and_what_was_there_first():
    old = make_run("sgd", 0)
    later = dataclasses.replace(
        old,
        seconds=99.0,
        provenance=dataclasses.replace(old.provenance, date="2027-01-01"),
    )
    more = make_run("adam", 0)
    merged = merge([make_results(old), make_results(more, later)])
    assert [run.method for run in merged.runs] == ["sgd", "adam"]
    assert merged.runs[0] is old


def test_a_measure_that_is_missing_is_filled_in():
    old = make_run("sgd", 0)
    measured = dataclasses.replace(old, ulp_spread=0.01, seconds=99.0)
    (run,) = make_results(old).add(make_results(measured)).runs
    assert (run.ulp_spread, run.seconds) == (0.01, old.seconds)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            make_results(data={"fingerprint": "ffff"}),
            "data.fingerprint is '0123abcd' and 'ffff' (the data differ)",
        ),
        (make_results(training={"epochs": 5}), "training.epochs is 2 and 5"),
        (make_results(network={"hidden": [8]}), "network.hidden is not set and [8]"),
        (make_results(make_run(num_tasks=2)), "stream.task_names is"),
    ],
)
def test_merge_says_what_differs(other, message):
    with pytest.raises(ResultsError) as error:
        merge([make_results(make_run()), other])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_merge_takes_what_json_cannot_tell_apart_as_the_same():
    a = make_results(hidden=(8, np.int64(8)))
    assert merge([a, make_results(make_run(), hidden=[8, 8])]).runs
    with pytest.raises(ResultsError, match="no results to merge"):
        merge([])


def test_weights_stay_in_memory():
    a = dataclasses.replace(make_results(make_run()), params={("sgd", 0): "tree"})
    assert a.add(make_results()).params == {("sgd", 0): "tree"}


# ---- flat tables -----------------------------------------------------------------


def test_csv_has_a_row_per_run_with_metrics_settings_and_provenance():
    results = make_results(
        make_run("classp", 0, num_tasks=1),
        make_run("classp", 0, num_tasks=1, settings={"eps": 0.5}),
    )
    first, second = csv.DictReader(io.StringIO(csv_text(results)))
    run = results.runs[0]
    assert float(first["average_accuracy"]) == run.matrix[1][0]
    assert first["backward_transfer"] == ""
    assert first["label"] == "classp (learning_rate=0.1, eps=0.001)"
    assert (second["settings.learning_rate"], second["settings.eps"]) == ("", "0.5")
    assert first["command"] == "classp-jax run"
    assert float(first["update_density"]) == pytest.approx(run.update_density[0])
    assert csv_text(make_results()).startswith("label,method,seed")


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_frame(library, monkeypatch):
    pytest.importorskip(library)
    if library == "polars":
        monkeypatch.setitem(sys.modules, "pandas", None)
    results = make_results(make_run("sgd"), make_run("sgd", 1, ulp_spread=0.5))
    frame = results.frame()
    assert type(frame).__module__.startswith(library)
    assert list(frame["seed"]) == [0, 1]
    assert frame["ulp_spread"][1] == 0.5
    assert list(frame.columns) == csv_text(results).split("\n")[0].split(",")


def test_frame_without_either_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(ResultsError, match="pip install pandas"):
        make_results(make_run()).frame()


# ---- metrics while training goes on ----------------------------------------------


RECORD = {
    "method": "sgd",
    "seed": 0,
    "settings": {"eps": 1.0},
    "task": 1,
    "step": 40,
    "loss": np.float32(0.5),
    "test_accuracy/task_1": jnp.asarray(0.25),
}


def test_csv_writer_adds_lines_at_once(tmp_path):
    path = tmp_path / "new" / "metrics.csv"
    for step in (40, 80):
        with csv_writer(path) as writer:
            writer({**RECORD, "step": step})
            # Before the file is closed: a killed run leaves them.
            assert path.read_text().endswith(
                f"sgd,eps=1,0,1,{step},test_accuracy/task_1,0.25\n"
            )
    header = "method,settings,seed,task,step,metric,value"
    assert path.read_text().count(header) == 1
    assert len(path.read_text().splitlines()) == 5


def test_csv_writer_on_a_full_disk():
    with (
        pytest.raises(
            ResultsError, match="Cannot write the metrics to /dev/full: No sp"
        ),
        csv_writer("/dev/full"),
    ):
        pass


def test_csv_writer_does_not_answer_for_another_file(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="weights"),
        csv_writer(tmp_path / "metrics.csv"),
    ):
        (tmp_path / "weights").read_bytes()


def test_tensorboard_writer(tmp_path):
    pytest.importorskip("tensorboardX")
    with tensorboard_writer(tmp_path) as writer:
        writer(RECORD)
        writer({**RECORD, "seed": 1})
        writer({**RECORD, "settings": {"eps": 0.5}})
    files = sorted(tmp_path.rglob("events.*"))
    assert [str(f.parent.relative_to(tmp_path)) for f in files] == [
        "sgd/eps=0.5/seed_0",
        "sgd/eps=1/seed_0",
        "sgd/eps=1/seed_1",
    ]
    assert b"test_accuracy/task_1" in files[0].read_bytes()


def test_tensorboard_writer_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with (
        pytest.raises(ResultsError, match="pip install tensorboardX"),
        tensorboard_writer(tmp_path),
    ):
        pass


def test_results_of_nothing_say_so():
    for show in (Results.table, Results.accuracy_picture, Results.matrix_picture):
        with pytest.raises(ResultsError, match="no finished runs"):
            show(make_results())
