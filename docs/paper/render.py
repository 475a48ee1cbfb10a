"""Writes docs/paper.md from its template and the stored results, and its picture.

Run ``python docs/paper/render.py`` (extra ``dev``). No number of the page is typed:
``paper.template.md`` is a Jinja2 template that calls the functions below and those of
``studies.py``.
"""

import functools
import pathlib
import textwrap
from collections.abc import Callable, Iterable

import jinja2
import numpy as np
import studies
from formatting import interval, joined, period, spread, table

from classp_jax.continual.results import Results, Run, load
from classp_jax.continual.results.statistics import Difference, paired_difference

FOLDER = pathlib.Path(__file__).parent

PAGE = FOLDER.parent / "paper.md"

TEMPLATE = FOLDER / "paper.template.md"

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
    "split-mnist-task": "split (task-incremental)",
    "split-mnist-class": "split (class-incremental)",
}
"""The streams on which every method's settings were tuned."""


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


def provenance(*names: str) -> str:
    """When, with which versions, on what and on which seeds results were made."""
    origins: dict[str, list[str]] = {}
    for name in names:
        runs = results(name).runs
        days = period(run.provenance.date[:10] for run in runs)
        devices = ", ".join(dict.fromkeys(run.provenance.device for run in runs))
        versions = runs[0].provenance.versions
        text = (
            f"{days}, classp-jax {versions['classp-jax']}, jax {versions['jax']}, "
            f"{devices}, seeds {seeds(name)}"
        )
        origins.setdefault(text, []).append(f"`{name}`")
    parts = (f"{', '.join(found)}: {text}" for text, found in origins.items())
    return f"*Made:* {'; '.join(parts)}."


def runs_of(name: str, method: str) -> list[Run]:
    """A method's runs, one per seed."""
    runs = [run for run in results(name).runs if run.method == method]
    if not runs:
        raise KeyError(f"{name} has no {method}")
    return runs


def values(name: str, method: str, what: str | int = "average") -> np.ndarray:
    """One number per seed, in %: the average, or a task's accuracy, at the end.

    NaN for a seed that diverged.
    """
    rows = [run.matrix[-1] for run in runs_of(name, method)]
    chosen = [np.mean(row) if what == "average" else row[int(what)] for row in rows]
    diverged = [run.diverged for run in runs_of(name, method)]
    return np.where(diverged, np.nan, 100 * np.array(chosen, float))


def diverged(name: str, method: str) -> int:
    """How many seeds diverged."""
    return sum(run.diverged for run in runs_of(name, method))


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
        dict(zip((r.seed for r in runs_of(name, m)), values(name, m), strict=True))
        for m in (method, reference)
    ]
    shared = sorted(by_seed[0].keys() & by_seed[1].keys())
    if any(np.isnan(list(numbers.values())).any() for numbers in by_seed):
        return Difference(np.nan, np.nan, np.nan, 0)
    return paired_difference(*([numbers[s] for s in shared] for numbers in by_seed))


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
        f"{word or 'not compared, as a seed diverged,'} on {joined(found)}"
        for word, found in groups.items()
        if found
    )


def methods(name: str) -> list[str]:
    """The methods of a preset, in the order of its results."""
    return list(dict.fromkeys(run.method for run in results(name).runs))


def two_tasks(name: str, first: str, second: str) -> str:
    """A table of a stream of two tasks."""

    def rows() -> Iterable[list[str]]:
        for method in methods(name):
            run = runs_of(name, method)[0]
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
    """Accuracy on the training sets under dropout, in %, one number per seed."""
    scores = [
        run.training_accuracy for run in runs_of("mnist-fashion-published", method)
    ]
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
                f"{runs_of(name, method)[0].state_bytes_per_parameter:.1f}",
                f"{runs_of(name, method)[0].kept_bytes_per_parameter:.1f}",
            ]
            for method in methods(name)
        ),
    )


def prior_of(name: str) -> str:
    """The settings that CLASSP with a prior ran with."""
    found = runs_of(name, "classp-prior")[0].settings
    return f"learning rate {found['learning_rate']:.2g}, prior {found['prior']:.2g}"


def render(template: str) -> str:
    """The page: every call between double braces in its place, paragraphs filled."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        finalize=lambda value: f"{value:.1f}" if isinstance(value, float) else value,
    )
    blocks = (
        environment.from_string(template)
        .render(vars(studies) | globals())
        .split("\n\n")
    )
    return "\n\n".join(map(_filled, blocks))


def _filled(block: str) -> str:
    if block.startswith(("|", "#", "!", "<!--")):
        return block
    end = "\n" if block.endswith("\n") else ""
    filled = textwrap.fill(block, 88, break_long_words=False, break_on_hyphens=False)
    return filled + end


if __name__ == "__main__":
    PAGE.write_text(render(TEMPLATE.read_text(encoding="utf-8")), encoding="utf-8")
    studies.picture(("permuted-digits",), studies.ABLATIONS).savefig(
        FOLDER / "ablations.png", dpi=110, metadata={"Software": None}
    )
