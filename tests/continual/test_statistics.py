"""Lines of the table against numpy, scipy and a table of Student's distribution."""

import math

import numpy as np
import pytest
import scipy.stats

from classp_jax.continual.results import ResultsError
from classp_jax.continual.results.statistics import paired_difference, rows
from tests.continual.fakes import make_results, make_run


def with_accuracy(method, seed, accuracy, **changes):
    return make_run(method, seed, 1, matrix=[[0.1], [accuracy]], **changes)


def estimate(row, name):
    found = row.estimates[name]
    assert found is not None
    return found


def difference(row):
    assert row.difference is not None
    return row.difference


def test_interval_by_hand():
    # Differences 1, 2, 3, 4: mean 2.5, s = sqrt(5/3); t(0.975, 3) = 3.182 in the books.
    found = paired_difference([2, 4, 6, 8], [1, 2, 3, 4])
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert found.mean == 2.5
    assert found.low == pytest.approx(2.5 - half, rel=1e-6)
    assert found.high == pytest.approx(2.5 + half, rel=1e-6)
    assert found.seeds == 4


@pytest.mark.parametrize("count", [2, 5, 10, 50])
def test_interval_is_scipys_paired_t_test(count):
    rng = np.random.default_rng(count)
    a, b = rng.normal(0.8, 0.02, count), rng.normal(0.79, 0.02, count)
    found = paired_difference(a.tolist(), b.tolist())
    expected = scipy.stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    # The words are the test's at 5 %.
    assert (found.word == "level") == (expected.pvalue > 0.05)


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([0.1, 0.11, 0.09], "ahead"),
        ([-0.1, -0.11, -0.09], "behind"),
        ([0.1, -0.1, 0.05], "level"),
        ([0.0, 0.0], "level"),
        ([0.125, 0.125], "ahead"),
        ([0.1], ""),
        ([], ""),
        ([0.1, math.nan], ""),
    ],
)
def test_words_follow_from_the_interval(differences, word):
    assert paired_difference(differences, [0.0] * len(differences)).word == word


def test_differences_are_taken_over_the_seeds_that_both_have():
    results = make_results(
        *(with_accuracy("sgd", seed, 0.5 + seed / 100) for seed in (0, 1, 2, 7)),
        *(with_accuracy("mine", seed, 0.6 + seed / 100) for seed in (2, 1, 9)),
    )
    sgd, mine = rows(results)
    assert sgd.difference is None
    assert difference(mine).seeds == 2
    assert difference(mine).mean == pytest.approx(0.1)
    # Seed by seed the difference is the same: the spread of seeds is no part of it.
    assert difference(mine).high - difference(mine).low < 1e-12
    assert difference(rows(results, "mine")[0]).mean == pytest.approx(-0.1)


def test_means_and_deviations():
    accuracies = [0.5, 0.75, 0.6]
    (row,) = rows(
        make_results(*(with_accuracy("sgd", i, a) for i, a in enumerate(accuracies)))
    )
    found = estimate(row, "average_accuracy")
    assert found.mean == pytest.approx(np.mean(accuracies))
    assert found.sd == pytest.approx(np.std(accuracies, ddof=1))
    assert row.seeds == (0, 1, 2)
    densities = [np.mean(make_run("sgd", i, 1).update_density) for i in range(3)]
    assert estimate(row, "update_density").mean == pytest.approx(np.mean(densities))


def test_one_seed_has_no_deviation_and_no_interval():
    first, second = rows(
        make_results(with_accuracy("sgd", 0, 0.5), with_accuracy("adam", 0, 0.6))
    )
    assert math.isnan(estimate(first, "average_accuracy").sd)
    assert difference(second).mean == pytest.approx(0.1)
    assert difference(second).word == ""


def test_a_diverged_seed_takes_the_numbers_of_its_method():
    results = make_results(
        with_accuracy("sgd", 0, 0.5, diverged=True),
        with_accuracy("sgd", 1, 0.5),
        with_accuracy("adam", 0, 0.6),
        with_accuracy("adam", 1, 0.6),
        with_accuracy("mine", 0, 0.7),
        with_accuracy("mine", 1, 0.7),
    )
    sgd, adam, mine = rows(results)
    assert sgd.diverged == 1
    assert sgd.estimates["average_accuracy"] is None
    assert estimate(sgd, "state_bytes_per_parameter").mean == 4.0
    # The first that has not diverged is the reference.
    assert adam.difference is None
    assert difference(mine).word == "ahead"
    assert all(row.difference is None for row in rows(results, "sgd"))


def test_rounding_is_pooled_over_the_seeds_that_have_it():
    spreads = [0.03, 0.04, None]
    (row,) = rows(
        make_results(
            *(with_accuracy("sgd", i, 0.5, ulp_spread=s) for i, s in enumerate(spreads))
        )
    )
    assert row.rounding == pytest.approx(math.sqrt((0.03**2 + 0.04**2) / 2))
    (without,) = rows(make_results(with_accuracy("sgd", 0, 0.5)))
    assert math.isnan(without.rounding)


def test_an_unknown_reference_is_refused_by_name():
    with pytest.raises(ResultsError, match=r"no method 'sdg' .* there are sgd, adam\."):
        rows(make_results(make_run("sgd"), make_run("adam")), "sdg")
    with pytest.raises(ResultsError, match="no finished runs"):
        rows(make_results())
