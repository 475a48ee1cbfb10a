"""CLASSP's brake on any other optimizer."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from classp_jax._accumulate import (
    Accumulation,
    ScaleByGeneralizedAdagradState,
    scaled,
)
from classp_jax._arrays import transform, working_dtype
from classp_jax._hyperparams import ScalarOrSchedule, at_step, positive, switch


class ProtectState(NamedTuple):
    """State of :func:`protect`."""

    importance: ScaleByGeneralizedAdagradState
    """What the brake keeps: a step count and the accumulators."""
    inner_state: optax.OptState
    """The state of the optimizer that is braked."""


def protect(
    inner: optax.GradientTransformation,
    power: jax.typing.ArrayLike = 1.0,
    eps: jax.typing.ArrayLike = 0.1,
    *,
    prior: jax.typing.ArrayLike = 0.0,
    window: ScalarOrSchedule | None = None,
    eps_unit: str | None = None,
    frozen: bool | ScalarOrSchedule = False,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Brakes any optimizer where weights have received many gradients.

    ``inner`` is the optimizer that you would use without it. The update :math:`u_t`
    that it makes, momentum, weight decay, learning rate and all, is multiplied by a
    number in (0, 1]; ``eps`` :math:`\varepsilon` is the accumulated gradient at which
    that becomes a half (at ``power=1``), ``power`` :math:`p` how fast it falls from
    there:

    .. math::
      A_t = A_{t-1} + |g_t|^p, \qquad
      w_t = w_{t-1} + \left( \frac{\varepsilon}{\varepsilon + A_t} \right)^{1/p} u_t

    :math:`A` sums the *raw* gradients :math:`g_t`, as ``protect`` receives them, and
    not the updates: Adam's are all of about one size, and would fill every accumulator
    alike. So put ``protect`` outermost, gradient clipping and accumulation
    (``optax.MultiSteps``) around it. ``protect(optax.sgd(alpha), eps=eps)`` is
    :func:`classp` with the learning rate :math:`\alpha\,\varepsilon^{1/p}`.

    When to take which. To fine-tune a network that must not lose what it knows: fill
    the accumulators from old data with :func:`accumulate_importance` first, then brake
    the optimizer you would have used (``frozen=True``: what the old data says is all
    that counts) or go on accumulating.
    Trained from nothing on a stream of tasks, it is worth a trial where the optimizer
    to be braked is much better than SGD; :func:`classp` is the simpler one.

    Args:
      inner: the optimizer to brake, any gradient transformation.
      power: :math:`p > 0`, how fast a weight slows down; a number or a scalar array. As
        the next four see :func:`scale_by_generalized_adagrad`.
      eps: :math:`\varepsilon > 0`, the accumulated gradient at which a weight moves
        half as far (at ``power=1``).
      prior: the number of gradients that an accumulator begins with.
      window: the number of steps that are remembered; None for all.
      eps_unit: what epsilon is measured in: None, ``"leaf"`` or ``"tree"``.
      frozen: whether accumulators stay as they are, so that only what
        :func:`accumulate_importance` put there brakes; a bool, a schedule
        ``step -> bool`` or a scalar array.
      accumulator_dtype: dtype of :math:`A`, by default at least float32.

    Returns:
      An optimizer whose updates have the shapes and dtypes of ``inner``'s. Its state is
      :class:`ProtectState`: that of ``inner``, a step count, one real array the size of
      the parameters and one number per leaf.

    Raises:
      ValueError: if a number is out of its range, infinite or NaN, or if the gradients'
        tree or shapes are not those of the state.
      TypeError: if ``inner`` is no transformation, an argument no number, or if a leaf
        has no floating-point dtype.

    Example:
      >>> import classp_jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> optimizer = classp_jax.protect(optax.sgd(0.1), eps=1.0, frozen=True)
      >>> params = jnp.array([1.0, 1.0])
      >>> old_gradients = jnp.array([9.0, 0.0])
      >>> state = classp_jax.accumulate_importance(
      ...     optimizer, optimizer.init(params), params, old_gradients
      ... )
      >>> updates, state = optimizer.update(jnp.array([2.0, 2.0]), state, params)
      >>> print(updates)
      [-0.02 -0.2 ]

    .. seealso:: :func:`classp`, :func:`accumulate_importance`,
      :func:`classp_jax.regularizers.l2_to_anchor`
    """
    positive("eps", eps)
    rule = Accumulation(power, eps, prior, window, eps_unit, accumulator_dtype)
    frozen = switch("frozen", frozen)
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(
            f"inner must be an optimizer, such as optax.sgd(0.1), got {inner!r}."
        )
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> ProtectState:
        return ProtectState(rule.init(params), inner.init(params))

    def step(
        gradients: Any,
        state: Any,
        params: Any,
        *,
        accumulate_importance: bool = False,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ProtectState]:
        old = state.importance
        new, _ = rule.grown(gradients, jax.tree.map(lambda _: True, gradients), old)
        if accumulate_importance:
            extra_args["accumulate_importance"] = True
        elif frozen is not False:
            held = jnp.asarray(at_step(frozen, old.count)).astype(bool)
            sums = optax.tree.where(held, old.accumulator, new.accumulator)
            new = new._replace(accumulator=sums)
        updates, inner_state = inner.update(
            gradients, state.inner_state, params, **extra_args
        )
        # Where no unit is known yet nothing moves.
        brake = functools.partial(_braked, power=rule.power)
        braked = jax.tree.map(brake, updates, new.accumulator, rule.eps_now(old, 0.0))
        return braked, ProtectState(new, inner_state)

    return transform(init, step, ProtectState)


def _braked(u: jax.Array, a: jax.Array, eps: Any, power: Any) -> jax.Array:
    """``u * (eps / (eps + a))^(1/power)``, in u's dtype; ``u`` itself where a is 0.

    An epsilon of 0 says that there is no unit for it yet.
    """
    dtype = np.promote_types(working_dtype(u), a.dtype)
    # A unit may overflow as the sum does, and infinity by itself is NaN.
    eps = jnp.minimum(jnp.asarray(eps, dtype), jnp.finfo(dtype).max)
    # Left out rather than divided by 0, whose derivative is not finite.
    no_unit = eps == 0
    ratio = a.astype(dtype) / jnp.where(no_unit, jnp.ones_like(eps), eps)
    moves = ~no_unit | (a == 0) | ~jnp.isfinite(u)
    return scaled(u, ratio, moves, 1.0, power, True)
