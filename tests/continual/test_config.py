"""Experiments in files: what is read, what is refused, and that it is one line."""

import dataclasses
import json

import pytest

from classp_jax.continual.config import (
    ConfigError,
    Experiment,
    check,
    folder_name,
    from_table,
    read,
    write,
)

TOML = """
seeds = [3, 4]
[data]
stream = "split"
[training]
batch-size = 16
[settings.classp]
eps = 1
"""
TABLE = {
    "seeds": [3, 4],
    "data": {"stream": "split"},
    "training": {"batch_size": 16},
    "settings": {"classp": {"eps": 1.0}},
}


def test_toml_and_json_say_the_same_and_come_back(tmp_path):
    (tmp_path / "a.toml").write_text(TOML)
    (tmp_path / "a.json").write_text(json.dumps(TABLE))
    one, two = read(tmp_path / "a.toml"), read(tmp_path / "a.json")
    assert one == two
    assert (one.seeds, one.training.batch_size) == ((3, 4), 16)
    assert one.settings == {"classp": {"eps": 1.0}}
    assert one.training.epochs == Experiment().training.epochs
    (tmp_path / "b.toml").write_text(write(one, header="Written by: me"))
    assert read(tmp_path / "b.toml") == one
    assert (tmp_path / "b.toml").read_text().startswith("# Written by: me\n")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"trainig": {}}, "unknown table trainig; did you mean 'training'"),
        ({"tasks": 3}, "unknown option tasks"),
        ({"data": {"sources": ["digits"]}}, "data.sources; did you mean 'source'"),
        ({"data": 3}, "data = 3: expected a table, got int"),
        ({"data": {"tasks": 2.5}}, "data.tasks = 2.5: expected int, got float"),
        ({"data": {"tasks": True}}, "expected int, got bool"),
        ({"data": {"tasks": 0}}, "data.tasks = 0: expected int >= 1"),
        ({"data": {"stream": "x"}}, "data.stream = \"x\": invalid enum value 'x'"),
        ({"data": {"source": ["a", "b"]}}, "'permuted' takes one source"),
        ({"data": {"validation_fraction": 1}}, "validation_fraction = 1"),
        ({"training": {"epochs": []}}, "training.epochs = []"),
        ({"training": {"epochs": [3, 0]}}, "training.epochs[1] = 0: expected int"),
        ({"training": {"fisher": "all"}}, "training.fisher"),
        ({"training": {"until_loss": [0.1, 0]}}, "until_loss[1] = 0: expected float"),
        ({"training": {"until_loss": [float("nan")]}}, "training.until_loss"),
        ({"training": {"normalisation": [0.1]}}, "must be a mean and a deviation"),
        ({"training": {"normalisation": [0.1, 0]}}, "must be a mean and a deviation"),
        ({"training": {"normalisation": [float("nan"), 1]}}, "must be finite: nan"),
        ({"network": {"hidden": [0]}}, "network.hidden[0] = 0"),
        ({"seeds": [1, 1]}, "seeds names 1 twice"),
        ({"seeds": [-1]}, "seeds[0] = -1: expected int >= 0"),
        ({"methods": []}, "methods = []: expected a list of length >= 1"),
        ({"settings": {"classp": 3}}, "settings.classp must be a table, got 3"),
        ({"settings": {"classp": {"eps": "x"}}}, "classp.eps must be a number"),
        ({"settings": {"classp": {"eps": float("inf")}}}, "must be finite: inf"),
        ([1], "expected a table, got a list"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(table, message):
    with pytest.raises(ConfigError) as raised:
        from_table(table)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"data": {"stream": "sequence", "tasks": 3}}, "data.tasks has no effect"),
        ({"data": {"scenario": "task-incremental"}}, "has no effect on the stream"),
        ({"network": {"model": "cnn", "hidden": [3]}}, "network.hidden has no effect"),
        ({"network": {"width": 8}}, "network.width has no effect on the model 'mlp'"),
    ],
)
def test_options_that_nothing_reads_are_refused(table, message):
    with pytest.raises(ConfigError, match=message):
        from_table(table)


def test_a_seed_of_any_size_and_a_source_that_comes_back():
    table = {
        "seeds": [2**70],
        "data": {"stream": "sequence", "source": ["digits", "digits"]},
    }
    assert from_table(table).seeds == (2**70,)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "data = ", "not valid TOML"),
        ("a.json", "{", "not valid JSON"),
        ("a.toml", "data = 3", "a.toml: data = 3"),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / name)
    with pytest.raises(ConfigError, match="No such file"):
        read(tmp_path / "missing.toml")


def test_what_python_changes_is_checked_too():
    config = from_table({})
    assert check(config) == config
    wrong = dataclasses.replace(config.training, epochs=(0,))
    with pytest.raises(ConfigError, match=r"training\.epochs"):
        check(dataclasses.replace(config, training=wrong))


def test_folders_are_named_after_what_can_stand_in_one_table():
    def folder(**table):
        return folder_name(from_table(table))

    assert folder(methods=["sgd"], seeds=[7]) == "permuted-digits"
    assert folder(data={"data_dir": "/elsewhere"}) == "permuted-digits"
    path = folder(data={"source": ["npz:/data/letters.npz"]})
    assert path.startswith("permuted-letters-")
    assert "/" not in path
    different = [
        path,
        folder(data={"source": ["npz:/other/letters.npz"]}),
        folder(data={"stream": "sequence", "source": ["digits", "tfds:mnist"]}),
        folder(data={"stream": "sequence", "source": ["tfds:mnist", "digits"]}),
        folder(training={"epochs": [3]}),
    ]
    assert len(set(different)) == len(different)
