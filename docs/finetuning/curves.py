"""From stored runs to what is kept at an equal new ability."""

import functools
import itertools
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from methods import METHODS, trials
from plan import Plan


def read(file: pathlib.Path) -> list[dict[str, Any]]:
    """The runs of a file, one per line."""
    if not file.exists():
        return []
    stamp = file.stat()
    return _read(file, stamp.st_mtime_ns, stamp.st_size)


@functools.lru_cache(maxsize=8)
def _read(file: pathlib.Path, *_: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def kept_at(curve: Sequence[Sequence[float]], target: float) -> float:
    """What is left of the old ability where a run first has the new one.

    Between the two points of a curve around the target it is interpolated, but not from
    the untrained start. NaN where the target is never reached.
    """
    for before, after in itertools.pairwise(curve):
        if before[2] < target <= after[2]:
            if before[0] == 0:
                return after[1]
            share = (target - before[2]) / (after[2] - before[2])
            return before[1] + share * (after[1] - before[1])
    return float("nan")


def chosen_trials(
    lines: Iterable[dict[str, Any]], method: str, plan: Plan
) -> dict[float, dict[str, float]]:
    """For each target the settings that keep most on validation data.

    Of those, if any, that get further than the target by the plan's margin: what only
    just reaches it with one seed does not with another.
    """
    allowed = trials(METHODS[method], plan.trials)
    made = [
        line
        for line in lines
        if line.get("method") == method
        and line["part"] == "validation"
        and line["settings"] in allowed
    ]
    chosen = {}
    for target in plan.targets:
        kept = np.array([kept_at(line["curve"], target) for line in made])
        most = np.array([max(p[2] for p in line["curve"]) for line in made])
        far = most >= target + plan.margin
        if np.isfinite(kept[far]).any():
            kept = np.where(far, kept, np.nan)
        if np.isfinite(kept).any():
            chosen[target] = made[int(np.nanargmax(kept))]["settings"]
    return chosen


def frontier(points: Iterable[Sequence[float]]) -> list[tuple[float, float]]:
    """Of points (old, new) those that none surpasses in both, by falling old."""
    best, found = float("-inf"), []
    for old, new in sorted(map(tuple, points), reverse=True):
        if new > best:
            found.append((old, new))
            best = new
    return found
