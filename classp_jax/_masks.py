"""Which weights move: those with a gradient above a threshold."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from classp_jax._arrays import kept, magnitude, transform, working_dtype
from classp_jax._hyperparams import ScalarOrSchedule, at_step, non_negative


class MaskByThresholdState(NamedTuple):
    """State of :func:`mask_by_threshold`."""

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    """Number of updates so far, int32."""


def passes(g: jax.Array, threshold: Any) -> Any:
    """Where ``|g|^2 > threshold``: bools like ``g``, or True for all of them.

    True where ``g`` is NaN, so that it stays visible. At a threshold of 0 (or one below
    the smallest normal number of the working dtype) everything passes: a zero is
    nothing to mask, and the derivative of what follows is not cut off there.
    """
    cutoff = _cutoff(threshold, working_dtype(g))
    if isinstance(threshold, float) and cutoff < 0:
        return True
    # One comparison of one array: what XLA repeats rather than stores (_accumulate).
    return ~(magnitude(g) <= cutoff)


def _cutoff(threshold: Any, dtype: Any) -> Any:
    """The largest ``x`` whose square, rounded to ``dtype``, is not above the threshold.

    Comparing ``|g|`` with it decides as comparing the rounded ``|g|^2`` would, without
    its under- and overflow. It is within one step of the rounded root; -1 at 0.
    """
    xp = np if isinstance(threshold, float) else jnp
    limits = jnp.finfo(dtype)
    if xp is jnp:
        # The mask is a step function: its derivative is 0.
        threshold = jax.lax.stop_gradient(jnp.asarray(threshold, dtype))
    tau = xp.minimum(xp.asarray(threshold), limits.max).astype(dtype)
    root = xp.sqrt(xp.maximum(tau, xp.zeros_like(tau)))
    if xp is jnp:
        # XLA takes the square of a root for the number itself.
        root = jax.lax.optimization_barrier(root)
    above = xp.nextafter(root, xp.full_like(root, np.inf))
    below = xp.nextafter(root, xp.zeros_like(root))
    with np.errstate(over="ignore"):
        exact = xp.where(root * root <= tau, root, below)
        exact = xp.where(above * above <= tau, above, exact)
    return xp.where(tau < limits.tiny, -xp.ones_like(root), exact)


def mask_by_threshold(
    threshold: ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps a gradient where its square is above a threshold, else makes it 0.

    ``threshold`` :math:`\tau` is in units of the squared gradient. The comparison is
    strict, so at 0 only exact zeros are masked:

    .. math::
      u_t = \begin{cases} g_t & |g_t|^2 > \tau \\ 0 & \text{otherwise} \end{cases}

    It compares in float32 for gradients of 16 bits, else in the gradient's own
    precision. A threshold below the smallest normal number of that precision counts as
    0. NaN and infinite gradients pass the mask.

    Args:
      threshold: :math:`\tau \ge 0`, what :math:`|g|^2` must exceed; a finite number, a
        schedule ``step -> value``, or a scalar array.

    Returns:
      A transform whose updates have the gradients' shapes and dtypes. Its state is a
      step count.

    Raises:
      ValueError: if ``threshold`` is negative, infinite, NaN or no scalar.
      TypeError: if it is no number, or if a leaf has no floating-point dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> import classp_jax
      >>> tx = classp_jax.mask_by_threshold(0.25)
      >>> g = jnp.array([0.5, -0.6, 0.1])
      >>> updates, state = tx.update(g, tx.init(g))
      >>> print(updates)
      [ 0.  -0.6  0. ]

    References:
      Ludwig, `CLASSP <https://arxiv.org/abs/2405.09637>`_, 2024, Algorithm 1
    """
    threshold = non_negative("threshold", threshold, schedule=True)

    def init(_: optax.Params) -> MaskByThresholdState:
        return MaskByThresholdState(count=jnp.zeros([], jnp.int32))

    def step(updates: Any, state: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        tau = at_step(threshold, state.count)
        updates = jax.tree.map(lambda g: kept(passes(g, tau), g), updates)
        return updates, MaskByThresholdState(optax.safe_increment(state.count))

    return transform(init, step, MaskByThresholdState)
