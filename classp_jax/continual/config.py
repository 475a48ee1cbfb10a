"""What a run is told: the options of the command line and of its files."""

import dataclasses
import json
import math
import pathlib
import tomllib
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import tyro

from classp_jax.continual._names import nearest
from classp_jax.continual.learner import Training
from classp_jax.continual.methods import Method, Setting, parse_method, resolve_settings
from classp_jax.continual.models import Model, make_model
from classp_jax.continual.sources import load_sources
from classp_jax.continual.streams import Stream, make_stream

Settings = dict[str, dict[str, float]]
"""Hyperparameters by the name of a method or of one of its parts."""


class ConfigError(ValueError):
    """A configuration that cannot be; the message is one line."""


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """What is learned and by which network: the same for every method."""

    stream: str = "permuted"
    """Kind of stream: permuted, rotated, split or sequence."""
    source: tuple[str, ...] = ("digits",)
    """Where the data comes from: digits, tfds:NAME, npz:PATH or tsv:PATH; the stream
    "sequence" takes several."""
    data_dir: str | None = None
    """Folder with prepared TFDS data sets."""
    scenario: str = "domain-incremental"
    """For the stream "split": class-, domain- or task-incremental."""
    tasks: int = 5
    """Number of tasks, for streams that are made from one source."""
    max_train: int | None = None
    """At most this many training examples a task."""
    validation_fraction: float = 0.1
    """Share of the training data kept for validation."""
    model: str = "mlp"
    """Network: mlp, cnn or transformer."""
    initialisation: Literal["flax", "pytorch"] = "flax"
    """What the weights of an MLP or a CNN begin as: as Flax or PyTorch would."""
    hidden: tuple[int, ...] = (128, 128)
    """Widths of the MLP's hidden layers."""
    width: int = 64
    """Width of the transformer."""
    heads: int = 4
    """Attention heads of the transformer."""
    feed_forward: int = 256
    """Width of the transformer's feed-forward layer."""
    text_length: int = 30
    """Tokens kept of each text."""
    vocabulary_size: int = 20_000
    """Different tokens kept."""
    methods: tuple[str, ...] = (
        "sgd",
        "adam",
        "adagrad",
        "classp",
        "classp-published",
        "ewc",
        "online-ewc",
        "si",
        "ewc+classp",
        "replay",
        "joint",
    )
    """What to compare: optimizers and additions joined by +, such as ewc+classp."""
    epochs: tuple[int, ...] = (10,)
    """Passes over each task's training data; the last one holds for later tasks."""
    until_loss: tuple[float, ...] = ()
    """End a task after the first pass whose last batch has a loss below this, at the
    latest after --epochs; the last number holds for later tasks."""
    batch_size: int = 32
    """Examples a step."""
    order: Literal["shuffled", "stored"] = "shuffled"
    """Order of the training examples: another one in every pass, or as stored."""
    normalisation: tuple[float, ...] = ()
    """Mean and deviation of the pixels in [0, 1], by default the first task's."""
    points: int = 5
    """How often accuracy is taken during a task."""
    fisher: Literal["exact", "sampled", "empirical"] = "exact"
    """How EWC takes the Fisher information."""
    fisher_examples: int = 1000
    """Training examples of the ended task it takes it from."""
    score_training: bool = False
    """Also take the accuracy on the training data, with dropout active."""
    lr: float | None = None
    """Learning rate of every method, in place of each one's own."""
    set: tuple[str, ...] = ()
    """Settings of single methods, such as classp.eps=0.01."""
    settings: Annotated[Settings, tyro.conf.Suppress] = dataclasses.field(
        default_factory=dict
    )
    """The same from a file: a table a method."""


@dataclasses.dataclass(frozen=True)
class RunConfig(StreamConfig):
    """Train on a stream of tasks and report what was kept and what was forgotten."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of every method for each seed."""
    out: str | None = None
    """Folder for the results, by default runs/STREAM-SOURCE."""


@dataclasses.dataclass(frozen=True)
class SweepConfig(StreamConfig):
    """Tune every method with the same number of tries, on validation data."""

    range: tuple[str, ...] = ()
    """What to draw a setting from, such as classp.learning_rate=1e-5:0.1."""
    tries: int = 24
    """Settings tried for each method."""
    together: int = 8
    """How many of them are proposed, and trained, at once."""
    tuning_seeds: tuple[int, ...] = (1000, 1001)
    """Seeds to tune on; none of the reported ones."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds that the configuration written will report."""
    out: str | None = None
    """Folder for the winners and the tries, by default runs/sweep-STREAM-SOURCE."""


C = TypeVar("C", bound=StreamConfig)

DEFAULTS = pathlib.Path(__file__).with_name("defaults.toml")
"""The settings a run starts from: the winners of a sweep, with its command."""

PRESETS = pathlib.Path(__file__).with_name("presets")
"""Experiments ready to run, NAME.SIZE.toml, each with the winners of its sweep."""


def read_config(path: str | pathlib.Path) -> dict[str, Any]:
    """Reads a TOML or JSON file of options.

    A ``results.json`` will do: its configuration is taken.

    Raises:
      ConfigError: if the file is missing, is neither, or cannot be read.
    """
    path = pathlib.Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ConfigError(f"{path} is not valid {kind}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold a table of options")
    return content.get("configuration", content)


def preset_sizes() -> dict[str, tuple[str, ...]]:
    """The names of the presets, each with its sizes.

    Example:
      >>> preset_sizes()["phrasebank-imdb"]
      ('paper', 'small')
    """
    sizes: dict[str, tuple[str, ...]] = {}
    for path in sorted(PRESETS.glob("*.toml")):
        name, _, size = path.stem.rpartition(".")
        sizes[name] = (*sizes.get(name, ()), size)
    return sizes


def read_preset(name: str, size: str | None = None) -> dict[str, Any]:
    """The options of a preset, with a folder for the results named after it.

    Args:
      name: one of :func:`preset_sizes`.
      size: one of its sizes; by default ``"small"``, or the only one.

    Raises:
      ConfigError: for an unknown name or size.
    """
    sizes = preset_sizes()
    if name not in sizes:
        raise ConfigError(f"unknown preset {name!r}{nearest(name, sizes)}")
    if size is None:
        size = "small" if "small" in sizes[name] else sizes[name][0]
    if size not in sizes[name]:
        raise ConfigError(
            f"preset {name!r} has no size {size!r}; it has {', '.join(sizes[name])}"
        )
    return read_config(PRESETS / f"{name}.{size}.toml") | {"out": f"runs/{name}-{size}"}


def with_options(config: C, options: Mapping[str, Any]) -> C:
    """A configuration with the options of a file.

    Raises:
      ConfigError: for an unknown option or a value of the wrong type.
    """
    hints = typing.get_type_hints(type(config))
    changes = {}
    for name, value in options.items():
        key = name.replace("-", "_")
        if key not in hints:
            raise ConfigError(f"unknown option {name!r}{nearest(key, hints)}")
        changes[key] = _converted(name, value, hints[key])
    return dataclasses.replace(config, **changes)


def _converted(name: str, value: Any, hint: Any) -> Any:
    if hint == Settings:
        if not isinstance(value, dict) or not all(
            isinstance(table, dict)
            and all(
                isinstance(v, int | float) and not isinstance(v, bool)
                for v in table.values()
            )
            for table in value.values()
        ):
            raise ConfigError(f"option {name!r} must hold a table of numbers a method")
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_converted(name, item, arguments[0]) for item in items)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"option {name!r} must be one of {', '.join(arguments)}")
        return value
    allowed = arguments or (hint,)
    if type(value) in allowed:
        return value
    if float in allowed and type(value) is int:
        return float(value)
    if value is None and type(None) in allowed:
        return None
    names = " or ".join(t.__name__ for t in allowed if t is not type(None))
    raise ConfigError(f"option {name!r} must be {names}, got {value!r}")


def check(config: StreamConfig) -> None:
    """Raises ConfigError for a number that cannot be."""
    at_least = {
        "tasks": 1,
        "batch_size": 1,
        "points": 1,
        "fisher_examples": 1,
        "max_train": 1,
        "text_length": 1,
        "vocabulary_size": 3,
        "width": 1,
        "heads": 1,
        "feed_forward": 1,
        "tries": 1,
        "together": 1,
    }
    for name, least in at_least.items():
        value = getattr(config, name, None)
        if value is not None and value < least:
            raise ConfigError(f"{name.replace('_', '-')} must be >= {least}: {value}")
    for name in ("epochs", "hidden"):
        values = getattr(config, name)
        if not values or min(values) < 1:
            raise ConfigError(f"{name} must be numbers >= 1: {values}")
    for name in ("seeds", "tuning_seeds", "methods", "source"):
        values = getattr(config, name, ("-",))
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{name.replace('_', '-')} must be named once each")
    for name in ("seeds", "tuning_seeds"):
        if min(getattr(config, name, (0,))) < 0:
            raise ConfigError(f"{name.replace('_', '-')} must be >= 0")
    words = "[0, 1)" if isinstance(config, RunConfig) else "(0, 1)"
    none_held_out = config.validation_fraction == 0 and isinstance(config, RunConfig)
    if not (none_held_out or 0 < config.validation_fraction < 1):
        raise ConfigError(
            f"validation-fraction must be in {words}: {config.validation_fraction}"
        )
    if config.until_loss and not min(config.until_loss) > 0:
        raise ConfigError(f"until-loss must be > 0: {config.until_loss}")
    if len(config.normalisation) not in (0, 2) or (
        config.normalisation
        and not (
            math.isfinite(sum(config.normalisation)) and config.normalisation[1] > 0
        )
    ):
        raise ConfigError(
            f"normalisation must be a mean and a deviation > 0: {config.normalisation}"
        )
    if config.lr is not None and not config.lr >= 0:
        raise ConfigError(f"lr must be >= 0: {config.lr}")


def _assignments(option: str, texts: Sequence[str], form: str) -> Iterator[Any]:
    """``(owner, name, [numbers])`` of every OWNER.NAME=NUMBER:NUMBER."""
    for text in texts:
        left, equals, value = text.partition("=")
        owner, dot, name = left.rpartition(".")
        try:
            if not (equals and dot):
                raise ValueError
            numbers = [float(number) for number in value.split(":")]
            if len(numbers) != form.count("NUMBER"):
                raise ValueError
        except ValueError as error:
            raise ConfigError(f"{option} takes {form}, got {text!r}") from error
        yield owner, name.replace("-", "_"), numbers


def command_line_settings(config: StreamConfig) -> Settings:
    """What ``--set`` and ``--lr`` ask for."""
    settings: Settings = {}
    form = "METHOD.SETTING=NUMBER"
    for owner, name, (value,) in _assignments("--set", config.set, form):
        settings.setdefault(owner, {})[name] = value
    if config.lr is not None:
        for name in config.methods:
            settings.setdefault(name, {}).setdefault("learning_rate", config.lr)
    return settings


def command_line_ranges(config: SweepConfig) -> dict[str, dict[str, Setting]]:
    """What ``--range`` asks for."""
    ranges: dict[str, dict[str, Setting]] = {}
    form = "METHOD.SETTING=NUMBER:NUMBER"
    for owner, name, (low, high) in _assignments("--range", config.range, form):
        if not 0 < low <= high:
            raise ConfigError(f"--range needs 0 < low <= high: {low:g}:{high:g}")
        ranges.setdefault(owner, {})[name] = Setting(low, low, high)
    return ranges


def check_owners(option: str, asked: Iterable[str], methods: Sequence[Method]) -> None:
    """Raises ConfigError for settings of a method that does not take part."""
    known = {m.name for m in methods}
    known |= {part for m in methods for part in (m.optimizer, *m.additions)}
    for owner in asked:
        if owner not in known:
            raise ConfigError(f"{option} names {owner!r}{nearest(owner, known)}")


def methods_and_settings(
    config: StreamConfig,
) -> list[tuple[Method, dict[str, float]]]:
    """The methods asked for, each with its resolved settings.

    The package's defaults come first, then the file's settings, then ``--lr`` and
    ``--set``.

    Raises:
      ValueError: for an unknown method, or a setting that it does not have.
    """
    defaults = read_config(DEFAULTS).get("settings", {})
    asked = command_line_settings(config)
    methods = [parse_method(name) for name in config.methods]
    check_owners("--set", asked, methods)
    return [(m, resolve_settings(m, defaults, config.settings, asked)) for m in methods]


def make_streams(config: StreamConfig, seeds: Sequence[int]) -> list[Stream]:
    """One stream a seed: its permutation or class order, and its validation split."""
    sources = [
        load_sources(
            name,
            seeds,
            data_dir=config.data_dir,
            validation_fraction=config.validation_fraction,
        )
        for name in config.source
    ]
    return [
        make_stream(
            config.stream,
            of_one_seed,
            num_tasks=config.tasks,
            scenario=config.scenario,
            seed=seed,
            max_train=config.max_train,
            text_length=config.text_length,
            vocabulary_size=config.vocabulary_size,
        )
        for seed, of_one_seed in zip(seeds, zip(*sources, strict=True), strict=True)
    ]


def make_network(config: StreamConfig, streams: Sequence[Stream]) -> Model:
    """The network for streams that are alike but for their data."""
    return make_model(
        config.model,
        streams[0].tasks[0].train.x.shape[1:],
        streams[0].num_classes,
        hidden=config.hidden,
        # Seeds hold out other texts for validation, so their vocabularies differ.
        vocabulary_size=max(stream.vocabulary_size for stream in streams),
        width=config.width,
        heads=config.heads,
        feed_forward=config.feed_forward,
        initialisation=config.initialisation,
    )


def training(config: StreamConfig, *, evaluate_on: str = "test") -> Training:
    """The part of a configuration that the training loop reads."""
    return Training(
        epochs=config.epochs,
        batch_size=config.batch_size,
        points_per_task=config.points,
        fisher=config.fisher,
        fisher_examples=config.fisher_examples,
        evaluate_on=evaluate_on,
        order=config.order,
        normalisation=config.normalisation,
        until_loss=config.until_loss,
        score_training=config.score_training,
    )
