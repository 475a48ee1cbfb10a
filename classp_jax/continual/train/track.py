"""One run while it trains: its state, and what has been measured so far."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from classp_jax.continual.data.arrays import generator
from classp_jax.continual.methods import Method
from classp_jax.continual.results.records import Run
from classp_jax.continual.train.experiment import (
    Experiment,
    boundary_key,
    chunks_of,
    compile_evaluate,
    compile_method,
    feed,
    initial_weights,
    run_data,
    run_keys,
    schedule,
    scoring_key,
    split_settings,
)
from classp_jax.continual.train.feed import Feed
from classp_jax.continual.train.places import Place, share_of
from classp_jax.continual.train.plan import Examples, Plan
from classp_jax.continual.train.step import (
    CHUNK,
    Compiled,
    RunData,
    State,
    next_task,
    width,
)

_ROUNDING = 108
"""Key of :func:`generator`."""


@dataclasses.dataclass
class Track:
    """The run of one seed with one group of settings.

    Everything that training changes on the device is in ``state``; the rest is what it
    was told, and lists of what was measured.
    """

    experiment: Experiment
    method: Method
    index: tuple[int, int]
    """Of its settings and of its seed."""
    copy: int
    """0, or the number of a copy with initial weights moved by a rounding error."""
    plan: Plan
    data: RunData
    settings: Mapping[str, Any]
    numbers: Mapping[str, Any]
    place: Place
    executables: Compiled
    state: State
    state_bytes: int
    matrix: np.ndarray
    curve_steps: list[int]
    curve: list[np.ndarray]
    task_ends: list[int] = dataclasses.field(default_factory=list)
    online: list[float] = dataclasses.field(default_factory=list)
    density: list[float] = dataclasses.field(default_factory=list)
    kept_bytes: float = np.nan
    feed: Feed | None = None
    """What reads the task's batches, if something has to."""
    diverged: bool = False
    steps_done: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0
    in_training: list[float] = dataclasses.field(default_factory=list)

    def schedule(self, task: int) -> Examples | Feed:
        """The task's batches."""
        if self.plan.feeds:
            self.feed = feed(self.experiment, self.plan, task, self.place)
            return self.feed
        return self.place.put(schedule(self.experiment, self.plan, task))

    def stop(self, task: int, point: int) -> int:
        """The step of the task at which a point lies."""
        points = self.plan.points[task]
        return points[min(point, len(points) - 1)]

    def segment(
        self, batches: Examples | Feed, task: int, stop: int
    ) -> tuple[Any, ...]:
        """The arguments of the steps up to one of the task."""
        return (
            self.data,
            self.numbers,
            batches.block(stop - 1) if isinstance(batches, Feed) else batches,
            np.float32(self.plan.target[task]),
            np.int32(self.plan.steps_per_pass[task]),
            np.int32(stop),
            self.state,
        )

    def took(self, state: State) -> None:
        """Takes the state after a segment."""
        self.state = state
        self.steps_done = int(state.total)
        self.diverged = self.diverged or not bool(state.finite)

    def ending(self, task: int) -> tuple[Any, ...]:
        """The arguments of the end of a task."""
        count = self.experiment.training.fisher_examples
        sample = self.feed.sample() if self.feed else self.plan.sample(task, count)
        key = boundary_key(self.plan.seed)
        return (self.data, self.numbers, sample, key, self.state)

    def evaluate(self, task: int, point: int) -> None:
        """Measures accuracy; at the task's end on all test examples."""
        tasks = len(self.plan.steps)
        at_end = point >= len(self.plan.points[task]) - 1
        if self.copy and not (at_end and task == tasks - 1):
            return
        accuracy = self.accuracy(self.plan.seen[task], full=at_end)
        if at_end and (task == tasks - 1 or not self.plan.is_joint):
            self.matrix[task + 1] = accuracy
        step = int(self.state.total)
        if step == self.curve_steps[-1]:
            # The task ended early: this is the same point again, measured better.
            self.curve.pop()
            self.curve_steps.pop()
        self.curve.append(accuracy)
        self.curve_steps.append(step)

    def accuracy(self, seen: int, *, full: bool) -> np.ndarray:
        """Of each task, NaN where it is not measured or the run has diverged."""
        found = np.full(len(self.plan.steps), np.nan)
        if self.diverged or not seen:
            return found
        parts = (self.plan.test if full else self.plan.glance)[:seen]
        total = self.experiment.test_chunks
        found[:seen] = self._count(chunks_of(parts, total), parts, None)[:seen]
        return found

    def _count(
        self, examples: Examples, parts: Sequence[Examples], key: Any
    ) -> np.ndarray:
        sizes = np.array([len(part.y) for part in parts])
        chunks = np.int32(-(-sizes.sum() // CHUNK))
        scoring = key is not None
        evaluate = compile_evaluate(self.experiment, self.place, scoring=scoring)
        state = self.state
        arguments = (self.data, examples, chunks, key, state.params, state.moments)
        (counts,) = evaluate([arguments])
        return np.asarray(counts)[: len(sizes)] / sizes

    def end_task(self, state: State, task: int) -> None:
        """Notes what the task's steps added up to, and goes on to the next."""
        tally = state.tally
        self.skipped_steps += int(state.step) - int(tally.taken)
        self.diverged = self.diverged or int(tally.taken) == 0
        steps = max(int(tally.taken), 1)
        self.online.append(float(tally.correct) / (steps * self.plan.batch_size))
        self.density.append(float(tally.density) / steps)
        self.task_ends.append(int(state.total))
        self.state = state
        if task == 0:
            self.kept_bytes = _bytes_that_differ(state.method, self._anew(state.params))
            if self.plan.is_joint:
                self.kept_bytes += self.plan.stored_bytes
        self.state = next_task(state)

    def _anew(self, params: Any) -> Any:
        """The method's state, were it to begin at these weights."""
        keys = run_keys(self.plan.seed)
        (state,) = self.executables.init([(self.data, self.numbers, params, keys)])
        return state.method

    def metrics(self, task: int) -> dict[str, Any]:
        """What is known at this point, as a flat record."""
        tally = self.state.tally
        steps = max(int(tally.taken), 1)
        record = {
            "method": self.method.name,
            "seed": self.plan.seed,
            "settings": dict(self.settings),
            "task": task,
            "step": int(self.state.total),
            "loss": float(tally.loss) / steps,
            "online_accuracy": float(tally.correct) / (steps * self.plan.batch_size),
            "update_density": float(tally.density) / steps,
        }
        return record | {
            f"test_accuracy/task_{k + 1}": float(accuracy)
            for k, accuracy in enumerate(self.curve[-1])
            if np.isfinite(accuracy)
        }

    def last_accuracy(self) -> float:
        """The mean over the tasks measured last."""
        measured = self.curve[-1][np.isfinite(self.curve[-1])]
        return float(np.mean(measured)) if measured.size else np.nan

    def finish(self) -> None:
        """What is left to measure when all tasks are done."""
        tasks = len(self.plan.steps)
        while len(self.task_ends) < tasks:
            # It diverged: no more steps were taken.
            self.task_ends.append(sum(self.plan.steps[: len(self.task_ends) + 1]))
            self.online.append(np.nan)
            self.density.append(np.nan)
        if self.diverged:
            self.matrix[1:] = np.nan
        if self.experiment.training.score_training and not self.copy:
            self.in_training = [np.nan] * tasks
            if not self.diverged:
                # The plan of joint training holds every task's data in each.
                own = [p for p in self.experiment.plans if p.seed == self.plan.seed]
                parts = own[0].train
                total = self.experiment.train_chunks
                key = scoring_key(self.plan.seed)
                examples = chunks_of(parts, total)
                self.in_training = self._count(examples, parts, key).tolist()

    def record(self, workers: int, siblings: Sequence["Track"]) -> Run:
        """The run as results keep it; siblings are its rounding copies, and itself."""
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        method = self.method
        finals = [track.matrix[-1].mean() for track in siblings]
        return Run(
            method=method.name,
            seed=self.plan.seed,
            settings=dict(self.settings),
            matrix=self.matrix.tolist(),
            curve_steps=self.curve_steps,
            curve=[row.tolist() for row in self.curve],
            task_ends=self.task_ends,
            online_accuracy=self.online,
            update_density=self.density,
            training_accuracy=self.in_training,
            seconds=self.seconds / workers,
            compile_seconds=self.executables.seconds,
            state_bytes_per_parameter=self.state_bytes / parameters,
            kept_bytes_per_parameter=self.kept_bytes / parameters,
            parameters=parameters,
            task_boundary_known=method.task_boundary_known,
            stored_data=method.stored_data,
            diverged=self.diverged,
            skipped_steps=self.skipped_steps,
            ulp_spread=float(np.std(finals, ddof=1)) if len(finals) > 1 else None,
        )


def start_tracks(
    experiment: Experiment,
    method: Method,
    settings: Sequence[Mapping[str, float]],
    weights: Callable[[int], Any] | None,
    copies: int,
) -> list[Track]:
    """Every run of a method that this process has a part in, before its first step.

    Runs are dealt out to the places in turn, each with its copies.
    """
    places, tracks = experiment.places, []
    count = len(settings) * len(experiment.plans)
    share = share_of(count, len(places), width())
    deal = itertools.cycle([place for place in places for _ in range(share)])
    for i, group in enumerate(settings):
        _, numbers = split_settings(method, group)
        for j, plan in enumerate(experiment.plans):
            own = method.plan(plan) if method.plan is not None else plan
            data, keys = run_data(own), run_keys(plan.seed)
            place = next(deal)
            if not place.is_here:
                continue
            executables = compile_method(experiment, method, group, place)
            for copy in range(copies + 1):
                params = (weights or (lambda s: initial_weights(experiment, s)))(
                    plan.seed
                )
                # A copy, since the state is given up step by step.
                params = jax.tree.map(lambda w: jnp.array(w, copy=True), params)
                if copy:
                    params = _moved(params, plan.seed, copy)
                data, numbers = place.put((data, numbers))
                (state,) = executables.init([(data, numbers, params, keys)])
                tasks = len(plan.steps)
                track = Track(
                    experiment=experiment,
                    method=method,
                    index=(i, j),
                    copy=copy,
                    plan=own,
                    data=data,
                    settings=group,
                    numbers=numbers,
                    place=place,
                    executables=executables,
                    state=state,
                    state_bytes=_bytes((state.method, state.moments))
                    + own.stored_bytes * int(own.is_joint),
                    matrix=np.full((tasks + 1, tasks), np.nan),
                    curve_steps=[0],
                    curve=[],
                )
                seen = own.seen[0] if not copy else 0
                track.curve.append(track.accuracy(seen, full=True))
                track.matrix[0] = track.curve[0]
                tracks.append(track)
    return tracks


def records_of(tracks: Sequence[Track], workers: int) -> dict[tuple[int, int], Run]:
    """The finished runs that this process is to tell of, by (setting, seed) indices."""
    return {
        track.index: track.record(
            workers, [t for t in tracks if t.index == track.index]
        )
        for track in tracks
        if track.copy == 0 and track.place.reports
    }


def _moved(params: Any, seed: int, copy: int) -> Any:
    """Each weight moved to the next number above or below, at random."""
    rng = generator(seed, _ROUNDING, copy)
    return jax.tree.map(
        lambda w: jnp.asarray(
            np.nextafter(
                np.asarray(w),
                np.where(rng.random(w.shape) < 0.5, -np.inf, np.inf).astype(w.dtype),
            )
        ),
        params,
    )


def _arrays(tree: Any) -> list[Any]:
    """Leaves that are arrays of numbers rather than random keys."""
    leaves = jax.tree.leaves(tree)
    return [a for a in leaves if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key)]


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in _arrays(tree))


def _bytes_that_differ(state: Any, anew: Any) -> float:
    """Bytes of the arrays that are not as they would begin."""
    pairs = zip(_arrays(state), _arrays(anew), strict=True)
    return float(sum(a.nbytes for a, b in pairs if a.size > 1 and _differ(a, b)))


def _differ(a: Any, b: Any) -> bool:
    if a.is_fully_addressable:
        return not np.array_equal(a, b)  # Nothing to compile.
    return bool(jnp.any(a != b))
