"""Results of a call of :func:`run`, in memory or in a folder too."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from classp_jax.continual.results.records import Results, Run
from classp_jax.continual.results.store import find
from classp_jax.continual.train import weights
from classp_jax.continual.train.experiment import abstract_state
from classp_jax.continual.train.hosts import by_first
from classp_jax.continual.train.job import Job
from classp_jax.continual.train.provenance import provenance
from classp_jax.continual.train.step import State
from classp_jax.continual.train.weights import Trained


class Folder(NamedTuple):
    """Where results are kept, and what a stored run must have to count.

    Of several processes the first reads and writes, and tells the others.
    """

    path: pathlib.Path | None
    """None: results are in memory alone."""
    with_weights: bool
    with_rounding: bool

    @classmethod
    def at(
        cls,
        path: str | os.PathLike[str] | None,
        with_weights: bool,
        with_rounding: bool,
    ) -> Folder:
        """A folder, or none."""
        found = None if path is None else pathlib.Path(path)
        return cls(found, with_weights, with_rounding)

    def complete(self, results: Results) -> Results:
        """The stored runs that have all that is asked for; others are trained again.

        Args:
          results: what there is if nothing is stored.
        """
        path = self.path
        return results if path is None else by_first(lambda: self._read(path, results))

    def _read(self, path: pathlib.Path, results: Results) -> Results:
        stored = find(path)
        if stored is None:
            return results

        def is_complete(run: Run) -> bool:
            file = weights.file_of(path, run.method, run.settings, run.seed)
            measured = run.ulp_spread is not None or not self.with_rounding
            return measured and (file.exists() or not self.with_weights)

        return dataclasses.replace(stored, runs=tuple(filter(is_complete, stored.runs)))

    def begin(self, results: Results) -> Results:
        """Adds nothing yet: the time to find a full disk is before the first hour."""
        path = self.path
        return results if path is None else by_first(lambda: results.save(path))

    def add(
        self,
        results: Results,
        job: Job,
        runs: Sequence[Run],
        states: Mapping[tuple[int, int], State],
        command: str | None,
    ) -> Results:
        """The results with a job's runs, which are in the folder from now on.

        Args:
          results: those of the call so far.
          job: the job.
          runs: one for each of its seeds.
          states: the last state of each, by (0, index of the seed), to be kept too.
          command: the command line, for the record.
        """
        origin, path = provenance(command), self.path
        runs = tuple(
            dataclasses.replace(run, settings=job.known_by, provenance=origin)
            for run in runs
        )
        params = {
            (job.name, job.seeds[j]): Trained(state.params, state.method)
            for (_, j), state in states.items()
        }
        added = Results(results.configuration, results.stream, runs, params)
        if path is None:
            return results.add(added)

        def save() -> Results:
            found = added.save(path)
            for (_, seed), trained in params.items():
                file = weights.file_of(path, job.name, job.known_by, seed)
                weights.save(file, trained)
            return found

        return dataclasses.replace(by_first(save), params=results.params | params)

    def with_stored_weights(self, results: Results, jobs: Sequence[Job]) -> Results:
        """The results with the weights that other calls have stored for these jobs."""
        if self.path is None or not self.with_weights:
            return results
        found = {}
        for job in jobs:
            state = abstract_state(job.experiment, job.method, job.settings)
            for seed in job.seeds:
                file = weights.file_of(self.path, job.name, job.known_by, seed)
                if (job.name, seed) not in results.params and file.exists():
                    found[job.name, seed] = weights.load(file, Trained(*state))
        return dataclasses.replace(results, params=found | results.params)
