"""Splits show the examples that they should; cuts are stratified; seeds are seeds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classp_jax.continual.data.arrays import Split, generator
from classp_jax.continual.data.sources import hold_out
from classp_jax.continual.errors import DataError


def test_a_split_shows_its_rows_with_the_pixels_in_order():
    x = np.arange(3 * 2 * 2 * 3).reshape(3, 2, 2, 3)
    y = np.array([5, 6, 7], np.int32)
    rows, pixels = np.array([0, 2]), np.array([3, 0, 2, 1])
    split = Split(x, y, rows, pixels)
    expected = np.zeros((2, 2, 2, 3), int)
    for i, row in enumerate(rows):
        for to, source in enumerate(pixels):
            expected[i, to // 2, to % 2] = x[row, source // 2, source % 2]
    assert len(split) == 2
    np.testing.assert_array_equal(split.inputs(), expected)
    assert split.labels().tolist() == [5, 7]
    assert split.indices().tolist() == [0, 2]


def test_what_a_split_shows_is_a_copy():
    whole = Split(np.zeros((2, 3)), np.zeros(2, np.int32))
    whole.inputs()[:] = 1
    whole.labels()[:] = 1
    assert whole.indices().tolist() == [0, 1]
    assert not whole.x.any()
    assert not whole.y.any()


@given(
    labels=st.lists(st.integers(0, 6), min_size=20, max_size=300),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**70),
)
@settings(deadline=None, max_examples=40)
def test_cuts_are_stratified_and_keep_the_order(labels, fraction, seed):
    y = np.array(labels, np.int32)
    rest, held = hold_out(Split(y, y), fraction, generator(seed))
    assert sorted([*rest.indices(), *held.indices()]) == list(range(len(y)))
    assert (np.diff(rest.indices()) > 0).all()
    assert (np.diff(held.indices()) > 0).all()
    counts = np.bincount(y, minlength=7)
    several = int(counts[counts > 1].sum())
    assert len(held) == int(fraction * several)
    found = np.bincount(held.labels(), minlength=7)
    assert not found[counts == 1].any()
    if min(len(held), several - len(held)) >= np.sum(counts > 1):
        # The share, rounded up or down, of the number that is cut off.
        shares = counts[counts > 1] * len(held) / several
        assert (np.abs(found[counts > 1] - shares) < 1 + 1e-9).all()


def test_a_part_of_a_split_can_be_cut_again():
    y = np.arange(40, dtype=np.int32) % 2
    rest, held = hold_out(Split(y, y, rows=np.arange(20)), 0.5, generator(0))
    assert sorted([*rest.indices(), *held.indices()]) == list(range(20))
    assert np.bincount(held.labels()).tolist() == [5, 5]


def test_fewer_examples_than_classes_are_held_out_all_the_same():
    y = np.arange(40, dtype=np.int32) % 20
    _, held = hold_out(Split(y, y), 0.1, generator(0))
    assert len(held) == 4


SEEDS = [0, 1, 2**32, 2**32 + 1, 2**64, 2**64 + 1, 2**100]


def test_every_seed_and_every_key_has_numbers_of_its_own():
    keys = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (2**32 - 1,)]
    drawn = {generator(seed, *key).bytes(16) for seed in SEEDS for key in keys}
    assert len(drawn) == len(SEEDS) * len(keys)
    assert generator(3, 1).random() == generator(np.uint64(3), 1).random()


@pytest.mark.parametrize("seed", [-1, 0.5, True, np.True_, None, "1", [1]])
def test_a_seed_that_is_no_natural_number_is_refused(seed):
    with pytest.raises(DataError, match="seed must be an integer >= 0, got"):
        generator(seed)
