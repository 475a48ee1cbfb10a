"""The training loop: task by task, point by point: step, evaluate; end the task."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from classp_jax.continual.methods import Method
from classp_jax.continual.results.records import Run
from classp_jax.continual.train.experiment import Experiment
from classp_jax.continual.train.hosts import gather_runs, gather_trees
from classp_jax.continual.train.keeper import NoKeeper
from classp_jax.continual.train.progress import Progress, reporter
from classp_jax.continual.train.side_by_side import (
    advance,
    end_task,
    finish_lane,
    lanes_of,
    schedules_of,
    threads_for,
)
from classp_jax.continual.train.track import Track, records_of, start_tracks


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
    keeper: NoKeeper | None = None,
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
      keeper: saves the runs while they train, or goes on from what it has saved. Then
        an exception that comes from outside (but Ctrl-C) waits until they are saved.

    Returns:
      ``runs[setting][seed]``. A run whose loss or parameters cease to be finite is
      marked as diverged, and its later accuracies are NaN.
    """
    tracks = start_tracks(experiment, method, settings, weights, rounding_copies)
    lanes = lanes_of(tracks)
    keeper = keeper or NoKeeper()
    first_task = keeper.start(lanes)
    report = reporter(tracks, on_metrics, progress)

    def train_task(group: Sequence[Track], task: int) -> None:
        first_point = keeper.first_point(group, task)
        if first_point is None:
            return
        points = max(len(track.plan.points[task]) for track in group)
        with schedules_of(group, task) as schedules:
            for point in range(first_point, points):
                if all(track.diverged for track in group):
                    return
                for stop in keeper.stops(group, task, point):
                    advance(group, schedules, task, point, stop)
                    keeper.stepped(group, task, point)
                for track in group:
                    track.evaluate(task, point)
                    report(track, task)
        end_task(group, task)
        keeper.save(group, task + 1, 0)

    def train_lane(lane: Sequence[Sequence[Track]], task: int) -> None:
        for group in lane:
            train_task(group, task)

    places = experiment.places
    with threads_for(lanes, places) as (threads, executor), keeper.saving(executor):
        for task in range(first_task, len(experiment.task_names)):
            list(executor.map(lambda lane, k=task: train_lane(lane, k), lanes))
            report(None, task)
        list(executor.map(finish_lane, lanes))
    if trained is not None:
        own = [track for track in tracks if track.copy == 0]
        trained |= gather_trees({t.index: (t.place, t.state) for t in own})
    runs = gather_runs(records_of(tracks, threads))
    seeds = range(len(experiment.plans))
    return [[runs[i, j] for j in seeds] for i in range(len(settings))]
