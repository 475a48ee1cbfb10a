"""The optimizers to compare, each a gradient transformation with its settings."""

import functools
from typing import Any

import jax.numpy as jnp
import optax

import classp_jax
from classp_jax import regularizers, rivals
from classp_jax.continual.methods.compose import Part
from classp_jax.continual.methods.protocol import Setting


def _adagrad(learning_rate: Any, initial_accumulator: Any) -> Any:
    # No sum is small enough to notice this epsilon. With zero in its place LLVM takes a
    # branch per weight, and a step takes twice as long.
    eps = float(jnp.finfo(jnp.float32).tiny)
    return optax.adagrad(
        learning_rate, initial_accumulator_value=initial_accumulator, eps=eps
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


def _classp_leaf(**settings: Any) -> Any:
    return classp_jax.classp(eps_unit="leaf", **settings)


def _classp_rising(
    learning_rate: Any, prior: Any, rise: float
) -> optax.GradientTransformationExtraArgs:
    def rate(step: Any) -> Any:
        return learning_rate * (1 + jnp.asarray(step, jnp.float32)) ** rise

    return classp_jax.classp(rate, eps=0.0, prior=prior)


def _classp_pull(learning_rate: Any, eps: Any, window: Any, pull: Any) -> Any:
    pulled = optax.chain(
        regularizers.l2_to_anchor(pull), optax.sgd(learning_rate / eps)
    )
    return classp_jax.protect(pulled, eps=eps, window=window)


def _protect_adam(learning_rate: Any, eps: Any) -> Any:
    return classp_jax.protect(optax.adam(learning_rate), eps=eps)


def _protect_rmsprop(learning_rate: Any, eps: Any) -> Any:
    direction = optax.scale_by_rms(0.999, bias_correction=True)
    inner = optax.chain(direction, optax.scale_by_learning_rate(learning_rate))
    return classp_jax.protect(inner, eps=eps)


def _sgd_decay(learning_rate: Any, weight_decay: Any) -> Any:
    return optax.chain(
        optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate)
    )


def _stable_sgd(learning_rate: Any, half_life: Any) -> Any:
    def rate(step: Any) -> Any:
        return learning_rate * jnp.exp2(-jnp.asarray(step, jnp.float32) / half_life)

    return optax.sgd(rate)


def _upgd(memory: Any, **settings: Any) -> Any:
    return rivals.upgd(utility_decay=1 - 1 / memory, **settings)


_RATE = Setting(0.1, 1e-3, 1.0)
_EPS = Setting(0.1, 1e-6, 10.0)
_THRESHOLD = Setting(0.0, 1e-12, 1e-4)
_POWER = Setting(1.0, choices=(0.5, 1.0, 1.5, 2.0))
_EVIDENCE = Setting(32.0, 1.0, 1e4)
_DEVIATION = Setting(0.05, 1e-3, 0.3)
_expected = functools.partial(rivals.value_and_expected_gradients, samples=2)
_WINDOW = Setting(1e4, 1e2, 1e6, least=1.0)
_EPS_LEAF = Setting(7.0, 1e-2, 100.0)
_WEIGHT_DECAY = Setting(1e-3, 1e-6, 1.0)
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
    "classp-root": Part(
        "CLASSP with a prior, whose rate grows with the root of the steps",
        {"learning_rate": _RATE, "prior": Setting(3.0, 0.1, 1e3)},
        functools.partial(_classp_rising, rise=0.5),
    ),
    "classp-mean": Part(
        "CLASSP with a prior that divides by the mean of a weight's gradients",
        {
            "learning_rate": Setting(1e-3, 1e-5, 1e-1),
            "prior": Setting(3.0, 0.1, 1e3),
        },
        functools.partial(_classp_rising, rise=1.0),
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
    "classp-window": Part(
        "CLASSP that remembers a window of steps",
        {"learning_rate": _RATE, "eps": _EPS, "window": _WINDOW},
        classp_jax.classp,
    ),
    "classp-leaf": Part(
        "CLASSP with epsilon in units of each layer's gradients",
        {"learning_rate": _RATE, "eps": _EPS_LEAF},
        _classp_leaf,
    ),
    "classp-leaf-window": Part(
        "CLASSP with epsilon in units of each layer's gradients and a window",
        {"learning_rate": _RATE, "eps": _EPS_LEAF, "window": _WINDOW},
        _classp_leaf,
    ),
    "classp-pull": Part(
        "CLASSP with a window and a pull to the initial weights",
        {
            "learning_rate": _RATE,
            "eps": _EPS,
            "window": _WINDOW,
            "pull": Setting(1e-3, 1e-6, 1e-1),
        },
        _classp_pull,
    ),
    "protect-adam": Part(
        "CLASSP's brake on Adam",
        {"learning_rate": Setting(1e-2, 1e-5, 1.0), "eps": _EPS},
        _protect_adam,
    ),
    "protect-rmsprop": Part(
        "CLASSP's brake on RMSprop without momentum",
        {"learning_rate": Setting(1e-2, 1e-5, 1.0), "eps": _EPS},
        _protect_rmsprop,
    ),
    "sgd-decay": Part(
        "SGD with weight decay",
        {"learning_rate": Setting(0.05, 1e-3, 1.0), "weight_decay": _WEIGHT_DECAY},
        _sgd_decay,
    ),
    "adamw": Part(
        "Adam with weight decay",
        {"learning_rate": Setting(1e-3, 1e-5, 1e-1), "weight_decay": _WEIGHT_DECAY},
        optax.adamw,
    ),
    "stable-sgd": Part(
        "SGD whose rate halves again and again; its network has dropout",
        {"learning_rate": Setting(0.1, 1e-3, 1.0), "half_life": Setting(1e3, 10, 1e5)},
        _stable_sgd,
    ),
    "upgd": Part(
        "UPGD-W, utility-based perturbed gradient descent",
        {
            "learning_rate": Setting(0.01, 1e-3, 1.0),
            "memory": Setting(1e3, 10, 1e5, least=1.0),
            "deviation": Setting(1e-3, 1e-5, 1e-1),
            "weight_decay": _WEIGHT_DECAY,
        },
        _upgd,
    ),
    "bgd": Part(
        "Bayesian gradient descent: a mean and a deviation per weight",
        {"evidence": _EVIDENCE, "deviation": _DEVIATION},
        rivals.bayesian_gradient_descent,
        differentiate=_expected,
    ),
    "mesu": Part(
        "MESU, Bayesian gradient descent that forgets",
        {"evidence": _EVIDENCE, "deviation": _DEVIATION, "window": _WINDOW},
        rivals.bayesian_gradient_descent,
        differentiate=_expected,
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
