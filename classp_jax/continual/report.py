"""From results to a table in the terminal and a Markdown report with pictures."""

import itertools
import json
import math
import os
import pathlib
import re
import textwrap
from typing import Any

import rich.box
from rich.table import Table
from rich.text import Text

from classp_jax.continual.metrics import METRICS
from classp_jax.continual.pictures import PICTURES, picture
from classp_jax.continual.results import Results
from classp_jax.continual.summary import Statistic, rows

_HEADINGS = (
    "Method",
    "Average\naccuracy",
    "Backward\ntransfer",
    "Forward\ntransfer",
    "Forgetting",
    "Learning\naccuracy",
    "Training\nseconds",
    "Bytes/\nparam.",
    "Update\ndensity",
    "Told of\nboundary",
)

_UNITS = (
    "Accuracy, transfer, forgetting in percentage points, density in %; "
    "mean ± sample standard deviation over seeds; - where undefined."
)


def rich_table(results: Results) -> Table:
    """The table for the terminal: a line a method, in 120 columns.

    Args:
      results: the runs.

    Returns:
      A table to print with rich. A method of which a seed diverged shows that instead
      of numbers.
    """
    table = Table(
        title=Text(_title(results)),
        caption=Text(_UNITS),
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for i, heading in enumerate(_HEADINGS):
        # Narrow terminals break a cell at its spaces, but never cut digits off.
        table.add_column(
            heading,
            justify="right" if i else "left",
            overflow="fold",
            no_wrap=i == 0,
        )
    for name, *numbers in _cells(results):
        table.add_row(Text("\n".join(textwrap.wrap(name, 18))), *map(Text, numbers))
    return table


def markdown(results: Results, command: str | None = None) -> str:
    """The report as Markdown: how it was made, table, pictures, formulas, settings.

    Args:
      results: the runs.
      command: the command line that made them.

    Returns:
      The text of ``report.md``. It refers to the three pictures by their file names.
    """
    seeds = _ranges({run.seed for run in results.runs})
    lines = [f"# {_escape(_title(results))}", ""]
    if command is not None:
        lines += ["```sh", command.strip(), "```", ""]
    versions = ", ".join(f"{name} {v}" for name, v in results.versions.items())
    lines += [
        f"- Device: {_escape(results.device)}",
        f"- Date: {_escape(results.date)}",
        f"- Versions: {_escape(versions)}",
        f"- Seeds: {seeds}",
        "",
        _markdown_line(h.replace("/\n", "/").replace("\n", " ") for h in _HEADINGS),
        _markdown_line(["---"] + ["---:"] * (len(_HEADINGS) - 1)),
    ]
    lines += [_markdown_line(map(_escape, cells)) for cells in _cells(results)]
    lines += ["", _UNITS, _NOTES, ""]
    for name, (title, caption, _) in PICTURES.items():
        lines += [f"![{title}]({name})", "", caption, ""]
    lines += [
        "## Metrics",
        "",
        "`R[i, j]` is the test accuracy on task `j` after training on task `i`, of `N` "
        "tasks; row 0 is taken before any training.",
        "",
    ]
    lines += [
        f"- {name.replace('_', ' ').capitalize()}: `{metric.formula}`"
        for name, metric in METRICS.items()
    ]
    lines += ["", "## Settings", "", _markdown_line(["Method", "Hyperparameters"])]
    lines.append(_markdown_line(["---", "---"]))
    settings = {run.method: run.settings for run in results.runs}
    for method, values in settings.items():
        text = ", ".join(f"{name} = {value}" for name, value in values.items())
        lines.append(_markdown_line([_escape(method), _escape(text or "-")]))
    configuration = json.dumps(results.configuration, indent=2, default=str)
    lines += ["", "The whole configuration:", "", "```json", configuration, "```", ""]
    return "\n".join(lines)


_NOTES = (
    "Training seconds are without compilation and evaluation. Bytes per parameter are "
    "those of optimizer and method state, buffers included. Update density is the "
    "share of weights that a step moves. A method of which a seed diverged has no "
    "numbers and is left out of the pictures."
)


def _title(results: Results) -> str:
    stream = results.stream
    num_tasks = len(stream["task_names"])
    tasks = "1 task" if num_tasks == 1 else f"{num_tasks} tasks"
    counts = {len(row.seeds) for row in rows(results)}
    text = f"{stream['name']}, {stream['scenario']}, {tasks}"
    if len(counts) == 1:
        count = counts.pop()
        text += ", 1 seed" if count == 1 else f", {count} seeds"
    return text


def _cells(results: Results) -> list[list[str]]:
    table = rows(results)
    same_seeds = len({len(row.seeds) for row in table}) == 1
    lines = []
    for row in table:
        count = len(row.seeds)
        name = row.method if same_seeds else f"{row.method} ({count} seeds)"
        cells = [_percent(row.statistics[metric]) for metric in METRICS]
        if row.diverged:
            cells[0] = (
                "diverged"
                if row.diverged == count
                else f"{row.diverged} of {count}\ndiverged"
            )
        density = row.statistics["update_density"]
        cells += [
            _seconds(row.statistics["seconds"]),
            _bytes(row.statistics["state_bytes_per_parameter"]),
            "-" if density is None else _fixed(100 * density.mean, 1),
            "yes" if row.told_boundary else "no",
        ]
        lines.append([name, *cells])
    return lines


def _fixed(number: float, decimals: int) -> str:
    return "-" if math.isnan(number) else f"{number:z.{decimals}f}"


def _plus_minus(statistic: Statistic | None, scale: float, decimals: int) -> str:
    if statistic is None or math.isnan(statistic.mean):
        return "-"
    mean, sd = (_fixed(scale * number, decimals) for number in statistic)
    return f"{mean} ± {sd}"


def _percent(statistic: Statistic | None) -> str:
    return _plus_minus(statistic, 100, 1)


def _seconds(statistic: Statistic | None) -> str:
    mean = math.nan if statistic is None else statistic.mean
    return _plus_minus(statistic, 1, 0 if mean >= 100 else 1 if mean >= 1 else 2)


def _bytes(statistic: Statistic | None) -> str:
    if statistic is None or math.isnan(statistic.mean):
        return "-"
    small = 0 < statistic.mean < 0.1
    return f"{statistic.mean:.1g}" if small else f"{statistic.mean:.1f}"


def _ranges(numbers: set[int]) -> str:
    """``{0, 1, 2, 5}`` as ``0-2, 5``."""
    groups = itertools.groupby(
        enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]
    )
    parts = []
    for _, group in groups:
        members = [number for _, number in group]
        last = f"-{members[-1]}" if len(members) > 1 else ""
        parts.append(f"{members[0]}{last}")
    return ", ".join(parts)


def _markdown_line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    """Plain text for Markdown, inside a table too."""
    return re.sub(r"([\\`*_<>|\[\]#$])", r"\\\1", text.replace("\n", " "))


def write_report(
    results: Results,
    out_dir: str | os.PathLike[str],
    command: str | None = None,
) -> None:
    """Writes ``report.md``, ``accuracy.png``, ``matrix.png`` and ``tradeoff.png``.

    Args:
      results: the runs, at least one.
      out_dir: the folder, made if need be; files of these names are replaced.
      command: the command line that made the results, for the report.

    Raises:
      ValueError: if there are no runs.
      OSError: if a file cannot be written.
    """
    if not results.runs:
        raise ValueError("There are no finished runs to report.")
    folder = pathlib.Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(markdown(results, command), encoding="utf-8")
    for name in PICTURES:
        figure = picture(results, name)
        # No metadata: the same results give the same bytes.
        figure.savefig(folder / name, format="png", metadata={"Software": None})
