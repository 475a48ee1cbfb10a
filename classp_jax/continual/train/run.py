"""The main job: methods on a stream, for every seed, results kept as they come."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from classp_jax.continual.errors import ContinualError, check_count
from classp_jax.continual.methods.protocol import Method
from classp_jax.continual.methods.registry import (
    as_methods,
    check_owners,
    resolve_settings,
)
from classp_jax.continual.results.records import Results, Run
from classp_jax.continual.results.store import load
from classp_jax.continual.train import weights
from classp_jax.continual.train.cost import estimate
from classp_jax.continual.train.experiment import (
    Experiment,
    abstract_state,
    compile_evaluate,
    compile_method,
    fingerprint_of,
)
from classp_jax.continual.train.experiment import (
    initial_weights as drawn_weights,
)
from classp_jax.continual.train.hosts import by_first, each, is_first
from classp_jax.continual.train.keeper import Keeper, folder_of
from classp_jax.continual.train.loop import train
from classp_jax.continual.train.progress import Progress
from classp_jax.continual.train.provenance import provenance
from classp_jax.continual.train.setup import set_up
from classp_jax.continual.train.weights import Trained


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
    configuration = setup.configuration
    known_by = {
        name: _known_by(setup.experiment, method, resolved[name])
        for name, method in chosen.items()
    }
    starting = None
    if initial_weights is not None:
        starting, digest = _starting_weights(setup.experiment, initial_weights)
        configuration = configuration | {"initial_weights": digest}
    results = Results(configuration, setup.stream)
    cost = estimate(setup.experiment, chosen, resolved, 1 + rounding_copies)
    if folder is not None:
        # Before the first hour of training is the time to find a full disk.
        to_save = results
        results = by_first(lambda: to_save.save(folder))
    if announce is not None:
        announce(cost.describe())
    keepers = {
        name: Keeper(
            folder_of(folder, name),
            {"settings": known, "configuration": configuration},
            every=checkpoint_every,
            resume=resume,
        )
        for name, known in known_by.items()
        if keeping
    }

    def complete() -> Results:
        return _complete(folder, save_weights, rounding_copies > 0) or results

    stored = by_first(complete)
    _check(keepers, setup.experiment, known_by, stored)
    todo = _compiled(setup.experiment, chosen, resolved, known_by, stored)
    for name, (method, experiment) in todo.items():
        # Another process may have added it meanwhile.
        stored = by_first(complete)
        experiment = _missing(experiment, name, known_by[name], stored)
        if experiment is None:
            continue
        states: dict[tuple[int, int], Any] = {}
        keeper = keepers.get(name)
        with keeper or contextlib.nullcontext():
            (runs,) = train(
                experiment,
                method,
                [resolved[name]],
                weights=starting,
                rounding_copies=rounding_copies,
                on_metrics=on_metrics,
                progress=progress,
                trained=states if save_weights else None,
                keeper=keeper,
            )
        origin = provenance(command)
        runs = tuple(
            dataclasses.replace(r, settings=known_by[name], provenance=origin)
            for r in runs
        )
        params = {
            (name, experiment.plans[j].seed): Trained(state.params, state.method)
            for (_, j), state in states.items()
        }
        added = Results(configuration, setup.stream, runs, params)
        if folder is None:
            results = results.add(added)
        else:
            results = dataclasses.replace(
                by_first(functools.partial(_save, added, known_by[name], folder)),
                params=results.params | params,
            )
            if keeper is not None:
                keeper.remove()
    if save_weights and folder is not None:
        params = _stored_weights(
            setup.experiment, chosen, resolved, known_by, pathlib.Path(folder)
        )
        results = dataclasses.replace(results, params=params | results.params)
    return results


def _check(
    keepers: Mapping[str, Keeper],
    experiment: Experiment,
    known_by: Mapping[str, Mapping[str, Any]],
    results: Results,
) -> None:
    """Refuses checkpoints of other runs, and removes those of runs that are stored."""

    def check() -> str:
        for name, keeper in keepers.items() if is_first() else ():
            if _missing(experiment, name, known_by[name], results):
                keeper.check()
            else:
                keeper.remove_finished(_seeds_of(experiment))
        return ""

    each(check)


def _save(
    added: Results, settings: Mapping[str, Any], folder: str | os.PathLike[str]
) -> Results:
    results = added.save(folder)
    for (method, seed), trained in added.params.items():
        file = weights.file_of(pathlib.Path(folder), method, settings, seed)
        weights.save(file, trained)
    return results


def _complete(
    folder: str | os.PathLike[str] | None, with_weights: bool, with_rounding: bool
) -> Results | None:
    """The stored runs that have all that is asked for; others are trained again."""
    if folder is None:
        return None
    results = load(folder)

    def is_complete(run: Run) -> bool:
        path = pathlib.Path(folder)
        file = weights.file_of(path, run.method, run.settings, run.seed)
        measured = run.ulp_spread is not None
        return (measured or not with_rounding) and (file.exists() or not with_weights)

    return dataclasses.replace(results, runs=tuple(filter(is_complete, results.runs)))


def _stored_weights(
    experiment: Experiment,
    methods: Mapping[str, Method],
    settings: Mapping[str, Mapping[str, Any]],
    known_by: Mapping[str, Mapping[str, Any]],
    folder: pathlib.Path,
) -> dict[tuple[str, int], Trained]:
    """What a folder holds of these methods' and seeds' weights."""
    found = {}
    for name, method in methods.items():
        like = Trained(*abstract_state(experiment, method, settings[name]))
        for seed in _seeds_of(experiment):
            file = weights.file_of(folder, name, known_by[name], seed)
            if file.exists():
                found[name, seed] = weights.load(file, like)
    return found


def _known_by(
    experiment: Experiment, method: Method, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings, and what else tells the method from another of its name."""
    found = fingerprint_of(experiment, method)
    return {**settings, "transformation": found} if found else dict(settings)


def _seeds_of(experiment: Experiment) -> list[int]:
    return [plan.seed for plan in experiment.plans]


def _starting_weights(
    experiment: Experiment, given: Any
) -> tuple[Callable[[int], Any], str]:
    """The weights of each seed, checked, and a hash of them."""
    seeds = _seeds_of(experiment)
    by_seed = isinstance(given, Mapping) and all(isinstance(k, int) for k in given)
    trees = {seed: given.get(seed) if by_seed else given for seed in seeds}
    expected = jax.eval_shape(experiment.model.init, jax.random.key(0))
    digest = hashlib.sha256()
    for seed, tree in trees.items():
        tree = trees[seed] = tree.params if isinstance(tree, Trained) else tree
        if jax.tree.structure(tree) != jax.tree.structure(expected):
            raise ContinualError(
                f"initial_weights of seed {seed} are not a tree like the network's: "
                f"{' '.join(str(jax.tree.structure(expected)).split())}"
            )
        shapes = [
            (np.shape(a), b.shape)
            for a, b in zip(
                jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True
            )
        ]
        wrong = [pair for pair in shapes if pair[0] != pair[1]]
        if wrong:
            raise ContinualError(
                f"initial_weights of seed {seed} have shape {wrong[0][0]} where the "
                f"network has {wrong[0][1]}"
            )
        for leaf in jax.tree.leaves(tree):
            digest.update(np.asarray(leaf).tobytes())
    return trees.__getitem__, digest.hexdigest()[:16]


def _compiled(
    experiment: Experiment,
    methods: Mapping[str, Method],
    settings: Mapping[str, Mapping[str, Any]],
    known_by: Mapping[str, Mapping[str, Any]],
    results: Results,
) -> dict[str, tuple[Method, Experiment]]:
    """The methods with seeds left to train, all compiled, side by side."""
    todo = {}
    for name, method in methods.items():
        remaining = _missing(experiment, name, known_by[name], results)
        if remaining is not None:
            todo[name] = (method, remaining)
    if todo:
        drawn_weights(experiment, experiment.plans[0].seed)
        used = experiment.places[: len(experiment.plans)]
        places = [place for place in used if place.is_here]
        with ThreadPoolExecutor(os.cpu_count() or 1) as executor:
            compiling = [
                executor.submit(
                    compile_method, experiment, method, settings[name], place
                )
                for name, (method, _) in todo.items()
                for place in places
            ] + [executor.submit(compile_evaluate, experiment, p) for p in places]
            for future in compiling:
                future.result()
    return todo


def _missing(
    experiment: Experiment,
    method: str,
    settings: Mapping[str, Any],
    results: Results | None,
) -> Experiment | None:
    """The experiment with the seeds that are left to train; None if there are none."""
    done = results.finished(method, dict(settings)) if results is not None else set()
    plans = tuple(plan for plan in experiment.plans if plan.seed not in done)
    return experiment._replace(plans=plans) if plans else None
