"""Tuning: equal numbers of trials, stored as they come, the same after a stop."""

import itertools
import json

import numpy as np
import pytest

from classp_jax import continual
from classp_jax.continual.errors import ContinualError
from classp_jax.continual.methods.protocol import Method, Setting
from classp_jax.continual.results import Run
from classp_jax.continual.tuning import Space, Trial, best, score, search

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETTINGS = {
    "learning_rate": Setting(0.1, 1e-3, 1.0),
    "power": Setting(1.0, choices=(0.5, 1.0, 2.0)),
    "size": Setting(4, 1, 64, integer=True),
    "untuned": Setting(7.0),
}


def method(name="mine"):
    return Method(name, "", SETTINGS, make=lambda *_: None)  # type: ignore[arg-type]


def run(accuracy, seed=0, **more):
    return Run(method="mine", seed=seed, matrix=[[0.1], [accuracy]], **more)


def evaluate(_, batch):
    """The best is at learning rate 0.03, power 1, size 16."""
    return [
        [
            run(
                0.9
                - 0.1 * abs(np.log10(s["learning_rate"] / 0.03))
                - 0.1 * abs(s["power"] - 1)
                - 0.03 * abs(np.log2(s["size"] / 16))
            )
        ]
        for s in batch
    ]


def space(**fixed):
    return Space(method(), SETTINGS, fixed)


def test_finds_a_known_optimum_within_the_ranges():
    calls = []

    def counted(method, batch):
        calls.append(len(batch))
        return evaluate(method, batch)

    found = search([space()], counted, trials=60, together=8)["mine"]
    assert calls == [8] * 7 + [4]
    winner = best(found).settings
    assert winner["power"] == 1.0
    assert 0.01 < winner["learning_rate"] < 0.1
    for trial in found:
        assert 1e-3 <= trial.settings["learning_rate"] <= 1.0
        assert trial.settings["size"] in range(1, 65)
        assert trial.settings["untuned"] == 7.0
        rate = trial.settings["learning_rate"]
        assert rate == float(f"{rate:.3g}"), "a table cannot show it"


def test_fixed_settings_are_not_drawn_and_nothing_to_draw_is_one_trial():
    found = search([space(power=2.0)], evaluate, trials=9)["mine"]
    assert {t.settings["power"] for t in found} == {2.0}
    assert len({t.settings["learning_rate"] for t in found}) == 9
    fixed = {name: 1.0 for name in SETTINGS}
    assert len(search([space(**fixed)], evaluate, trials=9)["mine"]) == 1


@pytest.mark.parametrize("batches_before", [1, 2])
def test_an_interrupted_search_goes_on_to_the_same_trials(tmp_path, batches_before):
    whole = search([space()], evaluate, trials=24, together=8)
    count = itertools.count()

    def interrupted(method, batch):
        if next(count) == batches_before:
            raise KeyboardInterrupt
        return evaluate(method, batch)

    with pytest.raises(KeyboardInterrupt):
        search([space()], interrupted, trials=24, together=8, folder=tmp_path)
    stored = json.loads((tmp_path / "trials.json").read_text())
    assert len(stored["trials"]["mine"]) == 8 * batches_before
    calls = []

    def counted(method, batch):
        calls.append(len(batch))
        return evaluate(method, batch)

    again = search([space()], counted, trials=24, together=8, folder=tmp_path)
    assert again == whole
    assert calls == [8] * (3 - batches_before)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"identity": {"seeds": [2]}}, r"another search: seeds is \[1\] there"),
        ({"together": 4}, "another search: together is 8 there and 4 here"),
        ({"spaces": [space(power=2.0)]}, "another search: mine is"),
        ({"spaces": [space()._replace(transformation="a")]}, "another search: mine is"),
    ],
)
def test_another_search_is_never_overwritten(tmp_path, second, message):
    first = {"spaces": [space()], "trials": 8, "identity": {"seeds": [1]}}
    search(evaluate=evaluate, folder=tmp_path, **first)
    before = (tmp_path / "trials.json").read_bytes()
    with pytest.raises(ContinualError, match=message):
        search(evaluate=evaluate, folder=tmp_path, **(first | second))
    assert (tmp_path / "trials.json").read_bytes() == before


def no_training(*_):
    raise AssertionError("it trained")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trials": "2"}, "trials must be a whole number"),
        ({"ranges": {"sgd": {"learning_rate": 3.0}}}, r"must be \(low, high\): 3.0"),
        ({"ranges": {"sgd": {"learning_rate": (1.0, 0.1)}}}, "0 < low <= high"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(arguments, message):
    with pytest.raises(ContinualError, match=message):
        continual.tune("no stream is looked at", "mlp", ["sgd"], **arguments)


def test_a_folder_that_cannot_be_written_is_found_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ContinualError, match="Cannot write"):
        search([space()], no_training, trials=1, folder=tmp_path / "file" / "below")


def test_a_diverged_seed_is_worth_nothing():
    assert score([run(0.5), run(0.9)]) == pytest.approx(0.7)
    assert score([run(0.5), run(0.9, diverged=True)]) == 0.0
    assert best([Trial({}, 0.2), Trial({"a": 1.0}, 0.3), Trial({}, 0.3)]).settings
