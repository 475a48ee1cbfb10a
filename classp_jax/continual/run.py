"""The main job: every method on one stream, results kept as they come."""

import dataclasses
import datetime
import functools
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Callable, Sequence
from typing import Any

import jax

from classp_jax.continual import results as results_file
from classp_jax.continual.config import (
    ConfigError,
    RunConfig,
    check,
    make_network,
    make_streams,
    methods_and_settings,
    training,
)
from classp_jax.continual.results import Results, Run
from classp_jax.continual.streams import Stream
from classp_jax.continual.train import train

Progress = Callable[[str, int, int, float], None]
"""Called as ``progress(method, step, steps, accuracy)``."""


def device_name() -> str:
    """The machine in words: the accelerator, or the processor and its cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    return f"CPU ({platform.machine()}, {len(os.sched_getaffinity(0))} cores)"


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on."""
    names = ("classp-jax", "jax", "jaxlib", "optax", "flax", "numpy", "scikit-learn")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }


def default_out(config: RunConfig) -> str:
    """Where results go if nobody says: ``runs/STREAM-SOURCE``."""
    sources = "-".join(pathlib.PurePath(s).name for s in config.source)
    return str(pathlib.Path("runs", f"{config.stream}-{sources}".replace(":", "-")))


def _configuration(config: RunConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """What was asked for, resolved, as JSON has it; None where nothing was said."""
    fields = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(config).items()
        if name not in ("out", "set", "lr")
    }
    return fields | {"settings": settings}


def _without_methods(configuration: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in configuration.items() if k not in ("methods", "settings")}


def run(
    config: RunConfig, *, progress: Progress | None = None
) -> tuple[Results, pathlib.Path]:
    """Trains every method and stores the results after each.

    A folder that holds results of the same configuration is gone on with: methods that
    are in it, with the same settings, are kept and not trained again.

    Args:
      config: what to do.
      progress: called after each stretch of training.

    Returns:
      The results, and the folder with their ``results.json``.

    Raises:
      ValueError: if the configuration cannot be, data is missing or unfit, or the
        folder holds another run's results.
    """
    check(config)
    plan = methods_and_settings(config)
    out = pathlib.Path(config.out or default_out(config))
    configuration = _configuration(config, {m.name: s for m, s in plan})
    done = _finished_runs(out, configuration)
    streams = make_streams(config, config.seeds)
    model = make_network(config, streams)
    how = training(config)
    ends, total = [], 0
    for k, task in enumerate(streams[0].tasks):
        epochs = how.epochs[min(k, len(how.epochs) - 1)]
        total += max(len(task.train.y) // how.batch_size, 1) * epochs
        ends.append(total)
    empty = Results(
        configuration=configuration,
        versions=versions(),
        device=device_name(),
        date=datetime.date.today().isoformat(),
        stream={
            "name": streams[0].name,
            "scenario": streams[0].scenario,
            "task_names": _task_names(streams),
            "task_ends": ends,
        },
        runs=(),
    )

    def save() -> Results:
        names = [m.name for m, _ in plan if m.name in done]
        names += [name for name in done if name not in names]
        runs = [run for name in names for run in done[name]]
        settings = configuration["settings"] | {r.method: r.settings for r in runs}
        results = dataclasses.replace(
            empty,
            configuration=configuration | {"methods": names, "settings": settings},
            runs=tuple(runs),
        )
        results_file.save(results, out / results_file.FILE_NAME)
        return results

    # Before the first hour of training, not after it, is the time to find a full disk.
    results = save()
    for method, settings in plan:
        if method.name in done:
            continue
        (done[method.name],) = train(
            method,
            [settings],
            model,
            streams,
            config.seeds,
            how,
            progress=functools.partial(progress, method.name) if progress else None,
        )
        results = save()
    return results, out


def _task_names(streams: Sequence[Stream]) -> list[str]:
    """The tasks' names, or their numbers where a task depends on the seed."""
    names = {tuple(task.name for task in stream.tasks) for stream in streams}
    first = list(names.pop())
    return [f"task {k + 1}" for k in range(len(first))] if names else first


def _finished_runs(
    out: pathlib.Path, configuration: dict[str, Any]
) -> dict[str, list[Run]]:
    """The runs by method in a folder that holds results of this configuration."""
    if not (out / results_file.FILE_NAME).exists():
        return {}
    found = results_file.load(out)
    if _without_methods(found.configuration) != _without_methods(configuration):
        raise ConfigError(
            f"{out} holds the results of another run; choose another --out, or remove "
            "it"
        )
    asked = configuration["settings"]
    finished: dict[str, list[Run]] = {}
    for run in found.runs:
        if asked.get(run.method, run.settings) == run.settings:
            finished.setdefault(run.method, []).append(run)
    return finished
