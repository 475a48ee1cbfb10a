"""The stored results of the league: numbers of runs, and how they are written."""

import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from samples import SAMPLES
from study import COMBINED, FORMS, METHODS, PROTOCOLS, REMEDIES, Protocol
from study import stored as read

from classp_jax.continual.results.statistics import Difference, paired_difference

FOLDER = pathlib.Path(__file__).parent


stored = functools.cache(read)
"""What a stream's file holds; read once."""


def streams() -> list[str]:
    """The streams that have been run, in the order of the protocols."""
    return [name for name in PROTOCOLS if (FOLDER / f"{name}.json").exists()]


def methods(stream: str) -> dict[str, Any]:
    """A stream's methods by name."""
    return stored(stream)["methods"]


def has(stream: str, method: str) -> bool:
    """Whether a method was run on a stream."""
    return method in methods(stream)


def compared(stream: str, method: str) -> bool:
    """Whether a method was run on a stream after as many trials as the others."""
    if not has(stream, method):
        return False
    return len(methods(stream)[method]["scores"]) >= PROTOCOLS[stream].trials


def wide() -> list[str]:
    """The streams that every method was tuned and run on, remedies aside."""
    wanted = [m for m in METHODS if m not in REMEDIES]
    return [s for s in streams() if all(compared(s, m) for m in wanted)]


def alike() -> list[str]:
    """Those of them whose trials have the same settings, method by method."""
    usual = Protocol._field_defaults["lowest_rate"]
    return [s for s in wide() if PROTOCOLS[s].lowest_rate == usual]


def is_free(stream: str, method: str) -> bool:
    """Whether a method is told no boundary and stores no data."""
    found = methods(stream)[method]
    return not (found["task_boundary_known"] or found["stored_data"])


def percent(stream: str, method: str, key: str = "") -> np.ndarray:
    """One number per seed, in %; NaN for a seed that diverged.

    Args:
      stream: its name.
      method: its name.
      key: what to look up; by default what the stream's trials were judged by.
    """
    return numbers(methods(stream)[method], key or PROTOCOLS[stream].criterion)


def numbers(found: dict[str, Any], key: str) -> np.ndarray:
    diverged = np.isin(found["seeds"], found["diverged"])
    return np.where(diverged, np.nan, 100 * np.array(found[key], float))


def best_scores(stream: str) -> dict[str, float]:
    """The best trial of each method, on validation data."""
    return {name: max(found["scores"]) for name, found in methods(stream).items()}


FIRST = (
    "permuted-digits",
    "split-digits-class",
    "split-digits-domain",
    "rotated-digits",
)
"""The streams that were run first."""


@functools.cache
def named(among: Sequence[str] | None = None) -> str:
    """The form of CLASSP that stands for it on the whole page.

    By a rule that looks at no test data: the mean of its best trial over some streams,
    by default :func:`alike`. A remedy, which was not run on all, cannot be it.
    """
    found = form_scores(alike() if among is None else among)
    return max(found, key=lambda form: found[form])


def form_scores(among: Sequence[str]) -> dict[str, float]:
    """The mean of each form's best trial over some streams, on validation data."""
    return {
        form: float(np.mean([best_scores(stream)[form] for stream in among]))
        for form in FORMS
        if form in METHODS and form not in REMEDIES
    }


def named_first() -> str:
    """What that rule names on the streams that were run first."""
    return named(FIRST)


def difference(stream: str, method: str, other: str, key: str = "") -> Any:
    """The paired difference in points; without an interval where a seed diverged."""
    own, against = percent(stream, method, key), percent(stream, other, key)
    if np.isnan(own).any() or np.isnan(against).any():
        return Difference(math.nan, math.nan, math.nan, 0)
    return paired_difference(own.tolist(), against.tolist())


def interval(found: Difference) -> str:
    """A difference with its interval and its word; a dash where there is none."""
    if not found.word:
        return "-"
    half = (found.high - found.low) / 2
    return f"{found.mean:+.1f} ± {half:.1f}, {found.word}"


def mean(numbers: np.ndarray) -> str:
    """Mean and half of its 95 % t-interval."""
    if np.isnan(numbers).any():
        return f"{int(np.isnan(numbers).sum())} of {len(numbers)} seeds diverged"
    found = paired_difference(numbers.tolist(), [0.0] * len(numbers))
    return f"{found.mean:.1f} ± {(found.high - found.low) / 2:.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns but the first are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ranked(stream: str, *, free: bool = False) -> list[str]:
    """The methods that are compared, by mean test accuracy; those that diverged last.

    Args:
      stream: its name.
      free: leave out those that are told a boundary or store data.
    """
    chosen = [m for m in methods(stream) if compared(stream, m)]
    return by_accuracy(stream, [m for m in chosen if not free or is_free(stream, m)])


def by_accuracy(stream: str, chosen: Sequence[str]) -> list[str]:
    """Methods, but for those with an option, by mean test accuracy."""

    def key(name: str) -> float:
        numbers = percent(stream, name)
        return math.inf if np.isnan(numbers).any() else -float(numbers.mean())

    plain = [m for m in chosen if "+" not in m or m in (*COMBINED, *SAMPLES)]
    return sorted(plain, key=key)
