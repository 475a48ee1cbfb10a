"""The table of a run: a line per method, as text, in a notebook, or in Markdown."""

import io
import itertools
import math
import shutil
import statistics
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import rich.box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.jupyter import JupyterMixin
from rich.table import Table
from rich.text import Text

from classp_jax.continual.results.records import Results
from classp_jax.continual.results.statistics import (
    Difference,
    Estimate,
    Row,
    find_reference,
    rows,
)
from classp_jax.continual.results.variants import variants

_LABEL_WIDTH, _HEADING_WIDTH = 22, 16
_GAP = 3
"""Between two columns: padding, and one space that rich puts there itself."""


class Column(NamedTuple):
    """A column of the table."""

    heading: str
    """Its lines; none of them is broken again."""
    cells: tuple[str, ...]
    """One per line of the table."""

    @property
    def width(self) -> int:
        lines = itertools.chain(*(t.split("\n") for t in (self.heading, *self.cells)))
        return max(map(len, lines))


class Content(NamedTuple):
    """What the table says, whatever it is written in."""

    title: str
    labels: Column
    accuracies: tuple[Column, ...]
    costs: tuple[Column, ...]
    notes: tuple[str, ...]
    """Sentences that belong below the table."""


class SummaryTable(JupyterMixin):
    """A line per method: metrics, costs, and the difference to a reference.

    ``print`` shows it, a notebook shows it as a table, rich takes it as it is. Where
    the terminal is too narrow for all columns, they stand in several tables below each
    other: no heading and no number is ever broken.

    Attributes:
      content: title, columns and notes as plain text.
    """

    content: Content

    def __init__(self, results: Results, reference: str | None = None) -> None:
        """See :meth:`Results.table`."""
        self.content = table_content(results, reference)

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        title, labels, accuracies, costs, notes = self.content
        yield Text(title, style="italic")
        for columns in _blocks(labels, accuracies, costs, options.max_width):
            yield Text()
            yield _rich_table([labels, *columns])
        yield Text()
        for note in notes:
            yield Text(note, style="dim")

    def __str__(self) -> str:
        width = shutil.get_terminal_size((120, 24)).columns
        text = io.StringIO()
        Console(file=text, width=width, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().split("\n"))

    __repr__ = __str__


def table_content(results: Results, reference: str | None = None) -> Content:
    """What the table says; see :meth:`Results.table` for arguments and errors."""
    lines = rows(results, reference)
    reference = find_reference(variants(results.runs), reference)
    usual = statistics.mode(len(row.seeds) for row in lines)
    labels = [
        row.label
        if len(row.seeds) == usual
        else f"{row.label}, {_seeds(len(row.seeds))}"
        for row in lines
    ]

    def column(heading: str, cell: Callable[[Row], str]) -> Column:
        return Column(heading, tuple(map(cell, lines)))

    def metric(heading: str, name: str) -> Column:
        return column(heading, lambda row: _percent(row.estimates[name]))

    accuracies = (
        column("Average\naccuracy", _average_accuracy),
        column(
            _fold(f"Against {reference}", _HEADING_WIDTH),
            lambda row: (
                "reference"
                if row.label == reference and not row.diverged
                else _difference(row.difference)
            ),
        ),
        column("Rounding\nspread", lambda row: _fixed(100 * row.rounding, 1)),
        metric("Average\non-line\naccuracy", "average_online_accuracy"),
        metric("Learning\naccuracy", "learning_accuracy"),
        metric("Backward\ntransfer", "backward_transfer"),
        metric("Forgetting", "forgetting"),
        metric("Forward\ntransfer", "forward_transfer"),
    )
    costs = (
        column("Training\nseconds", lambda row: _seconds(row.estimates["seconds"])),
        column(
            "Compiling\nseconds",
            lambda row: _seconds(row.estimates["compile_seconds"]),
        ),
        column(
            "Bytes per\nparameter",
            lambda row: _bytes(row.estimates["state_bytes_per_parameter"]),
        ),
        column(
            "Update\ndensity",
            lambda row: _mean(row.estimates["update_density"], 100, 1),
        ),
        column(
            "Task\nboundary\nknown",
            lambda row: "yes" if row.task_boundary_known else "no",
        ),
    )
    return Content(
        title=_title(results, usual),
        labels=Column("Method", tuple(_fold(label, _LABEL_WIDTH) for label in labels)),
        accuracies=tuple(filter(_says_something, accuracies)),
        costs=tuple(filter(_says_something, costs)),
        notes=tuple(_notes(lines, reference)),
    )


def _notes(lines: Sequence[Row], reference: str) -> Iterator[str]:
    several = any(len(row.seeds) > 1 for row in lines)
    spread = "; mean ± sample standard deviation over seeds" if several else ""
    yield (
        "Accuracy, transfer and forgetting in percentage points, density in %"
        f"{spread}; -: undefined or not evaluated."
    )
    if len(lines) > 1:
        yield (
            f"Against {reference}: the mean difference in average accuracy over the "
            "seeds that both have, ± half of its 95 % t-interval; ahead or behind "
            "where the interval excludes 0, else level. Not corrected for the number "
            "of methods."
            if any(d and d.word for d in (row.difference for row in lines))
            else f"Against {reference}: the difference in average accuracy. An "
            "interval takes two seeds or more."
        )
    if not all(math.isnan(row.rounding) for row in lines):
        yield (
            "Rounding spread: the standard deviation of the average accuracy when each "
            "initial weight moves by one unit in the last place; where it is like the "
            "spread of seeds, another machine may give another number."
        )
    yield (
        "Training seconds are per seed, without compilation and evaluation; the bytes "
        "are those of optimizer and method state, stored examples included; the "
        "density is the share of parameters that a step moves."
    )
    for row in lines:
        if row.diverged:
            yield (
                f"{row.label} diverged ({row.diverged} of {_seeds(len(row.seeds))}) "
                "and so has no numbers. A lower learning rate may help (--set "
                f"{row.label.split(' (')[0]}.learning_rate=...), or classp-jax sweep, "
                "which looks for one."
            )


def _blocks(
    labels: Column, accuracies: Sequence[Column], costs: Sequence[Column], width: int
) -> Iterator[list[Column]]:
    """The columns that stand side by side, each block with the labels before it."""

    def fits(columns: Sequence[Column]) -> bool:
        widths = [column.width for column in [labels, *columns]]
        return sum(widths) + _GAP * (len(widths) - 1) <= width

    if fits([*accuracies, *costs]):
        yield [*accuracies, *costs]
        return
    for group in (accuracies, costs):
        block: list[Column] = []
        for column in group:
            if block and not fits([*block, column]):
                yield block
                block = []
            block.append(column)
        if block:
            yield block


def _rich_table(columns: Sequence[Column]) -> Table:
    table = Table(
        box=rich.box.SIMPLE_HEAD,
        padding=(0, _GAP - 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for i, column in enumerate(columns):
        table.add_column(
            Text(column.heading), justify="right" if i else "left", no_wrap=True
        )
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(Text, cells))
    return table


def _title(results: Results, seeds: int) -> str:
    stream = results.stream
    count = len(stream["task_names"])
    tasks = "1 task" if count == 1 else f"{count} tasks"
    return ", ".join([stream["name"], stream["scenario"], tasks, _seeds(seeds)])


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _says_something(column: Column) -> bool:
    return any(cell not in ("-", "reference") for cell in column.cells)


def _fold(text: str, width: int) -> str:
    """Lines of this width, or of the longest word's, but never above a label's."""
    longest = max(map(len, text.split()), default=0)
    width = max(width, min(longest, _LABEL_WIDTH))
    return "\n".join(textwrap.wrap(text, width)) or text


def _average_accuracy(row: Row) -> str:
    if not row.diverged:
        return _percent(row.estimates["average_accuracy"])
    if row.diverged == len(row.seeds):
        return "diverged"
    return f"{row.diverged} of {len(row.seeds)}\ndiverged"


def _difference(difference: Difference | None) -> str:
    if difference is None or math.isnan(difference.mean):
        return "-"
    mean = f"{100 * difference.mean:+z.1f}"
    if not difference.word:
        return mean
    half = 100 * (difference.high - difference.mean)
    return f"{mean} ± {half:.1f} {difference.word}"


def _fixed(number: float, decimals: int) -> str:
    return "-" if math.isnan(number) else f"{number:z.{decimals}f}"


def _mean(estimate: Estimate | None, scale: float, decimals: int) -> str:
    return "-" if estimate is None else _fixed(scale * estimate.mean, decimals)


def _percent(estimate: Estimate | None) -> str:
    mean = _mean(estimate, 100, 1)
    if estimate is None or mean == "-" or math.isnan(estimate.sd):
        return mean
    return f"{mean} ± {_fixed(100 * estimate.sd, 1)}"


def _seconds(estimate: Estimate | None) -> str:
    mean = math.nan if estimate is None else estimate.mean
    return _mean(estimate, 1, 0 if mean >= 100 else 1 if mean >= 1 else 2)


def _bytes(estimate: Estimate | None) -> str:
    if estimate is None or math.isnan(estimate.mean):
        return "-"
    small = 0 < estimate.mean < 0.1
    return f"{estimate.mean:.1g}" if small else f"{estimate.mean:.1f}"
