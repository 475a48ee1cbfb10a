"""One method of a call, and the runs of it that are left to train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from classp_jax.continual.methods import Method
from classp_jax.continual.results.records import Results
from classp_jax.continual.train.experiment import Experiment, fingerprint_of


class Job(NamedTuple):
    """One method of a call, and the runs of it that are left to train."""

    name: str
    """What the user calls it."""
    method: Method
    settings: Mapping[str, Any]
    """All of them."""
    known_by: Mapping[str, Any]
    """The settings, and what else tells the method from another of its name."""
    experiment: Experiment
    """With the plans of the seeds that are left."""

    @classmethod
    def from_method(
        cls,
        name: str,
        method: Method,
        settings: Mapping[str, Any],
        experiment: Experiment,
    ) -> Job:
        """The job of every seed of an experiment."""
        found = fingerprint_of(experiment, method)
        known_by = {**settings, "transformation": found} if found else dict(settings)
        return cls(name, method, settings, known_by, experiment)

    @property
    def seeds(self) -> list[int]:
        """The seeds that are left."""
        return [plan.seed for plan in self.experiment.plans]

    def without(self, results: Results) -> Job:
        """The job without the seeds whose results are here."""
        done = results.finished(self.name, dict(self.known_by))
        plans = tuple(p for p in self.experiment.plans if p.seed not in done)
        return self._replace(experiment=self.experiment._replace(plans=plans))
