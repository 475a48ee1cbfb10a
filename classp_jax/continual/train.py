"""The training loop: one method on a stream of tasks, several runs at once.

A *run* is one seed with one set of hyperparameters. Runs that differ only in seed, or
in numbers, train together under ``vmap`` in one compiled function.
"""

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from classp_jax.continual.learner import (
    Data,
    Functions,
    Learner,
    Training,
    make_functions,
)
from classp_jax.continual.methods import Method
from classp_jax.continual.models import Model
from classp_jax.continual.results import Run
from classp_jax.continual.streams import Stream

_EVALUATION_BATCH = 1000
Progress = Callable[[int, int, float], None]
"""Called as ``progress(step, steps, accuracy)`` after each stretch of training."""


class _Compiled(NamedTuple):
    """A method's functions, vectorised over runs if wanted, and jitted."""

    init: Any
    advance: Callable[..., tuple[Learner, jax.Array]]
    density: Any
    consolidate: Any


def _compile(functions: Functions, *, together: bool, loop: bool) -> _Compiled:
    def lift(f: Callable[..., Any], axes: tuple[int | None, ...]) -> Any:
        return jax.vmap(f, in_axes=axes) if together else f

    def segment(
        learner: Learner,
        hyper: Any,
        seed_index: Any,
        data: Data,
        order: jax.Array,
        start: Any,
        stop: Any,
    ) -> tuple[Learner, jax.Array]:
        def body(i: Any, carry: tuple[Learner, jax.Array]) -> tuple[Learner, jax.Array]:
            learner, total = carry
            learner, loss = functions.step(learner, hyper, seed_index, data, order, i)
            return learner, total + loss

        return jax.lax.fori_loop(
            start, stop, body, (learner, jnp.zeros([], jnp.float32))
        )

    step_axes = (0, 0, 0, None, None, None)
    if loop:
        advance = jax.jit(lift(segment, (*step_axes, None)), donate_argnums=0)
    else:
        step = jax.jit(lift(functions.step, step_axes), donate_argnums=0)

        def advance(
            learner: Learner,
            hyper: Any,
            seed_index: Any,
            data: Data,
            order: jax.Array,
            start: int,
            stop: int,
        ) -> tuple[Learner, jax.Array]:
            total = jnp.zeros([], jnp.float32)
            for i in range(start, stop):
                learner, loss = step(
                    learner, hyper, seed_index, data, order, np.int32(i)
                )
                total = total + loss
            return learner, total

    return _Compiled(
        init=jax.jit(lift(functions.init, (0, 0, None))),
        advance=advance,
        density=jax.jit(lift(functions.density, step_axes)),
        # Outside jit the Fisher information is summed by a Python loop as well.
        consolidate=jax.jit(
            lift(functions.consolidate, (0, 0, None, None)), donate_argnums=0
        )
        if loop
        else functions.consolidate,
    )


class _Scale(NamedTuple):
    """How stored images become the network's inputs: ``(x - mean) / deviation``."""

    mean: float
    deviation: float

    def __call__(self, x: jax.Array) -> jax.Array:
        """Standardised images; tokens as they are."""
        if jnp.issubdtype(x.dtype, jnp.signedinteger):
            return x
        return (x.astype(jnp.float32) - self.mean) / self.deviation


@functools.partial(jax.jit, static_argnames=("model", "scale", "batch", "together"))
def _correct(
    params: Any,
    seed_index: Any,
    x: jax.Array,
    y: jax.Array,
    classes: jax.Array,
    start: Any,
    *,
    model: Model,
    scale: _Scale,
    batch: int,
    together: bool,
) -> jax.Array:
    """How many of a batch of test examples each run gets right.

    Compiled once for all methods, which have nothing to do with it.
    """

    def correct(params: Any, seed_index: Any) -> jax.Array:
        inputs = jax.lax.dynamic_slice_in_dim(x[seed_index], start, batch)
        labels = jax.lax.dynamic_slice_in_dim(y[seed_index], start, batch)
        logits = model.apply(params, scale(inputs), None)
        logits = jnp.where(classes[seed_index], logits, -jnp.inf)
        # The padding's label is -1, which no prediction equals.
        return jnp.sum(jnp.argmax(logits, axis=1).astype(jnp.int32) == labels)

    return (
        jax.vmap(correct)(params, seed_index)
        if together
        else (correct(params, seed_index))
    )


def train(
    method: Method,
    settings: Sequence[Mapping[str, float]],
    model: Model,
    streams: Sequence[Stream],
    seeds: Sequence[int],
    training: Training,
    *,
    progress: Progress | None = None,
) -> list[list[Run]]:
    """Trains a method on a stream, for every setting and every seed.

    Runs train together in one vectorised, compiled step. Where the network convolves
    and the device is a CPU, each run goes alone; where the seeds' tasks take different
    numbers of steps, each seed.

    Args:
      method: the method.
      settings: hyperparameters, one dict a run; those that have choices (see
        :class:`classp_jax.continual.methods.Setting`) must be the same in all.
      model: the network.
      streams: one stream a seed, alike but for their data.
      seeds: each gives the initial weights, the order of batches and dropout.
      training: passes, batch size and the like.
      progress: called after each stretch of training.

    Returns:
      ``runs[setting][seed]``. A run whose loss or parameters cease to be finite is
      marked as diverged, and its later accuracies are NaN.

    Raises:
      ValueError: if there is not one stream a seed, or settings with choices differ.
    """
    if len(streams) != len(seeds) or not seeds or not settings:
        raise ValueError("train needs settings, and one stream for each seed")
    steps = {_steps_per_task(stream, training) for stream in streams}
    convolves = model.convolutional and jax.default_backend() == "cpu"
    seed_groups, setting_groups = [list(range(len(seeds)))], [list(settings)]
    if convolves or len(steps) > 1:
        seed_groups = [[j] for j in range(len(seeds))]
    if convolves:
        setting_groups = [[setting] for setting in settings]
    runs: list[list[Run]] = []
    for group in setting_groups:
        of_seeds = [
            _train_together(
                method,
                group,
                model,
                [streams[j] for j in members],
                [seeds[j] for j in members],
                training,
                progress,
            )
            for members in seed_groups
        ]
        runs += [list(itertools.chain(*row)) for row in zip(*of_seeds, strict=True)]
    return runs


def _split_settings(
    method: Method, settings: Sequence[Mapping[str, float]]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """The settings that are compiled in, and those that are traced."""
    if len(settings) == 1:
        return dict(settings[0]), [{}]
    chosen = {name for name, setting in method.settings.items() if setting.choices}
    fixed = {name: settings[0][name] for name in chosen}
    for setting in settings:
        if any(setting[name] != value for name, value in fixed.items()):
            raise ValueError(f"settings that train together must agree on {chosen}")
    return fixed, [
        {name: value for name, value in setting.items() if name not in chosen}
        for setting in settings
    ]


def _batches_per_epoch(size: int, batch_size: int) -> int:
    return max(size // batch_size, 1)


def _steps_per_task(stream: Stream, training: Training) -> tuple[int, ...]:
    return tuple(
        _batches_per_epoch(len(task.train.y), training.batch_size)
        * training.epochs[min(k, len(training.epochs) - 1)]
        for k, task in enumerate(stream.tasks)
    )


def _order(size: int, steps: int, batch_size: int, seed: int, task: int) -> np.ndarray:
    """Indices ``[steps, batch_size]``: every pass in an order of its own.

    The examples that do not fill a last batch are left out of that pass.
    """
    rng = np.random.default_rng([seed, task])
    per_epoch = _batches_per_epoch(size, batch_size)
    epochs = [
        np.resize(rng.permutation(size), (per_epoch, batch_size))
        for _ in range(-(-steps // per_epoch))
    ]
    return np.concatenate(epochs)[:steps].astype(np.int32)


def _padded(arrays: Sequence[np.ndarray], length: int, fill: int = 0) -> jax.Array:
    """Arrays of different lengths, stacked to ``[len(arrays), length, ...]``."""
    stacked = np.full(
        (len(arrays), length, *arrays[0].shape[1:]), fill, arrays[0].dtype
    )
    for row, array in zip(stacked, arrays, strict=True):
        row[: len(array)] = array
    return jnp.asarray(stacked)


def _scale(stream: Stream) -> _Scale:
    """The scale of the first task's pixels: of later ones nothing is known yet."""
    x = stream.tasks[0].train.x
    if np.issubdtype(x.dtype, np.signedinteger):
        return _Scale(0.0, 1.0)
    deviation = float(np.std(x, dtype=np.float64))
    return _Scale(float(np.mean(x, dtype=np.float64)), deviation or 1.0)


def _train_together(
    method: Method,
    settings: Sequence[Mapping[str, float]],
    model: Model,
    streams: Sequence[Stream],
    seeds: Sequence[int],
    training: Training,
    progress: Progress | None,
) -> list[list[Run]]:
    """What :func:`train` does, in one vectorised run."""
    fixed, hypers = _split_settings(method, settings)
    num_tasks = len(streams[0].tasks)
    num_runs = len(hypers) * len(seeds)
    together = num_runs > 1
    steps = _steps_per_task(streams[0], training)
    joint = "joint" in method.additions
    class_table = jnp.asarray([[t.classes for t in s.tasks] for s in streams])
    scale = _scale(streams[0])
    tests = [[getattr(t, training.evaluate_on) for t in s.tasks] for s in streams]
    sizes = np.array([[len(split.y) for split in row] for row in tests])
    evaluation_batch = min(_EVALUATION_BATCH, int(sizes.max()))
    compiled = _compile(
        make_functions(method, fixed, model, scale, class_table, training),
        together=together,
        loop=not (model.convolutional and jax.default_backend() == "cpu"),
    )

    # One entry a run: settings outside, seeds inside.
    hyper: Any = {
        name: jnp.asarray(
            np.repeat([h[name] for h in hypers], len(seeds)).astype(np.float32)
        )
        for name in hypers[0]
    }
    seed_index: Any = jnp.asarray(
        np.tile(np.arange(len(seeds), dtype=np.int32), len(hypers))
    )
    keys = jnp.stack([jax.random.key(seed) for seed in seeds] * len(hypers))
    if not together:
        hyper = {name: value[0] for name, value in hyper.items()}
        seed_index, keys = seed_index[0], keys[0]

    padded_test = -(-int(sizes.max()) // evaluation_batch) * evaluation_batch
    test_data = [
        (
            _padded([row[k].x for row in tests], padded_test),
            _padded([row[k].y for row in tests], padded_test, fill=-1),
        )
        for k in range(num_tasks)
    ]
    run_sizes = np.tile(sizes, (len(hypers), 1))

    def accuracies(learner: Learner) -> np.ndarray:
        """``[runs, tasks]``."""
        counts = [
            sum(
                _correct(
                    learner.params,
                    seed_index,
                    x,
                    y,
                    class_table[:, k],
                    np.int32(start),
                    model=model,
                    scale=scale,
                    batch=evaluation_batch,
                    together=together,
                )
                for start in range(0, padded_test, evaluation_batch)
            )
            for k, (x, y) in enumerate(test_data)
        ]
        return np.stack([np.ravel(c) for c in counts], axis=1) / run_sizes

    training_sets = [[task.train for task in stream.tasks] for stream in streams]
    longest = max(len(s.y) for row in training_sets for s in row)
    if joint:
        longest = max(sum(len(s.y) for s in row) for row in training_sets)

    def task_data(k: int) -> tuple[Data, list[int]]:
        parts = [
            [(j, s) for j, s in enumerate(row)] if joint else [(k, row[k])]
            for row in training_sets
        ]
        tasks = [
            np.concatenate([np.full(len(s.y), j, np.int32) for j, s in row])
            for row in parts
        ]
        data = Data(
            _padded([np.concatenate([s.x for _, s in row]) for row in parts], longest),
            _padded([np.concatenate([s.y for _, s in row]) for row in parts], longest),
            _padded(tasks, longest),
        )
        return data, [len(t) for t in tasks]

    data, lengths = task_data(0)
    learner = compiled.init(keys, hyper, jax.eval_shape(lambda: data.x[0, 0]))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(learner.params))
    state_bytes = sum(
        leaf.nbytes for leaf in jax.tree.leaves((learner.opt_state, learner.buffer))
    )
    if joint:
        # What joint training keeps from step to step is all the data.
        state_bytes += sum(s.x.nbytes + s.y.nbytes for s in training_sets[0]) * num_runs

    matrix = np.full((num_runs, num_tasks + 1, num_tasks), np.nan)
    matrix[:, 0] = accuracies(learner)
    curve_steps, curve, densities = [0], [matrix[:, 0]], []
    finite = np.ones(num_runs, bool)
    seconds, done, total = 0.0, 0, sum(steps)
    for k in range(num_tasks):
        if k and not joint:
            data, lengths = task_data(k)
        orders = [
            _order(n, steps[k], training.batch_size, seed, k)
            for n, seed in zip(lengths, seeds, strict=True)
        ]
        # One length for all tasks, so that nothing is compiled twice.
        order = _padded(orders, max(steps))
        if k == 0:
            _warm_up(compiled, learner, hyper, seed_index, data, order)
        cuts = np.linspace(0, steps[k], training.points_per_task + 1).astype(int)
        for start, stop in itertools.pairwise(cuts):
            if start == stop:
                continue
            jax.block_until_ready(learner)
            began = time.perf_counter()
            learner, loss = compiled.advance(
                learner,
                hyper,
                seed_index,
                data,
                order,
                int(start),
                int(stop),
            )
            jax.block_until_ready(learner)
            seconds += time.perf_counter() - began
            finite &= np.isfinite(np.ravel(loss))
            done += int(stop - start)
            density = compiled.density(
                learner, hyper, seed_index, data, order, np.int32(stop - 1)
            )
            densities.append(np.broadcast_to(np.ravel(density), num_runs))
            accuracy = np.where(finite[:, None], accuracies(learner), np.nan)
            curve_steps.append(done)
            curve.append(accuracy)
            if progress is not None:
                seen = accuracy[finite, : k + 1]
                progress(done, total, float(seen.mean()) if seen.size else np.nan)
            if not finite.any():
                break
        if not joint or k == num_tasks - 1:
            matrix[:, k + 1] = curve[-1]
        if not finite.any():
            break
        if method.told_boundary:
            indices = jnp.asarray(
                np.stack(
                    [
                        np.resize(
                            np.random.default_rng([seed, k, 1]).permutation(n),
                            training.fisher_examples,
                        ).astype(np.int32)
                        for n, seed in zip(lengths, seeds, strict=True)
                    ]
                )
            )
            began = time.perf_counter()
            learner = jax.block_until_ready(
                compiled.consolidate(learner, seed_index, data, indices)
            )
            if k:  # The first call is spent on compiling.
                seconds += time.perf_counter() - began

    stacked = np.stack(curve, axis=1)
    mean_density = np.mean(densities, axis=0)

    def run(index: int, setting: Mapping[str, float], seed: int) -> Run:
        return Run(
            method=method.name,
            seed=seed,
            matrix=matrix[index].tolist(),
            curve_steps=curve_steps,
            curve=stacked[index].tolist(),
            seconds=seconds / num_runs,
            state_bytes_per_parameter=state_bytes / parameters,
            update_density=float(mean_density[index]),
            told_boundary=method.told_boundary,
            diverged=not bool(finite[index]),
            settings=dict(setting),
        )

    return [
        [run(i * len(seeds) + j, setting, seed) for j, seed in enumerate(seeds)]
        for i, setting in enumerate(settings)
    ]


def _warm_up(
    compiled: _Compiled,
    learner: Learner,
    hyper: Any,
    seed_index: Any,
    data: Data,
    order: jax.Array,
) -> None:
    """Compiles the step on a copy, so that compilation is not timed as training."""
    copy = jax.tree.map(jnp.copy, learner)
    jax.block_until_ready(compiled.advance(copy, hyper, seed_index, data, order, 0, 1))
