"""What the studies and the stored trials say, for docs/paper.md."""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from formatting import interval, period, spread, table
from matplotlib.figure import Figure

from classp_jax.continual.results import load
from classp_jax.continual.results.statistics import Difference, paired_difference

FOLDER = pathlib.Path(__file__).parent
PLAIN = "no threshold"
"""The variant of a study that the others are compared with."""

ABLATIONS = (
    "classp",
    PLAIN,
    "density",
    "power 0.5",
    "power 2",
    "power 3",
    "exclusive",
    "scaling from task 2",
    "accumulator reset",
)

REMEDIES = (
    PLAIN,
    "power 0.5 to 1.5",
    "own prior",
    "eps times fan-in",
    "rate over fan-in",
    "bound",
    "relative threshold",
    "relative threshold, own prior",
)

BUCKETS = ((0.0, 1e-4), (1e-4, 1e-2), (1e-2, 0.3), (0.3, np.inf))


@functools.cache
def study(stream: str) -> dict[str, dict[str, Any]]:
    """What ``study.py`` found on a stream, by variant: accuracies are one per seed."""
    folder = f"study-{stream}"
    stored = load(FOLDER / folder).runs
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(run.method for run in stored):
        runs = [run for run in stored if run.method == name]
        ends = np.array([run.matrix[-1] for run in runs])
        scores = [trial["score"] for trial in trials(folder)[name]]
        found[name] = {
            "settings": runs[0].settings,
            "scores": scores,
            "validation": max(scores),
            "average": ends.mean(axis=1),
            "first": ends[:, 0],
            "last": ends[:, -1],
            "density": [np.mean(run.update_density) for run in runs],
            "date": runs[0].provenance.date[:10],
            "device": runs[0].provenance.device,
        }
    return found


def made_study(*streams: str) -> str:
    """When and on what the studies were made, and with how many seeds."""
    found = [variant for stream in streams for variant in study(stream).values()]
    days = period(variant["date"] for variant in found)
    devices = ", ".join(sorted({variant["device"] for variant in found}))
    (count,) = {len(variant["average"]) for variant in found}
    return f"*Made:* {days}, {devices}, {count} seeds (0 to {count - 1})."


def variants(streams: Sequence[str], chosen: Sequence[str], *keys: str) -> str:
    """A table of the study: every variant on every stream."""
    titles = {
        "validation": "validation",
        "average": "average",
        "against": f"against `{PLAIN}`",
        "first": "first task",
        "last": "last task",
        "density": "density",
    }
    return table(
        ["Variant", *(f"{s}: {titles[k]}" for s in streams for k in keys)],
        ([v, *(variant(s, v, k) for s in streams for k in keys)] for v in chosen),
    )


def variant(stream: str, name: str, key: str = "average") -> str:
    """One number of a variant in %: mean and deviation over seeds, or the best trial.

    A dash is a variant that was not run on this stream.
    """
    if name not in study(stream):
        return "-"
    if key == "against":
        return (
            "reference" if name == PLAIN else interval(variant_difference(stream, name))
        )
    return spread(variant_values(stream, name, key))


def variant_values(stream: str, name: str, key: str = "average") -> np.ndarray:
    """One number per seed, in %; of the trials, the best one."""
    return 100 * np.atleast_1d(study(stream)[name][key])


def ran(stream: str, chosen: Sequence[str]) -> list[str]:
    """Those of the variants that were run on a stream."""
    return [name for name in chosen if name in study(stream)]


def variant_difference(stream: str, name: str) -> Difference:
    """The paired difference of a variant to plain CLASSP, in points."""
    own, other = (variant_values(stream, v).tolist() for v in (name, PLAIN))
    return paired_difference(own, other)


def gap(name: str, stream: str = "permuted-digits") -> str:
    """How far a variant is from CLASSP without a threshold, for a sentence."""
    found = variant_difference(stream, name)
    return (
        f"{found.mean:+.1f} ± {(found.high - found.low) / 2:.1f} points, {found.word}"
    )


@functools.cache
def trials(name: str) -> dict[str, list[dict[str, Any]]]:
    """The stored trials of a preset's sweep or of a study, by method."""
    path = FOLDER / name / "trials.json"
    return json.loads(path.read_text(encoding="utf-8"))["trials"]


def best_by_epsilon(name: str) -> list[float]:
    """CLASSP's best validation accuracy in each range of epsilon, in %."""
    made = trials(name)["classp"]
    found = [
        [t["score"] for t in made if low <= t["settings"]["eps"] < high]
        for low, high in BUCKETS
    ]
    return [100 * max(accuracies, default=np.nan) for accuracies in found]


def epsilons(names: Sequence[str]) -> str:
    """A table of :func:`best_by_epsilon`, and what each range loses at worst."""
    header = ["Stream", "ε < 1e-4", "1e-4 to 0.01", "0.01 to 0.3", "0.3 and more"]
    found = {name: best_by_epsilon(name) for name in names}
    rows = [
        [f"`{name}`", *("-" if np.isnan(v) else f"{v:.1f}" for v in row)]
        for name, row in found.items()
    ]
    worst = [f"{v:.1f}" for v in worst_loss(names)]
    return table(header, [*rows, ["largest loss against the stream's best", *worst]])


def chance() -> str:
    """How CLASSP's trials with a small epsilon and a usual rate do on the CNN."""
    found = [
        100 * t["score"]
        for t in trials("mnist-fashion")["classp"]
        if t["settings"]["eps"] < 0.01 and t["settings"]["learning_rate"] > 0.01
    ]
    return f"{min(found):.1f} to {max(found):.1f} %" if found else "no trial"


def worst_loss(names: Sequence[str]) -> np.ndarray:
    """Over streams, the most that each range of epsilon loses against the best."""
    rows = np.array([best_by_epsilon(name) for name in names])
    return np.nanmax(np.nanmax(rows, axis=1, keepdims=True) - rows, axis=0)


def best_trial(name: str, method: str) -> str:
    """The best validation accuracy of a method's trials, in %."""
    return f"{100 * max(t['score'] for t in trials(name)[method]):.1f}"


def lost_trials(name: str, method: str) -> str:
    """How many of a method's trials diverged."""
    made = trials(name)[method]
    return f"{sum(t['score'] == 0 for t in made)} of {len(made)}"


def picture(streams: Sequence[str], chosen: Sequence[str]) -> Figure:
    """Accuracy on the first and on the last task, a point a variant."""
    figure = Figure(figsize=(7 * len(streams), 5), layout="constrained")
    markers = "osD^v<>Phd*X"
    for stream, axes in zip(
        streams, figure.subplots(1, len(streams), squeeze=False)[0], strict=True
    ):
        for i, name in enumerate(chosen):
            if name not in study(stream):
                continue
            x, y = (variant_values(stream, name, k) for k in ("first", "last"))
            axes.errorbar(
                x.mean(),
                y.mean(),
                xerr=x.std(ddof=1),
                yerr=y.std(ddof=1),
                marker=markers[i % len(markers)],
                linestyle="none",
                elinewidth=0.8,
                color=f"C{i % 10}",
                label=name,
            )
        axes.set_title(stream)
        axes.set_xlabel("test accuracy on the first task at the end (%)")
        axes.set_ylabel("test accuracy on the last task (%)")
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure
