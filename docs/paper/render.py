"""Writes docs/paper.md from its template and the stored results, and its picture.

Run ``python docs/paper/render.py`` (extra ``continual``). No number of the page is
typed: what stands between double braces in ``paper.template.md`` is evaluated here.
"""

import functools
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from classp_jax.continual.results import Results, Run, load

FOLDER = pathlib.Path(__file__).parent
PAGE = FOLDER.parent / "paper.md"
TEMPLATE = FOLDER / "paper.template.md"


@functools.cache
def results(name: str) -> Results:
    """The stored results of a preset."""
    return load(FOLDER / name)


@functools.cache
def study(stream: str) -> dict[str, Any]:
    """The stored study of a stream."""
    return json.loads((FOLDER / f"study-{stream}.json").read_text(encoding="utf-8"))


def of(name: str, method: str) -> list[Run]:
    """A method's runs, one a seed."""
    runs = [run for run in results(name).runs if run.method == method]
    if not runs:
        raise KeyError(f"{name} has no {method}")
    return runs


def values(name: str, method: str, what: str | int = "average") -> np.ndarray:
    """One number a seed, in %: the average, or a task's accuracy, at the end.

    NaN for a seed that diverged.
    """
    rows = [run.matrix[-1] for run in of(name, method)]
    chosen = [np.mean(row) if what == "average" else row[int(what)] for row in rows]
    diverged = [run.diverged for run in of(name, method)]
    return np.where(diverged, np.nan, 100 * np.array(chosen, float))


def diverged(name: str, method: str) -> int:
    """How many seeds diverged."""
    return sum(run.diverged for run in of(name, method))


def spread(numbers: Sequence[float] | np.ndarray) -> str:
    """Mean and sample standard deviation; of a seed that diverged, that it did."""
    numbers = np.asarray(numbers, float)
    known = numbers[~np.isnan(numbers)]
    if not len(known):
        return "diverged"
    text = f"{known.mean():.1f}"
    if len(known) > 1:
        text += f" ± {known.std(ddof=1):.1f}"
    if len(known) < len(numbers):
        text += f" ({len(numbers) - len(known)} of {len(numbers)} seeds diverged)"
    return text


def acc(name: str, method: str, what: str | int = "average") -> str:
    """Mean ± sd of an accuracy of a preset's method."""
    return spread(values(name, method, what))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns but the first are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def methods(name: str) -> list[str]:
    """The methods of a preset, in the order of its results."""
    return list(dict.fromkeys(run.method for run in results(name).runs))


def two_tasks(name: str, first: str, second: str) -> str:
    """A table of a stream of two tasks."""

    def rows() -> Iterable[list[str]]:
        for method in methods(name):
            run = of(name, method)[0]
            yield [
                f"`{method}`",
                acc(name, method, 0),
                acc(name, method, 1),
                acc(name, method),
                "yes" if run.told_boundary else "no",
            ]

    return table(
        ["Method", f"{first} after {second}", second, "Average", "Told of boundary"],
        rows(),
    )


def published() -> str:
    """The published scripts' schedules, scored both ways."""
    name = "mnist-fashion-published"

    def rows() -> Iterable[list[str]]:
        for method in methods(name):
            yield [
                f"`{method}`",
                *(acc(name, method, what) for what in (0, 1, "average")),
                *(spread(as_scripts(method, what)) for what in (0, 1, "average")),
            ]

    return table(
        [
            "Method",
            "MNIST, test",
            "Fashion-MNIST, test",
            "average",
            "MNIST, as the scripts score",
            "Fashion-MNIST, as the scripts score",
            "average",
        ],
        rows(),
    )


def as_scripts(method: str, what: str | int) -> np.ndarray:
    """Accuracy on the training sets under dropout, in %, one number a seed."""
    scores = [run.training_accuracy for run in of("mnist-fashion-published", method)]
    chosen = [np.mean(s) if what == "average" else s[int(what)] for s in scores]
    return 100 * np.array(chosen)


def streams_table(names: dict[str, str], chosen: Sequence[str]) -> str:
    """Average accuracy of several methods on several streams."""
    return table(
        ["Method", *names.values(), "Told of boundary"],
        (
            [
                f"`{method}`",
                *(acc(n, method) if method in methods(n) else "-" for n in names),
                "yes" if of(next(iter(names)), method)[0].told_boundary else "no",
            ]
            for method in chosen
        ),
    )


def memory(name: str) -> str:
    """Bytes a parameter while training and between tasks."""
    return table(
        ["Method", "while training", "between tasks"],
        (
            [
                f"`{method}`",
                f"{of(name, method)[0].state_bytes_per_parameter:.1f}",
                f"{of(name, method)[0].kept_bytes_per_parameter:.1f}",
            ]
            for method in methods(name)
        ),
    )


def variants(streams: Sequence[str], chosen: Sequence[str], *keys: str) -> str:
    """A table of the study: every variant on every stream."""
    titles = {
        "validation": "validation",
        "average": "average",
        "first": "first task",
        "last": "last task",
        "density": "density",
    }

    def cell(stream: str, variant: str, key: str) -> str:
        if variant not in study(stream):
            return "-"
        value = study(stream)[variant][key]
        return (
            f"{100 * value:.1f}"
            if key == "validation"
            else (spread(100 * np.array(value)))
        )

    return table(
        ["Variant", *(f"{s}: {titles[k]}" for s in streams for k in keys)],
        ([v, *(cell(s, v, k) for s in streams for k in keys)] for v in chosen),
    )


def var(stream: str, variant: str, key: str = "average") -> str:
    """Mean ± sd of a variant on a stream, in %."""
    return spread(100 * np.atleast_1d(study(stream)[variant][key]))


def var_mean(stream: str, variant: str, key: str = "average") -> float:
    """The mean of a variant on a stream, in %."""
    return float(100 * np.mean(study(stream)[variant][key]))


BUCKETS = ((0.0, 1e-4), (1e-4, 1e-2), (1e-2, 0.3), (0.3, np.inf))


@functools.cache
def tries(name: str) -> dict[str, list[dict[str, Any]]]:
    """The stored tries of a preset's sweep, by method."""
    return json.loads((FOLDER / name / "tries.json").read_text(encoding="utf-8"))


def best_by_epsilon(name: str) -> list[float]:
    """CLASSP's best validation accuracy in each range of epsilon, in %."""
    made = tries(name)["classp"]
    found = [
        [t["accuracy"] for t in made if low <= t["settings"]["eps"] < high]
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
    """How well CLASSP's tries with a small epsilon and a usual rate do on the CNN."""
    found = [
        100 * t["accuracy"]
        for t in tries("mnist-fashion")["classp"]
        if t["settings"]["eps"] < 0.01 and t["settings"]["learning_rate"] > 0.01
    ]
    return f"{min(found):.1f} to {max(found):.1f} %"


def worst_loss(names: Sequence[str]) -> np.ndarray:
    """Over streams, the most that each range of epsilon loses against the best."""
    rows = np.array([best_by_epsilon(name) for name in names])
    return np.nanmax(np.nanmax(rows, axis=1, keepdims=True) - rows, axis=0)


def gap(variant: str) -> float:
    """How much less a variant of the ablations has than CLASSP without a threshold."""
    stream = "permuted-digits"
    return var_mean(stream, "no threshold") - var_mean(stream, variant)


def best_try(name: str, method: str) -> str:
    """The best validation accuracy of a method's tries, in %."""
    return f"{100 * max(t['accuracy'] for t in tries(name)[method]):.1f}"


def lost_tries(name: str, method: str) -> str:
    """How many of a method's tries diverged."""
    made = tries(name)[method]
    return f"{sum(t['accuracy'] == 0 for t in made)} of {len(made)}"


def prior_of(name: str) -> str:
    """The settings that CLASSP with a prior ran with."""
    found = of(name, "classp-prior")[0].settings
    return f"learning rate {found['learning_rate']:.2g}, prior {found['prior']:.2g}"


def render(template: str) -> str:
    """The page: every expression between double braces in its place."""

    def value(match: re.Match[str]) -> str:
        found = eval(match.group(1), globals())
        return f"{found:.1f}" if isinstance(found, float) else str(found)

    return re.sub(r"\{\{(.+?)\}\}", value, template, flags=re.DOTALL)


def picture(streams: Sequence[str], chosen: Sequence[str]) -> Figure:
    """Accuracy on the first and on the last task, a point a variant."""
    figure = Figure(figsize=(7 * len(streams), 5), layout="constrained")
    markers = "osD^v<>Phd*X"
    for stream, axes in zip(
        streams, figure.subplots(1, len(streams), squeeze=False)[0], strict=True
    ):
        for i, variant in enumerate(chosen):
            if variant not in study(stream):
                continue
            x, y = (
                100 * np.array(study(stream)[variant][k]) for k in ("first", "last")
            )
            axes.errorbar(
                x.mean(),
                y.mean(),
                xerr=x.std(ddof=1),
                yerr=y.std(ddof=1),
                marker=markers[i % len(markers)],
                linestyle="none",
                elinewidth=0.8,
                color=f"C{i % 10}",
                label=variant,
            )
        axes.set_title(stream)
        axes.set_xlabel("test accuracy on the first task at the end (%)")
        axes.set_ylabel("test accuracy on the last task (%)")
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


LONGER = {
    "mnist-fashion-mlp": "MNIST → Fashion-MNIST, MLP",
    "permuted-mnist": "permuted",
    "rotated-mnist": "rotated",
    "split-mnist-task": "split, task-incremental",
    "split-mnist-class": "split, class-incremental",
}
ABLATIONS = (
    "classp",
    "no threshold",
    "density",
    "power 0.5",
    "power 2",
    "power 3",
    "exclusive",
    "scaling from task 2",
    "accumulator reset",
)
REMEDIES = (
    "no threshold",
    "power 0.5 to 1.5",
    "prior",
    "own prior",
    "share",
    "prior and share",
    "eps times fan-in",
    "rate over fan-in",
    "bound",
    "relative threshold",
    "relative threshold, own prior",
)

if __name__ == "__main__":
    PAGE.write_text(render(TEMPLATE.read_text(encoding="utf-8")), encoding="utf-8")
    picture(("permuted-digits",), ABLATIONS).savefig(
        FOLDER / "ablations.png", dpi=110, metadata={"Software": None}
    )
