"""The training loop: task by task, point by point: step, evaluate; end the task."""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from classp_jax.continual.methods import Method
from classp_jax.continual.results.records import Run
from classp_jax.continual.train.experiment import Experiment, compile_method
from classp_jax.continual.train.step import width
from classp_jax.continual.train.track import Track, start_tracks


class Progress(NamedTuple):
    """How far a method's training has come."""

    method: str
    step: int
    """Steps taken, of all runs together."""
    steps: int
    """Steps to take, at most."""
    task: int
    """The task in training, from 0 on."""
    tasks: int
    accuracy: float
    """Mean over runs and over the tasks that were measured last; NaN: all diverged."""
    task_finished: bool
    """Whether all runs have finished the task with this."""


def train(
    experiment: Experiment,
    method: Method,
    settings: Sequence[Mapping[str, float]],
    *,
    weights: Callable[[int], Any] | None = None,
    rounding_copies: int = 0,
    on_metrics: Callable[[dict[str, Any]], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
    trained: dict[tuple[int, int], Any] | None = None,
) -> list[list[Run]]:
    """Trains a method on every seed of an experiment, with every group of settings.

    Args:
      experiment: data, plans and network, from :func:`prepare`.
      method: the method.
      settings: groups of settings, all complete.
      weights: ``weights(seed)``, what a seed starts from; by default drawn from it.
      rounding_copies: copies of each run whose initial weights are moved by one unit
        in the last place, to see what hangs on rounding.
      on_metrics: called with a flat record at every point of every run: ``method``,
        ``seed``, ``settings``, ``task`` (from 0), ``step``, ``loss``,
        ``online_accuracy`` and ``update_density`` (means since the task began), and
        ``test_accuracy/task_1`` and so on.
      progress: called at every point of every run, and when all have finished a task.
        One thread at a time calls these two.
      trained: takes the last state of each run, by (setting, seed) indices.

    Returns:
      ``runs[setting][seed]``. A run whose loss or parameters cease to be finite is
      marked as diverged, and its later accuracies are NaN.
    """
    tasks, lock = len(experiment.task_names), threading.Lock()
    executables = [compile_method(experiment, method, group) for group in settings]
    tracks = start_tracks(
        experiment, method, settings, executables, weights, rounding_copies
    )
    groups = _groups(tracks)
    workers = min(_workers(), len(groups))

    def report(track: Track, task: int, *, finished: bool = False) -> None:
        with lock:
            if on_metrics is not None and track.copy == 0 and not finished:
                on_metrics(track.metrics(task))
            if progress is not None:
                done = sum(t.steps_done for t in tracks)
                total = sum(sum(t.plan.steps) for t in tracks)
                last = [t.last_accuracy() for t in tracks if t.copy == 0]
                last = [accuracy for accuracy in last if np.isfinite(accuracy)]
                mean = float(np.mean(last)) if last else np.nan
                progress(
                    Progress(method.name, done, total, task, tasks, mean, finished)
                )

    def train_task(group: Sequence[Track], task: int) -> None:
        schedules = [track.schedule(task) for track in group]
        for point in range(max(len(track.plan.points[task]) for track in group)):
            if all(track.diverged for track in group):
                return
            _advance(group, schedules, task, point)
            for track in group:
                track.evaluate(task, point)
                report(track, task)
        _end_task(group, task)

    executor = ThreadPoolExecutor(workers)
    try:
        for task in range(tasks):
            list(executor.map(lambda group, k=task: train_task(group, k), groups))
            report(tracks[0], task, finished=True)
        list(executor.map(Track.finish, tracks))
    finally:
        # Ctrl-C does not wait for the steps that the threads are in the middle of.
        executor.shutdown(wait=False, cancel_futures=True)
    if trained is not None:
        trained |= {t.index: t.state for t in tracks if t.copy == 0}
    return [
        [
            track.record(workers, [t for t in tracks if t.index == track.index])
            for track in tracks
            if track.copy == 0 and track.index[0] == i
        ]
        for i in range(len(settings))
    ]


def _advance(
    group: Sequence[Track], schedules: Sequence[Any], task: int, point: int
) -> None:
    """One compiled segment for all of a group, up to each one's next point."""
    arguments = [
        track.segment(schedule, task, point)
        for track, schedule in zip(group, schedules, strict=True)
    ]
    with group[0].clock(len(group)):
        states = group[0].executables.advance(arguments)
        jax.block_until_ready(states)
    for track, state in zip(group, states, strict=True):
        track.took(state)


def _end_task(group: Sequence[Track], task: int) -> None:
    ending = group[0].executables.end_of_task
    states = [track.state for track in group]
    if ending is not None:
        with group[0].clock(len(group)):
            states = ending([track.ending(task) for track in group])
            jax.block_until_ready(states)
    for track, state in zip(group, states, strict=True):
        track.end_task(state, task)


def _groups(tracks: Sequence[Track]) -> list[list[Track]]:
    """Tracks that go through one executable together."""
    by_executable: dict[int, list[Track]] = {}
    for track in tracks:
        by_executable.setdefault(id(track.executables), []).append(track)
    size = width()
    return [
        members[start : start + size]
        for members in by_executable.values()
        for start in range(0, len(members), size)
    ]


def _workers() -> int:
    """One thread per core; an accelerator is kept busy by one."""
    if jax.default_backend() != "cpu":
        return 1
    count = getattr(os, "process_cpu_count", os.cpu_count)
    return count() or 1
