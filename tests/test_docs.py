"""Every number in the documentation equals the stored result that it names."""

import inspect
import json
import pathlib
import re

import numpy as np
import pytest

import classp_jax
from classp_jax import finetune, regularizers, rivals
from classp_jax.continual import presets
from classp_jax.continual.results import load

ROOT = pathlib.Path(__file__).parents[1]
CHOOSING = json.loads((ROOT / "docs/choosing.json").read_text(encoding="utf-8"))


def _trials(stream, part="scaling", **fixed):
    return [
        t
        for t in CHOOSING["results"][stream][part]
        if all(t[name] == value for name, value in fixed.items())
    ]


def _best(stream, part="scaling", **fixed):
    return max(t["average"] for t in _trials(stream, part, **fixed))


def _at(stream, rate, eps):
    (found,) = _trials(stream, learning_rate=rate, eps=eps, power=1.0)
    return found["average"]


def _loss_over_small_epsilons(stream, rate):
    values = [
        t["average"]
        for t in _trials(stream, learning_rate=rate, power=1.0)
        if t["eps"] <= 0.01
    ]
    return max(values) - min(values)


def test_choosing_quotes_what_was_measured():
    page = (ROOT / "docs/choosing.md").read_text(encoding="utf-8")
    expected = [
        # Learning rate
        _at("permuted", 0.1, 1e-3),
        _at("permuted", 0.01, 1e-3),
        _at("permuted", 1.0, 1e-3),
        # Epsilon
        _loss_over_small_epsilons("permuted", 0.1),
        _loss_over_small_epsilons("split", 0.01),
        _at("permuted", 0.3, 1e-6),
        _at("permuted", 0.3, 0.1),
        # Power
        *(_best("permuted", power=p) for p in (1.0, 1.5, 2.0, 3.0, 0.5)),
        *(_best("split", power=p) for p in (0.5, 1.0, 2.0, 3.0)),
        # Threshold
        _best("permuted", "threshold", threshold=1e-8),
        _best("permuted", "threshold", threshold=0.0),
        _best("split", "threshold", threshold=1e-5),
        _best("split", "threshold", threshold=0.0),
        _best("permuted", "threshold", threshold=0.0)
        - _best("permuted", "threshold", threshold=1e-3),
    ]
    quoted = re.findall(r"(\d+\.\d)(?= (?:%|points)| and \d+\.\d points)", page)
    assert quoted == [f"{100 * value:.1f}" for value in expected]
    for date in (CHOOSING["about"]["date"], "seeds 1000 and 1001"):
        assert date in " ".join(page.split())


def test_the_bests_that_choosing_names():
    best = {
        s: max(_trials(s, power=1.0), key=lambda t: t["average"])
        for s in ("permuted", "split")
    }
    assert (best["permuted"]["learning_rate"], best["permuted"]["eps"]) == (0.1, 1e-3)
    assert (best["split"]["learning_rate"], best["split"]["eps"]) == (0.01, 1e-7)
    for stream, tau in (("permuted", 1e-8), ("split", 1e-5)):
        trials = _trials(stream, "threshold")
        assert max(trials, key=lambda t: t["average"])["threshold"] == tau


def test_the_digits_report_is_drawn_from_its_results():
    from classp_jax.continual.report import markdown

    folder = ROOT / "docs/digits"
    assert (folder / "report.md").read_text(encoding="utf-8") == markdown(load(folder))


@pytest.fixture(scope="module")
def paper(script):
    return script("docs/paper/render.py")


def test_paper_is_its_template_with_the_stored_results(paper):
    template = paper.TEMPLATE.read_text(encoding="utf-8")
    assert paper.render(template) == paper.PAGE.read_text(encoding="utf-8")


def test_no_result_in_the_paper_s_template_is_typed(paper):
    template = paper.TEMPLATE.read_text(encoding="utf-8")
    typed = re.sub(r"\{\{.+?\}\}", "", template, flags=re.DOTALL)
    # What the scripts themselves gave is a fact from elsewhere.
    typed = re.sub(r"<!-- from elsewhere -->.*?<!-- end -->", "", typed, flags=re.S)
    assert re.findall(r"\d+\.\d+ ?(?:%|points|±|\|)", typed) == []


def test_the_template_refuses_what_is_misspelt(paper):
    import jinja2

    with pytest.raises(jinja2.UndefinedError, match="acccc"):
        paper.render('{{ acccc("mnist-fashion", "classp") }}')
    assert paper.render("{{ 1.25 }} {{ 'a' }}") == "1.2 a"


def test_the_paper_s_numbers_depend_on_the_stored_results(paper, monkeypatch):
    name, method = "mnist-fashion", "classp"
    before = paper.acc(name, method)
    runs = paper.runs_of(name, method)
    assert before == paper.spread(
        [100 * sum(run.matrix[-1]) / len(run.matrix[-1]) for run in runs]
    )
    worse = [
        run.__class__(**{**vars(run), "matrix": [[0.0, 0.0]] * len(run.matrix)})
        for run in runs
    ]
    monkeypatch.setattr(paper, "runs_of", lambda *_: worse)
    assert paper.acc(name, method) == "0.0 ± 0.0"


@pytest.mark.parametrize("name", [n for n in presets.sizes() if n != "digits"])
def test_stored_results_come_from_the_presets(paper, name):
    stored = paper.results(name)
    preset = presets.load(name)
    for option, value in stored.configuration["training"].items():
        expected = getattr(preset.training, option, value)
        expected = list(expected) if isinstance(expected, tuple) else expected
        assert value == expected, option
    assert stored.configuration["network"]["name"] == preset.network.model
    assert {run.method for run in stored.runs} == set(preset.methods)
    for run in stored.runs:
        assert run.settings == pytest.approx(preset.settings[run.method])


def test_digits_were_run_as_the_preset_says():
    runs = load(ROOT / "docs/digits").runs
    settings = presets.load("digits").settings
    assert {run.seed for run in runs} == set(range(10))
    for run in runs:
        assert run.settings == pytest.approx(settings[run.method])


def test_the_paper_s_words_hold(paper):
    """What its sentences say beyond numbers and the words of intervals."""
    elsewhere = re.search(
        r"<!-- from elsewhere -->(.*?)<!-- end -->", paper.PAGE.read_text("utf-8"), re.S
    )
    assert elsewhere is not None
    gave = [float(number) for number in re.findall(r"\d\d\.\d", elsewhere[1])]
    classp = [paper.as_scripts("scale-later+classp-published", k) for k in (0, 1)]
    for ours, theirs in zip(classp, gave[:2], strict=True):
        assert abs(ours.mean() - theirs) < 4
    assert abs(np.mean(classp) - np.mean(gave[:2])) < 2
    ewc = paper.as_scripts("ewc-published", 0)
    assert np.nanmean(ewc) - gave[3] > 2 * np.nanstd(ewc, ddof=1)
    # The defaults, and what a weight keeps.
    losses = paper.studies.worst_loss(
        ["mnist-fashion", "mnist-fashion-mlp", "permuted-mnist", "split-mnist-class"]
    )
    assert np.argmin(losses) == 2
    assert paper.studies.BUCKETS[2][0] <= 0.1 < paper.studies.BUCKETS[2][1]
    kept = {
        m: round(paper.runs_of("mnist-fashion", m)[0].kept_bytes_per_parameter)
        for m in ("classp", "adagrad", "ewc", "si")
    }
    assert kept == {"classp": 4, "adagrad": 4, "ewc": 8, "si": 4}
    # Priors and thresholds.
    assert paper.lowest("mnist-fashion", "classp-prior", 0) < 75
    trials = [
        paper.studies.best_trial("mnist-fashion", m) for m in ("classp-prior", "classp")
    ]
    assert float(trials[0]) > float(trials[1])
    digits = paper.studies.study("permuted-digits")
    assert max(digits, key=lambda v: digits[v]["validation"]) == "power 0.5 to 1.5"


def test_the_paper_s_numbers_in_words_hold(paper):
    """Budgets, seeds and sizes that its sentences name."""
    budgets = {
        "mnist-fashion": 10,
        "phrasebank-imdb": 8,
        "mnist-fashion-mlp": 20,
        "permuted-mnist": 20,
        "split-mnist-task": 20,
        "split-mnist-class": 20,
    }
    assert budgets.keys() == paper.TUNED.keys()
    for name, budget in budgets.items():
        made = paper.studies.trials(name)
        assert {len(trials) for trials in made.values()} == {budget}, name
        untuned = set(presets.load(name).methods) - set(made)
        # The study's variant, with a budget of its own.
        assert untuned <= {"classp-prior"}, name
        for _ in untuned:
            assert len(paper.studies.study(name)["own prior"]["scores"]) == budget
    assert set(presets.sizes()) - {"digits"} <= set(paper.PRESETS)
    for name in paper.PRESETS:
        few = name.startswith("mnist-fashion-published")
        assert paper.seeds(name) == ("0 to 2" if few else "0 to 9"), name
    settings = presets.load("mnist-fashion").settings
    ratio = settings["ewc+classp"]["strength"] / settings["ewc"]["strength"]
    assert 200 < ratio < 1000
    settings = presets.load("split-mnist-class").settings
    for method in ("sgd", "adagrad", "classp"):
        assert settings[method]["learning_rate"] < 0.0015
    si = paper.runs_of("mnist-fashion", "si")[0]
    assert round(si.state_bytes_per_parameter) == 20


def test_the_study_s_words_follow_from_its_intervals(paper):
    words = {
        name: paper.studies.variant_difference("permuted-digits", name).word
        for name in paper.studies.study("permuted-digits")
    }
    assert {words[v] for v in ("classp", "relative threshold")} == {"ahead"}
    assert {words[v] for v in ("density", "power 0.5 to 1.5")} == {"level"}
    behind = {"scaling from task 2", "accumulator reset", "power 0.5", "power 2"}
    behind |= {"power 3", "exclusive", "rate over fan-in"}
    assert {words[name] for name in behind} == {"behind"}
    assert {words[name] for name in ("bound", "eps times fan-in")} == {"level"}


def test_no_comparison_where_a_seed_diverged(paper):
    # Of whose seeds enough are left for an interval.
    assert 0 < paper.diverged("mnist-fashion", "ewc") < 2
    assert paper.against("mnist-fashion", "ewc") == "-"
    assert "as a seed diverged" in paper.stands("mnist-fashion", "ewc")
    standing = paper.standing("mnist-fashion")
    assert standing.endswith("not compared, as a seed diverged: `ewc`.")


def test_below_every_table_stands_when_it_was_made(paper):
    blocks = paper.PAGE.read_text("utf-8").split("\n\n")
    tables = [i for i, block in enumerate(blocks) if block.startswith("|")]
    assert len(tables) == 11
    for i in tables:
        # A second table may stand between, with a line of text.
        (made, *_) = (b for b in blocks[i:] if b.startswith(("*Made:*", "## ")))
        assert re.search(r"20\d\d-\d\d-\d\d", made)
    for name in paper.PRESETS:
        days = {run.provenance.date[:10] for run in paper.results(name).runs}
        assert all(day in paper.provenance(name) for day in days)


@pytest.mark.parametrize(
    "transform",
    [
        classp_jax.classp,
        classp_jax.classp_published,
        classp_jax.mask_by_threshold,
        classp_jax.mask_to_density,
        classp_jax.protect,
        classp_jax.scale_by_generalized_adagrad,
        finetune.importance_from_magnitude,
        finetune.merge,
        regularizers.ewc,
        regularizers.fisher_diagonal,
        regularizers.implicit_ewc,
        regularizers.l2_to_anchor,
        regularizers.mas_importance,
        regularizers.online_ewc,
        regularizers.si,
        rivals.bayesian_gradient_descent,
        rivals.shrink_and_perturb,
        rivals.streaming_importance,
        rivals.upgd,
    ],
    ids=lambda transform: transform.__name__,
)
def test_docstrings_say_what_parameters_are_before_the_formula(transform):
    words, formula, *_ = re.split(r"\.\. math::\n", transform.__doc__)
    names = inspect.signature(transform).parameters
    assert any(f"``{name}``" in words for name in names)
    formula = formula.split("\n\n    ")[0]
    arguments = transform.__doc__.split("Args:")[1].split("Returns:")[0]
    symbols = re.findall(r"\n +(\w+): :math:`(\\\w+|\w)\b", arguments)
    used = [
        name
        for name, symbol in symbols
        if re.search(rf"(?<![A-Za-z\\]){re.escape(symbol)}(?![A-Za-z])", formula)
    ]
    assert [name for name in used if f"``{name}``" not in words] == []
