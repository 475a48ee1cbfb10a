"""The options of the command line: an experiment, and what to do with it."""

import dataclasses
import difflib
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar, Union, cast

import tyro
from msgspec import Meta
from tyro._errors import on_parse_error
from tyro.conf import Suppress

from classp_jax.continual import presets
from classp_jax.continual._names import nearest
from classp_jax.continual.config import (
    ConfigError,
    Evaluation,
    Experiment,
    Settings,
    check,
    folder_name,
    read,
)

C = TypeVar("C")
E = TypeVar("E", bound="ExperimentOptions")


class UsageError(ConfigError):
    """The command line makes no sense; the message is one line."""


@dataclasses.dataclass(frozen=True)
class ExperimentOptions(Experiment):
    """What run and sweep have in common."""

    settings: Suppress[Settings] = dataclasses.field(default_factory=dict)
    preset: str | None = None
    """Begin from an experiment that "classp-jax list" names, with tuned settings."""
    preset_size: str | None = None
    """Which of the preset's sizes: small, if there is one."""
    config: str | None = None
    """Begin from a TOML or JSON file; options of the command line win."""
    lr: Annotated[float, Meta(ge=0)] | None = None
    """Learning rate of every method, in place of each one's own."""
    set: tuple[str, ...] = ()
    """Settings of single methods, such as classp.eps=0.01, or of your own model, such
    as model.depth=3."""
    out: str | None = None
    """Folder for all that is written, by default one in runs/."""
    devices: Annotated[int, Meta(ge=1)] | None = None
    """How many devices to train on; runs are spread over them. By default one, and all
    with --distributed."""
    devices_per_run: Annotated[int, Meta(ge=1)] = 1
    """How many of them share each run: each takes a part of every batch."""
    shard_parameters: bool = False
    """Also cut each run's parameters and optimizer state into a piece for each."""
    compilation_cache: bool = True
    """Keep compiled code in the user's cache folder, for a faster start next time."""

    def experiment(self, settings: Settings) -> Experiment:
        """What a file holds of these options, with settings in place of its own."""
        names = [field.name for field in dataclasses.fields(Experiment)]
        plain = Experiment(**{name: getattr(self, name) for name in names})
        model = assigned(self, ()).get("model")
        settings = ({"model": model} if model else {}) | settings
        return dataclasses.replace(plain, settings=settings)


@dataclasses.dataclass(frozen=True)
class Run(ExperimentOptions):
    """Train on a stream of tasks and report what was kept and what was forgotten.

    Results of the same experiment that are in the folder already are not trained again.
    """

    save_weights: bool = False
    """Also store the trained weights and optimizer states."""
    rounding_copies: Annotated[int, Meta(ge=0)] = 0
    """Copies of each run whose initial weights are moved by a rounding error."""
    checkpoint_every: Annotated[int, Meta(ge=1)] | None = None
    """Save every run after so many steps, and at each task's end, to go on from."""
    resume: bool = False
    """Go on where an interrupted run with checkpoints in the folder was."""
    csv: bool = False
    """Also write metrics.csv while training goes on."""
    tensorboard: bool = False
    """Also write metrics for TensorBoard while training goes on."""
    distributed: bool = False
    """Be one of several processes, as the cluster says or as the next three do; the
    first one writes."""
    coordinator: str | None = None
    """Address of the first process, HOST:PORT."""
    processes: Annotated[int, Meta(ge=1)] | None = None
    """How many processes there are."""
    process_id: Annotated[int, Meta(ge=0)] | None = None
    """Which of them this is, from 0."""


@dataclasses.dataclass(frozen=True)
class Sweep(ExperimentOptions):
    """Tune every method with the same number of trials, on validation data.

    Trials are stored as they finish; the same command goes on after an interruption. A
    preset's settings are what is tuned, so they are not used here.
    """

    # Not measured while tuning, but the file of winners takes it over from a preset.
    evaluation: Suppress[Evaluation] = Experiment.evaluation
    range: tuple[str, ...] = ()
    """What to draw a setting from, such as classp.learning_rate=1e-5:0.1."""
    trials: Annotated[int, Meta(ge=1)] = 32
    """Trials of each method."""
    together: Annotated[int, Meta(ge=1)] = 8
    """How many trials are proposed, and trained, at once."""
    tuning_seeds: Annotated[
        tuple[Annotated[int, Meta(ge=0)], ...], Meta(min_length=1)
    ] = (1000, 1001)
    """Seeds to tune on; none of --seeds, which the file of winners will report."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Draw table and pictures again, from one results folder or from several."""

    folders: tyro.conf.Positional[tuple[str, ...]]
    """Folders with a results.json; several must be of the same experiment."""
    out: str | None = None
    """Folder for the report: by default the results' own, if there is only one."""
    reference: str | None = None
    """Method to compare the others with, by default the first."""


@dataclasses.dataclass(frozen=True)
class List:
    """Name the streams, sources, models, methods and presets."""


Command = Run | Sweep | Report | List

_COMMANDS = {"run": Run, "sweep": Sweep, "report": Report, "list": List}
_DESCRIPTION = """Continual learning experiments: what is kept, what is forgotten.

classp-jax COMMAND --help lists a command's options, classp-jax --version the version.
"""


def parse(arguments: Sequence[str]) -> Command:
    """Reads a command line, with the file or preset that it names.

    Raises:
      UsageError: for a command or an option that does not exist or cannot be read.
      ConfigError: for a value that no experiment can have.
      SystemExit: after printing the help that was asked for.
    """
    options = _parse(arguments)
    if not isinstance(options, Run | Sweep):
        return _checked(options)
    base = _base(options)
    if base is not None:
        fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
        options = _parse(arguments, dataclasses.replace(type(options)(), **fields))
    return _with_tuned_settings(_checked(options))


def _base(options: ExperimentOptions) -> Experiment | None:
    """The experiment that the options begin from, if they name one."""
    if options.preset is not None and options.config is not None:
        raise UsageError("give --preset or --config, not both")
    if options.preset_size is not None and options.preset is None:
        raise UsageError("--preset-size goes with --preset")
    if options.preset is not None:
        base = presets.load(options.preset, options.preset_size)
        is_sweep = isinstance(options, Sweep)
        return dataclasses.replace(base, settings={}) if is_sweep else base
    if options.config is None:
        return None
    base = read(options.config)
    if isinstance(options, Sweep) and base.settings:
        raise ConfigError(
            f"{options.config} has settings, which a sweep draws itself: take them "
            "out, or fix single ones by --set"
        )
    return base


def _with_tuned_settings(options: E) -> E:
    """With the preset for digits where a run is on digits and names no other file."""
    digits = presets.load("digits")
    same = (
        options.data.stream == digits.data.stream
        and options.data.source == digits.data.source
        and options.network.model == digits.network.model
    )
    named = options.preset is not None or options.config is not None
    if isinstance(options, Sweep) or named or not same:
        return options
    return dataclasses.replace(options, preset="digits", settings=digits.settings)


def _checked(options: C) -> C:
    try:
        options = check(options)
    except ConfigError as error:
        # On the command line an option has a name of its own, and no table.
        path, rest = re.split(r"(?=[ \[:])", str(error), maxsplit=1)
        option = "--" + path.rpartition(".")[2].replace("_", "-")
        known = option in _option_names(type(options))
        raise ConfigError(option + rest if known else str(error)) from error
    if isinstance(options, Report) and not options.folders:
        raise UsageError("report needs at least one folder with a results.json")
    if isinstance(options, Run) and not options.distributed:
        for name in ("coordinator", "processes", "process_id"):
            if getattr(options, name) is not None:
                option = "--" + name.replace("_", "-")
                raise UsageError(f"{option} goes with --distributed")
    if isinstance(options, Sweep):
        shared = {*options.seeds} & {*options.tuning_seeds}
        if shared:
            raise ConfigError(f"seeds to tune on are also reported ones: {shared}")
        if options.data.validation_fraction == 0:
            raise ConfigError("a sweep needs validation data: --validation-fraction")
    return options


def _parse(arguments: Sequence[str], default: Any = None) -> Any:
    """Tyro's command line, whose errors become one line."""
    defaults = {type(default): {"default": default}}
    commands = tuple(
        Annotated[kind, tyro.conf.subcommand(name, **defaults.get(kind, {}))]
        for name, kind in _COMMANDS.items()
    )
    command = arguments[0] if arguments else ""
    with on_parse_error(lambda event: _refuse(event, command)):
        return tyro.cli(
            cast(Any, Union[commands]),  # noqa: UP007
            prog="classp-jax",
            description=_DESCRIPTION,
            args=list(arguments),
            config=(
                tyro.conf.OmitArgPrefixes,
                tyro.conf.OmitSubcommandPrefixes,
                tyro.conf.DisallowNone,
            ),
        )


def _refuse(event: Any, command: str) -> None:
    """Raises UsageError with one line in place of tyro's box of several.

    tyro may add kinds of events: of one that is not known here it draws its box.
    """
    kind = type(event).__name__
    if kind == "UnrecognizedArgs":
        raise UsageError(_unknown(event.tokens[0], command))
    if kind == "MissingSubcommand":
        raise UsageError(f"name a command: {', '.join(_COMMANDS)}; or --help")
    argument = getattr(event, "argument", None)
    option = "/".join(argument.lowered.name_or_flags) if argument else ""
    if kind == "InvalidChoice":
        hint = nearest(event.value, event.choices)
        raise UsageError(f"{option} cannot be {event.value!r}{hint}")
    if kind == "BadValue":
        raise UsageError(f"{option} needs a value")
    if kind == "InstantiationFailure":
        takes = f" takes {argument.lowered.metavar}" if argument else ""
        raise UsageError(f"{option}{takes}: {event.message.splitlines()[0]}")


def _unknown(token: str, command: str) -> str:
    if command not in _COMMANDS:
        return f"unknown command {token!r}{nearest(token, _COMMANDS)}"
    names = list(_option_names(_COMMANDS[command]))
    close = difflib.get_close_matches(token, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"see {command} --help"
    return f"{command} takes no {token!r}; {hint}"


def _option_names(kind: Any) -> Iterator[str]:
    for field in dataclasses.fields(kind):
        if field.name == "settings" or (field.name == "evaluation" and kind is Sweep):
            continue  # Not on the command line.
        if dataclasses.is_dataclass(field.default):
            yield from _option_names(type(field.default))
        else:
            yield "--" + field.name.replace("_", "-")


def assigned(options: ExperimentOptions, methods: Sequence[str]) -> Settings:
    """What ``--set`` and ``--lr`` ask for.

    Raises:
      UsageError: for a text that is not METHOD.SETTING=NUMBER.
    """
    settings: Settings = {}
    form = "METHOD.SETTING=NUMBER"
    for owner, name, (value,) in _assignments("--set", options.set, form):
        settings.setdefault(owner, {})[name] = value
    if options.lr is not None:
        for method in methods:
            settings.setdefault(method, {}).setdefault("learning_rate", options.lr)
    return settings


def ranges(options: Sweep) -> dict[str, dict[str, tuple[float, float]]]:
    """What ``--range`` asks for.

    Raises:
      UsageError: for a text that is not METHOD.SETTING=LOW:HIGH, or an empty range.
    """
    found: dict[str, dict[str, tuple[float, float]]] = {}
    form = "METHOD.SETTING=NUMBER:NUMBER"
    for owner, name, (low, high) in _assignments("--range", options.range, form):
        if not 0 < low <= high:
            raise UsageError(f"--range needs 0 < low <= high: {low:g}:{high:g}")
        found.setdefault(owner, {})[name] = (low, high)
    return found


def _assignments(
    option: str, texts: Sequence[str], form: str
) -> Iterator[tuple[str, str, list[float]]]:
    """``(owner, name, numbers)`` of every OWNER.NAME=NUMBER:NUMBER."""
    for text in texts:
        left, equals, value = text.partition("=")
        owner, dot, name = left.rpartition(".")
        try:
            numbers = [float(number) for number in value.split(":")]
        except ValueError:
            numbers = []
        if not (equals and dot and len(numbers) == form.count("NUMBER")):
            raise UsageError(f"{option} takes {form}, got {text!r}")
        if not all(map(math.isfinite, numbers)):
            raise UsageError(f"{option} takes finite numbers, got {text!r}")
        yield owner, name.replace("-", "_"), numbers


def out_folder(options: ExperimentOptions) -> pathlib.Path:
    """Where everything is written: ``--out``, or a folder named after the experiment.

    The name of a preset stands for it as long as no option changes the experiment.
    """
    if options.out is not None:
        return pathlib.Path(options.out)
    name = folder_name(options)
    if options.preset is not None:
        preset = presets.load(options.preset, options.preset_size)
        if folder_name(preset) == name:
            size = f"-{options.preset_size or 'small'}"
            several = len(presets.sizes()[options.preset]) > 1
            name = options.preset + (size if several else "")
    return pathlib.Path("runs", f"sweep-{name}" if isinstance(options, Sweep) else name)
