"""The methods to compare: an optimizer, and what may be put in front of it.

A method's name is one optimizer and any of the additions, joined by ``+``:
``sgd``, ``ewc+classp``, ``replay+adam``. An addition alone stands on SGD, and
``scale-later`` on CLASSP.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import optax

import classp_jax
from classp_jax import regularizers
from classp_jax.continual._names import nearest

T = TypeVar("T")


class Setting(NamedTuple):
    """A hyperparameter: its default, and what a sweep may draw.

    A sweep draws from ``choices`` if there are any, else log-uniformly from ``low`` to
    ``high``. A setting with choices is compiled into the step; the others are traced in
    a sweep, so that many of their values train together.
    """

    default: float
    low: float = 0.0
    high: float = 0.0
    choices: tuple[float, ...] = ()


class Part(NamedTuple):
    """An optimizer or an addition: what it does and what can be set."""

    summary: str
    settings: dict[str, Setting]
    make: Callable[..., optax.GradientTransformation] | None = None


def _adagrad(learning_rate: Any, initial_accumulator: Any) -> Any:
    return optax.adagrad(
        learning_rate, initial_accumulator_value=initial_accumulator, eps=0.0
    )


def _classp_density(learning_rate: Any, eps: Any, density: Any, power: Any) -> Any:
    return optax.chain(
        classp_jax.mask_to_density(density),
        classp_jax.scale_by_generalized_adagrad(power, eps),
        optax.scale_by_learning_rate(learning_rate),
    )


def _classp_exclusive(learning_rate: Any, eps: Any, threshold: Any, power: Any) -> Any:
    return optax.chain(
        classp_jax.mask_by_threshold(threshold),
        classp_jax.scale_by_generalized_adagrad(power, eps, include_current=False),
        optax.scale_by_learning_rate(learning_rate),
    )


_POWER = Setting(1.0, choices=(0.5, 1.0, 1.5, 2.0))
_CLASSP = {
    "learning_rate": Setting(0.1, 1e-3, 1.0),
    "eps": Setting(1e-2, 1e-6, 10.0),
    "threshold": Setting(0.0, 1e-12, 1e-4),
    "power": _POWER,
}

_SCALED = ("classp", "classp-prior", "classp-published")

OPTIMIZERS: dict[str, Part] = {
    "sgd": Part(
        "stochastic gradient descent",
        {"learning_rate": Setting(0.05, 1e-3, 1.0)},
        optax.sgd,
    ),
    "adam": Part(
        "Adam",
        {"learning_rate": Setting(1e-3, 1e-5, 1e-1)},
        optax.adam,
    ),
    "adagrad": Part(
        "AdaGrad",
        {
            "learning_rate": Setting(0.05, 1e-3, 1.0),
            "initial_accumulator": Setting(0.1, 1e-6, 10.0),
        },
        _adagrad,
    ),
    "classp": Part(
        "CLASSP, Algorithm 1 of the paper",
        _CLASSP,
        classp_jax.classp,
    ),
    "classp-prior": Part(
        "CLASSP that bounds a weight's first step by a prior in place of epsilon",
        {
            "learning_rate": _CLASSP["learning_rate"],
            "prior": Setting(3.0, 0.1, 1e3),
            "threshold": _CLASSP["threshold"],
            "power": _POWER,
        },
        functools.partial(classp_jax.classp, eps=0.0),
    ),
    "classp-density": Part(
        "CLASSP with a share of the weights that may move in place of a threshold",
        {
            "learning_rate": _CLASSP["learning_rate"],
            "eps": _CLASSP["eps"],
            "density": Setting(0.3, 0.01, 1.0),
            "power": _POWER,
        },
        _classp_density,
    ),
    "classp-exclusive": Part(
        "CLASSP whose accumulator leaves the current gradient out (equation 1)",
        _CLASSP,
        _classp_exclusive,
    ),
    "classp-published": Part(
        "the PyTorch class published with the paper, step for step",
        {
            "learning_rate": Setting(0.2, 1e-3, 1.0),
            "eps": Setting(1e-5, 1e-6, 10.0),
            "threshold": Setting(0.0, choices=(0.0,)),
            "power": _POWER,
        },
        classp_jax.classp_published,
    ),
}

ADDITIONS: dict[str, Part] = {
    "ewc": Part(
        "elastic weight consolidation, the Fisher of every task; told the boundary",
        {"strength": Setting(100.0, 1e-1, 1e5)},
        regularizers.ewc,
    ),
    "online-ewc": Part(
        "online EWC, a decayed sum of Fishers; told the boundary",
        {"strength": Setting(100.0, 1e-1, 1e5), "decay": Setting(1.0, 0.5, 1.0)},
        regularizers.online_ewc,
    ),
    "si": Part(
        "synaptic intelligence, importance from the path; told the boundary",
        {"strength": Setting(1.0, 1e-3, 1e3), "damping": Setting(0.1, 1e-3, 1.0)},
        regularizers.si,
    ),
    "ewc-published": Part(
        "the published script's EWC: Fisher of batch-mean gradients and anchor of "
        "another network, after the first pass; told the boundary",
        {"strength": Setting(10_000.0, 1e-1, 1e5)},
        regularizers.ewc,
    ),
    "second-rate": Part(
        "another learning rate from the second task on; told the boundary",
        {"second_rate": Setting(0.01, 1e-4, 1.0)},
    ),
    "scale-later": Part(
        "CLASSP's scaling off in the first task, on in later ones, as in the published "
        "script; told the boundary",
        {},
    ),
    "reset": Part(
        "the optimizer's state begins anew with every task; told the boundary",
        {},
    ),
    "replay": Part(
        "experience replay from a reservoir, one stored batch beside each new one",
        {"replay_size": Setting(200, choices=(200,))},
    ),
    "joint": Part(
        "all tasks' data at once, the upper bound",
        {},
    ),
}


class Method(NamedTuple):
    """What a method's name says."""

    name: str
    optimizer: str
    additions: tuple[str, ...]

    @property
    def regularizer(self) -> str | None:
        """The addition that changes the gradient, if there is one."""
        found = [a for a in self.additions if ADDITIONS[a].make is not None]
        return found[0] if found else None

    @property
    def told_boundary(self) -> bool:
        """Whether it is told where a task ends."""
        return self.regularizer is not None or self.changes_later or self.resets

    @property
    def changes_later(self) -> bool:
        """Whether its step is another one from the second task on."""
        return not {"second-rate", "scale-later"}.isdisjoint(self.additions)

    @property
    def resets(self) -> bool:
        """Whether the optimizer's state begins anew with every task."""
        return "reset" in self.additions

    @property
    def as_published(self) -> bool:
        """Whether the Fisher comes from another network, as in the paper's script."""
        return self.regularizer == "ewc-published"

    @property
    def consolidates(self) -> bool:
        """Whether a regularizer is told of every task's end."""
        return self.regularizer is not None and not self.as_published

    @property
    def needs_fisher(self) -> bool:
        """Whether it wants the Fisher information at a task's end."""
        return self.regularizer in ("ewc", "online-ewc")

    @property
    def settings(self) -> dict[str, Setting]:
        """What can be set, the optimizer's first."""
        settings = dict(OPTIMIZERS[self.optimizer].settings)
        for addition in self.additions:
            settings |= ADDITIONS[addition].settings
        return settings


def parse_method(name: str) -> Method:
    """Reads a method's name.

    Raises:
      ValueError: for an unknown part, two optimizers, two regularizers, replay
        together with joint training, or scaling switched where there is none.

    Example:
      >>> from classp_jax.continual.methods import parse_method
      >>> parse_method("ewc+classp")
      Method(name='ewc+classp', optimizer='classp', additions=('ewc',))
      >>> parse_method("ewc").optimizer
      'sgd'
    """
    parts = name.split("+")
    for part in parts:
        if part not in OPTIMIZERS and part not in ADDITIONS:
            raise ValueError(
                f"unknown method {part!r}{nearest(part, [*OPTIMIZERS, *ADDITIONS])}"
            )
    optimizers = [part for part in parts if part in OPTIMIZERS]
    additions = tuple(part for part in parts if part in ADDITIONS)
    if len(optimizers) > 1:
        raise ValueError(f"method {name!r} names more than one optimizer")
    if sum(ADDITIONS[a].make is not None for a in additions) > 1:
        raise ValueError(f"method {name!r} names more than one regularizer")
    if len(set(additions)) < len(additions) or {"replay", "joint"} <= set(additions):
        raise ValueError(f"method {name!r} names additions that do not go together")
    optimizer = "classp" if "scale-later" in additions else "sgd"
    optimizer = optimizers[0] if optimizers else optimizer
    if "scale-later" in additions and optimizer not in _SCALED:
        raise ValueError(f"method {name!r}: scale-later goes with {', '.join(_SCALED)}")
    return Method(name, optimizer, additions)


def resolve_settings(
    method: Method, *layers: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """The method's settings: defaults, then each layer's, by part and by whole name.

    Args:
      method: the method.
      layers: settings by the name of a part (``"classp"``, ``"ewc"``) or of a whole
        method (``"ewc+classp"``); later layers win, and within a layer the whole name.

    Raises:
      ValueError: for a setting that the part or method does not have.
    """
    settings = {name: setting.default for name, setting in method.settings.items()}
    for layer in layers:
        settings |= settings_of(method, layer)
    return settings


def settings_of(method: Method, layer: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """What one layer says of the method; the whole name wins over the parts.

    Raises:
      ValueError: for a setting that the part or method does not have.
    """
    settings: dict[str, T] = {}
    owners = [method.optimizer, *method.additions]
    if method.name not in owners:
        owners.append(method.name)
    for owner in owners:
        # "ewc" also names EWC on SGD, whose learning rate is none of ewc+classp's.
        own = (
            method.settings
            if owner == method.name
            else (OPTIMIZERS | ADDITIONS)[owner].settings
        )
        known = parse_method(owner).settings
        for name, value in layer.get(owner, {}).items():
            if name not in known:
                raise ValueError(
                    f"method {owner!r} has no setting {name!r}{nearest(name, known)}"
                )
            if name in own:
                settings[name] = value
    return settings


def make_transform(
    method: Method, settings: Mapping[str, Any], *, later: Any = False
) -> optax.GradientTransformationExtraArgs:
    """The method's gradient transformation: the regularizer, then the optimizer.

    Args:
      method: the method.
      settings: its settings, numbers or traced scalars.
      later: whether the first task is over, which only methods that change their step
        then ask for; a bool or a traced one. The state's tree does not depend on it.
    """

    def make(part: Part, **more: Any) -> optax.GradientTransformation:
        assert part.make is not None
        return part.make(**{name: settings[name] for name in part.settings} | more)

    now: dict[str, Any] = {}
    if "second-rate" in method.additions:
        rates = settings["second_rate"], settings["learning_rate"]
        now["learning_rate"] = jnp.where(later, *rates)
    if "scale-later" in method.additions:
        now["scaling"] = jnp.asarray(later)
    transforms = [make(OPTIMIZERS[method.optimizer], **now)]
    if method.regularizer is not None:
        transforms.insert(0, make(ADDITIONS[method.regularizer]))
    return optax.chain(*transforms)
