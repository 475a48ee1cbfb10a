"""The command line ``classp-jax``: it only wires."""

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from classp_jax.continual._names import nearest

T = TypeVar("T")

_USAGE = """\
usage: classp-jax COMMAND [OPTIONS]

commands:
  run        train on a stream of tasks and report what was kept and what was forgotten
  sweep      tune every method with the same number of tries, for a later run
  report     table and pictures again, from one results folder or several
  list       streams, sources, models and methods
  benchmark  steps a second beside a plain PyTorch loop

classp-jax COMMAND --help lists a command's options."""


class UsageError(ValueError):
    """A command line that cannot be read; the message is one line."""


def _parse(kind: Callable[..., T], arguments: Sequence[str], **options: Any) -> T:
    """``tyro.cli``, but with errors on one line."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, args=list(arguments), **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        # Tyro draws a box of several lines around what it has to say.
        text = re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯─│]", " ", errors.getvalue())
        message = re.sub(r"\s+", " ", text).strip()
        message = re.sub(r"^(Parsing error|Unrecognized options)\s", "", message)
        raise UsageError(message) from None


def _taken(rest: list[str], option: str, what: str) -> str | None:
    """Takes an option and its value out of the arguments."""
    for i, argument in enumerate(rest):
        if argument == option or argument.startswith(f"{option}="):
            inline = argument.partition("=")[2]
            if not inline and i + 1 >= len(rest):
                raise UsageError(f"{option} needs {what}")
            value = inline or rest[i + 1]
            del rest[i : i + (1 if inline else 2)]
            return value
    return None


def _with_file(kind: Callable[[], T], arguments: Sequence[str]) -> tuple[T, list[str]]:
    """The defaults, or those of --preset and of --config; the other arguments."""
    from classp_jax.continual.config import read_config, read_preset, with_options

    default: Any = kind()
    rest = list(arguments)
    size = _taken(rest, "--preset-size", "a size")
    preset = _taken(rest, "--preset", "a name; classp-jax list names them")
    path = _taken(rest, "--config", "a TOML or JSON file")
    if preset is not None:
        options = read_preset(preset, size)
        if hasattr(default, "tries"):
            options["out"] = options["out"].replace("runs/", "runs/sweep-")
        default = with_options(default, options)
    elif size is not None:
        raise UsageError("--preset-size goes with --preset")
    if path is not None:
        default = with_options(default, read_config(path))
    return default, rest


@contextlib.contextmanager
def _progress(console: Console, unit: str) -> Iterator[Callable[..., None]]:
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} " + unit),
        TextColumn("{task.fields[accuracy]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bars: dict[str, Any] = {}

        def show(name: str, done: int, total: int, accuracy: float) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=total, accuracy="")
            text = f"accuracy {accuracy:6.1%}" if accuracy == accuracy else "diverged"
            progress.update(bars[name], completed=done, accuracy=text)

        yield show


def _command_line(command: str, arguments: Sequence[str]) -> str:
    return shlex.join(["classp-jax", command, *arguments])


def _run(arguments: Sequence[str], console: Console) -> None:
    from classp_jax.continual import report
    from classp_jax.continual.config import RunConfig
    from classp_jax.continual.run import run

    default, rest = _with_file(RunConfig, arguments)
    config = _parse(
        RunConfig, rest, default=default, prog="classp-jax run", description=_RUN_HELP
    )
    with _progress(console, "steps") as progress:
        results, out = run(config, progress=progress)
    report.write_report(results, out, command=_command_line("run", arguments))
    console.print(report.rich_table(results))
    console.print(f"results and pictures: {out}", soft_wrap=True)


_RUN_HELP = (
    "Train on a stream of tasks and report what was kept and what was forgotten. "
    "--preset NAME (and --preset-size SIZE) takes the options of an experiment that "
    "classp-jax list names, --config FILE those of a TOML or JSON file; options of the "
    "command line win."
)


def _sweep(arguments: Sequence[str], console: Console) -> None:
    from classp_jax.continual.config import SweepConfig
    from classp_jax.continual.sweep import best, sweep

    default, rest = _with_file(SweepConfig, arguments)
    config = _parse(
        SweepConfig,
        rest,
        default=default,
        prog="classp-jax sweep",
        description="Tune every method with the same number of tries, on validation "
        "data and on seeds that are not reported. --preset and --config as for run.",
    )
    with _progress(console, "tries") as progress:
        tries, out = sweep(config, _command_line("sweep", arguments), progress=progress)
    for name, made in tries.items():
        winner = best(made)
        settings = ", ".join(f"{k} {v:.3g}" for k, v in winner.settings.items())
        console.print(f"{name:<18} {winner.accuracy:6.1%}  {settings}", highlight=False)
    console.print(
        f"winners: classp-jax run --config {out / 'config.toml'}", soft_wrap=True
    )


def _report(arguments: Sequence[str], console: Console) -> None:
    import dataclasses
    import pathlib

    from classp_jax.continual import report
    from classp_jax.continual.results import load, merge

    @dataclasses.dataclass(frozen=True)
    class ReportConfig:
        """Table and pictures again, from results folders of one stream."""

        folders: tyro.conf.Positional[tuple[str, ...]]
        """Folders, each with a results.json."""
        out: str | None = None
        """Where the report goes: by default the folder, if there is only one."""

    config = _parse(ReportConfig, arguments, prog="classp-jax report")
    folders = list(config.folders)
    if not folders:
        raise UsageError("report needs at least one folder with a results.json")
    if config.out is None and len(folders) > 1:
        raise UsageError("report of several folders needs --out")
    found = [load(folder) for folder in folders]
    results = found[0] if len(found) == 1 else merge(found)
    out = pathlib.Path(config.out or folders[0])
    report.write_report(results, out, command=_command_line("report", arguments))
    console.print(report.rich_table(results))
    console.print(f"report and pictures: {out}", soft_wrap=True)


def _list(arguments: Sequence[str], console: Console) -> None:
    from classp_jax.continual.config import preset_sizes
    from classp_jax.continual.methods import ADDITIONS, OPTIMIZERS
    from classp_jax.continual.models import MODELS
    from classp_jax.continual.sources import SOURCES
    from classp_jax.continual.streams import STREAMS

    if arguments:
        raise UsageError(f"list takes no options: {shlex.join(arguments)}")
    parts = {**OPTIMIZERS, **ADDITIONS}
    tables = {
        "streams": STREAMS,
        "sources": SOURCES,
        "models": MODELS,
        "methods (join by +: ewc+classp)": {k: p.summary for k, p in parts.items()},
        "presets, with their sizes": {
            k: ", ".join(v) for k, v in preset_sizes().items()
        },
    }
    for title, table in tables.items():
        console.print(title, style="bold")
        for name, summary in table.items():
            console.print(f"  {name:<24} {summary}", highlight=False, markup=False)


def _benchmark(arguments: Sequence[str], console: Console) -> None:
    from classp_jax.continual import benchmark

    config = _parse(benchmark.BenchmarkConfig, arguments, prog="classp-jax benchmark")
    benchmark.benchmark(config, console)


_COMMANDS = {
    "run": _run,
    "sweep": _sweep,
    "report": _report,
    "list": _list,
    "benchmark": _benchmark,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status.

    Errors that a user can mend are one line on standard error and status 1; a wrong
    command line is status 2, Ctrl-C 130.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if arguments else 2
    command, *rest = arguments
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    try:
        if command not in _COMMANDS:
            raise UsageError(
                f"unknown command {command!r}{nearest(command, _COMMANDS)}"
            )
        _COMMANDS[command](rest, console)
    except UsageError as error:
        return _fail(error, 2)
    except (ValueError, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted; the results of finished methods are kept", 130)
    return 0


def _fail(error: Exception | str, status: int) -> int:
    print(f"classp-jax: {' '.join(str(error).split())}", file=sys.stderr)
    return status
