"""Checkpoints of the runs of a method while they train, and going on from them."""

import contextlib
import itertools
import json
import pathlib
import shutil
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

import numpy as np

from classp_jax.continual import checkpoints
from classp_jax.continual.errors import CheckpointError, ContinualError, Stopped
from classp_jax.continual.leaves import least
from classp_jax.continual.results.files import LOCK_NAME, locked
from classp_jax.continual.results.variants import differences
from classp_jax.continual.train.hosts import each
from classp_jax.continual.train.places import Place
from classp_jax.continual.train.track import Track

_T = TypeVar("_T")

_RECORDED = (
    "matrix",
    "curve_steps",
    "curve",
    "task_ends",
    "online",
    "density",
    "kept_bytes",
    "diverged",
    "steps_done",
    "skipped_steps",
    "seconds",
)
"""What a track has measured so far; all else that changes is in its state."""
_PATIENCE = 5.0
"""Seconds to wait for another process that trains the same runs."""


class NoKeeper:
    """Saves nothing; what a training loop asks of one that does."""

    def start(self, lanes: Sequence[Sequence[Sequence[Track]]]) -> int:
        """Takes all groups to where they go on from; returns the first task to do."""
        del lanes
        return 0

    def first_point(self, group: Sequence[Track], task: int) -> int | None:
        """The point of the task to go on from; None if the task is over."""
        del group, task
        return 0

    def stops(
        self, group: Sequence[Track], task: int, point: int
    ) -> Iterable[int | None]:
        """Steps of the task at which to interrupt a segment; None: its point."""
        del group, task, point
        return (None,)

    def stepped(self, group: Sequence[Track], task: int, point: int) -> None:
        """Called at each of the stops."""

    def save(self, group: Sequence[Track], task: int, point: int) -> None:
        """Called before a group goes on with this point of this task."""

    @contextlib.contextmanager
    def saving(self, executor: Executor) -> Iterator[None]:
        """Training by this executor; at its end all is written."""
        del executor
        yield


class Keeper(NoKeeper):
    """Saves runs while they train, those that go through one executable together.

    Each group's checkpoints have a folder of their own, which no other process uses
    meanwhile, but those that have a part in the group. These do all that concerns it at
    the same steps. Where a group stands is the task and the point that come next.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        identity: Mapping[str, Any],
        *,
        every: int | None,
        resume: bool,
    ):
        """Prepares to save.

        Args:
          folder: of this method, from :func:`folder_of`.
          identity: what the runs that go on must have in common with those saved.
          every: steps between two checkpoints; None: only at the ends of tasks.
          resume: whether to go on from what is there.
        """
        self._folder = folder
        self._identity = json.loads(json.dumps(identity))
        self._every = every
        self._resume = resume
        self._starts: dict[pathlib.Path, tuple[int, int]] = {}
        self._numbers: dict[pathlib.Path, int] = {}
        self._own: list[pathlib.Path] = []
        self._stopping = threading.Event()
        self._failure: CheckpointError | None = None
        self._locks = contextlib.ExitStack()

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, *_: object) -> None:
        self._locks.close()

    def check(self) -> None:
        """Refuses what is in the folder, if need be, before anything trains.

        Raises:
          CheckpointError: if there are checkpoints and this is not to go on from them,
            they are of another configuration, or none of a run's is whole.
        """
        for place in self._folder.glob("seed-*"):
            found = checkpoints.find(place, warn=lambda _: None)
            if found is None:
                continue
            if not self._resume:
                raise CheckpointError(
                    f"{place} holds checkpoints of an interrupted run: go on from "
                    f"them (resume), or remove {self._folder} to start anew."
                )
            _refuse_another(found, self._identity)

    def start(self, lanes: Sequence[Sequence[Sequence[Track]]]) -> int:
        """Takes the groups to where their checkpoints stand.

        Returns:
          The first task that not all have finished; the same in all processes.

        Raises:
          CheckpointError: if a checkpoint is of other runs, or none is whole.
          ResultsError: if another process trains the same, or the folder cannot be
            written to.
          ContinualError: if something of this kind has happened in another process.
        """

        def start() -> str:
            checkpoints.orbax()
            errors = []
            for group in itertools.chain.from_iterable(lanes):
                try:
                    self._start(group)
                except ContinualError as error:
                    # Others may have a part in the next one.
                    errors.append(error)
            if errors:
                raise errors[0]
            return str(min((task for task, _ in self._starts.values()), default=""))

        return min(int(task) for task in each(start) if task)

    def _start(self, group: Sequence[Track]) -> None:
        """Takes a group to where its checkpoint stands."""
        folder, place = self._place(group), group[0].place

        def hold() -> None:
            self._locks.enter_context(locked(folder, _PATIENCE))
            self._own.append(folder)

        def see() -> None:
            if not (folder / LOCK_NAME).exists():
                raise CheckpointError(
                    f"Not all processes see {folder}: checkpoints of runs that they "
                    "share must be on a file system that they share."
                )

        # One holds the folder, for all who have a part in the group.
        _together(place, hold if place.reports else lambda: None)
        _together(place, see)
        found = checkpoints.find(folder, processes=place.processes)
        self._starts[folder], self._numbers[folder] = (0, 0), 0
        if found is not None:
            self._numbers[folder] = found.step
            self._starts[folder] = _together(place, lambda: self._take(found, group))

    def first_point(self, group: Sequence[Track], task: int) -> int | None:
        """The point of the task to go on from; None if the task is over."""
        at, point = self._starts[self._place(group)]
        return None if at > task else point if at == task else 0

    def stops(self, group: Sequence[Track], task: int, point: int) -> Iterator[int]:
        """Steps of the task at which to interrupt a segment; last, its point."""
        last = max(track.stop(task, point) for track in group)
        if self._every is not None:
            taken = max(int(track.state.step) for track in group)
            first = (taken // self._every + 1) * self._every
            for step in range(first, last, self._every):
                if all(bool(track.state.ended) for track in group):
                    break
                yield step
        yield last

    def stepped(self, group: Sequence[Track], task: int, point: int) -> None:
        """Saves a group if it is time to, or if training is to stop.

        Raises:
          Stopped: if training is to stop.
          CheckpointError: if the checkpoint, or the one before, cannot be written.
        """
        if least(int(not self._stopping.is_set()), group[0].place.devices) == 0:
            with self._noting_failure():
                self.save(group, task, point)
            raise Stopped(
                "stopped with another process; what was finished is kept, and every "
                "run is saved: go on from there (resume)"
            )
        step = max(int(track.state.step) for track in group)
        at_end = step >= max(track.plan.steps[task] for track in group)
        if self._every is not None and step % self._every == 0 and not at_end:
            self.save(group, task, point)

    def save(self, group: Sequence[Track], task: int, point: int) -> None:
        """Saves a group that goes on with this point of this task."""
        if all(track.diverged for track in group):
            return  # From before that, it ends in the same way.
        place = self._place(group)
        _together(group[0].place, lambda: checkpoints.wait(place))
        self._numbers[place] += 1
        note = {
            "identity": self._identity_of(group),
            "position": [task, point],
            "records": [_record(track) for track in group],
        }
        checkpoints.save(
            place,
            [track.state for track in group],
            step=self._numbers[place],
            note=note,
            processes=group[0].place.processes,
        )

    @contextlib.contextmanager
    def saving(self, executor: Executor) -> Iterator[None]:
        """Training; what ends it from outside, but for Ctrl-C, waits for a save.

        Raises:
          CheckpointError: if a run cannot be saved.
        """
        try:
            yield
            each(self._written)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._stopping.set()
            executor.shutdown(cancel_futures=True)
            for place in self._starts:
                with self._noting_failure():
                    checkpoints.wait(place)
            stopped = isinstance(error, Stopped) or not isinstance(error, Exception)
            if self._failure is not None and stopped:
                # Nobody is to believe that all is saved.
                raise self._failure from error
            raise

    def _written(self) -> str:
        for place in self._starts:
            checkpoints.wait(place)
        return ""

    @contextlib.contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as failure:
            self._failure = failure

    def remove(self) -> None:
        """Removes the checkpoints of these runs, whose results are stored.

        Each process does so with those that it holds.
        """
        _remove(self._own)

    def remove_finished(self, seeds: Sequence[int]) -> None:
        """Removes what a process left that was killed just after it stored results."""
        for seed in seeds:
            copies = self._folder.glob(f"seed-{seed}-copy-*")
            for place in (self._folder / f"seed-{seed}", *copies):
                with contextlib.suppress(CheckpointError):
                    found = checkpoints.find(place, warn=lambda _: None)
                    if found is None or not _differing(found, self._identity):
                        _remove([place])

    def _place(self, group: Sequence[Track]) -> pathlib.Path:
        first = group[0]
        copy = f"-copy-{first.copy}" if first.copy else ""
        return self._folder / f"seed-{first.plan.seed}{copy}"

    def _identity_of(self, group: Sequence[Track]) -> dict[str, Any]:
        runs = {
            "seeds": [track.plan.seed for track in group],
            "copies": [track.copy for track in group],
        }
        return {**self._identity, **runs}

    def _take(
        self, found: checkpoints.Checkpoint, group: Sequence[Track]
    ) -> tuple[int, int]:
        """Puts a group where a checkpoint stands."""
        _refuse_another(found, self._identity_of(group))
        states = checkpoints.load(found, [track.state for track in group])
        for track, state, record in zip(
            group, states, found.note["records"], strict=True
        ):
            track.state = state
            for name in _RECORDED:
                setattr(track, name, record[name])
            track.matrix = np.array(track.matrix)
            track.curve = [np.array(row) for row in track.curve]
        task, point = found.note["position"]
        return task, point


def folder_of(folder: Any, method: str) -> pathlib.Path:
    """Where a method's checkpoints are kept in a folder of results."""
    name = urllib.parse.quote(method, safe="+ ")
    return pathlib.Path(folder).absolute() / "checkpoints" / name


def _together(place: Place, function: Callable[[], _T]) -> _T:
    """What a function returns; what goes wrong in one process is an error in all.

    In all that have a part in the runs of this place.
    """
    found: Any = None
    error: ContinualError | None = None
    try:
        found = function()
    except ContinualError as failure:
        error = failure
    if least(int(error is None), place.devices) == 0:
        raise error or CheckpointError("Another process cannot go on, and says why.")
    return found


def _remove(places: Sequence[pathlib.Path]) -> None:
    for place in places:
        shutil.rmtree(place, ignore_errors=True)
        for empty in (place.parent, place.parent.parent):
            with contextlib.suppress(OSError):
                empty.rmdir()


def _differing(found: checkpoints.Checkpoint, identity: Mapping[str, Any]) -> list[str]:
    """In what a checkpoint is of another run, in words."""
    saved = found.note.get("identity", {})
    return differences({name: saved.get(name) for name in identity}, {**identity})


def _refuse_another(found: checkpoints.Checkpoint, identity: Mapping[str, Any]) -> None:
    if differing := _differing(found, identity):
        raise CheckpointError(
            f"{found.path} is a checkpoint of another run: {'; '.join(differing)} "
            "(there and here). Use another folder, or that configuration."
        )


def _record(track: Track) -> dict[str, Any]:
    values = {name: getattr(track, name) for name in _RECORDED}
    matrix, curve = values["matrix"], values["curve"]
    return {**values, "matrix": matrix.tolist(), "curve": [r.tolist() for r in curve]}
