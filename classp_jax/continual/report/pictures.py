"""The three pictures of a report, and their files."""

import io
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

from classp_jax.continual.report.curves import accuracy_picture
from classp_jax.continual.report.matrices import matrix_picture
from classp_jax.continual.report.styles import RC
from classp_jax.continual.report.tradeoff import tradeoff_picture
from classp_jax.continual.results.errors import ResultsError
from classp_jax.continual.results.records import Results


class Picture(NamedTuple):
    """A picture with its words."""

    title: str
    caption: str
    draw: Callable[[Results], Figure]


PICTURES: dict[str, Picture] = {
    "accuracy": Picture(
        "Accuracy on every task while training goes on",
        "Test accuracy while training goes on: the average over the tasks whose "
        "training has begun, from the end of the first task on, and each task alone. "
        "The x axis counts tasks, so that seeds with different numbers of steps "
        "stand together; lines and bands are mean and sample standard deviation over "
        "seeds. Shaded: the task is in training.",
        accuracy_picture,
    ),
    "matrix": Picture(
        "Accuracy matrices",
        "The accuracy matrix R of every method in %, the mean over seeds. Row: after "
        "training on that task, none: before all. Grey: not evaluated. Where tasks not "
        "trained yet are evaluated, they lie above the white line.",
        matrix_picture,
    ),
    "tradeoff": Picture(
        "Average accuracy against state bytes per parameter",
        "Average accuracy (mean ± sample standard deviation over seeds) against the "
        "bytes of optimizer and method state per parameter.",
        tradeoff_picture,
    ),
}

# Without a date, so that the same results give the same bytes.
_FORMATS: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}


def picture(results: Results, name: str) -> Figure:
    """One picture of the report, for a notebook or a file.

    Args:
      results: the runs, at least one.
      name: ``"accuracy"``, ``"matrix"`` or ``"tradeoff"``.

    Returns:
      A matplotlib figure, not known to pyplot.

    Raises:
      ResultsError: if there are no runs, or ``name`` is another.
    """
    if name not in PICTURES:
        raise ResultsError(f"name must be one of {', '.join(PICTURES)}, got {name!r}.")
    if not results.runs:
        raise ResultsError("There are no finished runs to show.")
    with matplotlib.rc_context(RC):
        return PICTURES[name].draw(results)


def picture_files(results: Results) -> Iterator[tuple[str, bytes]]:
    """Every picture as PNG, SVG and PDF: file names and contents."""
    for name in PICTURES:
        figure = picture(results, name)
        for suffix, metadata in _FORMATS.items():
            content = io.BytesIO()
            with matplotlib.rc_context(RC):
                figure.savefig(content, format=suffix, metadata=metadata)
            # The layout takes longer than the drawing, and is the same for each format.
            figure.set_layout_engine("none")
            yield f"{name}.{suffix}", content.getvalue()
