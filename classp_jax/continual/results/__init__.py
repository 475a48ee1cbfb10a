"""What a run leaves: records, their file, metrics and statistics."""

from classp_jax.continual.results.errors import ResultsError
from classp_jax.continual.results.records import Provenance, Results, Run

__all__ = ["Provenance", "Results", "ResultsError", "Run"]
