"""What all methods share: data on the device, plans, network, compiled functions."""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from classp_jax.continual.data.arrays import Stream, generator
from classp_jax.continual.errors import ContinualError
from classp_jax.continual.methods import Method, Problem
from classp_jax.continual.models import Model
from classp_jax.continual.train.feed import (
    Feed,
    block_sample,
    block_shapes,
    block_steps,
)
from classp_jax.continual.train.moments import Moments
from classp_jax.continual.train.places import Place, places_of
from classp_jax.continual.train.plan import Examples, Plan, Training, make_plans
from classp_jax.continual.train.step import (
    CHUNK,
    Compiled,
    RunData,
    Traced,
    compiled,
    make_evaluate,
    make_problem,
    width,
)

_WEIGHTS, _INIT, _STEPS, _BOUNDARY, _SCORING = 100, 101, 102, 106, 107
"""Keys of :func:`generator`, one for each use."""


class Experiment(NamedTuple):
    """Everything but the method; made by :func:`prepare`."""

    model: Model
    training: Training
    plans: tuple[Plan, ...]
    """One per seed."""
    stored: np.ndarray
    """All examples, once; :func:`stored_at` puts them on the devices."""
    task_names: tuple[str, ...]
    longest: int
    """The most steps of any task and seed: schedules are padded to it."""
    test_chunks: int
    """The most chunks of test examples of any seed."""
    train_chunks: int
    """The most chunks of training examples of any seed."""
    places: tuple[Place, ...]
    """Where runs train, in turn."""
    executables: dict[Any, Any]
    """What has been compiled so far, by what it depends on."""
    lock: threading.Lock


def prepare(
    streams: Sequence[Stream],
    seeds: Sequence[int],
    model: Model,
    training: Training,
    *,
    devices: int | None = None,
    devices_per_run: int = 1,
    shard_parameters: bool = False,
    mesh: jax.sharding.Mesh | None = None,
) -> Experiment:
    """Plans every seed, and where it trains.

    Args:
      streams: one stream per seed, alike but for their data.
      seeds: each gives its initial weights, order of batches and dropout.
      model: the network.
      training: passes, batch size and the like.
      devices: as for :func:`places_of`, like the others.
      devices_per_run: likewise.
      shard_parameters: likewise.
      mesh: likewise.

    Raises:
      ContinualError: if there is not one stream per seed, or the data does not fit.
    """
    if not seeds or len(streams) != len(seeds):
        raise ContinualError("one stream is needed for each seed")
    if len({len(stream.tasks) for stream in streams}) > 1:
        raise ContinualError("all seeds' streams must have as many tasks")
    params = jax.eval_shape(model.init, jax.random.key(0))
    places = places_of(
        devices,
        devices_per_run,
        shard_parameters,
        mesh,
        training.batch_size,
        [leaf.shape for leaf in jax.tree.leaves(params)],
    )
    stored, plans = make_plans(streams, seeds, training)
    if any(batches.in_shares for plan in plans for batches in plan.feeds):
        for place in places:
            _ = place.is_here and place.share
    test, train = (
        max(sum(len(part.y) for part in getattr(plan, name)) for plan in plans)
        for name in ("test", "train")
    )
    return Experiment(
        model=model,
        training=training,
        plans=tuple(plans),
        stored=stored,
        task_names=tuple(task.name for task in streams[0].tasks),
        longest=max(max(plan.steps) for plan in plans),
        test_chunks=-(-test // CHUNK),
        train_chunks=-(-train // CHUNK),
        places=places,
        executables={},
        lock=threading.Lock(),
    )


def stored_at(experiment: Experiment, place: Place) -> jax.Array:
    """The data, whole on each device of a place."""
    key = ("stored", place.devices)
    return _once(experiment, key, lambda: place.everywhere(experiment.stored))


def random_key(seed: int, use: int) -> jax.Array:
    """A JAX key from a seed of any size, apart for each use."""
    data = generator(seed, use).integers(0, 2**32, 2, dtype=np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(data), impl="threefry2x32")


def initial_weights(experiment: Experiment, seed: int) -> Any:
    """The weights that a seed starts from."""
    init = _once(experiment, "init", lambda: jax.jit(experiment.model.init))
    return init(random_key(seed, _WEIGHTS))


def run_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """Of the method's initial state, and of the steps."""
    return random_key(seed, _INIT), random_key(seed, _STEPS)


def boundary_key(seed: int) -> jax.Array:
    """Of what happens at task ends."""
    return random_key(seed, _BOUNDARY)


def scoring_key(seed: int) -> jax.Array:
    """Of dropout while the training data is scored."""
    return random_key(seed, _SCORING)


def run_data(plan: Plan) -> RunData:
    """The part of a plan that compiled functions read."""
    return RunData(
        mean=np.float32(plan.mean),
        deviation=np.float32(plan.deviation),
        pixels=plan.pixels,
        classes=plan.classes,
        train_sizes=np.array(plan.train_sizes, np.int32),
        steps_per_pass=np.array(plan.steps_per_pass, np.int32),
    )


def example_of(experiment: Experiment) -> jax.ShapeDtypeStruct:
    """Shape and dtype of one stored input."""
    stored = experiment.stored
    return jax.ShapeDtypeStruct(stored.shape[1:], stored.dtype)


def feed(experiment: Experiment, plan: Plan, task: int, place: Place) -> Feed:
    """A thread that reads a task's batches."""
    example, training = example_of(experiment), experiment.training
    steps = block_steps(example, training.batch_size, experiment.longest)
    name, kept = experiment.task_names[task], training.fisher_examples
    return Feed(plan, task, name, example, steps, kept, place)


def schedule(experiment: Experiment, plan: Plan, task: int) -> Examples:
    """A task's batches, padded to one length for all tasks and seeds."""
    if plan.feeds:
        # Only what a compiled function has to know of them.
        example, batch = example_of(experiment), experiment.training.batch_size
        steps = block_steps(example, batch, experiment.longest)
        return block_shapes(example, batch, steps)
    found = plan.schedule(task)
    rest = experiment.longest - len(found.y)
    return Examples(*(np.pad(a, ((0, rest), (0, 0))) for a in found))


def chunks_of(parts: Sequence[Examples], total: int) -> Examples:
    """Tasks' examples in turn, ``[total, CHUNK]``, padded with the label -1."""
    rows, y, task = (np.concatenate(a) for a in zip(*parts, strict=True))
    rest = total * CHUNK - len(y)
    return Examples(
        np.pad(rows, (0, rest)).reshape(total, CHUNK),
        np.pad(y, (0, rest), constant_values=-1).reshape(total, CHUNK),
        np.pad(task, (0, rest)).reshape(total, CHUNK),
    )


def problem_maker(experiment: Experiment) -> Callable[..., Problem]:
    """Makes the problem of a run, inside its traced functions."""
    training, example = experiment.training, example_of(experiment)
    masked = not all(plan.classes.all() for plan in experiment.plans)

    def problem_of(run: RunData, scale: Any = None, moments: Any = ()) -> Problem:
        return make_problem(
            experiment.model, run, example, training, masked, scale, moments
        )

    return problem_of


def fingerprint_of(experiment: Experiment, method: Method) -> str:
    """What tells a method from another of its name, for this network; often nothing."""
    if method.fingerprint is None:
        return ""
    return method.fingerprint(jax.eval_shape(experiment.model.init, jax.random.key(0)))


def split_settings(
    method: Method, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.float32]]:
    """Those that are compiled in, and those that are traced."""
    kinds = method.settings
    static = {n: v for n, v in settings.items() if kinds[n].compiled}
    return static, {n: np.float32(v) for n, v in settings.items() if n not in static}


def abstract_state(
    experiment: Experiment, method: Method, settings: Mapping[str, Any]
) -> tuple[Any, Any]:
    """Shapes of the parameters and of the method's state; nothing is allocated.

    Raises:
      ContinualError: if the method refuses its settings.
    """

    def state(key: jax.Array, run: RunData) -> tuple[Any, Any]:
        functions = method.make(settings, problem_maker(experiment)(run))
        params = experiment.model.init(key)
        return params, functions.init(params, key)

    if experiment.plans[0].feeds and method.plan is not None:
        raise ContinualError(
            f"method {method.name!r} needs the data of all tasks, and batches go by"
        )
    try:
        run = run_data(experiment.plans[0])
        return jax.eval_shape(state, jax.random.key(0), run)
    except (ValueError, TypeError, OverflowError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ContinualError(f"method {method.name!r}: {line}") from error


def check(experiment: Experiment, method: Method, settings: Mapping[str, Any]) -> int:
    """The bytes of a method's state.

    Raises:
      ContinualError: if the method refuses its settings.
    """
    _, state = abstract_state(experiment, method, settings)
    leaves = [a for a in jax.tree.leaves(state) if hasattr(a.dtype, "itemsize")]
    return sum(a.size * a.dtype.itemsize for a in leaves)


def compile_method(
    experiment: Experiment, method: Method, settings: Mapping[str, Any], place: Place
) -> Compiled:
    """A method's executables; compiled once for each place and compiled-in settings."""
    static, _ = split_settings(method, settings)
    key = (method.make, tuple(sorted(static.items())), place)
    return _once(experiment, key, lambda: _compile(experiment, method, settings, place))


def _compile(
    experiment: Experiment, method: Method, settings: Mapping[str, Any], place: Place
) -> Compiled:
    static, numbers = split_settings(method, settings)
    plan, training = experiment.plans[0], experiment.training
    problem_of = problem_maker(experiment)
    traced = Traced(method, static, problem_of, training)
    run, seed, stored = run_data(plan), plan.seed, stored_at(experiment, place)
    compile_here = functools.partial(compiled, width=width(), place=place)
    params = jax.eval_shape(experiment.model.init, jax.random.key(0))
    first = (run, numbers, params, run_keys(seed))
    init, seconds = compile_here(traced.init, stored, first, donate=False)
    state = jax.eval_shape(traced.init, stored, *first)
    target, number = np.float32(0), np.int32(0)
    batches = schedule(experiment, plan, 0)
    arguments = (run, numbers, batches, target, number, number, state)
    advance, more = compile_here(traced.advance, stored, arguments, donate=True)
    seconds += more
    end_of_task = None
    if method.make({**static, **numbers}, problem_of(run)).end_of_task is not None:
        count = training.fisher_examples
        sample = (
            block_sample(example_of(experiment), count)
            if plan.feeds
            else plan.sample(0, count)
        )
        arguments = (run, numbers, sample, boundary_key(seed), state)
        end_of_task, more = compile_here(
            traced.end_of_task, stored, arguments, donate=True
        )
        seconds += more
    return Compiled(init, advance, end_of_task, seconds)


def compile_evaluate(
    experiment: Experiment, place: Place, *, scoring: bool = False
) -> Any:
    """Counts right answers; compiled once for all methods."""

    def build() -> Any:
        plan = experiment.plans[0]
        parts = plan.train if scoring else plan.test
        total = experiment.train_chunks if scoring else experiment.test_chunks
        examples = chunks_of(parts, total)
        key = scoring_key(plan.seed) if scoring else None
        params = jax.eval_shape(experiment.model.init, jax.random.key(0))
        moments = ()
        if experiment.training.moments == "running":
            shape = example_of(experiment).shape
            moments = jax.eval_shape(lambda: Moments.none(shape))
        arguments = (run_data(plan), examples, np.int32(0), key, params, moments)
        evaluate = make_evaluate(experiment.model)
        stored = stored_at(experiment, place)
        return compiled(
            evaluate, stored, arguments, width(), donate=False, place=place
        )[0]

    return _once(experiment, ("evaluate", scoring, place), build)


def _once(experiment: Experiment, key: Any, build: Callable[[], Any]) -> Any:
    if key not in experiment.executables:
        value = build()
        with experiment.lock:
            experiment.executables.setdefault(key, value)
    return experiment.executables[key]
