"""The user's own methods and models, named as ``package.module:factory``."""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any

import optax
from flax import linen, nnx

from classp_jax.continual._names import nearest
from classp_jax.continual.adapters import parameters_of
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
    found = factory = load(reference)
    if callable(found) and not isinstance(found, Method | optax.GradientTransformation):
        settings = _settings_of(reference, factory)
        found = factory(**{k: s.default for k, s in settings.items()})
        if settings and isinstance(found, optax.GradientTransformation):
            return from_optax(factory, settings, name=name, summary=reference)
    if isinstance(found, Method):
        return found._replace(name=name, parts=(name,))
    if isinstance(found, optax.GradientTransformation):
        return from_optax(found, name=name, summary=reference)
    raise ConfigError(
        f"{reference} must be or make an optax.GradientTransformation or a Method, "
        f"got {type(found).__name__}"
    )


def _settings_of(reference: str, factory: Any) -> dict[str, Setting]:
    settings = {}
    for name, parameter in inspect.signature(factory).parameters.items():
        setting = _as_setting(parameter.default)
        if setting is not None:
            settings[name] = setting
        elif parameter.default is inspect.Parameter.empty:
            raise ConfigError(
                f"{reference}: its argument {name!r} needs a default, a number or a "
                "Setting with a range"
            )
    return settings


def _as_setting(default: Any) -> Setting | None:
    """An argument's default as a setting; None if it is no number."""
    if isinstance(default, Setting):
        return default
    if isinstance(default, int | float) and not isinstance(default, bool):
        return Setting(float(default))
    return None


def model(reference: str, settings: Mapping[str, float]) -> Any:
    """The network of ``package.module:factory``, as ``run`` takes networks.

    The factory is a function or a class that is called with ``rngs`` and gives an NNX
    module, or without and gives a Linen module or a pair of functions; or it is one of
    these itself. Arguments with a number as default, or a :class:`Setting`, are
    settings.

    Args:
      reference: what to load.
      settings: numbers for some of its arguments.

    Raises:
      ConfigError: if there is no such factory, or it has no such setting.
    """
    factory = load(reference)
    is_factory = callable(factory) and not isinstance(
        factory, linen.Module | nnx.Module
    )
    parameters = parameters_of(factory) if is_factory else {}
    known = {
        name: setting
        for name, parameter in parameters.items()
        if (setting := _as_setting(parameter.default)) is not None
    }
    for name in settings:
        if name not in known:
            hint = nearest(name, known) if known else "; it has none"
            raise ConfigError(f"model {reference} has no setting {name!r}{hint}")
    numbers = {
        name: _number(f"model.{name}", value, parameters[name].default)
        for name, value in settings.items()
    }
    for name, setting in known.items():
        if isinstance(parameters[name].default, Setting):
            whole = int(setting.default) if setting.integer else setting.default
            numbers.setdefault(name, whole)
    needed = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty]
    if is_factory and not needed and "rngs" not in parameters:
        return factory(**numbers)
    return functools.partial(factory, **numbers) if numbers else factory


def _number(where: str, value: float, default: Any) -> float:
    """What ``--set`` reads as a float, whole where a width or a depth must be."""
    whole = (
        default.integer if isinstance(default, Setting) else isinstance(default, int)
    )
    if not whole:
        return value
    if value != int(value):
        raise ConfigError(f"{where} must be a whole number: {value:g}")
    return int(value)
