"""What all streams have in common: reading, checking, holding out, leaving out."""

import dataclasses
import hashlib
import numbers
import operator
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from classp_jax.continual._names import nearest
from classp_jax.continual.data.arrays import Split, Stream, Task, generator
from classp_jax.continual.data.readers import read_source
from classp_jax.continual.data.sources import (
    VALIDATION_KEY,
    Source,
    hold_out,
    source_from_arrays,
)
from classp_jax.continual.errors import DataError

SCENARIOS: dict[str, str] = {
    "class-incremental": "every class has its own output; the task is not given",
    "domain-incremental": "the same outputs serve every task; the task is not given",
    "task-incremental": "only the outputs of the given task's classes may win",
}
"""The three scenarios of van de Ven et al., with one line each."""

AnySource = str | Sequence[Any]
"""A name, as for :func:`~classp_jax.continual.data.readers.read_source`, or arrays
``(x, y)`` or ``(x_train, y_train, x_test, y_test)``, as for
:func:`~classp_jax.continual.data.streams.stream`."""

_SUBSET_KEY = 12
_SMALLEST = {
    "tasks": 1,
    "max_train": 1,
    "text_length": 1,
    "vocabulary_size": 3,
    "num_classes": 2,
}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class StreamMaker:
    """A recipe that gives every seed its own stream, over data that all seeds share.

    Made by :func:`~classp_jax.continual.data.streams.permuted` and its neighbours. The
    seed alone decides which examples are held out for validation, which are left out by
    ``max_train``, the permutations and the order of the classes: its stream is the same
    whichever others are drawn. The test examples are the same for every seed.

    Attributes:
      configuration: how the stream is made, in plain JSON types.
      fingerprint: 16 hexadecimal digits, a hash of everything that was read: the same
        for the same content, wherever it lies.

    Example:
      >>> from classp_jax.continual.data.streams import permuted
      >>> maker = permuted("digits", tasks=2)
      >>> print(maker.describe())
      permuted: 2 tasks, domain-incremental, 10 outputs
      digits: 1,797 images (359 for testing), uint8 [8, 8, 1], 10 classes: 0, 1, 2, ...
      >>> first, again, other = maker(0), maker(0), maker(1)
      >>> bool((first.tasks[1].train.pixels == again.tasks[1].train.pixels).all())
      True
      >>> first.tasks[1].train.x is other.tasks[0].test.x
      True
    """

    configuration: dict[str, Any]
    fingerprint: str
    sources: tuple[Source, ...]
    num_classes: int
    vocabulary_size: int
    draw_tasks: Callable[[int], list[Task]] = dataclasses.field(repr=False)
    """The tasks of a seed, before ``max_train``."""

    def __call__(self, seed: int) -> Stream:
        """The stream of a seed, any integer >= 0.

        Raises:
          DataError: if the seed is not such a number, or if a task has a part without
            examples.
        """
        options = self.configuration
        tasks = [
            task._replace(train=_subset(task.train, options["max_train"], seed, k))
            for k, task in enumerate(self.draw_tasks(seed))
        ]
        for task in tasks:
            _check_parts(options["stream"], task, options["validation_fraction"])
        return Stream(
            name=options["stream"],
            kind=self.sources[0].kind,
            scenario=options["scenario"],
            tasks=tuple(tasks),
            num_classes=self.num_classes,
            vocabulary_size=self.vocabulary_size,
        )

    def describe(self) -> str:
        """What was read: a line for the stream, and one for its sources."""
        options = self.configuration
        words = f", {self.vocabulary_size:,} tokens" if self.vocabulary_size else ""
        distinct = list({id(source): source for source in self.sources}.values())
        shown = distinct if len(distinct) <= 3 else distinct[:1]
        lines = [_described(source) for source in shown]
        if len(distinct) > len(shown):
            lines.append(f"and {len(distinct) - 1} more")
        tasks = f"{options['tasks']} task{'s' * (options['tasks'] != 1)}"
        return (
            f"{options['stream']}: {tasks}, {options['scenario']}, "
            f"{self.num_classes} outputs{words}\n{'; '.join(lines)}"
        )


def new_maker(
    draw_tasks: Callable[[int], list[Task]],
    sources: Sequence[Source],
    num_outputs: int,
    num_tokens: int = 0,
    *,
    stream: str,
    tasks: int,
    validation_fraction: float,
    scenario: str = "domain-incremental",
    max_train: int | None = None,
    **other: Any,
) -> StreamMaker:
    """A stream maker; the options after the star become its configuration."""
    digests = "".join(source.digest for source in sources)
    configuration = {
        "stream": stream,
        "source": [source.name for source in sources],
        "tasks": int(tasks),
        "scenario": scenario,
        "max_train": None if max_train is None else int(max_train),
        "validation_fraction": float(validation_fraction),
        **other,
    }
    return StreamMaker(
        configuration=configuration,
        fingerprint=hashlib.sha256(digests.encode()).hexdigest()[:16],
        sources=tuple(sources),
        num_classes=num_outputs,
        vocabulary_size=num_tokens,
        draw_tasks=draw_tasks,
    )


def read_sources(
    given: Iterable[AnySource], data_dir: str | os.PathLike[str] | None
) -> list[Source]:
    """The sources; one that is named several times is read once."""
    found: dict[str, Source] = {}
    result = []
    for source in given:
        if not isinstance(source, str):
            result.append(source_from_arrays("arrays", source))
            continue
        if source not in found:
            found[source] = read_source(source, data_dir)
        result.append(found[source])
    return result


def task_of_source(source: Source, validation_fraction: float, seed: int) -> Task:
    """The source as a task, with what the seed holds out for validation."""
    rng = generator(seed, VALIDATION_KEY)
    train, validation = hold_out(source.train, validation_fraction, rng)
    classes = np.ones(len(source.class_names), bool)
    return Task(source.name, train, validation, source.test, classes)


def check_options(
    *, validation_fraction: Any, scenario: str = "domain-incremental", **counts: Any
) -> None:
    """Raises :class:`DataError` for an option that is out of range.

    Example:
      >>> check_options(validation_fraction=0.1, tasks=0)
      Traceback (most recent call last):
        ...
      classp_jax.continual.errors.DataError: tasks must be an integer >= 1, got 0.
    """
    if scenario not in SCENARIOS:
        raise DataError(f"Unknown scenario {scenario!r}{nearest(scenario, SCENARIOS)}")
    number = isinstance(validation_fraction, numbers.Real)
    if not (number and 0 <= float(validation_fraction) < 1):
        raise DataError(
            "validation_fraction must be at least 0 and below 1, got "
            f"{validation_fraction!r}."
        )
    for name, value in counts.items():
        if value is None:
            continue
        try:
            number = -1 if isinstance(value, bool) else operator.index(value)
        except TypeError:
            number = -1
        if number < _SMALLEST[name]:
            raise DataError(
                f"{name} must be an integer >= {_SMALLEST[name]}, got {value!r}."
            )


def check_same_shape(sources: Sequence[Source]) -> None:
    """Raises :class:`DataError` unless all examples look like the first source's."""
    first = sources[0]
    expected = _shape(first)
    for source in sources:
        if _shape(source) != expected:
            raise DataError(
                f"{source.name}: an example is {_shape(source)}, one of {first.name} "
                f"{expected}."
            )


def distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number behind those that came before.

    Example:
      >>> distinct(["digits", "letters", "digits"])
      ['digits', 'letters', 'digits (2)']
    """
    result: list[str] = []
    for name in names:
        number, unused = 1, name
        while unused in result:
            number += 1
            unused = f"{name} ({number})"
        result.append(unused)
    return result


def short_name(name: str) -> str:
    """A source's name without its reader and folder.

    Example:
      >>> [short_name(n) for n in ("npz:/data/letters.npz", "tfds:mnist", "digits")]
      ['letters', 'mnist', 'digits']
    """
    prefix, _, rest = name.partition(":")
    return pathlib.Path(rest).stem if prefix in ("npz", "tsv") else rest or name


def _subset(train: Split, max_train: int | None, seed: int, task: int) -> Split:
    if max_train is None or len(train) <= max_train:
        return train
    chosen = generator(seed, _SUBSET_KEY, task).permutation(len(train))[:max_train]
    return dataclasses.replace(train, rows=train.indices()[np.sort(chosen)])


def _check_parts(stream: str, task: Task, validation_fraction: float) -> None:
    remedies = {"validation": "; hold out a larger share, or validation_fraction=0"}
    for part in ("train", "validation", "test"):
        needed = part != "validation" or validation_fraction > 0
        if needed and not len(getattr(task, part)):
            remedy = remedies.get(part, "")
            raise DataError(f"{stream}, {task.name}, {part} part: is empty{remedy}.")


def _shape(source: Source) -> str:
    return f"{source.kind} {source.train.x.dtype} {list(source.train.x.shape[1:])}"


def _described(source: Source) -> str:
    names = ", ".join(source.class_names[:3])
    more = ", ..." if len(source.class_names) > 3 else ""
    shape = ""
    if source.train.x.dtype != object:
        shape = f" {source.train.x.dtype} {list(source.train.x.shape[1:])},"
    return (
        f"{source.name}: {len(source.train) + len(source.test):,} {source.kind}s "
        f"({len(source.test):,} for testing),{shape} {len(source.class_names)} "
        f"classes: {names}{more}"
    )
