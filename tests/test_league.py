"""The league's page is its template with the stored results, and counts right."""

import pathlib
import re
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
METHODS_ON_SGD = (
    "sgd",
    "sgd-decay",
    "l2-init",
    "shrink-and-perturb",
    "streaming-ewc",
    "streaming-mas",
    "ewc",
    "online-ewc",
    "implicit-ewc",
    "si",
    "mas",
    "lwf",
)


@pytest.fixture(scope="module")
def league(script):
    return script("docs/league/render.py")


def test_the_page_is_its_template_with_the_stored_results(league):
    template = league.TEMPLATE.read_text(encoding="utf-8")
    assert league.render(template) == league.PAGE.read_text(encoding="utf-8")
    typed = re.sub(r"\{\{.+?\}\}", "", template, flags=re.DOTALL)
    typed = re.sub(r"<!-- from elsewhere -->.*?<!-- end -->", "", typed, flags=re.S)
    assert re.findall(r"\d+\.\d+ ?(?:%|points|±|\|)", typed) == []


def test_every_method_had_the_same_candidates_and_seeds_on_every_stream(league):
    runs, common = league.runs, league.without_tuning.common
    for stream in runs.streams():
        found = runs.methods(stream)
        protocol = league.PROTOCOLS[stream]
        counts = {len(one["scores"]) for one in found.values()} - {1}
        assert counts - {protocol.trials} == ({10} if protocol.first_look else set())
        assert {tuple(one["seeds"]) for one in found.values()} == {
            tuple(range(league.PROTOCOLS[stream].seeds))
        }
        assert not {1000} & set(found["sgd"]["seeds"])
        for name, one in found.items():
            # Of scores that are alike when rounded, either may be the best.
            chosen = one["candidates"].index(one["settings"])
            assert one["scores"][chosen] == max(one["scores"]), name
            assert common(name) or not all(
                name in runs.methods(other) for other in runs.alike()
            )


def _fake(scores, average, **more):
    return {
        "scores": scores,
        "average": average,
        "seeds": [0, 1, 2],
        "diverged": [],
        "candidates": [{"learning_rate": 0.1 * k} for k in range(len(scores))],
        "task_boundary_known": False,
        "stored_data": False,
    } | more


@pytest.fixture
def fake(league, monkeypatch):
    files = {
        "permuted-digits": {
            "classp": _fake([0.5, 0.6, 0.9], [0.8, 0.9, 0.85]),
            "classp-leaf": _fake([0.7, 0.6, 0.7], [0.9, 0.95, 0.9]),
            "sgd": _fake([0.1, 0.8, 0.7], [0.5, 0.55, 0.6]),
            "ewc": _fake([0.1, 0.8, 0.7], [0.99] * 3, task_boundary_known=True),
        },
        "split-digits-class": {
            "classp": _fake([0.5, 0.7, 0.2], [0.8, 0.9, 0.85]),
            "classp-leaf": _fake([0.7, 0.9, 0.7], [0.9, 0.95, 0.9]),
            "sgd": _fake([0.1, 0.8, 0.7], [0.5, 0.55, 0.6], diverged=[1]),
            "ewc": _fake([0.1, 0.8, 0.7], [0.99] * 3, task_boundary_known=True),
        },
    }
    monkeypatch.setattr(league.runs, "streams", lambda: list(files))
    monkeypatch.setattr(league.runs, "methods", files.__getitem__)
    monkeypatch.setattr(league.runs, "METHODS", tuple(files["permuted-digits"]))
    protocols = {s: league.PROTOCOLS[s]._replace(trials=3) for s in files}
    monkeypatch.setattr(league.runs, "PROTOCOLS", protocols)
    league.runs.named.cache_clear()
    yield league
    league.runs.named.cache_clear()


def test_methods_with_fewer_trials_are_shown_and_not_compared(fake):
    runs = fake.runs
    found = runs.methods("permuted-digits")
    found["classp-leaf"] = _fake([0.7, 0.6], [0.9, 0.95, 0.9])
    assert runs.ranked("permuted-digits", free=True) == ["classp", "sgd"]
    assert "classp-leaf" not in fake.form("classp-leaf")
    assert fake.differences("classp-leaf", "sgd").keys() == {"split-digits-class"}


def test_ranks_and_differences(fake):
    # Means of the best trials: 0.8 for both forms; the first of equals.
    runs = fake.runs
    assert runs.named() == "classp"
    assert runs.ranked("permuted-digits")[0] == "ewc"
    assert runs.ranked("permuted-digits", free=True) == ["classp-leaf", "classp", "sgd"]
    assert runs.ranked("split-digits-class")[-1] == "sgd"
    assert runs.difference("permuted-digits", "sgd", "classp").word == "behind"
    assert runs.difference("split-digits-class", "sgd", "classp").word == ""
    assert fake.leads("permuted-digits")


def test_one_setting_is_chosen_on_the_other_streams(fake):
    found = fake.without_tuning.untuned("classp")
    setting, score, lost = found["permuted-digits"]
    assert (setting["learning_rate"], score) == (0.1, 60.0)
    assert lost == pytest.approx(30)
    setting, score, lost = found["split-digits-class"]
    assert setting["learning_rate"] == pytest.approx(0.2)
    assert (score, lost) == (20.0, pytest.approx(50))


def test_the_loss_is_to_the_best_of_all_trials_of_a_stream(fake):
    # One stream has a trial more than the settings that both have.
    files = {s: fake.runs.methods(s)["classp"] for s in fake.runs.streams()}
    more = files["permuted-digits"]
    more["candidates"] = [*more["candidates"], {"learning_rate": 5.0}]
    more["scores"] = [*more["scores"], 0.95]
    setting, score, lost = fake.without_tuning.untuned("classp")["permuted-digits"]
    assert (setting["learning_rate"], score) == (0.1, 60.0)
    assert lost == pytest.approx(35)


def test_the_form_is_chosen_on_the_other_streams_too(fake, monkeypatch):
    without = fake.without_tuning
    monkeypatch.setattr(without, "FORMS", ("classp", "classp-leaf"))
    # classp-leaf's second setting is best on the second stream, classp's third on the
    # first; neither is on the other one.
    chosen, mean = without.form_and_setting_without()
    assert chosen == ["classp-leaf", "classp"]
    assert mean == pytest.approx((60 + 20) / 2)


def test_the_setting_that_loses_least_over_all_streams(fake):
    names = ["permuted-digits", "split-digits-class"]
    setting, scores = fake.without_tuning.shared_setting("classp", names)
    # It loses 30 and 0 points, the others 40 and 20, 0 and 50.
    assert setting["learning_rate"] == pytest.approx(0.1)
    np.testing.assert_allclose(scores, [60, 70])


def test_the_page_s_words_hold(league):
    """What its sentences say beyond the words that intervals give."""
    runs, words = league.runs, league.differences
    for stream, brake in words("protect-adam", "adam").items():
        above_sgd = runs.difference(stream, "adam", "sgd")
        far = above_sgd.word == "ahead" and above_sgd.mean > 5
        assert (brake.word == "ahead" and brake.mean > 1) == far, stream
    on_sentiment = {
        name: runs.difference("sentiment", name, "adam") for name in league.FORMS
    }
    assert on_sentiment["classp"].word == "behind"
    assert on_sentiment["classp-leaf"].word == "ahead"
    ranked = runs.ranked("sentiment", free=True)
    assert ranked[:2] == ["protect-rmsprop", "protect-adam"]
    assert runs.difference("sentiment", *ranked[:2]).word == "ahead"
    for form in ("classp", "protect-adam", "protect-rmsprop"):
        assert runs.percent("streaming-digits", form, "0 back").mean() < 30
    gains = {
        (option, method): runs.difference(
            "split-digits-class", f"{option}+{method}", method
        ).mean
        for option in ("labels-trick", "hard-ash", "running-moments")
        for method in ("sgd", "adagrad", "adam")
    }
    best = {m: max((gains[k], k[0]) for k in gains if k[1] == m)[1] for _, m in gains}
    assert best == {
        "sgd": "labels-trick",
        "adagrad": "running-moments",
        "adam": "running-moments",
    }
    # What always answering the most frequent class gives on test data.
    same_answer = runs.percent("sentiment", "sgd-decay")
    np.testing.assert_allclose(same_answer, 54.68, atol=0.01)
    assert all(runs.percent("sentiment", m).mean() < 56 for m in METHODS_ON_SGD)
    for tuned in (s for s in runs.streams() if league.PROTOCOLS[s].tuning):
        assert league.PROTOCOLS[tuned].tuned_on in league.provenance(tuned)
        assert league.PROTOCOLS[tuned].tuned_on


def test_readme_says_how_often_it_leads(league):
    runs = league.runs
    streams = runs.wide()
    words = "no, one, two, three, four, five, six, seven, eight, nine, ten, eleven"
    numbers = words.split(", ")
    count = numbers[sum(map(league.leads, streams))]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"on {count} of {numbers[len(streams)]} small protocols" in readme
    assert runs.named() == "classp-window"
    assert "with a window, first without data or boundary" in readme
    against = [runs.difference(s, runs.named(), "adagrad").word for s in streams]
    assert ("behind" not in against) == ("nowhere behind AdaGrad" in readme)


def test_claims_from_three_seeds(league):
    claims = sys.modules[league.few_seeds.__module__]
    rng = np.random.default_rng(0)
    differences = rng.normal(1.0, 1.5, size=(40, 3))
    for row, word in zip(differences, claims.words(differences), strict=True):
        assert word == league.paired_difference(row.tolist(), [0.0] * 3).word
    # Four choices of 3 of 4; all four are ahead, and so are (1, 1, 1.1) and no others.
    found = claims.few_seeds([np.array([1.0, 1.0, 1.1, 5.0])])
    assert league.paired_difference([1.0, 1.0, 1.1, 5.0], [0.0] * 4).word == "level"
    assert found == claims.Claims(1, 0.25, 0.0, 0.0)
    found = claims.few_seeds([np.array([-1.0, 1.0, 1.0, 1.0, 1.2, 1.3, 1.1])])
    assert found.missed + found.wrong > 0
    assert found.reversed_order == 0


def test_a_plastic_trial_keeps_most_of_those_that_learn(league):
    study = sys.modules[league.PROTOCOLS["many-digits"].__class__.__module__]
    pairs = [(0.95, 0.1), (0.8, 0.9), (0.9, 0.3), (0.91, 0.2)]
    trials = [{"0 back": a, "20 back": b} for a, b in pairs]
    assert study.plastic_trial(trials, 0.9) == 2
    assert study.plastic_trial(trials, 0.99) == 0
    assert study.plastic_trial([{}, trials[1]], 0.99) == 1


def test_measures_look_at_the_ends_of_the_last_ten_tasks(league):
    study = sys.modules[league.PROTOCOLS["many-digits"].__class__.__module__]
    tasks = 40
    matrix = np.full((tasks + 1, tasks), np.nan)
    for end in range(1, tasks + 1):
        matrix[end, :end] = [0.001 * (end - 1 - k) for k in range(end)]
    matrix[:31] += 5
    found = study.measures(matrix.tolist())
    assert found["0 back"] == 0
    assert found["5 back"] == pytest.approx(0.005)
    assert found["recent"] == pytest.approx(0.025 / 3)
    assert set(study.measures(matrix[:13, :12].tolist())) == {"0 back", "recent"}


def test_a_curve_joins_the_settings_that_no_other_beats(league):
    points = {"sgd": [(0.9, 0.2), (0.5, 0.1), (0.7, 0.3)], "classp": [(0.8, 0.4)]}
    (axes,) = league.frontier_picture(points, "newest task", "twenty back").axes
    dots, curve, *_ = axes.get_lines()
    np.testing.assert_allclose(sorted(dots.get_xdata()), [50, 70, 90])
    np.testing.assert_allclose(curve.get_xydata(), [[70, 30], [90, 20]])
    assert axes.get_xlabel() == "newest task (%)"
    _, names = axes.get_legend_handles_labels()
    assert names == ["sgd", "classp"]
