"""Tuning: equal numbers of tries, seeds kept apart, a file that a run takes."""

import dataclasses
import json

import numpy as np
import pytest

from classp_jax.continual import sweep as sweep_module
from classp_jax.continual.config import (
    ConfigError,
    RunConfig,
    SweepConfig,
    methods_and_settings,
    read_config,
    with_options,
)
from classp_jax.continual.methods import parse_method
from classp_jax.continual.results import Run
from classp_jax.continual.sweep import best, sweep, tune


def test_finds_a_known_optimum_with_the_tries_it_was_given():
    method = parse_method("classp")
    calls = []

    def evaluate(settings):
        calls.append(len(settings))
        assert len({s["power"] for s in settings}) == 1
        return [
            1
            - 0.1 * abs(np.log10(s["learning_rate"] / 0.03))
            - 0.1 * abs(s["power"] - 1.0)
            for s in settings
        ]

    tries = tune(method, evaluate, tries=60, together=8, seed=3)
    assert len(tries) == sum(calls) == 60
    winner = best(tries)
    assert winner.settings["power"] == 1.0
    assert 0.01 < winner.settings["learning_rate"] < 0.1
    for t in tries:
        for name, setting in method.settings.items():
            if not setting.choices:
                assert setting.low <= t.settings[name] <= setting.high
    again = tune(method, evaluate, tries=60, together=8, seed=3)
    assert again == tries


def test_a_sweep_writes_what_a_run_takes(tmp_path, monkeypatch):
    splits = []
    original = sweep_module.train

    def spy(method, settings, model, streams, seeds, how):
        splits.append((how.evaluate_on, tuple(seeds)))
        return original(method, settings, model, streams, seeds, how)

    monkeypatch.setattr(sweep_module, "train", spy)
    config = SweepConfig(
        methods=("sgd", "classp"),
        tasks=2,
        epochs=(1,),
        hidden=(16,),
        tries=3,
        together=3,
        tuning_seeds=(7,),
        out=str(tmp_path / "sweep"),
    )
    tries, out = sweep(config, "classp-jax sweep --tries 3")
    assert {name: len(made) for name, made in tries.items()} == {"sgd": 3, "classp": 3}
    assert set(splits) == {("validation", (7,))}
    text = (out / "config.toml").read_text()
    assert "# Written by: classp-jax sweep --tries 3" in text
    run = with_options(RunConfig(), read_config(out / "config.toml"))
    assert run.methods == ("sgd", "classp")
    assert run.hidden == (16,)
    assert run.seeds == (0, 1, 2)
    for method, settings in methods_and_settings(run):
        winner = best(tries[method.name]).settings
        assert settings == pytest.approx(winner, rel=5e-3)
    stored = json.loads((out / "tries.json").read_text())
    assert [t["accuracy"] for t in stored["sgd"]] == [t.accuracy for t in tries["sgd"]]


def test_fixed_settings_are_not_drawn():
    method, batches = parse_method("ewc+classp"), []

    def evaluate(settings):
        batches.append(settings)
        return [0.5] * len(settings)

    fixed = {"power": 1.0, "eps": 123.0}
    tries = tune(method, evaluate, tries=12, together=6, fixed=fixed)
    assert len(tries) == 12
    # Those that share what is compiled in go together.
    assert [len(batch) for batch in batches] == [6, 6]
    for settings in (s for batch in batches for s in batch):
        assert settings.keys() == method.settings.keys()
        assert {name: settings[name] for name in fixed} == fixed
    for name in method.settings.keys() - fixed.keys():
        assert len({t.settings[name] for t in tries}) == 12


def test_a_sweep_holds_fixed_what_set_and_lr_name(tmp_path, monkeypatch):
    trained = {}

    def spy(method, settings, model, streams, seeds, how):
        trained.setdefault(method.name, []).extend(settings)
        run = Run(
            method=method.name,
            seed=7,
            matrix=[[0.1], [0.5]],
            curve_steps=[],
            curve=[],
            seconds=0.0,
            state_bytes_per_parameter=0.0,
            update_density=1.0,
            told_boundary=False,
            diverged=False,
            settings={},
        )
        return [[run] for _ in settings]

    monkeypatch.setattr(sweep_module, "train", spy)
    config = SweepConfig(
        methods=("sgd", "classp", "ewc+classp"),
        tasks=1,
        tries=4,
        together=4,
        tuning_seeds=(7,),
        set=("classp.power=1", "ewc+classp.learning-rate=0.25", "classp.eps=0.5"),
        out=str(tmp_path / "sweep"),
    )
    _, out = sweep(config, "classp-jax sweep")
    run = with_options(RunConfig(), read_config(out / "config.toml"))
    for name, fixed in {
        "sgd": {},
        "classp": {"power": 1.0, "eps": 0.5},
        "ewc+classp": {"power": 1.0, "eps": 0.5, "learning_rate": 0.25},
    }.items():
        assert len(trained[name]) == 4
        for setting in trained[name]:
            assert {key: setting[key] for key in fixed} == fixed
        for key in parse_method(name).settings.keys() - fixed.keys():
            assert len({setting[key] for setting in trained[name]}) > 1
        assert {key: run.settings[name][key] for key in fixed} == fixed
    trained.clear()
    sweep(dataclasses.replace(config, set=(), lr=0.125), "classp-jax sweep")
    for settings in trained.values():
        assert {setting["learning_rate"] for setting in settings} == {0.125}
    with pytest.raises(ValueError, match="no setting 'epsilon'; did you mean 'eps'"):
        sweep(dataclasses.replace(config, set=("classp.epsilon=1",)), "")
    with pytest.raises(ValueError, match="did you mean 'classp'"):
        sweep(dataclasses.replace(config, set=("clasp.eps=1",)), "")


def test_a_sweep_needs_validation_data(tmp_path):
    out = tmp_path / "sweep"
    with pytest.raises(ConfigError, match="validation-fraction must be in"):
        sweep(SweepConfig(validation_fraction=0.0, out=str(out)), "")
    assert not out.exists()


def test_reported_seeds_are_not_tuned_on():
    with pytest.raises(ConfigError, match="also reported"):
        sweep(SweepConfig(tuning_seeds=(5, 1)), "")
