"""From an experiment's options to what runs: a stream, a network, methods."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from classp_jax.continual import own
from classp_jax.continual.config import ConfigError, Data, Experiment, Network, Settings
from classp_jax.continual.data.streams import StreamMaker, make_stream
from classp_jax.continual.errors import ContinualError
from classp_jax.continual.methods.protocol import Method
from classp_jax.continual.methods.registry import (
    as_methods,
    check_owners,
    method,
    settings_of,
)


class Prepared(NamedTuple):
    """An experiment, read and checked; nothing has been trained."""

    stream: StreamMaker
    model: Any
    """As ``run`` takes it."""
    model_options: dict[str, Any]
    """What else a network that has a name is made from."""
    methods: dict[str, Method]
    settings: Settings
    """What the options say of each of them, by its name."""
    training: dict[str, Any]
    """How to train, as arguments of ``run``."""
    evaluation: dict[str, Any]
    """How to measure, likewise."""


def prepare(experiment: Experiment, asked: Settings | None = None) -> Prepared:
    """Reads the data and checks everything that the options name.

    Args:
      experiment: the options.
      asked: settings that win over the experiment's own.

    Raises:
      ContinualError: in one line, for whatever does not exist or does not fit.
    """
    asked = asked or {}
    methods = _methods(experiment)
    _check_settings(experiment, methods)
    check_owners(
        "--set", [owner for owner in asked if owner != "model"], methods.values()
    )
    model, options = network(
        experiment.network,
        experiment.settings.get("model", {}) | asked.get("model", {}),
    )
    return Prepared(
        stream=stream(experiment.data),
        model=model,
        model_options=options,
        methods=methods,
        settings={
            name: settings_of(found, experiment.settings) | settings_of(found, asked)
            for name, found in methods.items()
        },
        training=dataclasses.asdict(experiment.training),
        evaluation=dataclasses.asdict(experiment.evaluation),
    )


def stream(data: Data) -> StreamMaker:
    """The recipe of the stream; its data is read now."""
    options = dataclasses.asdict(data)
    return make_stream(options.pop("stream"), options.pop("source"), **options)


def _methods(experiment: Experiment) -> dict[str, Method]:
    own_methods = [own.method(text) for text in experiment.method]
    # Asked for by --method alone, only the user's own would be compared with nothing.
    return as_methods([*experiment.methods, *own_methods])


def _check_settings(experiment: Experiment, methods: Mapping[str, Method]) -> None:
    """Refuses settings of a method, or a setting, that does not exist.

    A file may have settings of methods that do not take part.
    """
    for owner, values in experiment.settings.items():
        if owner == "model":
            continue
        try:
            known = methods[owner] if owner in methods else method(owner)
            settings_of(known, {owner: values})
        except ContinualError as error:
            raise ConfigError(f"settings.{owner}: {error}") from error


def network(
    options: Network, settings: Mapping[str, float]
) -> tuple[Any, dict[str, Any]]:
    """The network as ``run`` takes it: ``model`` and ``model_options``.

    Args:
      options: what is asked for.
      settings: numbers for the user's own model.

    Raises:
      ConfigError: if there is no such model of the user, or it has no such setting.
    """
    name, table = options.model, dataclasses.asdict(options)
    if own.is_reference(name):
        # Its settings are a part of its name, which tells results apart.
        numbers = "".join(f" {key}={value:g}" for key, value in settings.items())
        return own.model(name, settings), {"name": f"{name}{numbers}"}
    if settings:
        raise ConfigError(
            f"model {name!r} has options, such as --hidden, but no settings"
        )
    reads = {
        "mlp": ("hidden", "initialisation"),
        "cnn": ("initialisation",),
        "transformer": ("width", "heads", "feed_forward"),
    }
    return name, {key: table[key] for key in reads.get(name, ())}
