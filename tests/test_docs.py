"""Every number in the documentation equals the stored result that it names."""

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
