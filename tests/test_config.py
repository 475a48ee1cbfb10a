"""Configurations: files, overrides, and what is refused."""

import dataclasses
import json
import tomllib

import jax
import pytest

from classp_jax.continual.config import (
    DEFAULTS,
    ConfigError,
    RunConfig,
    SweepConfig,
    check,
    make_network,
    make_streams,
    methods_and_settings,
    read_config,
    training,
    with_options,
)
from classp_jax.continual.methods import parse_method


def test_toml_and_json_say_the_same(tmp_path):
    (tmp_path / "a.toml").write_text(
        'stream = "split"\nbatch-size = 16\nseeds = [3, 4]\nlr = 1\n'
        "[settings.classp]\neps = 0.5\n"
    )
    options = {
        "stream": "split",
        "batch_size": 16,
        "seeds": [3, 4],
        "lr": 1.0,
        "settings": {"classp": {"eps": 0.5}},
    }
    (tmp_path / "a.json").write_text(json.dumps(options))
    configs = [
        with_options(RunConfig(), read_config(tmp_path / name))
        for name in ("a.toml", "a.json")
    ]
    assert configs[0] == configs[1]
    assert configs[0].seeds == (3, 4)
    assert configs[0].lr == 1.0
    (_, settings), *_ = methods_and_settings(
        dataclasses.replace(configs[0], methods=("classp",))
    )
    assert settings["eps"] == 0.5
    assert settings["learning_rate"] == 1.0


def test_results_are_a_configuration(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"configuration": {"tasks": 7}, "runs": []}))
    assert with_options(RunConfig(), read_config(path)).tasks == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stream": 3}, "'stream' must be str, got 3"),
        ({"sources": ["digits"]}, "did you mean 'source'"),
        ({"tasks": 2.5}, "'tasks' must be int"),
        ({"tasks": True}, "'tasks' must be int"),
        ({"lr": "fast"}, "'lr' must be float"),
        ({"fisher": "all"}, "must be one of exact, sampled, empirical"),
        ({"settings": {"classp": 3}}, "a table of numbers a method"),
        ({"seeds": ["a"]}, "'seeds' must be int"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        with_options(RunConfig(), options)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "stream = ", "not valid TOML"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", "[1]", "does not hold a table"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path / name)
    with pytest.raises(ConfigError, match="No such file"):
        read_config(tmp_path / "missing.toml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": 0}, "tasks must be >= 1: 0"),
        ({"batch_size": 0}, "batch-size must be >= 1"),
        ({"epochs": ()}, "epochs must be"),
        ({"epochs": (0,)}, "epochs must be"),
        ({"hidden": (0,)}, "hidden must be"),
        ({"seeds": ()}, "seeds must be named once"),
        ({"seeds": (1, 1)}, "seeds must be named once"),
        ({"seeds": (-1,)}, "seeds must be >= 0"),
        ({"methods": ()}, "methods must be named once"),
        ({"validation_fraction": 1.0}, "validation-fraction must be in"),
        ({"validation_fraction": -0.1}, r"validation-fraction must be in \[0, 1\)"),
        ({"until_loss": (0.1, 0.0)}, "until-loss must be > 0"),
        ({"until_loss": (float("nan"),)}, "until-loss must be > 0"),
        ({"normalisation": (0.1,)}, "normalisation must be a mean and a deviation"),
        ({"normalisation": (0.1, 0.0)}, "normalisation must be a mean and a deviation"),
        ({"normalisation": (0.1, 0.3, 0.2)}, "normalisation must be a mean and"),
        ({"lr": float("nan")}, "lr must be >= 0"),
    ],
)
def test_numbers_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        check(dataclasses.replace(RunConfig(), **changes))


def test_a_run_needs_no_validation_data_and_a_sweep_does():
    check(RunConfig(validation_fraction=0.0))
    with pytest.raises(ConfigError, match=r"validation-fraction must be in \(0, 1\)"):
        check(SweepConfig(validation_fraction=0.0))


def test_training_takes_what_the_configuration_says():
    options = {
        "until_loss": [1, 0.5],
        "order": "stored",
        "normalisation": [0.1, 0.3],
        "score-training": True,
    }
    config = with_options(RunConfig(), options)
    check(config)
    how = training(config)
    assert how.until_loss == (1.0, 0.5)
    assert how.order == "stored"
    assert how.normalisation == (0.1, 0.3)
    assert how.score_training
    assert not training(SweepConfig()).score_training
    with pytest.raises(ConfigError, match="must be one of shuffled, stored"):
        with_options(RunConfig(), {"order": "sorted"})


def test_set_and_lr():
    config = RunConfig(
        methods=("classp", "ewc+classp"), lr=0.7, set=("classp.eps=0.25",)
    )
    for _, settings in methods_and_settings(config):
        assert settings["learning_rate"] == 0.7
        assert settings["eps"] == 0.25
    for text, message in [
        ("classp.eps", "METHOD.SETTING=NUMBER"),
        ("eps=1", "METHOD.SETTING=NUMBER"),
        ("classp.eps=big", "METHOD.SETTING=NUMBER"),
        ("clasp.eps=1", "did you mean 'classp'"),
        ("classp.epsilon=1", "did you mean 'eps'"),
    ]:
        with pytest.raises(ValueError, match=message):
            methods_and_settings(dataclasses.replace(config, set=(text,)))


def test_the_defaults_file_names_its_command_and_only_what_exists():
    text = DEFAULTS.read_text(encoding="utf-8")
    assert "classp-jax sweep" in text
    settings = tomllib.loads(text)["settings"]
    assert set(settings) == set(RunConfig().methods)
    for name, values in settings.items():
        assert set(values) == set(parse_method(name).settings), name


def test_streams_differ_by_seed_and_fit_the_network():
    config = RunConfig(tasks=2)
    one, two = make_streams(config, (0, 1))
    assert not (one.tasks[1].train.x == two.tasks[1].train.x).all()
    assert make_network(config, [one, two]).name == "mlp"


def test_one_network_reads_every_seed_s_vocabulary(tmp_path):
    words = [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "iota",
        "kappa",
    ]
    lines = [f"{'good' if i % 2 else 'bad'}\t{w} {i}" for i, w in enumerate(words * 3)]
    (tmp_path / "texts.tsv").write_text("\n".join(lines) + "\n")
    config = RunConfig(
        stream="sequence",
        source=(f"tsv:{tmp_path}/texts.tsv",),
        model="transformer",
        validation_fraction=0.3,
    )
    streams = make_streams(config, (0, 1, 2))
    sizes = [stream.vocabulary_size for stream in streams]
    assert len(set(sizes)) > 1, "the vocabularies were meant to differ"
    params = make_network(config, streams).init(jax.random.key(0))
    assert len(params["tokens"]["embedding"]) == max(sizes)
