"""What a run leaves: records, their file, metrics and statistics."""

from classp_jax.continual.results.errors import ResultsError
from classp_jax.continual.results.records import Provenance, Results, Run
from classp_jax.continual.results.store import find, load, save
from classp_jax.continual.results.variants import merge

__all__ = [
    "Provenance",
    "Results",
    "ResultsError",
    "Run",
    "find",
    "load",
    "merge",
    "save",
]
