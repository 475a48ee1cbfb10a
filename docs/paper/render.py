"""Writes docs/paper.md from its template and the stored results, and its picture.

Run ``python docs/paper/render.py`` (extra ``dev``). No number of the page is typed:
``paper.template.md`` is a Jinja2 template that calls the functions below.
"""

import functools
import json
import pathlib
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from classp_jax.continual.results import Results, Run, load
from classp_jax.continual.results.statistics import Difference, paired_difference

FOLDER = pathlib.Path(__file__).parent
PAGE = FOLDER.parent / "paper.md"
TEMPLATE = FOLDER / "paper.template.md"


@functools.cache
def results(name: str) -> Results:
    """The stored results of a preset."""
    return load(FOLDER / name)


def seeds(name: str) -> str:
    """The seeds of a preset's runs."""
    found = sorted({run.seed for run in results(name).runs})
    if found == list(range(found[-1] + 1)) and len(found) > 2:
        return f"{found[0]} to {found[-1]}"
    return ", ".join(map(str, found))


def first_edition(name: str) -> bool:
    """Whether a preset's results were made before the experiments were rebuilt."""
    return "first_edition" in results(name).configuration


def editions() -> str:
    """Which presets' results are of which edition of the code, for a sentence."""
    old, new = (
        [f"`{name}`" for name in PRESETS if first_edition(name) is first]
        for first in (True, False)
    )
    text = f"those of {_and([*old, 'the studies'])} were made with the first edition"
    return text + (f", those of {_and(new)} with this one" if new else "")


def _and(texts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


def made(*names: str) -> str:
    """When, with which code, on what and with how many seeds results were made."""
    origins: dict[str, list[str]] = {}
    for name in names:
        runs = results(name).runs
        days = " to ".join(
            dict.fromkeys(_ends(run.provenance.date[:10] for run in runs))
        )
        devices = ", ".join(dict.fromkeys(run.provenance.device for run in runs))
        versions = runs[0].provenance.versions
        edition = "the first edition" if first_edition(name) else "this edition"
        text = (
            f"{days}, {edition} of the code (classp-jax {versions['classp-jax']}, "
            f"jax {versions['jax']}), {devices}, seeds {seeds(name)}"
        )
        origins.setdefault(text, []).append(f"`{name}`")
    parts = (f"{', '.join(found)}: {text}" for text, found in origins.items())
    return f"*Made:* {'; '.join(parts)}."


def _ends(days: Iterable[str]) -> tuple[str, str]:
    found = sorted(days)
    return found[0], found[-1]


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


def count(name: str) -> int:
    """How many seeds were run."""
    return len({run.seed for run in results(name).runs})


def lowest(name: str, method: str, what: str | int = "average") -> float:
    """The accuracy of the worst seed."""
    return float(values(name, method, what).min())


def half_width(seeds: int) -> float:
    """Half of the interval of a paired difference of standard deviation 1."""
    values = np.resize([-1.0, 1.0], seeds)
    values /= np.std(values, ddof=1)
    found = paired_difference(values.tolist(), [0.0] * seeds)
    return (found.high - found.low) / 2


def acc(name: str, method: str, what: str | int = "average") -> str:
    """Mean ± sd of an accuracy of a preset's method."""
    return spread(values(name, method, what))


def difference(name: str, method: str, reference: str = "classp") -> Difference:
    """The paired difference of two methods in points, over the seeds of both.

    Without an interval, and so without a word, where a seed of either diverged: what is
    left would flatter it.
    """
    by_seed = [
        dict(zip((r.seed for r in of(name, m)), values(name, m), strict=True))
        for m in (method, reference)
    ]
    shared = sorted(by_seed[0].keys() & by_seed[1].keys())
    if any(np.isnan(list(numbers.values())).any() for numbers in by_seed):
        return Difference(np.nan, np.nan, np.nan, 0)
    return paired_difference(*([numbers[s] for s in shared] for numbers in by_seed))


def interval(found: Difference) -> str:
    """A difference with its interval and its word; a dash where there is none."""
    if not found.word:
        return "-"
    half = (found.high - found.low) / 2
    return f"{found.mean:+.1f} ± {half:.1f}, {found.word}"


def against(name: str, method: str, reference: str = "classp") -> str:
    """The :func:`interval` of a method, for a table."""
    return (
        "reference"
        if method == reference
        else interval(difference(name, method, reference))
    )


_JOINED = {"ahead": "ahead of", "level": "level with", "behind": "behind", "": ""}


def stands(name: str, method: str, reference: str = "classp") -> str:
    """Where a method stands, for a sentence: "behind `classp` (-3.0 ± 1.2 points)"."""
    found = difference(name, method, reference)
    if not found.word:
        return f"without a comparison to `{reference}`, as a seed diverged"
    half = (found.high - found.low) / 2
    where = f"{_JOINED[found.word]} `{reference}`"
    return f"{where} ({found.mean:+.1f} ± {half:.1f} points)"


def standing(name: str, reference: str = "classp") -> str:
    """All methods of a preset, by where they stand to a reference."""
    groups: dict[str, list[str]] = {word: [] for word in _JOINED}
    for method in methods(name):
        if method != reference:
            groups[difference(name, method, reference).word].append(f"`{method}`")
    titles = {
        "ahead": f"Ahead of `{reference}`",
        "level": "level with it",
        "behind": "behind it",
        "": "not compared, as a seed diverged",
    }
    parts = [
        f"{titles[w]}: {', '.join(g) or 'none'}" for w, g in groups.items() if w or g
    ]
    return "; ".join(parts) + "."


def by_stream(names: dict[str, str], method: str, reference: str) -> str:
    """Where one method stands to another, stream by stream, for a sentence."""
    groups: dict[str, list[str]] = {word: [] for word in _JOINED}
    for name, title in names.items():
        if {method, reference} <= set(methods(name)):
            groups[difference(name, method, reference).word].append(title)
    return "; ".join(
        f"{word or 'not compared, as a seed diverged,'} on {_and(found)}"
        for word, found in groups.items()
        if found
    )


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
                against(name, method),
                "yes" if run.task_boundary_known else "no",
            ]

    return table(
        [
            "Method",
            f"{first} after {second}",
            second,
            "Average",
            "against `classp`",
            "Task boundary known",
        ],
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


def streams_table(names: dict[str, str], cell: Callable[[str, str], str]) -> str:
    """A number of every method on several streams: :func:`acc` or :func:`against`."""
    chosen = dict.fromkeys(method for name in names for method in methods(name))
    return table(
        ["Method", *names.values()],
        (
            [f"`{m}`", *(cell(n, m) if m in methods(n) else "-" for n in names)]
            for m in chosen
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


@functools.cache
def study(stream: str) -> dict[str, Any]:
    """What the first edition's study of a stream found, by variant."""
    return json.loads((FOLDER / f"study-{stream}.json").read_text(encoding="utf-8"))


def made_study(*streams: str) -> str:
    """When and on what the studies were made, and with how many seeds."""
    found = [variant for stream in streams for variant in study(stream).values()]
    days = " to ".join(dict.fromkeys(_ends(variant["date"] for variant in found)))
    devices = ", ".join(sorted({variant["device"] for variant in found}))
    (count,) = {len(variant["average"]) for variant in found}
    return (
        f"*Made:* {days}, the first edition of the code, {devices}, {count} seeds "
        f"(0 to {count - 1})."
    )


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


def ran(stream: str, chosen: Sequence[str]) -> list[str]:
    """Those of the variants that were run on a stream."""
    return [name for name in chosen if name in study(stream)]


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
    """One number a seed, in %; of the trials, the best one."""
    return 100 * np.atleast_1d(study(stream)[name][key])


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


BUCKETS = ((0.0, 1e-4), (1e-4, 1e-2), (1e-2, 0.3), (0.3, np.inf))


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


def prior_of(name: str) -> str:
    """The settings that CLASSP with a prior ran with."""
    found = of(name, "classp-prior")[0].settings
    return f"learning rate {found['learning_rate']:.2g}, prior {found['prior']:.2g}"


def render(template: str) -> str:
    """The page: every call between double braces in its place, paragraphs filled."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        finalize=lambda value: f"{value:.1f}" if isinstance(value, float) else value,
    )
    blocks = environment.from_string(template).render(globals()).split("\n\n")
    return "\n\n".join(map(_filled, blocks))


def _filled(block: str) -> str:
    if block.startswith(("|", "#", "!", "<!--")):
        return block
    end = "\n" if block.endswith("\n") else ""
    filled = textwrap.fill(block, 88, break_long_words=False, break_on_hyphens=False)
    return filled + end


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


PLAIN = "no threshold"
"""The variant of a study that the others are compared with."""

LONGER = {
    "mnist-fashion-mlp": "MNIST → Fashion-MNIST",
    "permuted-mnist": "permuted",
    "rotated-mnist": "rotated",
    "split-mnist-task": "split (task-incremental)",
    "split-mnist-class": "split (class-incremental)",
}
PRESETS = (
    "mnist-fashion",
    "mnist-fashion-published",
    "mnist-fashion-published-flax",
    "phrasebank-imdb",
    *LONGER,
)
TUNED = {
    "mnist-fashion": "vision",
    "phrasebank-imdb": "sentiment",
    "mnist-fashion-mlp": "vision with the MLP",
    "permuted-mnist": "permuted",
    "split-mnist-class": "split (class-incremental)",
}
"""The streams on which every method's settings were tuned."""

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
