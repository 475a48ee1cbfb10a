"""What a run leaves behind, and its file: results.json, written atomically."""

import dataclasses
import itertools
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

FORMAT = 1
"""The version of the file's layout; a file with a higher one is refused."""

FILE_NAME = "results.json"
"""The name of the file inside a run's folder."""

_SIGNATURE = "classp-jax results"


# What results may differ in and still be compared, and so merged.
_FREE = frozenset({"methods", "settings", "set", "lr", "seeds", "out", "data_dir"})


class ResultsError(ValueError):
    """A results file or a merge that cannot be; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One method, trained on the whole stream with one seed."""

    method: str
    """The method's name, such as ``"ewc+classp"``."""
    seed: int
    matrix: list[list[float]]
    """Test accuracy in [0, 1], [N + 1][N]: row 0 before training, row i after task i;
    NaN where it was not taken."""
    curve_steps: list[int]
    """The training steps at which :attr:`curve` was taken, ascending, [points]."""
    curve: list[list[float]]
    """Test accuracy in [0, 1] at each of those steps on each task, [points][N]."""
    seconds: float
    """Time of training alone: without compilation and evaluation."""
    state_bytes_per_parameter: float
    """Bytes of optimizer and method state, buffers included, over the parameters."""
    update_density: float
    """The share of weights that a step moves, in [0, 1], the mean over training."""
    told_boundary: bool
    """Whether the method was told when a task ended."""
    diverged: bool
    """Whether the loss became NaN or infinite; the accuracies then mean nothing."""
    settings: dict[str, float | int | bool | str]
    """The method's hyperparameters."""
    kept_bytes_per_parameter: float = math.nan
    """Bytes of that state which must outlive a task: all but what could be made anew
    from the weights; NaN where it was not taken."""
    steps: list[int] = dataclasses.field(default_factory=list)
    """The steps that each task's training took, where that depends on the loss; else
    empty."""
    training_accuracy: list[float] = dataclasses.field(default_factory=list)
    """Accuracy in [0, 1] on each task's training data at the stream's end, with dropout
    active, as the published scripts take it; empty where it was not asked for."""


@dataclasses.dataclass(frozen=True)
class Results:
    """Runs over one stream, with what is needed to make them again."""

    configuration: dict[str, Any]
    """The resolved configuration, of JSON's types."""
    versions: dict[str, str]
    """Package to version."""
    device: str
    date: str
    stream: dict[str, Any]
    """At least ``name``, ``scenario``, ``task_names`` (N names) and ``task_ends`` (the
    step at which each task's training ended, N ascending ints)."""
    runs: tuple[Run, ...]


def save(results: Results, path: str | os.PathLike[str]) -> None:
    """Writes results as JSON, atomically: the old file stays until the new is whole.

    The text goes to a file beside ``path``, which then takes its place in one step, so
    that a crash, a full disk or Ctrl-C leaves what was there before. NaN is stored as
    null; other floats come back bit for bit. Tuples inside ``configuration`` come back
    as lists, numpy and JAX numbers as Python's.

    Args:
      results: what to write.
      path: the file; its folder is made if need be.

    Raises:
      ResultsError: if the file cannot be written, or ``results`` is not as its fields
        say, such as a matrix whose shape is not [N + 1][N].

    Example:
      >>> import tempfile
      >>> stream = dict(name="s", scenario="domain-incremental", task_names=["a"],
      ...               task_ends=[10])
      >>> results = Results({}, {}, "cpu", "2024-05-16", stream, ())
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(results, f"{folder}/results.json")
      ...     load(f"{folder}/results.json") == results
      True
    """
    path = pathlib.Path(path)
    text = _encode(results)
    # What load would refuse is better refused now, before it replaces a good file.
    _decode(json.loads(text), "These results")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                # Without this, a power cut may leave the new name on an empty file.
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ResultsError(
            f"Cannot write the results to {path}: {error.strerror or error}."
        ) from error


def load(path: str | os.PathLike[str]) -> Results:
    """Reads results that :func:`save` wrote.

    Args:
      path: the file, or the folder with its ``results.json``.

    Returns:
      The results; null accuracies, seconds and the like are NaN.

    Raises:
      ResultsError: if the file is missing, unreadable, cut off, not one of ours, from
        a later version, or has a field of the wrong type or shape.

    Example:
      >>> load("/nowhere/results.json")
      Traceback (most recent call last):
      ...
      classp_jax.continual.results.ResultsError: No results at /nowhere/results.json.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(f"No results at {path}.") from None
    except OSError as error:
        raise ResultsError(f"Cannot read {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError:
        raise ResultsError(f"{path} is no text file, so not our results.") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ResultsError(
            f"{path} is damaged or cut off: not JSON ({error})."
        ) from None
    if not isinstance(content, dict) or content.get("file") != _SIGNATURE:
        raise ResultsError(f"{path} holds no classp-jax results but something else.")
    version = content.get("format")
    if version != FORMAT:
        raise ResultsError(
            f"{path} has format {version!r}, this version of classp-jax reads {FORMAT}."
        )
    return _decode(content, str(path))


def merge(results: Sequence[Results]) -> Results:
    """Puts runs over the same stream together, such as those of several methods.

    Runs keep their order. The merged configuration has the entries that all share, and
    under ``"merged"`` a list with each part's own.

    Args:
      results: one or more results.

    Returns:
      The union. A run that is in two parts, identical to the last bit, is kept once.

    Raises:
      ResultsError: if there are none; if the streams differ, or anything else in the
        configurations but methods, their settings, seeds and folders, as the network
        or the epochs; if one method and seed has two different runs; or if one method
        has two different settings, over which a mean would mean nothing.

    Example:
      >>> stream = dict(name="s", scenario="domain-incremental", task_names=["a"],
      ...               task_ends=[10])
      >>> parts = [Results({"methods": [m], "epochs": 1}, {}, "cpu", "2024-05-16",
      ...                  stream, ()) for m in ("sgd", "classp")]
      >>> merge(parts).configuration
      {'epochs': 1, 'merged': [{'methods': ['sgd']}, {'methods': ['classp']}]}
    """
    if not results:
        raise ResultsError("There are no results to merge.")
    first = results[0]
    for other in results[1:]:
        for a, b in (
            (first.stream, other.stream),
            (first.configuration, other.configuration),
        ):
            for key in sorted((a.keys() | b.keys()) - _FREE):
                if a.get(key) != b.get(key):
                    raise ResultsError(
                        "Only results over the same stream, trained the same way, can "
                        f"be merged; here {key} is {_short(a.get(key))} and "
                        f"{_short(b.get(key))}."
                    )
    runs: dict[tuple[str, int], Run] = {}
    settings: dict[str, dict[str, Any]] = {}
    for run in (run for part in results for run in part.runs):
        known = settings.setdefault(run.method, run.settings)
        for key in sorted(known.keys() | run.settings.keys()):
            if known.get(key) != run.settings.get(key):
                raise ResultsError(
                    f"Method {run.method} was run with two settings: {key} is "
                    f"{known.get(key)!r} and {run.settings.get(key)!r}."
                )
        known_run = runs.setdefault((run.method, run.seed), run)
        # As text, where NaN equals NaN.
        if _encode_run(known_run) != _encode_run(run):
            raise ResultsError(
                f"Method {run.method} with seed {run.seed} is in two of the results, "
                "with different outcomes; leave one out."
            )
    return Results(
        configuration=_merge_configurations([part.configuration for part in results]),
        versions={
            name: _joined(part.versions.get(name) for part in results)
            for name in dict.fromkeys(n for part in results for n in part.versions)
        },
        device=_joined(part.device for part in results),
        date=_joined(part.date for part in results),
        stream=first.stream,
        runs=tuple(runs.values()),
    )


def _merge_configurations(parts: list[dict[str, Any]]) -> dict[str, Any]:
    shared = {
        key: value
        for key, value in parts[0].items()
        if all(key in part and part[key] == value for part in parts)
    }
    rest = [{k: v for k, v in part.items() if k not in shared} for part in parts]
    return {**shared, "merged": rest} if any(rest) else shared


def _joined(texts: Any) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value: Any) -> Any:
    """JSON's own types: NaN as None, numpy's and JAX's numbers as Python's."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def _dumps(value: Any) -> str:
    try:
        return json.dumps(_plain(value), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ResultsError(f"These results cannot be stored: {error}.") from None


def _encode_run(run: Run) -> str:
    return _dumps({f.name: getattr(run, f.name) for f in dataclasses.fields(run)})


def _encode(results: Results) -> str:
    """One line a field and one a run, so that the file can be read and compared."""
    lines = [f'"file": "{_SIGNATURE}"', f'"format": {FORMAT}']
    for field in dataclasses.fields(results):
        if field.name != "runs":
            lines.append(f'"{field.name}": {_dumps(getattr(results, field.name))}')
    runs = ",\n".join(map(_encode_run, results.runs))
    lines.append(f'"runs": [\n{runs}\n]')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _decode(content: dict[str, Any], where: str) -> Results:
    """Checks every field's type and shape; ``where`` begins the error's message."""
    stream = _get(content, "stream", dict, where)
    for key in ("name", "scenario"):
        _get(stream, key, str, f"{where}: stream")
    names = _get(stream, "task_names", list, f"{where}: stream")
    ends = _get(stream, "task_ends", list, f"{where}: stream")
    if not names or not all(isinstance(name, str) for name in names):
        raise ResultsError(f"{where}: stream: task_names must be one or more names.")
    if not _ascending(ends) or len(ends) != len(names):
        raise ResultsError(
            f"{where}: stream: task_ends must be {len(names)} ascending step counts."
        )
    versions = _get(content, "versions", dict, where)
    if not all(isinstance(version, str) for version in versions.values()):
        raise ResultsError(f"{where}: versions must be texts.")
    runs = [
        _decode_run(run, len(names), f"{where}: run {i}")
        for i, run in enumerate(_get(content, "runs", list, where))
    ]
    if len({(run.method, run.seed) for run in runs}) < len(runs):
        raise ResultsError(f"{where}: a method has two runs with the same seed.")
    return Results(
        configuration=_get(content, "configuration", dict, where),
        versions=versions,
        device=_get(content, "device", str, where),
        date=_get(content, "date", str, where),
        stream=stream,
        runs=tuple(runs),
    )


def _decode_run(run: Any, num_tasks: int, where: str) -> Run:
    if not isinstance(run, dict):
        raise ResultsError(f"{where} is no table of fields.")
    steps = _get(run, "curve_steps", list, where)
    if not _ascending(steps):
        raise ResultsError(f"{where}: curve_steps must be ascending step counts.")
    settings = _get(run, "settings", dict, where)
    if not all(isinstance(s, float | int | str) for s in settings.values()):
        raise ResultsError(f"{where}: settings must be numbers, bools or texts.")
    # Files of version 0.1 do not have these.
    run = {
        "kept_bytes_per_parameter": None,
        "steps": [],
        "training_accuracy": [],
        **run,
    }
    taken = _get(run, "steps", list, where)
    if len(taken) not in (0, num_tasks) or not all(map(_is_count, taken)):
        raise ResultsError(f"{where}: steps must be {num_tasks} step counts or none.")
    in_training = _get(run, "training_accuracy", list, where)
    if in_training:
        row = {"training_accuracy": [in_training]}
        (in_training,) = _accuracies(row, "training_accuracy", 1, num_tasks, where)
    return Run(
        method=_get(run, "method", str, where),
        seed=_get(run, "seed", int, where),
        matrix=_accuracies(run, "matrix", num_tasks + 1, num_tasks, where),
        curve_steps=steps,
        curve=_accuracies(run, "curve", len(steps), num_tasks, where),
        seconds=_number(run, "seconds", where),
        state_bytes_per_parameter=_number(run, "state_bytes_per_parameter", where),
        update_density=_number(run, "update_density", where),
        told_boundary=_get(run, "told_boundary", bool, where),
        diverged=_get(run, "diverged", bool, where),
        settings=settings,
        kept_bytes_per_parameter=_number(run, "kept_bytes_per_parameter", where),
        steps=taken,
        training_accuracy=in_training,
    )


def _get(table: dict[str, Any], key: str, kind: type, where: str) -> Any:
    if key not in table:
        raise ResultsError(f"{where} has no {key}.")
    value = table[key]
    # JSON's true and false are ints in Python, and no seeds.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ResultsError(
            f"{where}: {key} must be of type {kind.__name__}, got {_short(value)}."
        )
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def _number(table: dict[str, Any], key: str, where: str) -> float:
    value = table.get(key, "nothing")
    if value is None:
        return math.nan
    if not _is_number(value) or value < 0:
        raise ResultsError(f"{where}: {key} must be at least 0, got {_short(value)}.")
    return float(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _ascending(steps: list[Any]) -> bool:
    return all(map(_is_count, steps)) and all(
        a < b for a, b in itertools.pairwise(steps)
    )


def _accuracies(
    table: dict[str, Any], key: str, num_rows: int, num_columns: int, where: str
) -> list[list[float]]:
    rows = _get(table, key, list, where)
    if len(rows) != num_rows or not all(
        isinstance(row, list) and len(row) == num_columns for row in rows
    ):
        raise ResultsError(f"{where}: {key} must have {num_rows} x {num_columns}.")
    values = [[math.nan if x is None else x for x in row] for row in rows]
    # Written so that NaN passes.
    if not all(_is_number(x) and not (x < 0 or x > 1) for row in values for x in row):
        raise ResultsError(f"{where}: {key} must hold accuracies in [0, 1] or null.")
    return [[float(x) for x in row] for row in values]
