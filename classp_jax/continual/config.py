"""What an experiment is: options in tables, the same in TOML, JSON and Python.

Nothing is built here. :func:`read` refuses what no experiment can be and says so on
one line; what depends on the data or on a method is checked by those who read it.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import re
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from classp_jax.continual._names import nearest
from classp_jax.continual.errors import ContinualError

C = TypeVar("C")
Settings = dict[str, dict[str, float]]
"""Numbers by the name of a method, of a part of one, or ``model``, and of a setting."""

_Count = Annotated[int, Meta(ge=1)]
_Positive = Annotated[float, Meta(gt=0)]
_Seeds = Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(min_length=1)]
_Names = Annotated[tuple[str, ...], Meta(min_length=1)]


class ConfigError(ContinualError):
    """A configuration that no experiment can have; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Data:
    """The stream of tasks: the same for every method."""

    stream: Literal["permuted", "rotated", "split", "sequence"] = "permuted"
    """Kind of stream: one source under several pixel orders or angles, its classes
    split into tasks, or a sequence of sources."""
    source: _Names = ("digits",)
    """Where the data comes from: digits, tfds:NAME, npz:PATH or tsv:PATH; the stream
    "sequence" takes several, and one may come back."""
    data_dir: str | None = None
    """Folder with prepared TFDS data sets."""
    scenario: Literal["class-incremental", "domain-incremental", "task-incremental"] = (
        "domain-incremental"
    )
    """For the stream "split": whether a task has outputs of its own, shares them with
    the others, or is also named when it is tested."""
    tasks: _Count = 5
    """Number of tasks that are made from one source."""
    max_train: _Count | None = None
    """At most this many training examples per task."""
    validation_fraction: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    """Share of the training data kept for validation."""
    text_length: _Count = 30
    """Tokens kept of each text."""
    vocabulary_size: Annotated[int, Meta(ge=3)] = 20_000
    """Different tokens kept."""


@dataclasses.dataclass(frozen=True)
class Network:
    """The network: the same for every method."""

    model: str = "mlp"
    """mlp, cnn, transformer, or your own as package.module:factory."""
    initialisation: Literal["flax", "pytorch"] = "flax"
    """Initial weights of an MLP or a CNN: as Flax or as PyTorch draws them."""
    hidden: Annotated[tuple[_Count, ...], Meta(min_length=1)] = (128, 128)
    """Widths of the MLP's hidden layers."""
    width: _Count = 64
    """Width of the transformer."""
    heads: _Count = 4
    """Attention heads of the transformer."""
    feed_forward: _Count = 256
    """Width of the transformer's feed-forward layer."""


@dataclasses.dataclass(frozen=True)
class Training:
    """How every method trains."""

    epochs: Annotated[tuple[_Count, ...], Meta(min_length=1)] = (10,)
    """Passes over each task's training data; the last one holds for later tasks."""
    until_loss: tuple[_Positive, ...] = ()
    """End a task after the first pass whose last batch has a loss below this, at the
    latest after --epochs; the last number holds for later tasks."""
    batch_size: _Count = 32
    """Examples per step."""
    order: Literal["shuffled", "stored"] = "shuffled"
    """Order of the training examples: new in every pass, or as stored."""
    normalisation: tuple[float, ...] = ()
    """Mean and deviation of the pixels in [0, 1]; by default those of the first
    task's training data, for each seed its own."""
    moments: Literal["first-task", "running"] = "first-task"
    """Running: standardise every number of the inputs, on top of that, by its mean
    and deviation over the examples seen so far."""
    fisher: Literal["exact", "sampled", "empirical"] = "exact"
    """How EWC takes the Fisher information."""
    fisher_examples: _Count = 1000
    """Training examples of the ended task from which EWC takes it."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the network trains in; weights and optimizer state are float32."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What a step that gives a NaN or infinite number leads to: the run ends as
    diverged, or the step is undone and counted."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """When accuracy is measured, and on what."""

    points: _Count = 5
    """How often accuracy is measured during a task."""
    max_test: _Count | None = None
    """Measure on at most this many test examples per task."""
    evaluate: Literal["seen", "all"] = "seen"
    """Tasks to measure: those seen so far, or all, for forward transfer too."""
    score_training: bool = False
    """Also measure accuracy on the training data, with dropout active."""


METHODS = (
    "sgd",
    "adam",
    "adagrad",
    "classp",
    "ewc",
    "si",
    "ewc+classp",
    "replay",
    "joint",
)
"""What a run compares if nothing else is asked for."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All that a file holds; what is missing in the file has these defaults."""

    data: Data = Data()
    network: Network = Network()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    methods: _Names = METHODS
    """What to compare: optimizers and additions joined by +, such as ewc+classp."""
    method: tuple[str, ...] = ()
    """Your own methods, compared too: NAME=package.module:factory."""
    seeds: _Seeds = tuple(range(10))
    """One run of every method for each seed."""
    settings: Settings = dataclasses.field(default_factory=dict)
    """Numbers in place of the methods' own defaults."""


def read(path: str | pathlib.Path) -> Experiment:
    """Reads an experiment from a TOML or JSON file.

    Args:
      path: the file; one that ends in ``.json`` is JSON, any other TOML.

    Raises:
      ConfigError: if the file is missing or is neither, has a table or option that
        does not exist, or a value that no experiment can have.
    """
    path = pathlib.Path(path)
    kind = "JSON" if path.suffix == ".json" else "TOML"
    decode = msgspec.json.decode if kind == "JSON" else msgspec.toml.decode
    try:
        content = decode(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError(f"{path} is not valid {kind}: {error}") from error
    try:
        return from_table(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def from_table(content: Any) -> Experiment:
    """The experiment of a nested table, as TOML and JSON hold it.

    Raises:
      ConfigError: as :func:`read`.

    Example:
      >>> from_table({"training": {"epochs": [3]}}).training.epochs
      (3,)
    """
    return _convert(_with_underscores(content), Experiment)


def check(config: C) -> C:
    """Gives the configuration back if an experiment can have its values.

    Raises:
      ConfigError: naming the first option that has a wrong value.
    """
    return _convert(_table(config), type(config))


def write(experiment: Experiment, *, header: str = "") -> str:
    """The experiment as TOML that :func:`read` reads.

    Args:
      experiment: what to write.
      header: lines to stand first, as comments.
    """
    # TOML has no null: an option that is None is left out.
    text = msgspec.toml.encode(_without_none(_table(experiment))).decode()
    return "".join(f"# {line}\n" for line in header.splitlines()) + "\n" + text


def with_methods_of(before: Experiment, experiment: Experiment) -> Experiment:
    """The experiment with another's methods too, where it has none of that name."""
    own = {
        text.partition("=")[0]: text for text in (*before.method, *experiment.method)
    }
    return dataclasses.replace(
        experiment,
        methods=tuple(dict.fromkeys((*before.methods, *experiment.methods))),
        method=tuple(own.values()),
        settings=before.settings | experiment.settings,
    )


def folder_name(experiment: Experiment) -> str:
    """A name for the folder of the results: a path's last part, and a short hash.

    Experiments whose results can stand in one table share it; others do not.

    Example:
      >>> folder_name(Experiment())
      'permuted-digits'
      >>> folder_name(from_table({"data": {"source": ["npz:/data/letters.npz"]}}))[:-6]
      'permuted-letters-'
    """
    data = experiment.data
    stems = [pathlib.PurePath(s.partition(":")[2] or s).stem for s in data.source]
    name = re.sub(r"[^\w.-]+", "-", "-".join([data.stream, *stems]))[:60]
    parts = _comparable(experiment)
    if parts == _comparable(Experiment()):
        return name
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return f"{name}-{digest[:6]}"


def _comparable(experiment: Experiment) -> dict[str, Any]:
    table = _table(experiment)
    table["data"].pop("data_dir")
    for name in ("compute_dtype", "nonfinite", "moments"):
        # Left out where they came later than the names of existing folders.
        if table["training"][name] == getattr(Training(), name):
            table["training"].pop(name)
    table["network"]["settings"] = experiment.settings.get("model", {})
    return {name: table[name] for name in ("data", "network", "training", "evaluation")}


def _table(config: Any) -> dict[str, Any]:
    """Nested dicts of every option; msgspec itself leaves defaults out."""
    return dataclasses.asdict(config)


def _convert(table: Any, kind: type[C]) -> C:
    if isinstance(table, Mapping):
        _refuse_unknown(table, kind)
    try:
        config = msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(_one_line(error, table)) from error
    _check_finite(_table(config))
    _check_together(config)
    return config


def _with_underscores(content: Any) -> Any:
    """Options may be written as on the command line: ``batch-size``."""
    if not isinstance(content, Mapping):
        return content
    sections = {str(k).replace("-", "_"): v for k, v in content.items()}
    return {
        name: {k.replace("-", "_"): v for k, v in value.items()}
        if isinstance(value, Mapping) and name != "settings"
        else value
        for name, value in sections.items()
    }


def _refuse_unknown(table: Mapping[str, Any], kind: Any, where: str = "") -> None:
    hints = typing.get_type_hints(kind)
    for name, value in table.items():
        if name not in hints:
            what = "option" if where or not isinstance(value, Mapping) else "table"
            raise ConfigError(f"unknown {what} {where}{name}{nearest(name, hints)}")
        if isinstance(value, Mapping) and dataclasses.is_dataclass(hints[name]):
            _refuse_unknown(value, hints[name], f"{name}.")
        if isinstance(value, Mapping) and name == "settings":
            _check_settings(value)


def _check_settings(settings: Mapping[str, Any]) -> None:
    for owner, values in settings.items():
        if not isinstance(values, Mapping):
            raise ConfigError(f"settings.{owner} must be a table, got {values!r}")
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(
                    f"settings.{owner}.{name} must be a number, got {value!r}"
                )


_PLAIN = {"`object`": "a table", "`array`": "a list", "`": ""}


def _one_line(error: Exception, table: Any) -> str:
    """The library's message in the words of a file, with the value that is wrong."""
    message, _, path = str(error).partition(" - at `$")
    for word, plain in _PLAIN.items():
        message = message.replace(word, plain)
    path = path.rstrip("`").removeprefix(".")
    value = table
    for key, index in re.findall(r"(\w+)|\[(\d+)\]", path):
        value = value[key] if key else value[int(index)]
    message = message[0].lower() + message[1:]
    return f"{path} = {json.dumps(value)}: {message}" if path else message


def _check_finite(value: Any, where: str = "") -> None:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_finite(inner, f"{where}.{name}" if where else name)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_finite(inner, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} must be finite: {value}")


def _check_together(config: Any) -> None:
    """What no type can say: values that must differ or go together."""
    if not isinstance(config, Experiment):
        return
    for name in ("methods", "seeds"):
        values = getattr(config, name)
        twice = [v for i, v in enumerate(values) if v in values[:i]]
        if twice:
            raise ConfigError(f"{name} names {twice[0]!r} twice")
    scale = config.training.normalisation
    if scale and not (len(scale) == 2 and scale[1] > 0):
        raise ConfigError(
            f"training.normalisation must be a mean and a deviation > 0: {list(scale)}"
        )
    _refuse_ignored(config)


def _refuse_ignored(config: Experiment) -> None:
    """Raises ConfigError for an option that this stream or network does not read."""
    stream, model = config.data.stream, config.network.model
    read_by = {
        ("data", "tasks"): stream != "sequence",
        ("data", "scenario"): stream == "split",
        ("network", "initialisation"): model in ("mlp", "cnn"),
        ("network", "hidden"): model == "mlp",
        ("network", "width"): model == "transformer",
        ("network", "heads"): model == "transformer",
        ("network", "feed_forward"): model == "transformer",
    }
    for (section, name), is_read in read_by.items():
        value = getattr(getattr(config, section), name)
        default = getattr(getattr(Experiment(), section), name)
        if not is_read and value != default:
            owner = f"stream {stream!r}" if section == "data" else f"model {model!r}"
            raise ConfigError(f"{section}.{name} has no effect on the {owner}")
    if stream != "sequence" and len(config.data.source) > 1:
        raise ConfigError(f"the stream {stream!r} takes one source; sequence, several")


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value
