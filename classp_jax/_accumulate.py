"""How far weights move: generalized AdaGrad scaling and its accumulator."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from classp_jax._arrays import (
    float_arrays,
    magnitude,
    require_same_shapes,
    working_dtype,
)
from classp_jax._hyperparams import (
    Scalar,
    ScalarOrSchedule,
    at_step,
    cast,
    float_dtype,
    non_negative,
    positive,
    switch,
)
from classp_jax._powers import divide_by_root, power_of_magnitude


class ScaleByGeneralizedAdagradState(NamedTuple):
    """State of every transform here that accumulates."""

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    """Number of updates so far, int32."""
    accumulator: optax.Updates
    """A tree like the parameters: the sum of ``|g|^p`` over accepted gradients."""


def scale_by_generalized_adagrad(
    power: Scalar = 1.0,
    eps: Scalar = 0.1,
    *,
    prior: Scalar = 0.0,
    scaling: bool | ScalarOrSchedule = True,
    include_current: bool = True,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides gradients by the p-th root of the sum of their p-th powers so far.

    .. math::
      A_t &= A_{t-1} + |g_t|^p \\
      u_t &= \frac{g_t}{(\varepsilon + A_t)^{1/p}}

    with :math:`A_0 = 0`. A weight that has received many gradients moves less and less.
    :math:`\varepsilon` stands inside the root, so it *is* the accumulator's initial
    value: ``power=2, eps=0.1`` equals
    ``optax.adagrad(initial_accumulator_value=0.1, eps=0)`` but for the learning rate.
    While :math:`A` is small against :math:`\varepsilon` the transform is a constant
    factor :math:`\varepsilon^{-1/p}`.

    ``prior`` is a start without a scale: a weight's accumulator begins as if it had
    already received ``prior`` gradients of the size of its first one,

    .. math::
      A_t = c\,|g_t|^p + |g_t|^p \quad \text{where } A_{t-1} = 0 \ne g_t

    so that with :math:`\varepsilon = 0` the first step of every weight has the size
    :math:`(1 + c)^{-1/p}`, whatever its gradient and whenever it comes.

    Numerics. Powers 0.5, 1, 1.5, 2, 3 and 4 given as plain numbers have their own,
    fast forms; others and traced ones use ``jax.numpy.power``. Arithmetic is in
    float32, or in float64 where the gradient or the accumulator is. A gradient of
    exactly 0 gives an update of exactly 0, also at :math:`A = \varepsilon = 0`.
    Outside the normal range of the dtype: a sum :math:`\varepsilon + A` below the
    smallest normal number counts as 0 and gives no step; one that overflows to infinity
    gives no step from then on (at ``power=4`` in float32 a single gradient above 4e9
    does that). A NaN or infinite gradient shows as NaN in the update, and poisons the
    accumulator unless ``optax.apply_if_finite`` stands around the transform.

    Args:
      power: :math:`p > 0`; a number or a scalar array.
      eps: :math:`\varepsilon \ge 0`, in units of :math:`|g|^p`; a number or a scalar
        array.
      prior: :math:`c \ge 0`, the number of gradients that an accumulator begins with;
        a number or a scalar array.
      scaling: whether to divide. Off means: go on accumulating and return the gradient
        as it came. A bool, a schedule ``step -> bool`` or a scalar array.
      include_current: whether :math:`A_t` (Algorithm 1 of the paper) or
        :math:`A_{t-1}` (its equation 1) divides the gradient of step t.
      accumulator_dtype: dtype of :math:`A`. By default float32 for narrower
        parameters, else the parameters' real dtype: a growing sum of small terms
        stands still in 16 bits.

    Returns:
      A transform whose updates have the gradients' shapes and dtypes. Its state is
      :class:`ScaleByGeneralizedAdagradState`: a step count and one real array the size
      of the parameters, whatever the arguments.

    Raises:
      ValueError: if ``power <= 0``, ``eps < 0`` or ``prior < 0`` (or NaN, infinite, no
        scalar), or if the gradients' tree or shapes are not those of the state.
      TypeError: if an argument is no number, or if a leaf has no floating-point dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> import classp_jax
      >>> tx = classp_jax.scale_by_generalized_adagrad(power=1.0, eps=0.0)
      >>> g = jnp.array([2.0, -4.0, 0.0])
      >>> state = tx.init(g)
      >>> for _ in range(2):
      ...     updates, state = tx.update(g, state)
      ...     print(updates)
      [ 1. -1.  0.]
      [ 0.5 -0.5  0. ]

    References:
      Ludwig, `CLASSP <https://arxiv.org/abs/2405.09637>`_, 2024

      Duchi et al., `Adaptive Subgradient Methods for Online Learning and Stochastic
      Optimization <https://jmlr.org/papers/v12/duchi11a.html>`_, 2011

    .. seealso:: :func:`classp`, :func:`optax.scale_by_rss`
    """
    return masked_scaling(
        lambda g, count: g != 0,
        power,
        eps,
        prior=prior,
        scaling=scaling,
        include_current=include_current,
        accumulator_dtype=accumulator_dtype,
    )


def masked_scaling(
    accept: Callable[[jax.Array, jax.Array], jax.Array],
    power: Scalar,
    eps: Scalar,
    *,
    prior: Scalar = 0.0,
    scaling: bool | ScalarOrSchedule,
    include_current: bool = True,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Scaling of the gradients for which ``accept(g, count)`` is true; 0 for others.

    Masking and scaling in one expression a leaf. Behind a mask of its own the masked
    gradient would be an intermediate array that both the new accumulator and the update
    read, and XLA (CPU, jax 0.10) writes such an array to memory: 8 bytes of traffic a
    weight and a temporary the size of the parameters. ``accept`` is a comparison, which
    XLA repeats instead.
    """
    power = positive("power", power)
    eps = non_negative("eps", eps)
    prior = non_negative("prior", prior)
    scaling = switch("scaling", scaling)
    accumulator_dtype = float_dtype("accumulator_dtype", accumulator_dtype)
    if not isinstance(include_current, bool):
        raise TypeError(f"include_current must be a bool, got {include_current!r}.")

    def init_fn(params: optax.Params) -> ScaleByGeneralizedAdagradState:
        params = float_arrays(params, "parameter")
        return ScaleByGeneralizedAdagradState(
            count=jnp.zeros([], jnp.int32),
            accumulator=jax.tree.map(
                lambda w: jnp.zeros_like(
                    w, dtype=accumulator_dtype or working_dtype(w)
                ),
                params,
            ),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByGeneralizedAdagradState]:
        del params, extra_args
        updates = float_arrays(updates, "gradient")
        require_same_shapes(updates, state.accumulator)
        scale_now = at_step(scaling, state.count)

        def begun(g: jax.Array, a: jax.Array) -> jax.Array:
            """The accumulator before this step, with the prior if this is its first."""
            if isinstance(prior, float) and prior == 0:
                return a
            dtype = np.promote_types(working_dtype(g), a.dtype)
            term = power_of_magnitude(magnitude(g).astype(dtype), power)
            first = (a == 0) & accept(g, state.count)
            return jnp.where(first, (cast(prior, dtype) * term).astype(a.dtype), a)

        def new_accumulator(g: jax.Array, a: jax.Array) -> jax.Array:
            dtype = np.promote_types(working_dtype(g), a.dtype)
            term = power_of_magnitude(magnitude(g).astype(dtype), power)
            total = begun(g, a).astype(dtype) + jnp.where(
                accept(g, state.count), term, jnp.zeros_like(term)
            )
            return total.astype(a.dtype)

        def new_update(g: jax.Array, a: jax.Array) -> jax.Array:
            return scaled(g, a, accept(g, state.count), power, eps, scaling=scale_now)

        accumulator = jax.tree.map(new_accumulator, updates, state.accumulator)
        divisor = accumulator
        if not include_current:
            divisor = jax.tree.map(begun, updates, state.accumulator)
        return jax.tree.map(new_update, updates, divisor), (
            ScaleByGeneralizedAdagradState(
                count=optax.safe_increment(state.count), accumulator=accumulator
            )
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scaled(
    g: jax.Array,
    a: jax.Array,
    accepted: jax.Array,
    power: Any,
    eps: Any,
    *,
    scaling: Any,
) -> jax.Array:
    """``g / (a + eps)^(1/power)`` where accepted (and scaling is on), in g's dtype."""
    zero = jnp.zeros_like(g)
    if isinstance(scaling, bool) and not scaling:
        return jnp.where(accepted, g, zero)
    dtype = np.promote_types(working_dtype(g), a.dtype)
    wide = g.astype(np.promote_types(g.dtype, dtype))
    base = a.astype(dtype) + cast(eps, dtype)
    # Not for a NaN or infinite gradient, which shall show, nor for a NaN base.
    empty = (base < jnp.finfo(dtype).tiny) & jnp.isfinite(g)
    quotient = divide_by_root(wide, base, power).astype(g.dtype)
    result = jnp.where(accepted & ~empty, quotient, zero)
    if isinstance(scaling, bool):
        return result
    on = jnp.asarray(scaling).astype(bool)
    return jnp.where(on, result, jnp.where(accepted, g, zero))
