"""The transforms that the benchmarks of a step compare, one line each."""

from typing import Any

import jax.numpy as jnp
import optax

import classp_jax
from classp_jax import regularizers, rivals

RATE, THRESHOLD, EPS = 0.01, 1e-6, 1e-5
BASELINE = "optax.adagrad"
POWERS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
_scaling = classp_jax.scale_by_generalized_adagrad


def classp(power: float = 1.0, **options: Any) -> Any:
    """``classp`` with the settings that all rows share."""
    return classp_jax.classp(RATE, THRESHOLD, power, EPS, **options)


def _with_pairs(
    tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """One that takes a pair of gradients, given the same array twice."""

    def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return tx.update((updates, updates), state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def transforms() -> dict[str, optax.GradientTransformation]:
    """Every contestant by name, the baseline first."""
    traced = optax.inject_hyperparams(classp_jax.classp)
    injected = classp_jax.inject_hyperparams(classp_jax.classp)
    protect = classp_jax.protect
    descent = optax.scale_by_learning_rate(RATE)
    mask, density = classp_jax.mask_by_threshold, classp_jax.mask_to_density
    return {
        BASELINE: optax.adagrad(RATE),
        "optax.sgd": optax.sgd(RATE),
        "optax.adam": optax.adam(RATE),
        "optax.adamw": optax.adamw(RATE),
        **{f"classp, power {power:g}": classp(power) for power in POWERS},
        "classp, power 1.7 (general)": classp(1.7),
        "classp, power traced": traced(RATE, THRESHOLD, 1.0, EPS),
        "classp, rate traced": injected(RATE, THRESHOLD, 1.0, EPS),
        "classp, threshold 0": classp_jax.classp(RATE, 0.0, 1.0, EPS),
        "classp, prior": classp(prior=1.0),
        "classp, window": classp(window=1000.0),
        "classp, eps_unit leaf": classp(eps_unit="leaf"),
        "classp, eps_unit tree": classp(eps_unit="tree"),
        "classp, bfloat16 sums": classp(accumulator_dtype=jnp.bfloat16),
        "mask_by_threshold, scaling": optax.chain(mask(THRESHOLD), _scaling(), descent),
        "mask_to_density, scaling": optax.chain(density(0.5), _scaling(), descent),
        "classp_published": classp_jax.classp_published(RATE),
        "protect(sgd)": protect(optax.sgd(RATE), eps=EPS),
        "protect(adamw)": protect(optax.adamw(RATE), eps=EPS),
        "l2_to_anchor, classp": optax.chain(regularizers.l2_to_anchor(1.0), classp()),
        "ewc, classp": optax.chain(regularizers.ewc(1.0), classp()),
        "online_ewc, classp": optax.chain(regularizers.online_ewc(1.0), classp()),
        "sgd, implicit_ewc": optax.chain(
            optax.sgd(RATE), regularizers.implicit_ewc(1.0)
        ),
        "si, classp": optax.chain(regularizers.si(1.0), classp()),
        "streaming_importance, sgd": optax.chain(
            rivals.streaming_importance(1.0), optax.sgd(RATE)
        ),
        "sgd, shrink_and_perturb": optax.chain(
            optax.sgd(RATE), rivals.shrink_and_perturb(1e-4, 1e-4)
        ),
        "upgd": rivals.upgd(RATE),
        "bayesian_gradient_descent": _with_pairs(
            rivals.bayesian_gradient_descent(1.0, window=1000.0)
        ),
    }
