"""Streams of tasks that are already in memory."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from classp_jax.continual.data.arrays import Task
from classp_jax.continual.data.maker import (
    StreamMaker,
    check_options,
    check_same_shape,
    distinct,
    new_maker,
    task_of_source,
)
from classp_jax.continual.data.sources import (
    class_names_of,
    examples_from_arrays,
    make_source,
)
from classp_jax.continual.data.texts import num_tokens
from classp_jax.continual.errors import DataError


def stream(
    tasks: Iterable[Sequence[Any]],
    *,
    name: str = "arrays",
    task_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    scenario: str = "domain-incremental",
    validation_fraction: float = 0.1,
) -> StreamMaker:
    """A stream of tasks that are already in memory.

    Args:
      tasks: for every task ``(x, y)``, of which 20 % are held out for testing,
        stratified by class and the same for every seed; or ``(x_train, y_train, x_test,
        y_test)``. The x are images ``[n, height, width]`` or ``[n, height, width,
        channels]``, uint8 or floating point; or vectors, floating point ``[n,
        features]``; or tokens, integers ``[n, length]`` from 0 on, where 0 fills up
        short texts. All tasks have the same kind, shape and dtype. The y are integers
        ``[n]`` or ``[n, 1]`` from 0 on. A generator is read to its end at once. An
        array that comes again is stored once, and the same examples are held out.
      name: what messages and pictures call the stream.
      task_names: a name for every task; by default "task 1" and so on.
      num_classes: the number of outputs; by default as many as the largest training
        label of all tasks needs.
      scenario: if ``"task-incremental"``, only the classes among a task's training
        labels may win in it; ``"class-incremental"`` and ``"domain-incremental"`` only
        say what the labels mean.
      validation_fraction: the share of every task's training examples that is held out
        for validation, stratified by class: at least 0 and below 1. A class with a
        single example keeps it for training.

    Returns:
      A :class:`~classp_jax.continual.data.maker.StreamMaker`.

    Raises:
      DataError: if an array is not as above, holds NaN or infinite numbers or has
        labels outside the head.

    Example:
      >>> x, y = np.random.default_rng(0).normal(size=(100, 3)), np.arange(100) % 2
      >>> drawn = stream([(x, y), (x + 1, 1 - y)])(0)
      >>> [(task.name, len(task.train), len(task.test)) for task in drawn.tasks]
      [('task 1', 72, 20), ('task 2', 72, 20)]
    """
    options: dict[str, Any] = {
        "scenario": scenario,
        "validation_fraction": validation_fraction,
    }
    check_options(num_classes=num_classes, **options)
    arrays = list(tasks)
    names = [f"task {k}" for k in range(1, len(arrays) + 1)]
    names = names if task_names is None else distinct(task_names)
    if not arrays:
        raise DataError(f"{name}: at least one task is needed.")
    if len(names) != len(arrays):
        raise DataError(f"{name}: has {len(arrays)} tasks, {len(names)} task names.")
    seen: dict[int, tuple[str, np.ndarray]] = {}
    parts = [
        examples_from_arrays(f"{name}, {task}", given, seen)
        for task, given in zip(names, arrays, strict=True)
    ]
    if num_classes is None:
        class_names = class_names_of(name, [train for train, _ in parts])
    else:
        class_names = [str(label) for label in range(num_classes)]
    data = [
        make_source(f"{name}, {task}", train, test, class_names)
        for task, (train, test) in zip(names, parts, strict=True)
    ]
    check_same_shape(data)
    words = num_tokens(data) if data[0].kind == "text" else 0

    def draw_tasks(seed: int) -> list[Task]:
        result = []
        for task, source in zip(names, data, strict=True):
            drawn = task_of_source(source, validation_fraction, seed)
            if scenario == "task-incremental":
                present = np.isin(np.arange(len(class_names)), source.train.labels())
                drawn = drawn._replace(classes=present)
            result.append(drawn._replace(name=task))
        return result

    options |= {"stream": name, "source": ["arrays"], "tasks": len(data)}
    options["num_classes"] = len(class_names)
    return new_maker(draw_tasks, data, len(class_names), words, **options)
