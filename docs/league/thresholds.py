"""CLASSP with a threshold, in four forms whose threshold is tuned with the rest."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import classp_jax
from classp_jax import continual


def mask_by_relative_threshold(times: Any) -> optax.GradientTransformation:
    """Keeps gradients with g² above so many times the mean of g² in their leaf."""

    def masked(g: jax.Array) -> jax.Array:
        squares = g * g
        return jnp.where(squares > times * squares.mean(), g, 0.0)

    return optax.stateless(lambda gradients, _: jax.tree.map(masked, gradients))


def _absolute(learning_rate: Any, eps: Any, least: Any) -> Any:
    return classp_jax.classp(learning_rate, threshold=least, eps=eps)


def _relative(learning_rate: Any, times: Any, **of_scale: Any) -> Any:
    return optax.chain(
        mask_by_relative_threshold(times),
        classp_jax.scale_by_generalized_adagrad(1.0, **of_scale),
        optax.scale_by_learning_rate(learning_rate),
    )


def _density(learning_rate: Any, eps: Any, density: Any) -> Any:
    return optax.chain(
        classp_jax.mask_to_density(density),
        classp_jax.scale_by_generalized_adagrad(1.0, eps),
        optax.scale_by_learning_rate(learning_rate),
    )


_RATE = continual.Setting(0.1, 1e-4, 1.0)
_EPS = continual.Setting(0.1, 1e-6, 10.0)
_TIMES = continual.Setting(1.0, 1e-3, 30.0)

THRESHOLDS: dict[str, continual.Method] = {
    "threshold+classp": continual.from_optax(
        _absolute,
        {
            "learning_rate": _RATE,
            "eps": _EPS,
            "least": continual.Setting(1e-8, 1e-12, 1e-4),
        },
    ),
    "relative-threshold+classp": continual.from_optax(
        _relative, {"learning_rate": _RATE, "eps": _EPS, "times": _TIMES}
    ),
    "density+classp": continual.from_optax(
        _density,
        {
            "learning_rate": _RATE,
            "eps": _EPS,
            "density": continual.Setting(0.3, 0.01, 1.0),
        },
    ),
    "relative-threshold+classp-window": continual.from_optax(
        _relative,
        {
            "learning_rate": _RATE,
            "eps": _EPS,
            "times": _TIMES,
            "window": continual.Setting(1e4, 1e2, 1e6, least=1.0),
        },
    ),
}
"""By name: ``KIND+METHOD``, to be held against the method without a threshold."""
