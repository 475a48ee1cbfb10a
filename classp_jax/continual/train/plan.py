"""What one seed will do: which examples in which order, scaled how, evaluated when."""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from classp_jax.continual.data.arrays import Split, Stream, generator
from classp_jax.continual.data.batches import Batches
from classp_jax.continual.errors import ContinualError

_N = TypeVar("_N", int, float)

_ORDER, _SAMPLE, _TEST = 103, 104, 105
"""Keys of :func:`generator`, one for each use."""

_EVALUATED = 100_000
_EVALUATED_DURING = 10_000
"""Without ``max_test``, the most examples of all tasks that an evaluation takes at a
task's end, and at a point during a task. They keep the cost linear in the tasks."""


class Training(NamedTuple):
    """How to train and evaluate: the same for every method."""

    epochs: tuple[int, ...] = (10,)
    """Passes over each task's training data; the last one holds for later tasks."""
    batch_size: int = 32
    """Examples per step."""
    points: int = 5
    """How often accuracy is measured during a task."""
    evaluate: str = "seen"
    """Tasks to measure: those seen so far, or ``"all"``, for forward transfer."""
    evaluate_on: str = "test"
    """The split that accuracy is measured on: test or validation."""
    max_test: int | None = None
    """At most this many test examples per task. None: all, unless an evaluation of all
    tasks would take more than 100,000 (10,000 during a task): then equal shares."""
    order: str = "shuffled"
    """Order of the training examples: new in every pass, or as stored."""
    normalisation: tuple[float, ...] = ()
    """Mean and deviation of the inputs, of pixels in [0, 1]; by default those of the
    first task's training data, for each seed its own."""
    moments: str = "first-task"
    """``"running"``: standardise every number of the inputs, on top of that, by its
    mean and deviation over the examples seen so far, in training and evaluation."""
    until_loss: tuple[float, ...] = ()
    """End a task after the first pass whose last batch has a loss below this, at the
    latest after its passes; the last number holds for later tasks."""
    fisher: str = "exact"
    """How EWC takes the Fisher information: exact, sampled or empirical."""
    fisher_examples: int = 1000
    """Training examples of the ended task from which it takes it."""
    score_training: bool = False
    """Also measure accuracy on the training data, with dropout active."""
    compute_dtype: str = "float32"
    """What the network trains in: float32, bfloat16, or float16 with dynamic loss
    scaling. Weights, gradients, optimizer state and evaluation are float32."""
    nonfinite: str = "stop"
    """What a step that gives a NaN or infinite number leads to: the run stops there and
    has diverged, or the step is undone and counted (``"skip"``). In float16 an
    overflow is always undone."""


class Examples(NamedTuple):
    """Some examples: rows of the stored data, labels and tasks, int32 ``[n]`` each."""

    rows: np.ndarray
    y: np.ndarray
    task: np.ndarray

    def take(self, indices: np.ndarray) -> "Examples":
        """Some of them, in an order and shape of their own."""
        return Examples(*(a[indices] for a in self))


class Plan(NamedTuple):
    """All that one seed's training needs to know beforehand."""

    seed: int
    mean: float
    deviation: float
    """Inputs are ``(x - mean) / deviation``."""
    pixels: np.ndarray | None
    """Order of the pixels in each task, int32 ``[tasks, pixels]``."""
    classes: np.ndarray
    """Which outputs may win in each task, bool ``[tasks, num_classes]``."""
    train: tuple[Examples, ...]
    """Training examples of each task; none where they come from :attr:`feeds`."""
    feeds: tuple[Batches, ...]
    """Where each task's training examples are read while it trains, or nothing."""
    train_sizes: tuple[int, ...]
    """How many training examples each task has."""
    test: tuple[Examples, ...]
    """Of each task, the examples that accuracy is measured on."""
    glance: tuple[Examples, ...]
    """Fewer of them, for the points during a task."""
    steps_per_pass: tuple[int, ...]
    steps: tuple[int, ...]
    """Steps of each task, at most."""
    points: tuple[tuple[int, ...], ...]
    """Steps of each task after which accuracy is measured; the last is its end."""
    seen: tuple[int, ...]
    """How many tasks are measured during each task."""
    is_joint: bool
    target: tuple[float, ...]
    """The loss that ends each task early; 0 does not."""
    shuffled: bool
    batch_size: int
    example_bytes: int

    @property
    def stored_bytes(self) -> int:
        """What training on all data at once has to keep."""
        return sum(len(part.y) for part in self.train[:1]) * (self.example_bytes + 4)

    def joint(self) -> "Plan":
        """The plan of learning all tasks at once, in as many steps."""
        every = Examples(*map(np.concatenate, zip(*self.train, strict=True)))
        tasks = len(self.train)
        return self._replace(
            train=(every,) * tasks,
            train_sizes=(len(every.y),) * tasks,
            seen=(tasks,) * tasks,
            steps_per_pass=(len(every.y) // self.batch_size,) * tasks,
            is_joint=True,
            target=(0.0,) * tasks,
        )

    def schedule(self, task: int) -> Examples:
        """The batches of a task, ``[steps, batch_size]``.

        The examples that do not fill a last batch are left out of that pass.
        """
        per_pass, steps = self.steps_per_pass[task], self.steps[task]
        # Joint training goes on in the middle of a pass where a task would have ended.
        start = sum(self.steps[:task]) if self.is_joint else 0
        skipped, whose = start // per_pass, 0 if self.is_joint else task
        passes = [
            self._pass(whose, number)
            for number in range(skipped, -(-(start + steps) // per_pass))
        ]
        first = start - skipped * per_pass
        return self.train[task].take(np.concatenate(passes)[first : first + steps])

    def _pass(self, task: int, number: int) -> np.ndarray:
        """The order of one pass over a task's data, ``[steps, batch_size]``."""
        size = len(self.train[task].y)
        order = np.arange(size)
        if self.shuffled:
            order = generator(self.seed, _ORDER, task, number).permutation(size)
        steps = self.steps_per_pass[task]
        return order[: steps * self.batch_size].reshape(steps, self.batch_size)

    def sample(self, task: int, count: int) -> Examples:
        """Random examples of a task; they repeat if it has fewer."""
        rng = generator(self.seed, _SAMPLE, task)
        order = rng.permutation(len(self.train[task].y))
        return self.train[task].take(np.resize(order, count))


def make_plans(
    streams: Sequence[Stream], seeds: Sequence[int], training: Training
) -> tuple[np.ndarray, list[Plan]]:
    """The stored data of all seeds, once, and a plan for each seed.

    Raises:
      ContinualError: for data that the training does not fit.
    """
    bases: dict[int, tuple[np.ndarray, int]] = {}
    total = 0
    for stream in streams:
        for task in stream.tasks:
            for split in (task.train, getattr(task, training.evaluate_on)):
                if not isinstance(split, Batches) and id(split.x) not in bases:
                    bases[id(split.x)] = (split.x, total)
                    total += len(split.x)
    arrays = [array for array, _ in bases.values()]
    first = arrays[0]
    if any((a.shape[1:], a.dtype) != (first.shape[1:], first.dtype) for a in arrays):
        raise ContinualError("all tasks' examples must have one shape and dtype")
    offsets = {key: offset for key, (_, offset) in bases.items()}
    moments = _Moments()
    plans = [
        _plan(stream, seed, training, offsets, moments)
        for stream, seed in zip(streams, seeds, strict=True)
    ]
    return (first if len(arrays) == 1 else np.concatenate(arrays)), plans


def _plan(
    stream: Stream,
    seed: int,
    training: Training,
    offsets: dict[int, int],
    moments: "_Moments",
) -> Plan:
    tasks = stream.tasks
    feeds = tuple(t.train for t in tasks if isinstance(t.train, Batches))
    if len(feeds) not in (0, len(tasks)):
        raise ContinualError("all tasks must be batches, or none")
    if feeds and training.score_training:
        raise ContinualError("score_training needs all training data: batches go by")
    train = [
        Examples(*np.zeros((3, 0), np.int32))
        if feeds
        else _examples(t.train, k, offsets)
        for k, t in enumerate(tasks)
    ]
    sizes = tuple(len(task.train) for task in tasks)
    for task, size in zip(tasks, sizes, strict=True):
        if training.batch_size > size:
            raise ContinualError(
                f"batch_size {training.batch_size} is above the {size} "
                f"training examples of the task {task.name!r} (seed {seed})"
            )
    parts = [getattr(task, training.evaluate_on) for task in tasks]
    for task, part in zip(tasks, parts, strict=True):
        if not len(part):
            raise ContinualError(
                f"{task.name} has no {training.evaluate_on} examples (seed {seed})"
            )
    order = [
        generator(seed, _TEST, k).permutation(len(part)) for k, part in enumerate(parts)
    ]
    all_test = [_examples(part, k, offsets) for k, part in enumerate(parts)]

    def chosen(budget: int) -> tuple[Examples, ...]:
        cap = training.max_test or max(map(len, parts))
        if training.max_test is None or budget == _EVALUATED_DURING:
            wanted = sum(min(len(part), cap) for part in parts)
            if wanted > budget:
                cap = min(cap, max(budget // len(parts), 1))
        return tuple(
            examples.take(np.sort(o[:cap]))
            for examples, o in zip(all_test, order, strict=True)
        )

    x = parts[0].x
    per_pass = tuple(size // training.batch_size for size in sizes)
    steps = tuple(n * _of_task(training.epochs, k, 1) for k, n in enumerate(per_pass))
    mean, deviation = _scale(tasks[0].train, x.dtype, training.normalisation, moments)
    points = [np.linspace(0, n, training.points + 1).astype(int)[1:] for n in steps]
    everything = training.evaluate == "all"
    return Plan(
        seed=seed,
        mean=mean,
        deviation=deviation,
        pixels=_pixels(stream),
        classes=np.stack([task.classes for task in tasks]),
        train=tuple(train),
        feeds=feeds,
        train_sizes=sizes,
        test=chosen(_EVALUATED),
        glance=chosen(_EVALUATED_DURING),
        steps_per_pass=per_pass,
        steps=steps,
        points=tuple(tuple(sorted(set(p.tolist()) - {0})) for p in points),
        seen=tuple(len(tasks) if everything else k + 1 for k in range(len(tasks))),
        is_joint=False,
        target=tuple(_of_task(training.until_loss, k, 0.0) for k in range(len(tasks))),
        shuffled=training.order == "shuffled",
        batch_size=training.batch_size,
        example_bytes=math.prod(x.shape[1:]) * x.dtype.itemsize,
    )


def _of_task(values: Sequence[_N], k: int, default: _N) -> _N:
    return values[min(k, len(values) - 1)] if values else default


def _examples(split: Split, task: int, offsets: dict[int, int]) -> Examples:
    rows = np.arange(len(split.x)) if split.rows is None else split.rows
    return Examples(
        (rows + offsets[id(split.x)]).astype(np.int32),
        np.asarray(split.y[rows], np.int32),
        np.full(len(rows), task, np.int32),
    )


def _pixels(stream: Stream) -> np.ndarray | None:
    orders = [getattr(task.train, "pixels", None) for task in stream.tasks]
    given = [order for order in orders if order is not None]
    if not given:
        return None
    plain = np.arange(len(given[0]))
    return np.stack([plain if o is None else o for o in orders]).astype(np.int32)


class _Moments:
    """Sums over each stored example, taken once for all seeds that share the data."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[float, np.ndarray, np.ndarray]] = {}

    def __call__(self, split: Split) -> tuple[float, float]:
        """Mean and standard deviation of all numbers in a split."""
        if id(split.x) not in self._sums:
            # Around a number near the mean, the squares lose no digits.
            centre = float(np.mean(split.x[:100], dtype=np.float64))
            first, second = np.empty((2, len(split.x)))
            for start in range(0, len(split.x), 1000):
                part = split.x[start : start + 1000].astype(np.float64) - centre
                part = part.reshape(len(part), -1)
                first[start : start + 1000] = part.sum(1)
                second[start : start + 1000] = (part * part).sum(1)
            self._sums[id(split.x)] = (centre, first, second)
        centre, first, second = self._sums[id(split.x)]
        rows = slice(None) if split.rows is None else split.rows
        count = len(split) * math.prod(split.x.shape[1:])
        shift = first[rows].sum() / count
        variance = max(second[rows].sum() / count - shift * shift, 0.0)
        return centre + shift, math.sqrt(variance)


def _scale(
    split: Split, dtype: np.dtype, normalisation: tuple[float, ...], moments: _Moments
) -> tuple[float, float]:
    """What inputs are standardised by; tokens are left alone."""
    if np.issubdtype(dtype, np.signedinteger):
        return 0.0, 1.0
    if normalisation:
        # In units of the stored pixels: those of uint8 images go to 255.
        unit = 255 if dtype == np.uint8 else 1
        return unit * normalisation[0], unit * normalisation[1]
    if isinstance(split, Batches):
        raise ContinualError("batches need normalisation=(mean, deviation)")
    mean, deviation = moments(split)
    return mean, deviation or 1.0
