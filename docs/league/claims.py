"""What a claim from three seeds is worth, from runs with more; and who is beaten."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from classp_jax.continual.results.statistics import CONFIDENCE, paired_difference

_WORDS = np.array(["behind", "level", "ahead"])


class Claims(NamedTuple):
    """How claims from a few seeds compare with the verdict of all, as shares."""

    comparisons: int
    wrong: float
    """Ahead or behind by an interval, where all seeds say level or the opposite."""
    missed: float
    """Level by an interval, where all seeds say ahead or behind."""
    reversed_order: float
    """The order of the means alone is not that of the means over all seeds."""


def words(differences: np.ndarray) -> np.ndarray:
    """Ahead, behind or level, by the 95 % t-interval of each row's mean."""
    count = differences.shape[1]
    quantile = stdtrit(count - 1, (1 + CONFIDENCE) / 2)
    half = quantile * differences.std(axis=1, ddof=1) / np.sqrt(count)
    mean = differences.mean(axis=1)
    return _WORDS[1 + (mean > half).astype(int) - (mean < -half).astype(int)]


def few_seeds(comparisons: Sequence[np.ndarray], seeds: int = 3) -> Claims:
    """Every choice of a few seeds against the verdict of all.

    Args:
      comparisons: the paired differences of each, one number per seed.
      seeds: how many a claim is made from.
    """
    wrong, missed, turned = [], [], []
    for differences in comparisons:
        verdict = paired_difference(differences.tolist(), [0.0] * len(differences)).word
        chosen = np.array(list(itertools.combinations(differences, seeds)))
        found = words(chosen)
        wrong.append(np.mean((found != "level") & (found != verdict)))
        missed.append(np.mean((found == "level") & (verdict != "level")))
        order = np.sign(chosen.mean(axis=1)) != np.sign(differences.mean())
        turned.append(np.mean(order))
    means = (float(np.mean(shares)) for shares in (wrong, missed, turned))
    return Claims(len(comparisons), *means)
