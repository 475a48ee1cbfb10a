"""Every number in the documentation equals the stored result that it names."""

import importlib.util
import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CHOOSING = json.loads((ROOT / "docs/choosing.json").read_text(encoding="utf-8"))


def _tries(stream, part="scaling", **fixed):
    return [
        t
        for t in CHOOSING["results"][stream][part]
        if all(t[name] == value for name, value in fixed.items())
    ]


def _best(stream, part="scaling", **fixed):
    return max(t["average"] for t in _tries(stream, part, **fixed))


def _at(stream, rate, eps):
    (found,) = _tries(stream, learning_rate=rate, eps=eps, power=1.0)
    return found["average"]


def _loss_over_small_epsilons(stream, rate):
    values = [
        t["average"]
        for t in _tries(stream, learning_rate=rate, power=1.0)
        if t["eps"] <= 0.01
    ]
    return max(values) - min(values)


def test_choosing_quotes_what_was_measured():
    page = (ROOT / "docs/choosing.md").read_text(encoding="utf-8")
    expected = [
        # Learning rate
        _at("permuted", 0.1, 1e-6),
        _at("permuted", 0.01, 1e-6),
        _at("permuted", 1.0, 1e-6),
        # Epsilon
        _loss_over_small_epsilons("permuted", 0.1),
        _loss_over_small_epsilons("split", 0.01),
        _at("permuted", 0.3, 1e-6),
        _at("permuted", 0.3, 0.1),
        # Power
        *(_best("permuted", power=p) for p in (1.0, 1.5, 2.0, 3.0, 0.5)),
        *(_best("split", power=p) for p in (0.5, 1.0, 2.0, 3.0)),
        # Threshold
        _best("permuted", "threshold", threshold=1e-5),
        _best("permuted", "threshold", threshold=0.0),
        _best("split", "threshold", threshold=1e-6),
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
        s: max(_tries(s, power=1.0), key=lambda t: t["average"])
        for s in ("permuted", "split")
    }
    assert (best["permuted"]["learning_rate"], best["permuted"]["eps"]) == (0.1, 1e-6)
    assert (best["split"]["learning_rate"], best["split"]["eps"]) == (0.01, 1e-7)
    for stream, tau in (("permuted", 1e-5), ("split", 1e-6)):
        tries = _tries(stream, "threshold")
        assert max(tries, key=lambda t: t["average"])["threshold"] == tau


@pytest.fixture(scope="module")
def digits():
    return json.loads((ROOT / "docs/digits/results.json").read_text(encoding="utf-8"))


def test_readme_quotes_the_stored_run(digits):
    from classp_jax.continual.report import markdown
    from classp_jax.continual.results import load

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    report = markdown(load(ROOT / "docs/digits"))
    rows = [line for line in report.splitlines() if line.startswith("| ")]
    for row in rows[: 2 + len({r["method"] for r in digits["runs"]})]:
        name, accuracy, *_ = (cell.strip() for cell in row.split("|")[1:-1])
        if name in ("Method", "---"):
            continue
        assert re.search(rf"\| `?{re.escape(name)}`? \| {re.escape(accuracy)} ", readme)
    assert digits["date"] in readme


@pytest.fixture(scope="module")
def paper():
    path = ROOT / "docs/paper/render.py"
    spec = importlib.util.spec_from_file_location("render", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_paper_is_its_template_with_the_stored_results(paper):
    template = paper.TEMPLATE.read_text(encoding="utf-8")
    assert paper.render(template) == paper.PAGE.read_text(encoding="utf-8")


def test_no_result_in_the_paper_s_template_is_typed(paper):
    template = paper.TEMPLATE.read_text(encoding="utf-8")
    typed = re.sub(r"\{\{.+?\}\}", "", template, flags=re.DOTALL)
    # What the scripts themselves gave is a fact from elsewhere.
    typed = re.sub(r"<!-- from elsewhere -->.*?<!-- end -->", "", typed, flags=re.S)
    assert re.findall(r"\d+\.\d+ ?(?:%|points|±|\|)", typed) == []


def test_the_paper_s_numbers_depend_on_the_stored_results(paper, monkeypatch):
    name, method = "mnist-fashion", "classp"
    before = paper.acc(name, method)
    runs = paper.of(name, method)
    assert before == paper.spread(
        [100 * sum(run.matrix[-1]) / len(run.matrix[-1]) for run in runs]
    )
    worse = [
        run.__class__(**{**vars(run), "matrix": [[0.0, 0.0]] * len(run.matrix)})
        for run in runs
    ]
    monkeypatch.setattr(paper, "of", lambda *_: worse)
    assert paper.acc(name, method) == "0.0 ± 0.0"


def test_stored_results_come_from_the_presets(paper):
    from classp_jax.continual.config import (
        RunConfig,
        preset_sizes,
        read_preset,
        with_options,
    )

    free = {"source", "data_dir", "seeds", "out", "methods"}
    for name in preset_sizes():
        stored = paper.results(name).configuration
        size = "paper" if name.endswith("published") else "small"
        preset = vars(with_options(RunConfig(), read_preset(name, size)))
        for key, value in preset.items():
            if key in free or key not in stored:
                continue
            value = list(value) if isinstance(value, tuple) else value
            assert stored[key] == value, (name, key)
        assert set(preset["settings"]) == set(stored["methods"])


def test_readme_quotes_the_paper_s_results(paper):
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for method in ("classp", "adagrad", "adam", "sgd", "replay"):
        assert f"{paper.acc('mnist-fashion', method)} % for `{method}`" in readme
    for what in (0, 1):
        score = paper.spread(paper.as_scripts("scale-later+classp-published", what))
        assert f"{score} %" in readme
