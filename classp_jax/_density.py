"""Which weights move: a share of them, whatever the size of their gradients."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from classp_jax._arrays import (
    kept,
    magnitude,
    require_same_tree,
    transform,
    whole_size,
    whole_sum,
    working_dtype,
)
from classp_jax._hyperparams import ScalarOrSchedule, at_step, checked, positive


class MaskToDensityState(NamedTuple):
    """State of :func:`mask_to_density`."""

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    """Number of updates so far, int32."""
    level: optax.Updates
    """A tree like the parameters, of float32 scalars: how far the threshold is from its
    first guess, 1 at the start. One value stands in every leaf if the mask is over the
    whole tree."""


# The mean of sqrt(x), squared, over the mean of x, if x is exponentially distributed.
_ROOT_MEAN = math.pi / 4
# The threshold on |g|^2 goes with this power of the level.
_POWER = 8


def mask_to_density(
    density: ScalarOrSchedule,
    *,
    per_leaf: bool = True,
    rate: jax.typing.ArrayLike = 0.1,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the larger gradients, such that a given share of the weights moves.

    For gradients whose scale nobody knows: instead of a threshold on the gradient, name
    the share of weights to move, ``density`` :math:`d`, for each leaf or (``per_leaf``)
    for all together. In each step the threshold is a multiple :math:`y_t` of the size
    of this step's gradients, so a factor on all of them changes nothing; ``rate``
    :math:`\eta` is how fast that multiple follows the share seen:

    .. math::
      |g_t| > \frac{4}{\pi} \, \overline{\sqrt{|g_t|}}^{\,2} \,
      \log\frac{1}{d} \; \max(y_t, 0)^4

    With :math:`y = 1`, where it starts, the share is :math:`d` if magnitudes are
    exponentially distributed. When a step has moved a share :math:`d_t`,

    .. math::
      y_{t+1} = y_t + \frac{\eta}{8}\, \frac{d_t - d}{d (1 - d)}

    but not below :math:`-\eta / 8 (1 - d)`. Outliers hardly move a mean of roots.

    **What is guaranteed.** What a step moves too much, later ones move less. Whatever
    the gradients are, as long as at least a share :math:`d` of them is nonzero, after
    :math:`T` steps

    .. math::
      -d - c \le \sum_{t=1}^{T} (d_t - d) \le 1 - d + c \, (\max(m, 1) - 1), \quad
      c = \frac{8}{\eta} d (1 - d), \quad m^4 = \frac{\pi}{4 d^2 \log(1/d)}

    so the mean share is within :math:`21 / T` of :math:`d` at the default rate. This
    holds for leaves of any size (one weight alone moves in every :math:`1/d`-th step,
    whatever its gradient is then) and for gradients of equal size, which no threshold
    parts (all of them move in every :math:`1/d`-th step). In a large leaf with a
    smooth distribution each step is near :math:`d` after some ten. If fewer than the
    wanted share are nonzero for long, all of these move; the threshold is then 0 and
    rises once more of them are nonzero.

    A leaf whose gradients are all 0 leaves its level as it is. At :math:`d = 1` all
    nonzero gradients pass, at :math:`d = 0` none; the level waits. NaN and infinite
    gradients pass the mask; in such a step they alone do, and the level waits.

    Sharded gradients, under ``jit``, give what unsharded ones give. Inside
    ``jax.shard_map`` a leaf is the whole leaf, too: sums go over the mesh axes over
    which the gradient varies and the state does not. With ``check_vma=False`` JAX does
    not say which these are, and each shard is a leaf of its own.

    The gradients are read twice, once for their size and once for the mask.

    Args:
      density: :math:`d`, the share of weights to move, in (0, 1]; a number, a
        schedule ``step -> value`` or a scalar array. A schedule may reach 0.
      per_leaf: whether each leaf has a threshold of its own, or all share one.
      rate: :math:`\eta > 0`, the gain of the controller: the log of the threshold on
        :math:`|g|^2` moves by about this times :math:`(d_t - d) / d (1 - d)` a step.
        Larger follows faster and swings more; above about 0.3 it may not settle at
        small densities.

    Returns:
      A transform whose updates have the gradients' shapes and dtypes. Its state is a
      step count and one float32 scalar a leaf. Nothing has a derivative with respect
      to ``density`` or ``rate``.

    Raises:
      ValueError: if ``density`` is outside (0, 1] or ``rate`` is not above 0.
      TypeError: if one is no number, or if a leaf has no floating-point dtype.

    Example:
      >>> import jax
      >>> import classp_jax
      >>> tx = classp_jax.mask_to_density(0.2)
      >>> g = jax.random.normal(jax.random.key(0), (10_000,))
      >>> state = tx.init(g)
      >>> for _ in range(100):
      ...     updates, state = tx.update(g, state)
      >>> print(f"{classp_jax.update_density(updates):.2f}")
      0.20
    """
    density = checked(
        "density", density, "in (0, 1]", lambda x: 0 < x <= 1, schedule=True
    )
    rate = positive("rate", rate)
    if not isinstance(per_leaf, bool):
        raise TypeError(f"per_leaf must be a bool, got {per_leaf!r}.")

    def init(params: optax.Params) -> MaskToDensityState:
        levels = jax.tree.map(lambda _: jnp.ones([], jnp.float32), params)
        return MaskToDensityState(jnp.zeros([], jnp.int32), levels)

    def step(updates: Any, state: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        require_same_tree(updates, state.level)
        now = at_step(density, state.count)
        updates, levels = _masked(updates, state.level, now, rate, per_leaf)
        count = optax.safe_increment(state.count)
        return updates, MaskToDensityState(count, levels)

    return transform(init, step, MaskToDensityState)


# Compiled once for a tree of gradients where a caller has not compiled it himself.
@functools.partial(jax.jit, static_argnums=4, inline=True)
def _masked(
    gradients: Any, levels: Any, density: Any, rate: Any, per_leaf: bool
) -> tuple[Any, Any]:
    """The masked gradients and the next levels."""
    fixed, levels, density, rate = jax.lax.stop_gradient(
        (gradients, levels, density, rate)
    )
    d = jnp.clip(jnp.asarray(density, jnp.float32), 0, 1)
    if not per_leaf and jax.tree.leaves(levels):
        mean = _total(jax.tree.leaves(levels)) / len(jax.tree.leaves(levels))
        levels = jax.tree.map(lambda _: mean, levels)
    roots = jax.tree.map(lambda g: jnp.sqrt(magnitude(g)), fixed)
    roots = _means(roots, levels, per_leaf)
    exceeds = functools.partial(_exceeds_multiple, d)
    keep = jax.tree.map(exceeds, fixed, roots, levels)
    # Bytes, as XLA's CPU compiler would store the numbers to sum as wide as the sum.
    shares = jax.tree.map(lambda k: jnp.where(k, np.uint8(1), np.uint8(0)), keep)
    shares = _means(shares, levels, per_leaf)
    adapts = (d > 0) & (d < 1)
    gain = jnp.asarray(rate, jnp.float32) / _POWER / jnp.where(adapts, d * (1 - d), 1)

    def next_level(level: jax.Array, share: jax.Array, root: jax.Array) -> jax.Array:
        moved = jnp.maximum(level + gain * (share - d), -gain * d)
        return jnp.where(adapts & (root > 0) & jnp.isfinite(root), moved, level)

    masked = jax.tree.map(kept, keep, gradients)
    return masked, jax.tree.map(next_level, levels, shares, roots)


def _exceeds_multiple(d: Any, g: jax.Array, root: Any, level: Any) -> jax.Array:
    """Where ``|g|`` is above the threshold, given the mean of square roots."""
    factor = jnp.log(1 / jnp.maximum(d, jnp.finfo(d.dtype).tiny)) / _ROOT_MEAN
    multiple = jnp.sqrt(factor) * jnp.maximum(level, 0) ** (_POWER // 4)
    dtype = working_dtype(g)
    threshold = ((root * multiple.astype(root.dtype)) ** 2).astype(dtype)
    # Only what is NaN or infinite is not below the largest number.
    largest = jnp.finfo(dtype).max
    nothing_finite = (d == 0) | ~jnp.isfinite(root)
    threshold = jnp.where(nothing_finite, largest, jnp.minimum(threshold, largest))
    if jnp.iscomplexobj(g):
        return ~(jnp.abs(g) <= threshold)
    # Not by abs(g), which XLA would store, seeing that the mean needs it too.
    wide = g.astype(dtype)
    return ~((wide <= threshold) & (wide >= -threshold))


def _total(scalars: Sequence[jax.Array]) -> jax.Array:
    """The sum of one scalar for each leaf.

    Behind a barrier, as XLA would make a chain of additions of it and put the whole
    chain into each leaf's kernel, which takes minutes to compile with many leaves.
    """
    widest = np.result_type(*scalars)
    stacked = jnp.stack([scalar.astype(widest) for scalar in scalars])
    return jnp.sum(jax.lax.optimization_barrier(stacked))


def _means(tree: Any, levels: Any, per_leaf: bool) -> Any:
    """For each leaf its mean, or for each that of all."""
    sums, sizes = [], []
    for x, level in zip(jax.tree.leaves(tree), jax.tree.leaves(levels), strict=True):
        sums.append(whole_sum(x, level, np.promote_types(x.dtype, np.float32)))
        sizes.append(whole_size(x, level))
    if not per_leaf and sums:
        sums = [_total(sums)] * len(sums)
        sizes = [sum(sizes)] * len(sizes)
    means = [total / max(size, 1) for total, size in zip(sums, sizes, strict=True)]
    return jax.tree.structure(tree).unflatten(means)
