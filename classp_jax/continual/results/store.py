"""The file of a folder's results: ``results.json``, to which runs are only added."""

import dataclasses
import itertools
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import msgspec

from classp_jax.continual.results.errors import ResultsError
from classp_jax.continual.results.files import locked, write_atomically
from classp_jax.continual.results.flat import csv_text
from classp_jax.continual.results.metrics import run_metrics
from classp_jax.continual.results.records import Results, Run
from classp_jax.continual.results.variants import encode, merge

FORMAT = 2
"""The version of the file's layout; a file of another one is refused."""

FILE_NAME = "results.json"
CSV_NAME = "results.csv"

_SIGNATURE = "classp-jax results"


def save(results: Results, folder: str | os.PathLike[str]) -> Results:
    """Adds runs to a folder; see :meth:`Results.save`.

    The folder is locked, read, added to and replaced in one step, so that after a
    crash, a full disk or Ctrl-C the old file is still there. NaN is stored as null;
    other floats come back bit for bit.

    Example:
      >>> import tempfile
      >>> stream = {"name": "s", "scenario": "domain-incremental", "task_names": ["a"]}
      >>> run = Run(method="sgd", seed=0, matrix=[[0.1], [0.9]])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = save(Results({}, stream, (run,)), folder)
      ...     more = dataclasses.replace(run, seed=1)
      ...     [run.seed for run in save(Results({}, stream, (more,)), folder).runs]
      [0, 1]
    """
    folder = pathlib.Path(folder)
    with locked(folder):
        stored = find(folder)
        try:
            together = merge([stored, results] if stored else [results])
        except ResultsError as error:
            raise ResultsError(
                f"{folder} holds other results: use another folder. {error}"
            ) from None
        # What load would refuse is better refused now, before it replaces a good file.
        _check(together, "These results cannot be stored")
        text = _encode(together)
        _decode(text, "These results", "These results cannot be stored")
        write_atomically(folder / FILE_NAME, text)
        write_atomically(folder / CSV_NAME, csv_text(together).encode())
    return together


def load(folder: str | os.PathLike[str]) -> Results:
    """Reads what :func:`save` wrote.

    Args:
      folder: the folder, or its ``results.json``.

    Returns:
      The results; null accuracies, seconds and the like are NaN.

    Raises:
      ResultsError: in one line, if the file is missing, unreadable, cut off, not one of
        ours, of another version, or has a field of the wrong type or shape.

    Example:
      >>> load("/nowhere")
      Traceback (most recent call last):
      ...
      classp_jax.continual.results.errors.ResultsError: No results at /nowhere.
    """
    path = pathlib.Path(folder)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise ResultsError(f"No results at {path}.") from None
    except OSError as error:
        raise ResultsError(f"Cannot read {path}: {error.strerror or error}.") from error
    return _decode(text, str(path), f"{path} is damaged")


def find(folder: str | os.PathLike[str]) -> Results | None:
    """What a folder holds, or None where it holds no results or does not exist.

    Raises:
      ResultsError: as :func:`load`, but not where there is nothing.
    """
    path = pathlib.Path(folder)
    return load(path) if (path / FILE_NAME).exists() else None


def _encode(results: Results) -> bytes:
    """One line per field and one per run, so that the file can be read and compared."""
    head = {
        "file": _SIGNATURE,
        "format": FORMAT,
        "configuration": results.configuration,
        "stream": results.stream,
    }
    lines = [encode(name) + b": " + encode(value) for name, value in head.items()]
    runs = b",\n".join(
        encode({**_fields(run), "metrics": run_metrics(run)}) for run in results.runs
    )
    lines.append(b'"runs": [\n' + runs + b"\n]")
    return b"{\n" + b",\n".join(lines) + b"\n}\n"


def _fields(run: Run) -> dict[str, Any]:
    return {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}


class _File(msgspec.Struct):
    configuration: dict[str, Any]
    stream: dict[str, Any]
    runs: list[dict[str, Any]]


def _decode(text: bytes, where: str, fault: str) -> Results:
    """Checks every field's type and shape; ``fault`` begins the message on those."""
    try:
        raw = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ResultsError(
            f"{where} is damaged, cut off, or no results file: {error}."
        ) from None
    if not isinstance(raw, dict) or raw.get("file") != _SIGNATURE:
        raise ResultsError(f"{where} holds no classp-jax results but something else.")
    if raw.get("format") != FORMAT:
        raise ResultsError(
            f"{where} has format {raw.get('format')!r}; this version of classp-jax "
            f"reads {FORMAT}."
        )
    try:
        file = msgspec.convert(raw, _File)
        runs = tuple(
            msgspec.convert(_with_nan(run), Run, strict=True) for run in file.runs
        )
    except msgspec.ValidationError as error:
        raise ResultsError(f"{fault}: {error}.") from None
    results = Results(file.configuration, file.stream, runs)
    _check(results, fault)
    return results


_FLOATS = tuple(
    field.name
    for field in dataclasses.fields(Run)
    if field.type in ("float", "list[float]", "list[list[float]]")
)


def _with_nan(run: dict[str, Any]) -> dict[str, Any]:
    return {**run, **{name: _nan(run[name]) for name in _FLOATS if name in run}}


def _nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_nan(item) for item in value]
    return math.nan if value is None else value


def _check(results: Results, fault: str) -> None:
    """Refuses shapes and values that no run has."""
    names = results.stream.get("task_names")
    texts = [results.stream.get(key) for key in ("name", "scenario")]
    texts += names if isinstance(names, list) else [None]
    if not names or not all(isinstance(text, str) for text in texts):
        raise ResultsError(
            f"{fault}: stream must have a name, a scenario and a list of task_names."
        )
    for i, run in enumerate(results.runs):
        for text in _faults(run, len(names)):
            raise ResultsError(
                f"{fault}: run {i} ({run.method}, seed {run.seed}): {text}."
            )


def _faults(run: Run, num_tasks: int) -> Iterator[str]:
    if [len(row) for row in run.matrix] != [num_tasks] * (num_tasks + 1):
        yield f"matrix must have the shape [{num_tasks + 1}, {num_tasks}]"
    if [len(row) for row in run.curve] != [num_tasks] * len(run.curve_steps):
        yield f"curve must have the shape [{len(run.curve_steps)}, {num_tasks}]"
    for name in ("curve_steps", "task_ends"):
        steps = getattr(run, name)
        if any(b <= a for a, b in itertools.pairwise([-1, *steps])):
            yield f"{name} must be ascending step counts"
    for name in (
        "task_ends",
        "online_accuracy",
        "update_density",
        "training_accuracy",
    ):
        if len(getattr(run, name)) not in (0, num_tasks):
            yield f"{name} must have {num_tasks} entries or none"
    if run.curve and not run.task_ends:
        yield "a curve needs task_ends"
    shares = itertools.chain(
        *run.matrix,
        *run.curve,
        run.online_accuracy,
        run.update_density,
        run.training_accuracy,
    )
    # Written so that NaN passes.
    if any(share < 0 or share > 1 for share in shares):
        yield "accuracies and densities must be in [0, 1] or null"
