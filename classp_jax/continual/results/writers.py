"""What to do with metrics while training goes on: a CSV file, TensorBoard.

``run(..., on_metrics=writer)`` calls ``writer(record)`` for each seed at each
evaluation. A record is a flat dictionary with ``method``, its ``settings`` by name,
``seed``, ``task`` (from 0), ``step`` and the metrics of that point by name, such as
``{"method": "sgd", "settings": {"learning_rate": 0.1}, "seed": 0, "task": 1, "step":
40, "loss": 0.3, "test_accuracy/task_1": 0.9}``; what else is no number is left out.
"""

import contextlib
import csv
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from classp_jax.continual.results.errors import ResultsError

_KEYS = ("method", "settings", "seed", "task", "step")

OnMetrics = Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def csv_writer(path: str | os.PathLike[str]) -> Iterator[OnMetrics]:
    """Appends metrics to a CSV file, one line per metric, as they come.

    The columns are ``method, settings, seed, task, step, metric, value``. Each record
    is written out at once, so that a killed run leaves its metrics.

    Args:
      path: the file; its folder is made if need be. Lines are added to one that exists.

    Raises:
      ResultsError: if the file cannot be written.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with csv_writer(f"{folder}/metrics.csv") as writer:
      ...         settings = {"learning_rate": 0.1}
      ...         keys = dict(method="sgd", settings=settings, seed=0, task=1, step=40)
      ...         writer(keys | {"loss": 0.5})
      ...     print(pathlib.Path(folder, "metrics.csv").read_text())
      method,settings,seed,task,step,metric,value
      sgd,learning_rate=0.1,0,1,40,loss,0.5
      <BLANKLINE>
    """
    path = pathlib.Path(path)
    with _one_line(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", newline="", encoding="utf-8")
    lines = csv.writer(file, lineterminator="\n")
    if file.tell() == 0:
        lines.writerow([*_KEYS, "metric", "value"])

    def write(record: Mapping[str, Any]) -> None:
        with _one_line(path):
            keys = [_key(record, key) for key in _KEYS]
            lines.writerows([*keys, *item] for item in _metrics(record).items())
            file.flush()

    try:
        yield write
    finally:
        # Not around the caller's own work, whose errors are not this file's.
        with _one_line(path):
            file.close()


@contextlib.contextmanager
def tensorboard_writer(folder: str | os.PathLike[str]) -> Iterator[OnMetrics]:
    """Writes metrics for TensorBoard, one of its runs per method, settings and seed.

    Args:
      folder: what ``tensorboard --logdir`` is given.

    Raises:
      ResultsError: if tensorboardX is not installed, or a file cannot be written.
    """
    try:
        import tensorboardX
    except ImportError:
        raise ResultsError(
            "Metrics for TensorBoard need tensorboardX, which is not installed; "
            "`pip install tensorboardX` is enough."
        ) from None
    writers: dict[str, Any] = {}

    def write(record: Mapping[str, Any]) -> None:
        keys = (record["method"], _key(record, "settings"), f"seed_{record['seed']}")
        name = "/".join(filter(None, keys))
        with _one_line(pathlib.Path(folder)):
            if name not in writers:
                writers[name] = tensorboardX.SummaryWriter(
                    str(pathlib.Path(folder, name))
                )
            for metric, value in _metrics(record).items():
                writers[name].add_scalar(metric, value, record["step"])

    try:
        yield write
    finally:
        for writer in writers.values():
            writer.close()


def _key(record: Mapping[str, Any], key: str) -> Any:
    """One of the keys, the settings as text."""
    value = record.get(key, "")
    if not isinstance(value, Mapping):
        return value
    return " ".join(f"{name}={number:g}" for name, number in value.items())


def _metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record, apart from its keys; numpy's and JAX's as Python's."""
    numbers = {}
    for name, value in record.items():
        if name in _KEYS or isinstance(value, str | Mapping) or value is None:
            continue
        numbers[name] = float(value)
    return numbers


@contextlib.contextmanager
def _one_line(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResultsError(
            f"Cannot write the metrics to {path}: {error.strerror or error}."
        ) from error
