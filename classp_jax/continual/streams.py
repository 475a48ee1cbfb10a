"""Streams: sequences of tasks, made from sources or from arrays."""

import contextlib
import itertools
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from classp_jax.continual._names import nearest
from classp_jax.continual.sources import (
    VALIDATION_KEY,
    Source,
    SourceError,
    Split,
    as_images,
    as_labels,
    check_fraction,
    check_source,
    check_split,
    generator,
    hold_out,
)

STREAMS: dict[str, str] = {
    "permuted": "the pixels of every task in another order; task 1 as they are",
    "rotated": "the images turned further with every task, half a turn divided by them",
    "split": "the classes divided among the tasks",
    "sequence": "one task a source, with one head for all",
}
"""What :func:`make_stream` takes, with one line each."""

SCENARIOS: dict[str, str] = {
    "class-incremental": "every class has its own output; the task is not given",
    "domain-incremental": "the same outputs serve every task; the task is not given",
    "task-incremental": "only the outputs of the given task's classes may win",
}
"""The three scenarios of van de Ven et al., with one line each."""

# One key for every use of randomness, apart from those of the sources.
_PERMUTATION_KEY, _CLASS_ORDER_KEY, _SUBSET_KEY = 10, 11, 12

_PADDING, _UNKNOWN = 0, 1
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")


class StreamError(ValueError):
    """A stream that cannot be made from what was given; says so on one line."""


class Task(NamedTuple):
    """One task of a stream: three parts that share no example."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: np.ndarray
    """Bool ``[num_classes]``: the outputs that may win in this task."""


class Stream(NamedTuple):
    """Tasks in the order in which they are learned."""

    name: str
    kind: str
    """``"image"``: x is uint8 or float32 ``[n, height, width, channels]``; ``"text"``:
    x is tokens, int32 ``[n, length]``, where 0 fills up short texts."""
    scenario: str
    """One of :data:`SCENARIOS`."""
    tasks: tuple[Task, ...]
    num_classes: int
    """The number of outputs: labels are 0 to ``num_classes - 1``."""
    vocabulary_size: int
    """The number of different tokens; 0 for images."""


def make_stream(
    name: str,
    sources: Sequence[Source],
    *,
    num_tasks: int = 5,
    scenario: str = "domain-incremental",
    seed: int = 0,
    max_train: int | None = None,
    text_length: int = 30,
    vocabulary_size: int = 20_000,
) -> Stream:
    """Makes the tasks of a stream from one source, or from several in sequence.

    * ``permuted``: task k shows the source's images with their pixels in an order drawn
      from ``seed`` and k; in the first task they are as they are. The channels of a
      pixel stay together.
    * ``rotated``: task k (from 0) shows them turned counter-clockwise by ``k * 180 /
      num_tasks`` degrees, bilinear, with 0 where nothing was.
    * ``split``: the classes are shuffled by ``seed`` and divided into ``num_tasks``
      groups whose sizes differ by at most one. ``class-incremental``: labels and
      outputs are those of the source. ``domain-incremental``: the label is the class's
      index in its group. ``task-incremental``: labels are those of the source, and only
      the outputs of the task's own group may win.
    * ``sequence``: one task a source, in the given order (``num_tasks`` has no
      meaning). Class i of every source has the same output i. Texts become lower-case
      words; the most frequent ones in the training parts of all sources are the
      vocabulary, counted where the model sees them, in the first ``text_length`` words
      of a text. Equally frequent ones are taken in alphabetical order. Token 0 fills up
      short texts behind their end and 1 is every other word; a text without any word
      is one such word.

    Args:
      name: one of :data:`STREAMS`.
      sources: one source of images; for ``sequence`` one or more sources of one kind,
        and, if they are images, of one shape and dtype.
      num_tasks: the number of tasks, >= 1. ``split`` needs a class for each, and two
        classes for each unless it is class-incremental.
      scenario: one of :data:`SCENARIOS`; all but ``split`` are domain-incremental.
      seed: decides permutations, the order of classes and ``max_train``, >= 0.
      max_train: the largest number of training examples a task, >= 1, drawn anew for
        every task; None for all.
      text_length: the number of words kept of a text, >= 1.
      vocabulary_size: the largest number of different tokens, 0 and 1 among them, >= 3.

    Returns:
      A :class:`Stream`. Images keep their dtype. ``classes`` is all true unless the
      stream is task-incremental.

    Raises:
      StreamError: if an argument is not as above, if a source is not as
        :class:`Source` says, or if a task has a part without examples.

    Example:
      >>> from classp_jax.continual.sources import load_source
      >>> stream = make_stream("split", [load_source("digits")], max_train=100)
      >>> [task.name for task in stream.tasks]
      ['2, 4', '5, 8', '3, 7', '1, 9', '0, 6']
      >>> stream.tasks[0].train.x.shape, stream.num_classes
      ((100, 8, 8, 1), 2)

    References:
      van de Ven et al., `Three types of incremental learning
      <https://doi.org/10.1038/s42256-022-00568-3>`_, 2022
    """
    if name not in STREAMS:
        raise StreamError(f"Unknown stream {name!r}{nearest(name, STREAMS)}")
    if scenario not in SCENARIOS:
        raise StreamError(
            f"Unknown scenario {scenario!r}{nearest(scenario, SCENARIOS)}"
        )
    if name != "split" and scenario != "domain-incremental":
        raise StreamError(
            f"Only the stream 'split' can be {scenario}; {name!r} is "
            "domain-incremental."
        )
    _at_least("num_tasks", num_tasks, 1)
    _at_least("text_length", text_length, 1)
    _at_least("vocabulary_size", vocabulary_size, 3)
    if max_train is not None:
        _at_least("max_train", max_train, 1)
    sources = [sources] if isinstance(sources, Source) else list(sources)
    with _sources_errors_as_ours():
        generator(seed)
        for source in sources:
            check_source(source)
    if name == "sequence":
        tasks = _tasks_of_sources(sources)
    elif len(sources) != 1 or sources[0].kind != "image":
        raise StreamError(
            f"The stream {name!r} is made from one source of images, got "
            f"{', '.join(f'{s.name} ({s.kind})' for s in sources) or 'none'}."
        )
    elif name == "split":
        tasks = _tasks_of_classes(sources[0], num_tasks, scenario, seed)
    else:
        tasks = _tasks_of_sources(sources) * num_tasks
    # Examples are chosen first, so that the vocabulary comes from the chosen ones.
    tasks = [
        task._replace(train=_capped(task.train, max_train, seed, k))
        for k, task in enumerate(tasks)
    ]
    with _sources_errors_as_ours():
        validated = any(len(source.validation.y) for source in sources)
        for task in tasks:
            _check_task(name, task, validated=validated)
    kind, words = sources[0].kind, 0
    if name == "permuted":
        tasks = _permuted(tasks, seed)
    elif name == "rotated":
        tasks = _rotated(tasks)
    elif kind == "text":
        tasks, words = _tokenised(tasks, text_length, vocabulary_size)
    return Stream(name, kind, scenario, tuple(tasks), len(tasks[0].classes), words)


def stream_from_arrays(
    tasks: Iterable[Sequence[Any]],
    *,
    name: str = "arrays",
    task_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    scenario: str = "domain-incremental",
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> Stream:
    """A stream of tasks that are already in memory.

    Args:
      tasks: for every task ``(x_train, y_train, x_test, y_test)``. The x are images
        ``[n, height, width]`` or ``[n, height, width, channels]``, uint8 or floating
        point; or vectors, floating point ``[n, d]``, which become images of one pixel
        with d channels; or tokens, integers ``[n, length]`` from 0 on, where 0 fills up
        short texts. All tasks have the same kind, shape and dtype. The y are integers
        ``[n]`` or ``[n, 1]`` from 0 on.
      name: what messages and pictures call the stream.
      task_names: a name for every task; by default "task 1" and so on.
      num_classes: the number of outputs; by default as many as the largest training
        label of all tasks needs.
      scenario: one of :data:`SCENARIOS`. If task-incremental, only the classes among a
        task's training labels may win in it; else the word changes nothing.
      validation_fraction: the share of every task's training part that becomes its
        validation part, at least 0 and below 1.
      seed: decides which examples those are, >= 0.

    Returns:
      A :class:`Stream`.

    Raises:
      StreamError: if an array is not as above, holds NaN or infinite numbers, has
        labels outside the head, or if a part has no examples.

    Example:
      >>> import numpy as np
      >>> x, y = np.zeros((20, 3), np.float32), np.arange(20) % 2
      >>> stream = stream_from_arrays([(x, y, x, y), (x + 1, y, x + 1, y)])
      >>> stream.tasks[1].name, stream.tasks[1].train.x.shape
      ('task 2', (18, 1, 1, 3))
    """
    if scenario not in SCENARIOS:
        raise StreamError(
            f"Unknown scenario {scenario!r}{nearest(scenario, SCENARIOS)}"
        )
    if num_classes is not None:
        _at_least("num_classes", num_classes, 2)
    arrays = [tuple(task) for task in tasks]
    names = [f"task {k}" for k in range(1, len(arrays) + 1)]
    if task_names is not None:
        names = [*task_names]
    if not arrays or len(names) != len(arrays):
        raise StreamError(f"{name}: has {len(arrays)} tasks, {len(names)} task names.")
    wrong = [task for task, parts in zip(names, arrays, strict=True) if len(parts) != 4]
    if wrong:
        raise StreamError(
            f"{name}, {wrong[0]}: must be (x_train, y_train, x_test, y_test)."
        )
    with _sources_errors_as_ours():
        check_fraction(validation_fraction)
        pairs = [
            (
                _arrays_split(f"{name}, {task}, training part", parts[0], parts[1]),
                _arrays_split(f"{name}, {task}, test part", parts[2], parts[3]),
            )
            for task, parts in zip(names, arrays, strict=True)
        ]
        largest = max(int(train.y.max(initial=1)) for train, _ in pairs)
        outputs = largest + 1 if num_classes is None else num_classes
        made = []
        for k, (task, (train, test)) in enumerate(zip(names, pairs, strict=True)):
            check_split(f"{name}, {task}, training part", train, outputs)
            classes = np.ones(outputs, bool)
            if scenario == "task-incremental":
                classes = np.isin(np.arange(outputs), train.y)
            rng = generator(seed, VALIDATION_KEY, k)
            rest, validation = hold_out(train, validation_fraction, rng)
            made.append(Task(task, rest, validation, test, classes))
            _check_task(name, made[-1], validated=validation_fraction > 0)
    _check_same_shape([(f"{name}, {task.name}", task) for task in made])
    tokens = made[0].train.x.ndim == 2
    words = 1 + max(int(x.max()) for task in made for x in _xs(task)) if tokens else 0
    kind = "text" if tokens else "image"
    return Stream(name, kind, scenario, tuple(made), outputs, words)


@contextlib.contextmanager
def _sources_errors_as_ours() -> Iterator[None]:
    """Bad data is bad data, but here it is the stream that cannot be made."""
    try:
        yield
    except SourceError as error:
        raise StreamError(str(error)) from error


def _at_least(name: str, value: int, smallest: int) -> None:
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_integer or value < smallest:
        raise StreamError(f"{name} must be an integer >= {smallest}, got {value!r}.")


def _xs(task: Task) -> tuple[np.ndarray, ...]:
    return task.train.x, task.validation.x, task.test.x


def _check_task(stream: str, task: Task, *, validated: bool) -> None:
    """Every part has examples, with labels inside the head.

    Without validation the validation part may be empty, in every task.
    """
    for part in ("train", "validation", "test"):
        where = f"{stream}, {task.name}, {part} part"
        if part == "validation" and not (validated or len(task.validation.y)):
            continue
        check_split(where, getattr(task, part), len(task.classes))


def _check_same_shape(named: Sequence[tuple[str, Task | Source]]) -> None:
    """All examples have the shape and dtype of the first task's."""
    first = named[0][1].train.x
    for where, parts in named:
        for x in (parts.train.x, parts.validation.x, parts.test.x):
            if (x.shape[1:], x.dtype) != (first.shape[1:], first.dtype):
                raise StreamError(
                    f"{where}: examples are {x.dtype} {list(x.shape[1:])}, those of "
                    f"{named[0][0]} {first.dtype} {list(first.shape[1:])}."
                )


def _capped(split: Split, max_train: int | None, seed: int, task: int) -> Split:
    if max_train is None or len(split.y) <= max_train:
        return split
    rng = generator(seed, _SUBSET_KEY, task)
    chosen = rng.permutation(len(split.y))[:max_train]
    return Split(split.x[chosen], split.y[chosen])


def _with_x(task: Task, name: str, view: Callable[[np.ndarray], np.ndarray]) -> Task:
    """The task with other inputs and the same labels."""
    train, validation, test = (
        Split(view(split.x), split.y)
        for split in (task.train, task.validation, task.test)
    )
    return Task(name, train, validation, test, task.classes)


def _tasks_of_sources(sources: Sequence[Source]) -> list[Task]:
    """One task a source, each with the outputs of the largest one."""
    if not sources:
        raise StreamError("A sequence needs at least one source.")
    if len({source.kind for source in sources}) > 1:
        raise StreamError(
            "A sequence is of images or of texts, got "
            f"{', '.join(f'{s.name} ({s.kind})' for s in sources)}."
        )
    if sources[0].kind == "image":
        _check_same_shape([(source.name, source) for source in sources])
    classes = np.ones(max(len(source.class_names) for source in sources), bool)
    names = [_short(source.name) for source in sources]
    return [
        Task(
            # A source that comes again is another task.
            name if name not in names[:k] else f"{name} ({names[:k].count(name) + 1})",
            source.train,
            source.validation,
            source.test,
            classes,
        )
        for k, (name, source) in enumerate(zip(names, sources, strict=True))
    ]


def _short(name: str) -> str:
    """A source's name without its reader and folder.

    Example:
      >>> _short("npz:/data/letters.npz"), _short("tfds:mnist"), _short("digits")
      ('letters', 'mnist', 'digits')
    """
    prefix, _, rest = name.partition(":")
    return pathlib.Path(rest).stem if prefix in ("npz", "tsv") else rest or name


def _tasks_of_classes(
    source: Source, num_tasks: int, scenario: str, seed: int
) -> list[Task]:
    """One task a group of classes."""
    num_classes = len(source.class_names)
    a_task = 1 if scenario == "class-incremental" else 2
    if num_tasks * a_task > num_classes:
        raise StreamError(
            f"{num_tasks} {scenario} tasks need at least {num_tasks * a_task} classes; "
            f"{source.name} has {num_classes}."
        )
    order = generator(seed, _CLASS_ORDER_KEY).permutation(num_classes)
    groups = [np.sort(group) for group in np.array_split(order, num_tasks)]
    label_of = np.arange(num_classes, dtype=np.int32)
    outputs = num_classes
    if scenario == "domain-incremental":
        outputs = max(len(group) for group in groups)
        for group in groups:
            label_of[group] = np.arange(len(group))
    tasks = []
    for group in groups:
        train, validation, test = (
            Split(split.x[chosen], label_of[split.y[chosen]])
            for split in (source.train, source.validation, source.test)
            for chosen in [np.isin(split.y, group)]
        )
        classes = np.ones(outputs, bool)
        if scenario == "task-incremental":
            classes = np.isin(np.arange(outputs), group)
        names = [source.class_names[label] for label in group]
        name = ", ".join(names)
        if len(names) > 3:
            name = f"{names[0]} and {len(names) - 1} more"
        tasks.append(Task(name, train, validation, test, classes))
    return tasks


def _permuted(tasks: Sequence[Task], seed: int) -> list[Task]:
    """The tasks with the pixels of all but the first in other orders."""
    height, width = tasks[0].train.x.shape[1:3]
    made = [tasks[0]._replace(name="as they are")]
    for k, task in enumerate(tasks[1:], start=1):
        order = generator(seed, _PERMUTATION_KEY, k).permutation(height * width)

        def view(x: np.ndarray, order: np.ndarray = order) -> np.ndarray:
            pixels = x.reshape(len(x), height * width, x.shape[-1])
            return np.take(pixels, order, axis=1).reshape(x.shape)

        made.append(_with_x(task, f"permutation {k}", view))
    return made


def _rotated(tasks: Sequence[Task]) -> list[Task]:
    """The tasks, each turned further than the one before."""
    made = [tasks[0]._replace(name="0°")]
    for k, task in enumerate(tasks[1:], start=1):
        angle = 180 * k / len(tasks)

        def view(x: np.ndarray, angle: float = angle) -> np.ndarray:
            return ndimage.rotate(x, angle, axes=(1, 2), reshape=False, order=1)

        made.append(_with_x(task, f"{angle:g}°", view))
    return made


def _words(text: str, length: int) -> list[str]:
    """The first words of a text in lower case.

    Example:
      >>> _words("Isn't it GOOD -- 10/10?", 5)
      ["isn't", 'it', 'good', '10', '10']
    """
    found = _WORD.finditer(text.lower())
    return [word.group() for word in itertools.islice(found, length)]


def _tokenised(
    tasks: Sequence[Task], length: int, vocabulary_size: int
) -> tuple[list[Task], int]:
    """The tasks with texts turned into tokens, and the number of different tokens."""
    counts = Counter(
        word for task in tasks for text in task.train.x for word in _words(text, length)
    )
    frequent = sorted(counts, key=lambda word: (-counts[word], word))
    token_of = {
        word: token
        for token, word in enumerate(
            frequent[: vocabulary_size - _UNKNOWN - 1], start=_UNKNOWN + 1
        )
    }

    def view(texts: np.ndarray) -> np.ndarray:
        tokens = np.full((len(texts), length), _PADDING, np.int32)
        for row, text in zip(tokens, texts, strict=True):
            found = [token_of.get(word, _UNKNOWN) for word in _words(text, length)]
            row[: len(found) or 1] = found or _UNKNOWN
        return tokens

    return (
        [_with_x(task, task.name, view) for task in tasks],
        len(token_of) + _UNKNOWN + 1,
    )


def _arrays_split(where: str, x: Any, y: Any) -> Split:
    """One part of a task that was given as arrays."""
    x = np.asarray(x)
    if x.ndim == 2 and x.dtype.kind in "iu":
        if x.size and (x.min() < 0 or x.max() >= np.iinfo(np.int32).max):
            raise StreamError(f"{where}: tokens must be 0, 1, 2 and so on.")
        x = x.astype(np.int32)
    elif x.ndim == 2:
        x = as_images(where, x[:, np.newaxis, np.newaxis])
    else:
        x = as_images(where, x)
    return Split(x, as_labels(where, y))
