"""The methods that the study compares, each with the settings that are tuned."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import qmc

import classp_jax
from classp_jax import finetune, regularizers

RANK = 4
"""Of LoRA's factors."""

TEMPERATURES = (1.0, 2.0, 4.0)
"""Of the softmax whose Fisher information EWC takes."""


class Knowledge(NamedTuple):
    """What is kept of the old task. Importances and Fisher diagonals have mean 1."""

    params: Any
    importance: Any
    fishers: tuple[Any, ...]
    """One for each of the temperatures."""


class Method(NamedTuple):
    """How to fine-tune."""

    ranges: dict[str, tuple[float, float]]
    """The lowest and highest value of each setting, on a logarithmic scale."""
    optimizer: Callable[[Any, Knowledge], Any]
    """``(settings, knowledge) -> transform``."""
    fill: Callable[[Any, Any, Knowledge], Any] | None = None
    """``(state, settings, knowledge) -> state`` with what was learned of the old."""
    replay: bool = False
    low_rank: bool = False
    trained_as: str | None = None
    """The method that trains, where this one only merges what came of it."""
    merge: Callable[[Any, Knowledge, Any, Any], Any] | None = None
    """``(settings, knowledge, trained, share) -> params``: the curve then leads with
    the share from the old weights to the new ones, not along the steps."""


RATE = (5e-5, 2e-3)
"""AdamW's learning rate; under a brake, that of a weight of mean importance."""

EPS = (3e-3, 3.0)
"""In units of the mean importance."""

MERGING = (3e-2, 1e2)
"""The epsilons between which a curve of merged weights leads, in the same units."""


def masked_to_largest_momenta(fraction: Any) -> optax.GradientTransformation:
    """Adam's direction where the momentum is among the leaf's largest, else 0.

    The quantile is that of at most 4,096 entries of a leaf, evenly spaced.
    """
    adam: Any = optax.scale_by_adam()

    def update(gradients: Any, state: Any, params: Any = None) -> Any:
        updates, state = adam.update(gradients, state, params)

        def masked(u: jax.Array, m: jax.Array) -> jax.Array:
            sizes = jnp.abs(m).ravel()
            some = sizes[:: math.ceil(sizes.size / 4096)]
            return jnp.where(jnp.abs(m) >= jnp.quantile(some, 1 - fraction), u, 0.0)

        return jax.tree.map(masked, updates, state.mu), state

    make: Any = optax.GradientTransformation
    return make(adam.init, update)


def low_rank_factors(params: Any, seed: int = 0) -> Any:
    """LoRA's two factors for each matrix; the product is 0 at first."""
    rng = np.random.default_rng(seed)

    def factors(w: jax.Array) -> Any:
        if w.ndim != 2:
            return None
        m, n = w.shape
        down = jnp.asarray(rng.normal(0, m**-0.5, (m, RANK)), jnp.float32)
        return {"down": down, "up": jnp.zeros([RANK, n])}

    return jax.tree.map(factors, params)


def with_low_rank(params: Any, factors: Any, scale: Any) -> Any:
    """The weights with LoRA's products added."""

    def merged(w: jax.Array, f: Any) -> jax.Array:
        return w if f is None else w + scale * (f["down"] @ f["up"])

    return jax.tree.map(merged, params, factors)


def _filled(state: Any, settings: Any, knowledge: Knowledge) -> Any:
    strength = settings.get("strength", 1.0)
    return finetune.put_importance(state, knowledge.importance, strength=strength)


def _fisher(settings: Any, knowledge: Knowledge) -> Any:
    stacked = jax.tree.map(lambda *f: jnp.stack(f), *knowledge.fishers)
    # 1 to 1000 on a logarithmic scale, in three equal parts.
    third = jnp.log10(settings.get("temperature", 1.0)).astype(jnp.int32)
    chosen = jnp.clip(third, 0, len(TEMPERATURES) - 1)
    return jax.tree.map(lambda f: f[chosen], stacked)


def _consolidated(state: Any, settings: Any, knowledge: Knowledge) -> Any:
    fisher = _fisher(settings, knowledge)
    return regularizers.consolidate(state, knowledge.params, fisher)


def _both(state: Any, settings: Any, knowledge: Knowledge) -> Any:
    return _consolidated(_filled(state, settings, knowledge), settings, knowledge)


def _averaged(_: Any, knowledge: Knowledge, trained: Any, share: Any) -> Any:
    return jax.tree.map(lambda a, b: a + share * (b - a), knowledge.params, trained)


def _merged(settings: Any, knowledge: Knowledge, trained: Any, share: Any) -> Any:
    low, high = MERGING
    fisher = _fisher(settings, knowledge)
    eps = low * (high / low) ** share
    return finetune.merge(knowledge.params, trained, fisher, eps=eps, power=2.0)


def _adamw(s: Any, _: Knowledge) -> Any:
    return optax.adamw(s["learning_rate"])


def _classp(s: Any, _: Knowledge) -> Any:
    return classp_jax.classp(s["learning_rate"], eps=s["eps"])


def _protect(*inner: Callable[[Any], Any], frozen: bool = True) -> Any:
    def make(s: Any, _: Knowledge) -> Any:
        mean = s.get("strength", 1.0)
        adamw = optax.adamw(s["learning_rate"] * (s["eps"] + mean) / s["eps"])
        chained = optax.chain(*(part(s) for part in inner), adamw)
        return classp_jax.protect(chained, eps=s["eps"], frozen=frozen)

    return make


def _pull(s: Any) -> Any:
    return regularizers.l2_to_anchor(s["pull"])


def _ewc(s: Any) -> Any:
    return regularizers.ewc(s["ewc"])


PULL = (1e-2, 1e1)
STRENGTH = (1e-2, 1e1)
TEMPERATURE = (1.0, 1e3)
CLASSP_RATE, CLASSP_EPS = (3e-3, 0.3), (1e-3, 0.3)
FILLED = (1e-2, 3.0)

METHODS: dict[str, Method] = {
    "AdamW": Method({"learning_rate": RATE}, _adamw),
    "averaging": Method(
        {"learning_rate": RATE}, _adamw, trained_as="AdamW", merge=_averaged
    ),
    "L2 to the start": Method(
        {"learning_rate": RATE, "pull": PULL},
        lambda s, k: optax.chain(_pull(s), _adamw(s, k)),
    ),
    "EWC": Method(
        {"learning_rate": RATE, "ewc": STRENGTH, "temperature": TEMPERATURE},
        lambda s, k: optax.chain(_ewc(s), _adamw(s, k)),
        _consolidated,
    ),
    "LoRA": Method(
        {"learning_rate": (3e-4, 1e-2), "scale": (0.3, 10.0)}, _adamw, low_rank=True
    ),
    "MoFO": Method(
        {"learning_rate": RATE, "fraction": (0.01, 0.5)},
        lambda s, k: optax.chain(
            masked_to_largest_momenta(s["fraction"]),
            optax.scale_by_learning_rate(s["learning_rate"]),
        ),
    ),
    "replay of 1 %": Method(
        {"learning_rate": RATE, "ratio": (0.1, 10.0)}, _adamw, replay=True
    ),
    "CLASSP, empty": Method({"learning_rate": CLASSP_RATE, "eps": CLASSP_EPS}, _classp),
    "CLASSP, filled": Method(
        {"learning_rate": CLASSP_RATE, "eps": CLASSP_EPS, "strength": FILLED},
        _classp,
        _filled,
    ),
    "protect(AdamW), frozen": Method(
        {"learning_rate": RATE, "eps": EPS}, _protect(), _filled
    ),
    "protect(AdamW), growing": Method(
        {"learning_rate": RATE, "eps": CLASSP_EPS, "strength": FILLED},
        _protect(frozen=False),
        _filled,
    ),
    "protect(pull, AdamW)": Method(
        {"learning_rate": RATE, "eps": EPS, "pull": PULL},
        _protect(_pull),
        _filled,
    ),
    "protect(EWC, AdamW)": Method(
        {
            "learning_rate": RATE,
            "eps": EPS,
            "ewc": STRENGTH,
            "temperature": TEMPERATURE,
        },
        _protect(_ewc),
        _both,
    ),
    "EWC, averaged": Method(
        {"learning_rate": RATE, "ewc": STRENGTH, "temperature": TEMPERATURE},
        lambda s, k: optax.chain(_ewc(s), _adamw(s, k)),
        _consolidated,
        trained_as="EWC",
        merge=_averaged,
    ),
    "protect(AdamW), averaged": Method(
        {"learning_rate": RATE, "eps": EPS},
        _protect(),
        _filled,
        trained_as="protect(AdamW), frozen",
        merge=_averaged,
    ),
    "AdamW, merged by importance": Method(
        {"learning_rate": RATE, "temperature": TEMPERATURE},
        _adamw,
        trained_as="AdamW",
        merge=_merged,
    ),
    "EWC, merged by importance": Method(
        {"learning_rate": RATE, "ewc": STRENGTH, "temperature": TEMPERATURE},
        lambda s, k: optax.chain(_ewc(s), _adamw(s, k)),
        _consolidated,
        trained_as="EWC",
        merge=_merged,
    ),
}

OURS = [
    name
    for name in METHODS
    if name.startswith(("CLASSP, f", "protect")) or "by importance" in name
]


def trials(method: Method, count: int) -> list[dict[str, float]]:
    """Settings spread evenly over the ranges, the same number for every method."""
    halton: Any = qmc.Halton  # by its former argument: rng=0 gives other points
    points = halton(len(method.ranges), seed=0).random(count)
    return [
        {
            name: float(f"{low * (high / low) ** u:.4g}")
            for u, (name, (low, high)) in zip(p, method.ranges.items(), strict=True)
        }
        for p in points
    ]
