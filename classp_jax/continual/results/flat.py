"""Results as one flat table with a row per run: ``results.csv`` and data frames."""

import csv
import importlib
import io
import math
from typing import Any

from classp_jax.continual.results.errors import ResultsError
from classp_jax.continual.results.metrics import run_metrics
from classp_jax.continual.results.records import Results
from classp_jax.continual.results.variants import is_undefined, variants

_COLUMNS = (
    "seconds",
    "compile_seconds",
    "state_bytes_per_parameter",
    "kept_bytes_per_parameter",
    "parameters",
    "task_boundary_known",
    "stored_data",
    "diverged",
    "ulp_spread",
)


def flat_rows(results: Results) -> list[dict[str, Any]]:
    """One row per run, all with the same columns; None where a cell is empty.

    Columns: the label that tables show, method, seed, ``settings.NAME`` for every
    setting, all metrics, costs, and the run's date, device and command.
    """
    settings = dict.fromkeys(
        f"settings.{name}" for run in results.runs for name in run.settings
    )
    return [
        {"label": variant.label, "method": run.method, "seed": run.seed}
        | settings
        | {f"settings.{name}": value for name, value in run.settings.items()}
        | {name: _cell(value) for name, value in run_metrics(run).items()}
        | {name: _cell(getattr(run, name)) for name in _COLUMNS}
        | {"update_density": _mean(run.update_density)}
        | {name: getattr(run.provenance, name) for name in _PROVENANCE}
        for variant in variants(results.runs)
        for run in variant.runs
    ]


_PROVENANCE = ("date", "device", "command")


def csv_text(results: Results) -> str:
    """The text of ``results.csv``; only a heading where there are no runs."""
    rows = flat_rows(results)
    text = io.StringIO()
    names = list(rows[0]) if rows else ["label", "method", "seed"]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def frame(results: Results) -> Any:
    """A data frame of :func:`flat_rows`; see :meth:`Results.frame`."""
    rows = flat_rows(results)
    for library in ("pandas", "polars"):
        try:
            module = importlib.import_module(library)
        except ImportError:
            continue
        options = {} if library == "pandas" else {"infer_schema_length": None}
        return module.DataFrame(rows, **options)
    raise ResultsError(
        "A data frame needs pandas or polars, and neither is installed; "
        "`pip install pandas` is enough. results.csv holds the same rows."
    )


def _cell(value: Any) -> Any:
    return None if is_undefined(value) else value


def _mean(values: list[float]) -> float | None:
    return _cell(math.fsum(values) / len(values)) if values else None
