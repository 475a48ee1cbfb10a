"""The optimizers to compare, each a gradient transformation with its settings."""

from typing import Any

import optax

import classp_jax
from classp_jax.continual.methods.compose import Part
from classp_jax.continual.methods.protocol import Setting


def _adagrad(learning_rate: Any, initial_accumulator: Any) -> Any:
    return optax.adagrad(
        learning_rate, initial_accumulator_value=initial_accumulator, eps=0.0
    )


def _classp_prior(**settings: Any) -> Any:
    return classp_jax.classp(eps=0.0, **settings)


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


_RATE = Setting(0.1, 1e-3, 1.0)
_EPS = Setting(0.1, 1e-6, 10.0)
_THRESHOLD = Setting(0.0, 1e-12, 1e-4)
_POWER = Setting(1.0, choices=(0.5, 1.0, 1.5, 2.0))
_CLASSP = {
    "learning_rate": _RATE,
    "eps": _EPS,
    "threshold": _THRESHOLD,
    "power": _POWER,
}

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
        "CLASSP whose first step per weight is bounded by a prior instead of epsilon",
        {
            "learning_rate": _RATE,
            "prior": Setting(3.0, 0.1, 1e3),
            "threshold": _THRESHOLD,
            "power": _POWER,
        },
        _classp_prior,
    ),
    "classp-density": Part(
        "CLASSP with a share of the weights that may move instead of a threshold",
        {
            "learning_rate": _RATE,
            "eps": _EPS,
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
            # As published, only a threshold below 1 does anything, and all act alike.
            "threshold": Setting(0.0),
            "power": _POWER,
        },
        classp_jax.classp_published,
    ),
}
"""By name. One line here is all that a new optimizer needs."""
