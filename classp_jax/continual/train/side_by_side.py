"""Runs that go through one compiled function together, in one thread."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from classp_jax.continual.train.feed import Feed
from classp_jax.continual.train.places import Place
from classp_jax.continual.train.step import width
from classp_jax.continual.train.track import Track


def advance(
    group: Sequence[Track],
    schedules: Sequence[Any],
    task: int,
    point: int,
    most: int | None = None,
) -> None:
    """Compiled segments for all of a group, up to each one's next point.

    Args:
      group: runs that go through one executable together.
      schedules: the task's batches of each.
      task: the task.
      point: the point.
      most: a step of the task to stop at, where that comes before the point.
    """
    last = [track.stop(task, point) for track in group]
    if most is not None:
        last = [min(stop, most) for stop in last]
    for stops in _segments(group, schedules, last):
        arguments = [
            track.segment(schedule, task, stop)
            for track, schedule, stop in zip(group, schedules, stops, strict=True)
        ]
        with _clock(group):
            states = group[0].executables.advance(arguments)
            jax.block_until_ready(states)
        for track, state in zip(group, states, strict=True):
            track.took(state)


def _segments(
    group: Sequence[Track], schedules: Sequence[Any], last: list[int]
) -> list[list[int]]:
    """Where each run's segments end: with a block of batches, and at its last step."""
    if not isinstance(schedules[0], Feed):
        return [last]
    length, taken = schedules[0].steps, min(int(t.state.step) for t in group)
    ends = [end for end in range(length, max(last), length) if end > taken]
    return [[min(end, stop) for stop in last] for end in [*ends, max(last)]]


@contextlib.contextmanager
def schedules_of(group: Sequence[Track], task: int) -> Iterator[list[Any]]:
    """The group's batches of a task; nothing reads them any more at the end."""
    with contextlib.ExitStack() as stack:
        schedules = []
        for track in group:
            schedules.append(track.schedule(task))
            if track.feed is not None:
                stack.callback(track.feed.close)
        yield schedules


def end_task(group: Sequence[Track], task: int) -> None:
    """What the method does between two tasks."""
    ending = group[0].executables.end_of_task
    states = [track.state for track in group]
    last = task == len(group[0].plan.steps) - 1
    if ending is not None and not last:
        with _clock(group):
            states = ending([track.ending(task) for track in group])
            jax.block_until_ready(states)
    for track, state in zip(group, states, strict=True):
        track.end_task(state, task)


Group = Sequence[Track]
"""Tracks that go through one executable together."""


def lanes_of(tracks: Sequence[Track]) -> list[list[Group]]:
    """Groups that one thread trains one after the other; lanes go side by side.

    Devices that share a run would wait for each other for ever if two threads gave them
    two runs in different orders.
    """
    lanes: dict[Any, list[Group]] = {}
    for number, group in enumerate(_groups_of(tracks)):
        place = group[0].place
        lanes.setdefault(place if place.is_shared else number, []).append(group)
    return list(lanes.values())


def finish_lane(lane: Sequence[Group]) -> None:
    """What is left to measure of all of a lane's runs."""
    for group in lane:
        for track in group:
            track.finish()


def _groups_of(tracks: Sequence[Track]) -> list[Group]:
    by_executable: dict[int, list[Track]] = {}
    for track in tracks:
        by_executable.setdefault(id(track.executables), []).append(track)
    size = width()
    return [
        members[start : start + size]
        for members in by_executable.values()
        for start in range(0, len(members), size)
    ]


@contextlib.contextmanager
def threads_for(
    lanes: Sequence[Sequence[Group]], places: Sequence[Place]
) -> Iterator[tuple[int, ThreadPoolExecutor]]:
    """Threads to train lanes in, and how many: one per core, or per accelerator."""
    if jax.default_backend() != "cpu":
        most = len(places)
    else:
        most = getattr(os, "process_cpu_count", os.cpu_count)() or 1
    number = max(min(most, len(lanes)), 1)
    executor = ThreadPoolExecutor(number)
    try:
        yield number, executor
    finally:
        # Ctrl-C does not wait for the steps that the threads are in the middle of.
        executor.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _clock(group: Sequence[Track]) -> Iterator[None]:
    """Adds its share of the time to each run's seconds."""
    began = time.perf_counter()
    yield
    for track in group:
        track.seconds += (time.perf_counter() - began) / len(group)
