"""The report of a run as Markdown, with its pictures."""

import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

from classp_jax.continual.report.pictures import PICTURES, picture_files
from classp_jax.continual.report.table import Column, table_content
from classp_jax.continual.results.errors import ResultsError
from classp_jax.continual.results.files import write_atomically
from classp_jax.continual.results.metrics import (
    METRICS,
    ONLINE,
    ONLINE_SOURCE,
    formulas,
)
from classp_jax.continual.results.records import Results, Run
from classp_jax.continual.results.variants import Variant, encode, variants


def write_report(
    results: Results, folder: str | os.PathLike[str], reference: str | None = None
) -> None:
    """Writes ``report.md`` and every picture as PNG, SVG and PDF.

    Args:
      results: the runs, at least one.
      folder: made if need be; files of these names are replaced.
      reference: the label of the method to compare with; None: the first.

    Raises:
      ResultsError: in one line, if there are no runs, no such reference, or a file
        cannot be written.
    """
    folder = pathlib.Path(folder)
    text = markdown(results, reference)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(
            f"Cannot write {folder}: {error.strerror or error}."
        ) from error
    write_atomically(folder / "report.md", text.encode())
    for name, content in picture_files(results):
        write_atomically(folder / name, content)


def markdown(results: Results, reference: str | None = None) -> str:
    """The text of ``report.md``, which refers to the pictures by their file names.

    Args:
      results: the runs, at least one.
      reference: the label of the method to compare with; None: the first.

    Raises:
      ResultsError: if there are no runs, or no such reference.
    """
    title, labels, accuracies, costs, notes = table_content(results, reference)
    groups = variants(results.runs)
    lines = [f"# {_escape(title)}", "", *_provenance(groups), ""]
    lines += [*_table([labels, *accuracies]), "", *_table([labels, *costs]), ""]
    for note in notes:
        lines += [_escape(note), ""]
    for name, (heading, caption, _) in PICTURES.items():
        lines += [f"![{heading}]({name}.png)", "", caption, ""]
    lines += [
        "## Metrics",
        "",
        "`R[i, j]` is the test accuracy on task `j` after training on task `i`, of `N` "
        "tasks; row 0 is before any training.",
        "",
        *_metrics(),
        "",
        "## Settings",
        "",
        *_settings(groups),
        "",
        "The configuration that all runs share:",
        "",
        "```json",
        json.dumps(json.loads(encode(results.configuration)), indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)


def _provenance(groups: Sequence[Variant]) -> list[str]:
    """Command, device, versions and dates: once where all runs share them."""
    runs = [run for group in groups for run in group.runs]
    commands = dict.fromkeys(r.provenance.command for r in runs if r.provenance.command)
    lines = ["```sh", *commands, "```", ""] if commands else []
    dates = sorted(run.provenance.date for run in runs)
    period = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return [
        *lines,
        *_shared("Device", groups, lambda run: run.provenance.device),
        *_shared("Versions", groups, _versions),
        f"- Date: {period}",
        *_listed("Seeds", [(g.label, _ranges(r.seed for r in g.runs)) for g in groups]),
        *_shared("Parameters", groups, lambda run: f"{run.parameters:,}"),
    ]


def _shared(
    heading: str, groups: Sequence[Variant], text: Callable[[Run], str]
) -> list[str]:
    """What a text of each run says; where runs differ, which say what."""
    return _listed(
        heading,
        [
            (f"{group.label}, seeds {_ranges(r.seed for r in members)}", value)
            for group in groups
            for value, members in _by_value(group.runs, text)
        ],
    )


def _by_value(
    runs: Sequence[Run], text: Callable[[Run], str]
) -> Iterable[tuple[str, list[Run]]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(text(run), []).append(run)
    return found.items()


def _listed(heading: str, entries: Sequence[tuple[str, str]]) -> list[str]:
    """One line if all entries have one value, else one for each value."""
    owners: dict[str, list[str]] = {}
    for owner, value in entries:
        owners.setdefault(value, []).append(owner)
    if len(owners) == 1:
        return [f"- {heading}: {_escape(value or 'not known')}" for value in owners]
    return [
        f"- {heading}:",
        *(
            f"  - {_escape(value or 'not known')}: {_escape('; '.join(names))}"
            for value, names in owners.items()
        ),
    ]


def _versions(run: Run) -> str:
    return ", ".join(f"{name} {v}" for name, v in run.provenance.versions.items())


def _ranges(numbers: Iterable[int]) -> str:
    """``0, 1, 2, 5`` as ``0-2, 5``."""
    groups = itertools.groupby(
        enumerate(sorted(set(numbers))), key=lambda pair: pair[1] - pair[0]
    )
    parts = []
    for _, group in groups:
        members = [number for _, number in group]
        last = f"-{members[-1]}" if len(members) > 1 else ""
        parts.append(f"{members[0]}{last}")
    return ", ".join(parts)


def _table(columns: Sequence[Column]) -> list[str]:
    first, *others = (" ".join(column.heading.split("\n")) for column in columns)
    return [
        _line(map(_escape, [first, *others])),
        _line(["---"] + ["---:"] * len(others)),
        *(
            _line(map(_escape, cells))
            for cells in zip(*(column.cells for column in columns), strict=True)
        ),
    ]


def _metrics() -> list[str]:
    sources = {name: metric.source for name, metric in METRICS.items()}
    sources |= {ONLINE: ONLINE_SOURCE}
    return [
        f"- {name.replace('_', ' ').capitalize()}: `{formula}` ({sources[name]})"
        for name, formula in formulas().items()
    ]


def _settings(groups: Sequence[Variant]) -> list[str]:
    rows = [
        (group.label, ", ".join(f"{k} = {v}" for k, v in group.settings.items()) or "-")
        for group in groups
    ]
    labels, settings = zip(*rows, strict=True)
    table = _table([Column("Method", labels), Column("Settings", settings)])
    return [line.replace("---:", "---") for line in table]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    """Plain text for Markdown, inside a table too."""
    return re.sub(r"([\\`*_<>|\[\]#$])", r"\\\1", text.replace("\n", " "))
