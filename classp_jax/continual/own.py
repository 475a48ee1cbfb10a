"""The user's own methods and models, named as ``package.module:factory``."""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any

import optax

from classp_jax.continual._names import nearest
from classp_jax.continual.config import ConfigError
from classp_jax.continual.methods import from_optax
from classp_jax.continual.methods.protocol import Method, Setting


def is_reference(text: str) -> bool:
    """Whether a name is one of ``package.module:factory``.

    Example:
      >>> is_reference("mine.networks:small"), is_reference("mlp")
      (True, False)
    """
    return ":" in text


def load(reference: str) -> Any:
    """What ``package.module:factory`` names; the current folder is searched too.

    Raises:
      ConfigError: if there is no such module, or no such name in it. What the module
        raises itself comes through as it is.
    """
    module_name, _, name = reference.partition(":")
    if not (module_name and name):
        raise ConfigError(f"{reference!r} is not package.module:factory")
    if os.getcwd() not in sys.path:
        # A console script does not search the folder that it is called from.
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"{reference}: there is no module {error.name}") from error
    if not hasattr(module, name):
        known = [key for key in vars(module) if not key.startswith("_")]
        raise ConfigError(f"{reference}: no {name!r} in it{nearest(name, known)}")
    return getattr(module, name)


def method(text: str) -> Method:
    """The method of ``NAME=package.module:factory``.

    The factory is an Optax gradient transformation, a :class:`Method`, or a function
    that makes one of them. A function's arguments are settings, and their defaults
    numbers, or a :class:`Setting` with the range that a sweep draws from::

        def mine(learning_rate=Setting(0.1, 1e-3, 1.0), momentum=0.9):
            return optax.sgd(learning_rate, momentum)

    Raises:
      ConfigError: for any other text or factory.
    """
    name, _, reference = text.partition("=")
    if not (name and reference):
        raise ConfigError(f"method takes NAME=package.module:factory, got {text!r}")
    factory = made = load(reference)
    if callable(made) and not isinstance(made, Method | optax.GradientTransformation):
        settings = _settings_of(reference, made)
        made = made(**{k: s.default for k, s in settings.items()})
        if settings and isinstance(made, optax.GradientTransformation):
            return from_optax(factory, settings, name=name, summary=reference)
    if isinstance(made, Method):
        return made._replace(name=name, parts=(name,))
    if isinstance(made, optax.GradientTransformation):
        return from_optax(made, name=name, summary=reference)
    raise ConfigError(
        f"{reference} must be or make an optax.GradientTransformation or a Method, "
        f"got {type(made).__name__}"
    )


def _settings_of(reference: str, factory: Any) -> dict[str, Setting]:
    settings = {}
    for name, parameter in inspect.signature(factory).parameters.items():
        default = parameter.default
        if isinstance(default, Setting):
            settings[name] = default
        elif isinstance(default, int | float) and not isinstance(default, bool):
            settings[name] = Setting(float(default))
        elif default is inspect.Parameter.empty:
            raise ConfigError(
                f"{reference}: its argument {name!r} needs a default, a number or a "
                "Setting with a range"
            )
    return settings


def model(reference: str, settings: Mapping[str, float]) -> Any:
    """The network of ``package.module:factory``, as ``run`` takes networks.

    The factory is called with ``rngs``, or is a Linen module or a pair of functions.
    Of a function, arguments with a number as default are settings.

    Args:
      reference: what to load.
      settings: numbers for some of its arguments.

    Raises:
      ConfigError: if there is no such factory, or it has no such setting.
    """
    made = load(reference)
    if not settings:
        return made
    if not callable(made):
        raise ConfigError(f"model {reference} has no settings")
    parameters = inspect.signature(made).parameters
    arguments = {k: p for k, p in parameters.items() if k != "rngs"}
    for name in settings:
        if name not in arguments:
            raise ConfigError(
                f"model {reference} has no setting {name!r}{nearest(name, arguments)}"
            )
    # A width or a depth must be whole, and --set reads every number as a float.
    numbers = {
        name: int(value) if isinstance(arguments[name].default, int) else value
        for name, value in settings.items()
    }
    return functools.partial(made, **numbers)
