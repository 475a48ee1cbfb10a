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
from classp_jax.continual.sources import Split
from classp_jax.continual.streams import Stream

_EVALUATION_BATCH = 1000
Progress = Callable[[int, int, float], None]
"""Called as ``progress(step, steps, accuracy)`` after each stretch of training."""


class _Compiled(NamedTuple):
    """A method's functions, vectorised over runs if wanted, and jitted."""

    init: Any
    advance: Callable[..., tuple[Learner, jax.Array, jax.Array]]
    """The learner, the sum of the losses, and the last one."""
    density: Any
    consolidate: Any
    fresh: Any
    reset: Any
    other_init: Any
    other_step: Any
    consolidate_other: Any


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
    ) -> tuple[Learner, jax.Array, jax.Array]:
        def body(i: Any, carry: Any) -> tuple[Learner, jax.Array, jax.Array]:
            learner, total, _ = carry
            learner, loss = functions.step(learner, hyper, seed_index, data, order, i)
            return learner, total + loss, loss

        nothing = jnp.zeros([], jnp.float32)
        return jax.lax.fori_loop(start, stop, body, (learner, nothing, nothing))

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
        ) -> tuple[Learner, jax.Array, jax.Array]:
            total = loss = jnp.zeros([], jnp.float32)
            for i in range(start, stop):
                learner, loss = step(
                    learner, hyper, seed_index, data, order, np.int32(i)
                )
                total = total + loss
            return learner, total, loss

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
        fresh=jax.jit(lift(functions.fresh, (0, 0))),
        reset=jax.jit(lift(functions.reset, (0, 0))),
        other_init=jax.jit(lift(functions.other_init, (0,))),
        other_step=jax.jit(lift(functions.other_step, (0, *step_axes))),
        consolidate_other=jax.jit(lift(functions.consolidate_other, (0, 0, 0))),
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
    key: jax.Array | None = None,
    *,
    model: Model,
    scale: _Scale,
    batch: int,
    together: bool,
) -> jax.Array:
    """How many of a batch of examples each run gets right; with a key, under dropout.

    Compiled once for all methods, which have nothing to do with it.
    """

    def correct(params: Any, seed_index: Any) -> jax.Array:
        inputs = jax.lax.dynamic_slice_in_dim(x[seed_index], start, batch)
        labels = jax.lax.dynamic_slice_in_dim(y[seed_index], start, batch)
        logits = model.apply(params, scale(inputs), key)
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


def _order(
    size: int, steps: int, training: Training, seed: int, task: int
) -> np.ndarray:
    """Indices ``[steps, batch_size]``: every pass in an order of its own, or as stored.

    The examples that do not fill a last batch are left out of that pass.
    """
    rng = np.random.default_rng([seed, task])
    shuffled = training.order == "shuffled"
    per_epoch = _batches_per_epoch(size, training.batch_size)
    epochs = [
        np.resize(
            rng.permutation(size) if shuffled else np.arange(size),
            (per_epoch, training.batch_size),
        )
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


def _scale(stream: Stream, normalisation: tuple[float, ...]) -> _Scale:
    """The scale of the first task's pixels: of later ones nothing is known yet."""
    x = stream.tasks[0].train.x
    if np.issubdtype(x.dtype, np.signedinteger):
        return _Scale(0.0, 1.0)
    if normalisation:
        # In units of the stored pixels: those of uint8 images go to 255.
        unit = 255 if x.dtype == np.uint8 else 1
        return _Scale(unit * normalisation[0], unit * normalisation[1])
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
    scale = _scale(streams[0], training.normalisation)
    tests = [[getattr(t, training.evaluate_on) for t in s.tasks] for s in streams]
    largest_test = max(len(split.y) for row in tests for split in row)
    evaluation_batch = min(_EVALUATION_BATCH, largest_test)
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

    def on(splits: Sequence[Sequence[Split]]) -> tuple[list[Any], np.ndarray]:
        """Data to evaluate on, a task each, padded; and the sizes, [runs, tasks]."""
        sizes = np.array([[len(split.y) for split in row] for row in splits])
        length = -(-int(sizes.max()) // evaluation_batch) * evaluation_batch
        data = [
            (
                _padded([row[k].x for row in splits], length),
                _padded([row[k].y for row in splits], length, fill=-1),
            )
            for k in range(num_tasks)
        ]
        return data, np.tile(sizes, (len(hypers), 1))

    def accuracies(
        learner: Learner, data: list[Any], sizes: np.ndarray, key: Any = None
    ) -> np.ndarray:
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
                    None if key is None else jax.random.fold_in(key, start + k),
                    model=model,
                    scale=scale,
                    batch=evaluation_batch,
                    together=together,
                )
                for start in range(0, x.shape[1], evaluation_batch)
            )
            for k, (x, y) in enumerate(data)
        ]
        return np.stack([np.ravel(c) for c in counts], axis=1) / sizes

    test_data = on(tests)
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
    state_bytes = _nbytes((learner.opt_state, learner.buffer))
    # What joint training keeps from step to step is all the data.
    joint_bytes = sum(s.x.nbytes + s.y.nbytes for s in training_sets[0])
    if joint:
        state_bytes += joint_bytes * num_runs

    matrix = np.full((num_runs, num_tasks + 1, num_tasks), np.nan)
    matrix[:, 0] = accuracies(learner, *test_data)
    curve_steps, curve, densities = [0], [matrix[:, 0]], []
    finite = np.ones(num_runs, bool)
    taken = np.zeros((num_runs, num_tasks), int)
    kept_bytes = np.full(num_runs, np.nan)
    seconds, done, total = 0.0, 0, sum(steps)
    for k in range(num_tasks):
        if k and not joint:
            data, lengths = task_data(k)
        if method.changes_later:
            hyper = hyper | {"later": jnp.full(np.shape(seed_index), k > 0)}
        orders = [
            _order(n, steps[k], training, seed, k)
            for n, seed in zip(lengths, seeds, strict=True)
        ]
        # One length for all tasks, so that nothing is compiled twice.
        order = _padded(orders, max(steps))
        if k == 0:
            _warm_up(compiled, learner, hyper, seed_index, data, order)
        points = np.linspace(0, steps[k], training.points_per_task + 1).astype(int)
        one_pass = _batches_per_epoch(lengths[0], training.batch_size)
        cuts = set(points.tolist())
        target = 0.0
        if training.until_loss and not joint:
            target = training.until_loss[min(k, len(training.until_loss) - 1)]
            cuts |= set(range(0, steps[k], one_pass))
        if method.as_published and k == 0:
            cuts.add(one_pass)
        active = np.ones(num_runs, bool)
        for start, stop in itertools.pairwise(sorted(cuts)):
            if active.any():
                jax.block_until_ready(learner)
                # Where a run's task is over, its learner stays as it is.
                before = None if active.all() else jax.tree.map(jnp.copy, learner)
                began = time.perf_counter()
                learner, losses, last = compiled.advance(
                    learner, hyper, seed_index, data, order, start, stop
                )
                jax.block_until_ready(learner)
                seconds += time.perf_counter() - began
                if before is not None:
                    learner = _where(active, learner, before)
                finite &= np.isfinite(np.ravel(losses)) | ~active
                taken[active, k] += stop - start
                if stop % one_pass == 0:
                    # Not in place: _where may still be reading the old array.
                    active = active & ~(np.ravel(last) < target)
            if method.as_published and k == 0 and stop == one_pass:
                # Each seed has its own number of examples.
                examples = jnp.asarray(lengths, jnp.float32)[seed_index]
                now = (learner, hyper, seed_index, data, order)
                _consolidated_as_published(compiled, now, examples, 1)  # Compiles.
                began = time.perf_counter()
                learner = _consolidated_as_published(compiled, now, examples, one_pass)
                seconds += time.perf_counter() - began
            done += stop - start
            if stop not in points:
                continue
            density = compiled.density(
                learner, hyper, seed_index, data, order, np.int32(stop - 1)
            )
            densities.append(np.broadcast_to(np.ravel(density), num_runs))
            accuracy = accuracies(learner, *test_data)
            accuracy = np.where(finite[:, None], accuracy, np.nan)
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
        if method.consolidates:
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
        if method.resets:
            learner = compiled.reset(learner, hyper)
        if k == 0:
            kept = learner.opt_state, compiled.fresh(learner, hyper)
            kept_bytes = _bytes_that_differ(*kept, num_runs)
            if learner.buffer is not None:
                kept_bytes += _nbytes(learner.buffer) / num_runs
            if joint:
                kept_bytes += joint_bytes

    in_training = np.full((num_runs, 0), np.nan)
    if training.score_training:
        in_training = accuracies(learner, *on(training_sets), key=jax.random.key(0))
        in_training = np.where(finite[:, None], in_training, np.nan)
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
            kept_bytes_per_parameter=float(kept_bytes[index] * num_runs / parameters),
            steps=taken[index].tolist() if training.until_loss else [],
            training_accuracy=in_training[index].tolist(),
        )

    return [
        [run(i * len(seeds) + j, setting, seed) for j, seed in enumerate(seeds)]
        for i, setting in enumerate(settings)
    ]


def _nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _where(chosen: np.ndarray, new: Any, old: Any) -> Any:
    """New leaves for the chosen runs, old ones for the others."""

    def leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        # Of a run that is alone, some leaves are scalars.
        shape = chosen.shape + (1,) * (a.ndim - 1) if a.ndim else ()
        along = chosen.reshape(shape)
        return jnp.where(along, a, b)

    return jax.tree.map(leaf, new, old)


def _bytes_that_differ(state: Any, fresh: Any, num_runs: int) -> np.ndarray:
    """Of each run's state, the bytes of the arrays that are not as they would begin."""
    total = np.zeros(num_runs)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(fresh), strict=True):
        if jnp.ndim(a) and a.size > num_runs:
            differ = np.asarray(a != b).reshape(num_runs, -1).any(axis=1)
            total += differ * (a.nbytes / num_runs)
    return total


def _consolidated_as_published(
    compiled: _Compiled, now: tuple[Any, ...], examples: jax.Array, steps: int
) -> Learner:
    """The learner with the Fisher and the anchor of another network's first pass."""
    learner = now[0]
    other = compiled.other_init(learner)
    for i in range(steps):
        other = compiled.other_step(other, *now, np.int32(i))
    return jax.block_until_ready(compiled.consolidate_other(learner, other, examples))


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
