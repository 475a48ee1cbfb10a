"""The main job: methods on a stream, for every seed, results kept as they come."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from classp_jax.continual.errors import ContinualError, check_count
from classp_jax.continual.methods.registry import (
    as_methods,
    check_owners,
    resolve_settings,
)
from classp_jax.continual.results.records import Results
from classp_jax.continual.train.cost import estimate
from classp_jax.continual.train.experiment import (
    Experiment,
    compile_evaluate,
    compile_method,
)
from classp_jax.continual.train.experiment import initial_weights as drawn_weights
from classp_jax.continual.train.folder import Folder
from classp_jax.continual.train.hosts import each, is_first
from classp_jax.continual.train.job import Job
from classp_jax.continual.train.keeper import Keeper, folder_of
from classp_jax.continual.train.loop import train
from classp_jax.continual.train.progress import Progress
from classp_jax.continual.train.setup import set_up
from classp_jax.continual.train.weights import starting_weights


def run(
    stream: Any,
    model: Any,
    methods: Any,
    *,
    seeds: Sequence[int] = range(10),
    settings: Mapping[str, Mapping[str, float]] | None = None,
    model_options: Mapping[str, Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
    initial_weights: Any = None,
    save_weights: bool = False,
    checkpoint_every: int | None = None,
    resume: bool = False,
    rounding_copies: int = 0,
    devices: int | None = None,
    devices_per_run: int = 1,
    shard_parameters: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    on_metrics: Callable[[dict[str, Any]], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
    announce: Callable[[str], None] | None = None,
    command: str | None = None,
    **options: Any,
) -> Results:
    """Trains methods on a stream of tasks, every seed by itself.

    Everything is checked, and every method compiled, before anything trains. A seed's
    data, scale, order of batches, initial weights and dropout are its own: its result
    is the same, to the bit, whichever other seeds, settings and methods run with it on
    the same machine.

    Args:
      stream: what :func:`permuted`, :func:`stream` and their neighbours return, or one
        :class:`Stream` for all seeds.
      model: the network; see :func:`as_model`.
      methods: names such as ``"ewc+classp"``; or a mapping from a name of your choice
        to such a name, a :class:`Method`, or an Optax transformation.
      seeds: one run of every method for each; integers >= 0 of any size.
      settings: numbers in place of the methods' defaults, by the name of a method or of
        a part of one: ``{"classp": {"eps": 0.5}}``.
      model_options: for a network that has a name, such as ``{"hidden": (64,)}``.
      folder: where results are added after each method. What is there already, of the
        same methods, settings and seeds, is not trained again, unless it lacks weights
        or rounding copies that are asked for.
      initial_weights: what to start from in place of random weights: a tree of
        parameters for all seeds, or one per seed, ``{seed: tree}``. What
        :attr:`Results.params` holds will do as a tree.
      save_weights: whether to put trained weights and states into
        :attr:`Results.params`, by (method, seed), and into the folder, if there is one.
      checkpoint_every: save every run in the folder after so many steps, and at the end
        of each task, to go on from there. A method's checkpoints are removed when its
        results are stored.
      resume: go on from checkpoints in the folder, to the same bits as if there had
        been no interruption; runs without one begin at the beginning.
      rounding_copies: copies of each run whose initial weights are moved by one unit in
        the last place; their spread is stored with the run.
      devices: how many to train on, of those that JAX has; None: one, or all where
        several processes work together. Runs (seeds and copies) are spread over them.
      devices_per_run: how many of them share each run: each takes a part of every
        batch, which must divide, and their gradients are added up.
      shard_parameters: whether the devices of a run also share its parameters, and what
        state is as large, cut along the longest axis that divides; the rest is on each.
      mesh: devices in place of these two numbers: a mesh with the axis ``"runs"``,
        over which runs are spread, or ``"batch"``, which share a run, or both.
      on_metrics: called at every evaluation of every run; see :func:`train`.
      progress: called with a :class:`Progress` likewise.
      announce: called once, before training, with a line about sizes, steps and time.
      command: the command line, for the record.
      **options: fields of :class:`Training`: ``epochs`` (a number, or one for each
        task), ``batch_size``, ``points``, ``evaluate``, ``max_test`` and so on.

    Returns:
      The :class:`Results`, with what the folder held before.

    Raises:
      ContinualError: in one line, for anything that does not exist or does not fit.

    Example:
      >>> from classp_jax import continual
      >>> results = continual.run(
      ...     continual.permuted("digits", tasks=2, max_train=64),
      ...     "mlp",
      ...     ["sgd", "classp"],
      ...     seeds=[0],
      ...     epochs=1,
      ... )
      >>> [run.method for run in results.runs]
      ['sgd', 'classp']
    """
    chosen = as_methods(methods)
    if settings is not None and not isinstance(settings, Mapping):
        raise ContinualError("settings must be a mapping from methods to mappings")
    check_owners("settings", settings or {}, chosen.values())
    resolved = {
        name: resolve_settings(method, settings or {})
        for name, method in chosen.items()
    }
    check_count("rounding_copies", rounding_copies, 0)
    if checkpoint_every is not None:
        check_count("checkpoint_every", checkpoint_every, 1)
    keeping = resume or checkpoint_every is not None
    if keeping and folder is None:
        raise ContinualError("checkpoints need a folder")
    setup = set_up(
        stream,
        model,
        seeds,
        model_options=model_options,
        devices=devices,
        devices_per_run=devices_per_run,
        shard_parameters=shard_parameters,
        mesh=mesh,
        **options,
    )
    experiment, configuration = setup.experiment, setup.configuration
    starting = None
    if initial_weights is not None:
        seeds = [plan.seed for plan in experiment.plans]
        starting, digest = starting_weights(experiment.model, seeds, initial_weights)
        configuration = configuration | {"initial_weights": digest}
    every_job = [
        Job.from_method(name, method, resolved[name], experiment)
        for name, method in chosen.items()
    ]
    results = Results(configuration, setup.stream)
    kept = Folder.at(folder, save_weights, rounding_copies > 0)
    stored = kept.complete(results)
    jobs = [job.without(stored) for job in every_job]
    cost = estimate(experiment, jobs, 1 + rounding_copies)
    results = kept.begin(results)
    if announce is not None:
        announce(cost.describe())
    keepers = {}
    if folder is not None and keeping:
        keepers = _keepers(jobs, folder, configuration, checkpoint_every, resume)
        _check(keepers, jobs, experiment)
    _compile([job for job in jobs if job.seeds], experiment)
    for job in jobs:
        # Another process may have added it meanwhile.
        job = job.without(kept.complete(results))
        if not job.seeds:
            continue
        keeper = keepers.get(job.name)
        states: dict[tuple[int, int], Any] = {}
        with keeper or contextlib.nullcontext():
            (runs,) = train(
                job.experiment,
                job.method,
                [job.settings],
                weights=starting,
                rounding_copies=rounding_copies,
                on_metrics=on_metrics,
                progress=progress,
                trained=states if save_weights else None,
                keeper=keeper,
            )
        results = kept.add(results, job, runs, states, command)
        if keeper is not None:
            keeper.remove()
    return kept.with_stored_weights(results, every_job)


def _keepers(
    jobs: Sequence[Job],
    folder: str | os.PathLike[str],
    configuration: Mapping[str, Any],
    every: int | None,
    resume: bool,
) -> dict[str, Keeper]:
    """What saves the runs of each job while they train."""
    return {
        job.name: Keeper(
            folder_of(folder, job.name),
            {"settings": job.known_by, "configuration": configuration},
            every=every,
            resume=resume,
        )
        for job in jobs
    }


def _check(
    keepers: Mapping[str, Keeper], jobs: Sequence[Job], experiment: Experiment
) -> None:
    """Refuses checkpoints of other runs, and removes those of runs that are stored."""

    def check() -> str:
        for job in jobs if is_first() else ():
            if job.seeds:
                keepers[job.name].check()
            else:
                keepers[job.name].remove_finished(
                    [plan.seed for plan in experiment.plans]
                )
        return ""

    each(check)


def _compile(jobs: Sequence[Job], experiment: Experiment) -> None:
    """Compiles all that jobs need, side by side."""
    if not jobs:
        return
    drawn_weights(experiment, experiment.plans[0].seed)
    used = experiment.places[: len(experiment.plans)]
    places = [place for place in used if place.is_here]
    with ThreadPoolExecutor(os.cpu_count() or 1) as executor:
        compiling = [
            executor.submit(compile_method, experiment, job.method, job.settings, place)
            for job in jobs
            for place in places
        ] + [executor.submit(compile_evaluate, experiment, p) for p in places]
        for future in compiling:
            future.result()
