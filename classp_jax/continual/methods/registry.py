"""The methods that have a name, and what their settings are.

A name is one optimizer and any of the additions, joined by ``+``: ``sgd``,
``ewc+classp``, ``replay+adam``. An addition alone stands on SGD, and ``scale-later`` on
CLASSP.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import optax

from classp_jax.continual._names import nearest
from classp_jax.continual.errors import ContinualError
from classp_jax.continual.methods.boundary import (
    JOINT,
    LOWER_RATE_LATER,
    RESET_OPTIMIZER,
    SCALE_LATER,
)
from classp_jax.continual.methods.boundary_free import (
    L2_INIT,
    LABELS_TRICK,
    SHRINK_AND_PERTURB,
    STREAMING_EWC,
    STREAMING_MAS,
)
from classp_jax.continual.methods.compose import Part, compose, from_optax
from classp_jax.continual.methods.lwf import LWF
from classp_jax.continual.methods.optimizers import OPTIMIZERS
from classp_jax.continual.methods.protocol import Method
from classp_jax.continual.methods.published import EWC_PUBLISHED
from classp_jax.continual.methods.regularized import (
    EWC,
    IMPLICIT_EWC,
    MAS,
    ONLINE_EWC,
    SI,
)
from classp_jax.continual.methods.replay import REPLAY

T = TypeVar("T")

ADDITIONS: dict[str, Part] = {
    "ewc": EWC,
    "online-ewc": ONLINE_EWC,
    "implicit-ewc": IMPLICIT_EWC,
    "si": SI,
    "mas": MAS,
    "lwf": LWF,
    "streaming-ewc": STREAMING_EWC,
    "streaming-mas": STREAMING_MAS,
    "l2-init": L2_INIT,
    "shrink-and-perturb": SHRINK_AND_PERTURB,
    "ewc-published": EWC_PUBLISHED,
    "lower-rate-later": LOWER_RATE_LATER,
    "scale-later": SCALE_LATER,
    "reset-optimizer": RESET_OPTIMIZER,
    "replay": REPLAY,
    "joint": JOINT,
    "labels-trick": LABELS_TRICK,
}
"""What may stand in front of an optimizer, by name."""

METHODS: dict[str, str] = {
    name: part.summary for name, part in (OPTIMIZERS | ADDITIONS).items()
}
"""Every name that a method can be put together from, with one line about it."""

_SCALED = ("classp", "classp-prior", "classp-published")


def method(name: str) -> Method:
    """A method by its name.

    Args:
      name: an optimizer and any additions of :data:`METHODS`, joined by ``+``. The
        additions act in this order; an addition alone stands on SGD.

    Raises:
      ContinualError: for an unknown part, two optimizers, two regularizers, replay
        together with joint training, or scaling switched where there is none.

    Example:
      >>> from classp_jax import continual
      >>> continual.method("ewc+classp").parts
      ('classp', 'ewc', 'ewc+classp')
      >>> sorted(continual.method("ewc").settings)
      ['learning_rate', 'strength']
    """
    if not isinstance(name, str):
        raise ContinualError(f"a method is named by text, got {name!r}")
    names = name.split("+")
    for part in names:
        if part not in METHODS:
            raise ContinualError(f"unknown method {part!r}{nearest(part, METHODS)}")
    optimizers = [part for part in names if part in OPTIMIZERS]
    additions = [part for part in names if part in ADDITIONS]
    if len(optimizers) > 1:
        raise ContinualError(f"method {name!r} names more than one optimizer")
    if sum(ADDITIONS[a].replaces_gradient for a in additions) > 1:
        raise ContinualError(f"method {name!r} names more than one regularizer")
    if len(set(additions)) < len(additions) or {"replay", "joint"} <= set(additions):
        raise ContinualError(f"method {name!r} names additions that do not go together")
    default = "classp" if "scale-later" in additions else "sgd"
    optimizer = optimizers[0] if optimizers else default
    if "scale-later" in additions and optimizer not in _SCALED:
        raise ContinualError(
            f"method {name!r}: scale-later goes with {', '.join(_SCALED)}"
        )
    # Of the examples that are learned, also of those that replay adds.
    additions.sort(key=lambda part: part == "labels-trick")
    parts = dict.fromkeys((optimizer, *additions, name))
    return compose(
        name, OPTIMIZERS[optimizer], [ADDITIONS[a] for a in additions], tuple(parts)
    )


_method = method


def as_methods(methods: Any) -> dict[str, Method]:
    """What a caller may pass for methods, as methods by name.

    Args:
      methods: names, methods, or a mapping from a name of your choice to a name, a
        :class:`Method` or an optax transformation.

    Raises:
      ContinualError: for an unknown or repeated name, or none at all.
    """
    if isinstance(methods, str | Method):
        methods = [methods]
    if not isinstance(methods, Iterable):
        raise ContinualError(f"methods must be names or a mapping, got {methods!r}")
    pairs = (
        list(methods.items())
        if isinstance(methods, Mapping)
        else [(m.name if isinstance(m, Method) else m, m) for m in methods]
    )
    if not pairs:
        raise ContinualError("methods: at least one is needed")
    found: dict[str, Method] = {}
    for name, value in pairs:
        if not isinstance(name, str) or not name.strip():
            raise ContinualError(f"methods: a name must be text, got {name!r}")
        if name in found:
            raise ContinualError(f"methods: {name!r} is named twice")
        value = method(value) if isinstance(value, str) else value
        if isinstance(value, optax.GradientTransformation):
            found[name] = from_optax(value, name=name)
        elif isinstance(value, Method):
            parts = value.parts if name in value.parts else (*value.parts, name)
            found[name] = value._replace(name=name, parts=parts)
        else:
            raise ContinualError(
                f"method {name!r} must be a name, a Method or an optax transformation, "
                f"got {type(value).__name__}"
            )
    return found


def settings_of(method: Method, layer: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """What one layer says about the method; its own name wins over those of its parts.

    Args:
      method: the method.
      layer: settings by the name of a part (``"classp"``, ``"ewc"``) or of a whole
        method (``"ewc+classp"``).

    Raises:
      ContinualError: for a setting that the part or method does not have.
    """
    settings: dict[str, T] = {}
    for owner in method.parts or (method.name,):
        # "ewc" also names EWC on SGD, whose learning rate is not that of ewc+classp.
        if owner == method.name or owner not in METHODS:
            own = known = method.settings
        else:
            own = (OPTIMIZERS | ADDITIONS)[owner].settings
            known = _method(owner).settings
        values = layer.get(owner, {})
        if not isinstance(values, Mapping):
            raise ContinualError(
                f"{owner!r} takes a mapping from its settings' names, got {values!r}"
            )
        for name, value in values.items():
            if name not in known:
                raise ContinualError(
                    f"method {owner!r} has no setting {name!r}{nearest(name, known)}"
                )
            if name in own:
                settings[name] = value
    return settings


def check_owners(what: str, owners: Iterable[str], methods: Iterable[Method]) -> None:
    """Refuses settings of a method that does not take part.

    Args:
      what: what the error calls them.
      owners: the names of methods or parts that settings are given for.
      methods: the methods that take part.

    Raises:
      ContinualError: for a name that is neither one of them nor a part of one.
    """
    known = list(dict.fromkeys(p for m in methods for p in (m.name, *m.parts)))
    for owner in owners:
        if owner not in known:
            raise ContinualError(f"{what} names {owner!r}{nearest(owner, known)}")


def resolve_settings(
    method: Method, *layers: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """The method's settings: its defaults, then each layer's, all checked.

    Args:
      method: the method.
      layers: as in :func:`settings_of`; later layers win.

    Raises:
      ContinualError: for a setting that the method does not have, or a value that the
        setting does not take.
    """
    settings = {name: setting.default for name, setting in method.settings.items()}
    for layer in layers:
        settings |= settings_of(method, layer)
    return {
        name: _checked(f"{method.name}.{name}", value, method.settings[name])
        for name, value in settings.items()
    }


def _checked(where: str, value: Any, setting: Any) -> float:
    value = value.item() if hasattr(value, "item") else value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise ContinualError(f"{where} must be a finite number, got {value!r}")
    if value < setting.least:
        raise ContinualError(f"{where} must be at least {setting.least:g}: {value:g}")
    if setting.integer and value != int(value):
        raise ContinualError(f"{where} must be a whole number: {value:g}")
    return int(value) if setting.integer else float(value)
