"""The methods to compare: an optimizer, and what may be put in front of it.

A method's name is one optimizer and any of the additions, joined by ``+``:
``sgd``, ``ewc+classp``, ``replay+adam``. An addition alone stands on SGD.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

import classp_jax
from classp_jax import regularizers
from classp_jax.continual._names import nearest


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


_POWER = Setting(1.0, choices=(0.5, 1.0, 1.5, 2.0))

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
        {
            "learning_rate": Setting(0.1, 1e-3, 1.0),
            "eps": Setting(1e-2, 1e-6, 10.0),
            "threshold": Setting(0.0, 1e-12, 1e-4),
            "power": _POWER,
        },
        classp_jax.classp,
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
        return self.regularizer is not None

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
      ValueError: for an unknown part, two optimizers, two regularizers, or replay
        together with joint training.

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
    return Method(name, optimizers[0] if optimizers else "sgd", additions)


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


def settings_of(
    method: Method, layer: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """What one layer says of the method; the whole name wins over the parts.

    Raises:
      ValueError: for a setting that the part or method does not have.
    """
    settings: dict[str, float] = {}
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
    method: Method, settings: Mapping[str, Any]
) -> optax.GradientTransformationExtraArgs:
    """The method's gradient transformation: the regularizer, then the optimizer."""

    def make(part: Part) -> optax.GradientTransformation:
        assert part.make is not None
        return part.make(**{name: settings[name] for name in part.settings})

    transforms = [make(OPTIMIZERS[method.optimizer])]
    if method.regularizer is not None:
        transforms.insert(0, make(ADDITIONS[method.regularizer]))
    return optax.chain(*transforms)
