"""Which weights move: masks on the gradient, by threshold or by density."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from classp_jax._arrays import (
    float_arrays,
    kept,
    magnitude,
    require_same_tree,
    working_dtype,
)
from classp_jax._hyperparams import (
    ScalarOrSchedule,
    at_step,
    checked,
    non_negative,
    positive,
)


class MaskByThresholdState(NamedTuple):
    """State of :func:`mask_by_threshold`."""

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    """Number of updates so far, int32."""


class MaskToDensityState(NamedTuple):
    """State of :func:`mask_to_density`."""

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    """Number of updates so far, int32."""
    log_threshold: optax.Updates
    """A tree like the parameters, of float32 scalars: the log of the threshold on
    ``|g|^2``. One value stands in every leaf if the mask is over the whole tree.
    Minus infinity until the first gradients that are not all 0."""


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

    .. math::
      u_t = \begin{cases} g_t & |g_t|^2 > \tau \\ 0 & \text{otherwise} \end{cases}

    The comparison is strict, so at :math:`\tau = 0` only exact zeros are masked. It is
    made in float32 for gradients of 16 bits, else in the gradient's own precision; a
    complex gradient is judged by :math:`|g|^2`. A threshold below the smallest normal
    number of that precision counts as 0. NaN and infinite gradients pass the mask.

    Args:
      threshold: :math:`\tau`, in units of the squared gradient; a finite number of at
        least 0, a schedule ``step -> value``, or a scalar array.

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

    def init_fn(params: optax.Params) -> MaskByThresholdState:
        float_arrays(params, "parameter")
        return MaskByThresholdState(count=jnp.zeros([], jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MaskByThresholdState]:
        del params, extra_args
        updates = float_arrays(updates, "gradient")
        tau = at_step(threshold, state.count)
        updates = jax.tree.map(lambda g: kept(passes(g, tau), g), updates)
        return updates, MaskByThresholdState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# The range of log(|g|^2) for normal float32 magnitudes |g|.
_LOG_RANGE = (-174.0, 177.0)
# The log-threshold moves by at most this many times the rate in one step.
_MAX_ERROR = 10.0


def mask_to_density(
    density: ScalarOrSchedule,
    *,
    per_leaf: bool = True,
    rate: float = 0.1,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the larger gradients, adapting the threshold to a share of the weights.

    For gradients whose scale nobody knows: instead of a threshold on the squared
    gradient, name the share of weights that shall move. After each step with the share
    :math:`d_t` of moving weights the threshold follows by

    .. math::
      \log\tau_{t+1} = \log\tau_t + \eta\, \frac{d_t - d}{d (1 - d)},

    whose fixed point is :math:`d_t = d` on average, for a leaf of any size. The
    fraction is cut off at :math:`\pm 10`, or at what one weight makes of it where that
    is more. The first threshold comes from the first gradients that are not all 0:
    :math:`\sqrt{\tau_0} = -\log(d)\, \overline{|g_0|}`, which is right if magnitudes
    are exponentially distributed.

    No sorting and no second look at the gradients is needed. The thresholds depend on
    nothing but the gradients given, so that replicas which see the same (averaged)
    gradients keep the same thresholds. A leaf whose gradients are all 0 leaves its
    threshold as it is. If fewer than the wanted share have a nonzero gradient, all of
    these move, and the threshold falls no further. At :math:`d = 1` it stays, and all
    nonzero gradients pass. NaN and infinite gradients pass the mask.

    Args:
      density: :math:`d`, the share of weights that shall move, in (0, 1]; a number, a
        schedule ``step -> value`` or a scalar array.
      per_leaf: whether each leaf has a threshold of its own, or all share one.
      rate: :math:`\eta > 0`, the gain of the controller per step. Larger follows
        faster and swings more; above about 0.3 it may not settle at small densities.

    Returns:
      A transform whose updates have the gradients' shapes and dtypes. Its state is a
      step count and one float32 scalar a leaf.

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

    def init_fn(params: optax.Params) -> MaskToDensityState:
        params = float_arrays(params, "parameter")
        return MaskToDensityState(
            count=jnp.zeros([], jnp.int32),
            log_threshold=jax.tree.map(
                lambda _: jnp.full([], -jnp.inf, jnp.float32), params
            ),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MaskToDensityState]:
        del params, extra_args
        updates = float_arrays(updates, "gradient")
        require_same_tree(updates, state.log_threshold)
        d = jnp.asarray(at_step(density, state.count), jnp.float32)
        leaves, tree = jax.tree.flatten(updates)
        groups = (
            [[i] for i in range(len(leaves))]
            if per_leaf
            else [list(range(len(leaves)))]
        )
        logs = tree.flatten_up_to(state.log_threshold)
        new_leaves, new_logs = list(leaves), list(logs)
        for group in groups:
            members = [leaves[i] for i in group]
            size = sum(g.size for g in members)
            if size == 0:
                continue
            log_tau = jax.lax.cond(
                jnp.isneginf(logs[group[0]]),
                lambda members, log_tau, d, size=size: _first_log_threshold(
                    members, d, size
                ),
                lambda members, log_tau, d: log_tau,
                members,
                logs[group[0]],
                d,
            )
            root = jnp.exp(log_tau / 2)
            kept = [
                (~(magnitude(g) <= root.astype(working_dtype(g))))
                | ((g != 0) & (d >= 1))
                for g in members
            ]
            seen = _total(kept) / size
            spread = jnp.maximum(d * (1 - d), jnp.finfo(jnp.float32).tiny)
            # What one weight of a small leaf is off by must not be cut off: it would
            # shift the average.
            largest = jnp.maximum(_MAX_ERROR, 1 / (size * spread))
            error = jnp.clip((seen - d) / spread, -largest, largest)
            # Lowering the threshold further is idle where all nonzero gradients pass.
            any_masked = _total([g != 0 for g in members]) > _total(kept)
            moves = (d < 1) & jnp.isfinite(log_tau) & ((error > 0) | any_masked)
            log_tau = jnp.where(
                moves, jnp.clip(log_tau + rate * error, *_LOG_RANGE), log_tau
            )
            for i, keep in zip(group, kept, strict=True):
                new_leaves[i] = jnp.where(keep, leaves[i], jnp.zeros_like(leaves[i]))
                new_logs[i] = log_tau
        return tree.unflatten(new_leaves), MaskToDensityState(
            count=optax.safe_increment(state.count),
            log_threshold=tree.unflatten(new_logs),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _total(masks: list[jax.Array]) -> jax.Array:
    counts = [jnp.count_nonzero(m).astype(jnp.float32) for m in masks]
    return jnp.sum(jnp.stack(counts))


def _first_log_threshold(
    gradients: list[jax.Array], density: jax.Array, size: int
) -> jax.Array:
    sums = [jnp.sum(magnitude(g) / size).astype(jnp.float32) for g in gradients]
    mean = jnp.sum(jnp.stack(sums))
    log_tau = 2 * (jnp.log(mean) + jnp.log(-jnp.log(density)))
    # A mean of 0, inf or NaN says nothing: wait for the next step.
    return jnp.where(jnp.isfinite(log_tau), jnp.clip(log_tau, *_LOG_RANGE), -jnp.inf)
