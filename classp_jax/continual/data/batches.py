"""Streams whose training data comes batch by batch and is never whole in memory."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np

from classp_jax.continual.data.arrays import Split, Stream, Task
from classp_jax.continual.data.maker import distinct
from classp_jax.continual.data.sources import as_inputs, as_labels
from classp_jax.continual.errors import DataError

Read = Callable[..., Iterable[tuple[Any, Any]]]


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Batches:
    """A task's training data as something that yields batches.

    Attributes:
      read: begins a pass over the data, given random numbers for its order.
      size: how many examples a pass has.
      in_shares: whether each of several processes reads a share of them.
    """

    read: Read
    size: int
    in_shares: bool = False

    def __len__(self) -> int:
        """The number of examples."""
        return self.size


def stream_of_batches(
    tasks: Iterable[Sequence[Any]],
    *,
    examples: int | Sequence[int],
    num_classes: int,
    name: str = "batches",
    task_names: Sequence[str] | None = None,
    scenario: str = "domain-incremental",
    in_shares: bool = False,
) -> Stream:
    """A stream whose training data is larger than memory: tasks that yield batches.

    While a task trains, a thread reads ahead of it, a block of batches at a time; only
    some of these blocks are in memory, on the host and on the device. Test examples are
    kept whole.

    Args:
      tasks: for every task ``(read, x_test, y_test)``. ``read(rng)`` is called at the
        start of every pass and returns an iterable of pairs ``(x, y)``: a generator, a
        Grain loader, a TFDS set as NumPy. ``rng`` is a NumPy generator, the same for
        the same seed, task and pass, from which it may draw an order. Batches have any
        sizes, ``x`` is ``[n, ...]`` with the shape and dtype of the test examples, and
        ``y`` integers ``[n]``; they are cut anew to the size of a training batch.
      examples: how many examples a pass over a task has, one number for all tasks or
        one for each. More are not read; fewer are an error when they end.
      num_classes: the number of outputs.
      name: what messages and pictures call the stream; results of the same name, test
        data and sizes are taken to be over the same data.
      task_names: a name for every task; by default "task 1" and so on.
      scenario: only says what the labels mean.
      in_shares: whether ``read(rng, share, shares)`` is called, and is to return only
        that share, counted from 0, of so many: where several processes train one run,
        each reads one, in place of all examples. A step takes as many examples of each
        share. Where one process trains a run there is one share.

    Returns:
      A stream for :func:`~classp_jax.continual.run`, which needs ``normalisation=(mean,
      deviation)`` unless the examples are tokens. The method ``joint`` and
      ``score_training`` need all training data at once, so they refuse it.

    Raises:
      DataError: if an argument is not as above.

    Example:
      >>> def read(rng):
      ...     for _ in range(4):
      ...         y = rng.integers(0, 2, 16)
      ...         yield rng.normal(size=(16, 3)).astype(np.float32) + y[:, None], y
      >>> x, y = next(read(np.random.default_rng(0)))
      >>> tasks = stream_of_batches([(read, x, y)] * 2, examples=64, num_classes=2)
      >>> [(task.name, len(task.train), len(task.test)) for task in tasks.tasks]
      [('task 1', 64, 16), ('task 2', 64, 16)]
    """
    given = list(tasks)
    names = [f"task {k}" for k in range(1, len(given) + 1)]
    names = names if task_names is None else distinct(task_names)
    if not given:
        raise DataError(f"{name}: at least one task is needed.")
    if len(names) != len(given):
        raise DataError(f"{name}: has {len(given)} tasks, {len(names)} task names.")
    several = isinstance(examples, Sequence)
    sizes = list(examples) if several else [examples] * len(given)
    whole = all(isinstance(size, int | np.integer) and size >= 1 for size in sizes)
    if len(sizes) != len(given) or not whole:
        raise DataError(
            f"{name}: examples must be >= 1 for each task, whole numbers, got "
            f"{examples!r}."
        )
    seen: dict[int, tuple[str, np.ndarray]] = {}
    stream_tasks = []
    for task, size, parts in zip(names, sizes, given, strict=True):
        if len(parts) != 3 or not callable(parts[0]):
            raise DataError(
                f"{name}, {task}: must be (read, x_test, y_test) with a function that "
                "returns batches."
            )
        where = f"{name}, {task}"
        if id(parts[1]) not in seen:
            seen[id(parts[1])] = as_inputs(f"{where}, x_test", parts[1])
        test = Split(seen[id(parts[1])][1], as_labels(f"{where}, y_test", parts[2]))
        if len(test.x) != len(test.y) or not len(test.y):
            raise DataError(
                f"{where}: x_test has {len(test.x)} examples, y_test {len(test.y)} "
                "labels."
            )
        if test.y.max() >= num_classes:
            raise DataError(
                f"{name}, {task}: label {test.y.max()} is outside the {num_classes} "
                "outputs."
            )
        none = dataclasses.replace(test, rows=np.zeros(0, np.int32))
        classes = np.ones(num_classes, bool)
        stream_tasks.append(
            Task(
                task,
                cast(Any, Batches(cast(Read, parts[0]), size, in_shares)),
                none,
                test,
                classes,
            )
        )
    x = stream_tasks[0].test.x
    is_text = np.issubdtype(x.dtype, np.signedinteger)
    kind = "text" if is_text else "vector" if x.ndim == 2 else "image"
    words = 1 + max(int(task.test.x.max()) for task in stream_tasks) if is_text else 0
    return Stream(name, kind, scenario, tuple(stream_tasks), num_classes, words)
