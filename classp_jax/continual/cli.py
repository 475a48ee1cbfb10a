"""The command line ``classp-jax``: it only wires.

Whatever is slow to import is imported by the command that needs it, so that something
stands on the screen at once.
"""

import contextlib
import dataclasses
import gc
import math
import os
import pathlib
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

import classp_jax
from classp_jax.continual.errors import CheckpointWarning, ContinualError, Stopped
from classp_jax.continual.options import (
    ExperimentOptions,
    Report,
    Run,
    Sweep,
    UsageError,
    assigned,
    out_folder,
    parse,
    ranges,
)

if TYPE_CHECKING:
    from classp_jax.continual.results import Results

OK, ERROR, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
"""What the command line exits with."""


class Terminated(BaseException):
    """SIGTERM came."""


def main_of_process() -> int:
    """Runs the command that this process was started with, also to a SIGTERM's end."""

    def terminate(*_: Any) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    status = main()
    hosts = sys.modules.get("classp_jax.continual.train.hosts")
    if status in (ERROR, TERMINATED) and hosts is not None:
        hosts.leave()
    if status != OK:
        # Threads may still be training, or waiting for another process. An orderly exit
        # waits for some, and crashes others by taking their memory away.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    # Python would look for cycles among all that JAX made, half a second for nothing.
    gc.freeze()
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    What a user can mend is one line on standard error; an error of ours keeps its
    traceback.

    Returns:
      The exit status: 0, 1 for an error, 2 for a command line it does not understand,
      130 after Ctrl-C, 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"classp-jax {classp_jax.__version__}")
        return OK
    options = None
    try:
        options = parse(arguments)
        console = _console()
        command = shlex.join(["classp-jax", *arguments])
        if isinstance(options, Run):
            _run(options, command, console)
        elif isinstance(options, Sweep):
            _sweep(options, command, console)
        elif isinstance(options, Report):
            _report(options, console)
        else:
            _list(console)
    except UsageError as error:
        return _fail(error, USAGE)
    except Stopped as error:
        return _fail(error, TERMINATED)
    except (ContinualError, OSError) as error:
        return _fail(error, ERROR)
    except KeyboardInterrupt:
        return _fail("interrupted; what was finished is kept", INTERRUPTED)
    except Terminated:
        saved = isinstance(options, Run) and _keeps_checkpoints(options)
        rest = "; every run is saved: go on with --resume" if saved else ""
        return _fail(f"terminated; what was finished is kept{rest}", TERMINATED)
    return OK


def _fail(error: BaseException | str, status: int) -> int:
    print(f"classp-jax: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def _keeps_checkpoints(options: Run) -> bool:
    return options.resume or options.checkpoint_every is not None


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Shows a damaged checkpoint that was passed over, without Python's decoration."""

    def show(message: Any, category: Any, *rest: Any, **named: Any) -> None:
        if issubclass(category, CheckpointWarning):
            print(f"classp-jax: {message}", file=sys.stderr)
        else:
            before(message, category, *rest, **named)

    before, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = before


def _console() -> Console:
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(width=120, highlight=False)


def _run(options: Run, command: str, console: Console) -> None:
    writes = not options.distributed or _is_first_of_several(options)
    if not writes:
        console = Console(quiet=True)
        options = dataclasses.replace(options, csv=False, tensorboard=False)
    _begin(options, console)
    from classp_jax.continual import report
    from classp_jax.continual.experiment import prepare
    from classp_jax.continual.train.run import run

    prepared = prepare(options, assigned(options, options.methods))
    folder = out_folder(options)
    console.print(prepared.stream.describe())
    _say_where_settings_are_from(options, console)
    with (
        _warnings_in_one_line(),
        _progress(console) as progress,
        _writers(options, folder) as on_metrics,
    ):
        results = run(
            prepared.stream,
            prepared.model,
            prepared.methods,
            seeds=options.seeds,
            settings=prepared.settings,
            model_options=prepared.model_options,
            **prepared.training,
            **prepared.evaluation,
            folder=folder,
            save_weights=options.save_weights,
            rounding_copies=options.rounding_copies,
            **_devices(options),
            checkpoint_every=options.checkpoint_every,
            resume=options.resume,
            command=command,
            announce=lambda line: console.print(f"{line}; compiling first"),
            progress=progress,
            on_metrics=on_metrics,
        )
    if not writes:
        return
    report.write_report(results, folder)
    console.print(results.table())
    _hint_at_divergence(results, console)
    console.print(f"results and pictures: {folder}")


def _is_first_of_several(options: Run) -> bool:
    """Waits for the other processes; the first one of them writes."""
    from classp_jax.continual.train import hosts

    hosts.join(options.coordinator, options.processes, options.process_id)
    return hosts.is_first()


def _devices(options: ExperimentOptions) -> dict[str, Any]:
    names = ("devices", "devices_per_run", "shard_parameters")
    return {name: getattr(options, name) for name in names}


def _begin(options: ExperimentOptions, console: Console) -> None:
    """A sign of life, before the seconds that imports and data take."""
    seeds = options.tuning_seeds if isinstance(options, Sweep) else options.seeds
    methods = len(options.methods) + len(options.method)
    trials = f"{options.trials} trials of each, " if isinstance(options, Sweep) else ""
    console.print(
        f"{options.data.stream} {' '.join(options.data.source)}: "
        f"{methods} method{'s' * (methods != 1)}, {trials}"
        f"{len(seeds)} seed{'s' * (len(seeds) != 1)}"
    )
    if options.compilation_cache:
        _keep_compiled_code()


def _keep_compiled_code() -> None:
    """JAX's persistent cache, in the user's cache folder unless it is set already."""
    import jax
    import platformdirs

    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = pathlib.Path(platformdirs.user_cache_dir("classp-jax"), "compiled")
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # By default JAX keeps only what took a second to compile.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _say_where_settings_are_from(options: Run, console: Console) -> None:
    if options.preset is not None:
        text = f"those of the preset {options.preset}"
    elif options.config is not None:
        text = f"those of {options.config}; elsewhere the library's defaults"
    else:
        text = "the library's defaults, not tuned for this stream: see classp-jax sweep"
    console.print(f"settings: {text}")


def _hint_at_divergence(results: "Results", console: Console) -> None:
    lost = dict.fromkeys(run.method for run in results.runs if run.diverged)
    for name in lost:
        console.print(
            f"{name} diverged: choose a lower --set {name}.learning_rate=NUMBER, or "
            f"tune it: classp-jax sweep --methods {name}"
        )


@contextlib.contextmanager
def _writers(options: Run, folder: pathlib.Path) -> Iterator[Any]:
    """What is called with metrics while training goes on; None if nobody asked."""
    from classp_jax.continual.results import writers

    with contextlib.ExitStack() as stack:
        chosen = []
        if options.csv:
            opened = writers.csv_writer(folder / "metrics.csv")
            chosen.append(stack.enter_context(opened))
        if options.tensorboard:
            opened = writers.tensorboard_writer(folder / "tensorboard")
            chosen.append(stack.enter_context(opened))

        def write(record: Any) -> None:
            for writer in chosen:
                writer(record)

        yield write if chosen else None


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Any]:
    """Shows training: bars in a terminal, else one line per method and task."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description:<18}"),
        bars.BarColumn(),
        bars.TextColumn("{task.completed:,.0f}/{task.total:,.0f} steps"),
        bars.TextColumn("{task.fields[note]}"),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console) as shown:
        known: dict[str, Any] = {}

        def show(event: Any) -> None:
            if event.method not in known:
                known[event.method] = shown.add_task(
                    event.method, total=event.steps, note=""
                )
            note = f"task {event.task + 1}/{event.tasks} {_accuracy(event.accuracy)}"
            shown.update(known[event.method], completed=event.step, note=note)

        yield show


class _Lines:
    """Progress for a file: a line for every task that a method has finished."""

    def __init__(self, console: Console):
        self.console = console

    def __call__(self, event: Any) -> None:
        if event.task_finished:
            what = f"task {event.task + 1} of {event.tasks}"
            self.console.print(f"{event.method}: {what}, {_accuracy(event.accuracy)}")
            self.console.file.flush()


def _accuracy(accuracy: float) -> str:
    return "diverged" if math.isnan(accuracy) else f"accuracy {accuracy:.1%}"


def _sweep(options: Sweep, command: str, console: Console) -> None:
    _begin(options, console)
    from classp_jax.continual import tuning
    from classp_jax.continual.config import read, with_methods_of, write
    from classp_jax.continual.experiment import prepare
    from classp_jax.continual.results.files import write_atomically

    prepared = prepare(options, assigned(options, options.methods))
    folder = out_folder(options)
    path = folder / "config.toml"
    before = read(path) if path.exists() else None
    console.print(prepared.stream.describe())

    def show(name: str, done: int, trials: int, score: float) -> None:
        console.print(f"{name}: {done} of {trials} trials, best {score:.1%}")

    tuned = tuning.tune(
        prepared.stream,
        prepared.model,
        prepared.methods,
        trials=options.trials,
        seeds=options.tuning_seeds,
        together=options.together,
        ranges=ranges(options),
        settings=prepared.settings,
        model_options=prepared.model_options,
        **prepared.training,
        **_devices(options),
        folder=folder,
        announce=console.print,
        progress=show,
    )
    header = (
        "Each method's best of its trials in trials.json, on validation data, seeds "
        f"{' '.join(map(str, options.tuning_seeds))}.\nWritten by: {command}"
    )
    winners = options.experiment(tuned.settings)
    if before is not None:
        winners = with_methods_of(before, winners)
    write_atomically(path, write(winners, header=header).encode())
    for name, trials in tuned.trials.items():
        found = ", ".join(f"{k} {v:g}" for k, v in tuned.settings[name].items())
        console.print(f"{name:<18} {tuning.best(trials).score:6.1%}  {found}")
    console.print(f"winners: classp-jax run --config {path}")


def _report(options: Report, console: Console) -> None:
    from classp_jax.continual import report
    from classp_jax.continual.results import load, merge

    if options.out is None and len(options.folders) > 1:
        raise UsageError("report of several folders needs --out")
    folders = list(options.folders)
    folder = pathlib.Path(options.out or folders[0])
    results = merge([load(found) for found in folders])
    if options.out is not None:
        results = results.save(folder)
    report.write_report(results, folder, options.reference)
    console.print(results.table(options.reference))
    console.print(f"report and pictures: {folder}")


def _list(console: Console) -> None:
    from classp_jax.continual import presets
    from classp_jax.continual.data.readers import SOURCES
    from classp_jax.continual.data.streams import STREAMS
    from classp_jax.continual.methods.registry import METHODS
    from classp_jax.continual.models import MODELS

    tables = {
        "streams": STREAMS,
        "sources": SOURCES,
        "models": MODELS | {"package.module:factory": "your own"},
        "methods (join by +: ewc+classp)": METHODS,
        "presets, with their sizes": {
            name: ", ".join(sizes) for name, sizes in presets.sizes().items()
        },
    }
    for title, table in tables.items():
        console.print(title, style="bold")
        for name, summary in table.items():
            console.print(f"  {name:<24} {summary}", markup=False)
