"""Elastic weight consolidation (EWC): all tasks, each with its own anchor."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from classp_jax._arrays import float_arrays, require_state
from classp_jax._hyperparams import ScalarOrSchedule, at_step, non_negative
from classp_jax.regularizers._penalty import matched, pulled, required, wide_zeros


class EWCState(NamedTuple):
    """State of :func:`ewc`."""

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    """Number of updates so far, int32."""
    fisher: optax.Params
    """A tree like the parameters: the sum of all tasks' Fisher diagonals."""
    anchor: optax.Params
    """A tree like the parameters: the Fisher-weighted mean of all tasks' weights."""

    needs_fisher = True

    def end_of_task(self, params: Any, fisher: Any) -> "EWCState":
        """Adds a task to the sum of Fisher diagonals and to the weighted mean."""
        params = matched("parameters", params, self.anchor)
        fisher = matched("Fisher diagonal", fisher, self.anchor)

        def moved(f: jax.Array, s: jax.Array, a: jax.Array, w: jax.Array) -> jax.Array:
            f = f.astype(s.dtype)
            total = s + f
            # Below the smallest normal number the quotient may be 0 / 0 on some
            # devices.
            empty = total < jnp.finfo(s.dtype).tiny
            share = jnp.where(empty, 0, f / jnp.where(empty, 1, total))
            return a + share * (w.astype(a.dtype) - a)

        return self._replace(
            fisher=jax.tree.map(
                lambda s, f: s + f.astype(s.dtype), self.fisher, fisher
            ),
            anchor=jax.tree.map(moved, fisher, self.fisher, self.anchor, params),
        )


def ewc(strength: ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Elastic weight consolidation with one Fisher diagonal and anchor per task.

    Pulls weights, ``strength`` :math:`\lambda` times, to those :math:`w^*_k` at the
    end of each task :math:`k`, the harder the more they mattered there: by the diagonal
    :math:`F_k` of its Fisher information, from :func:`fisher_diagonal`. Call
    :func:`consolidate` with both at the end of each task. Before the first call the
    penalty, whose gradient is added, is exactly 0:

    .. math::
      \frac{\lambda}{2} \sum_k \sum_i F_{k,i}\, (w_i - w^*_{k,i})^2

    The penalty of any number of tasks takes two arrays, because its gradient is

    .. math::
      \lambda\, S\, (w - m), \qquad S = \sum_k F_k, \qquad
      m = \frac{1}{S} \sum_k F_k\, w^*_k

    This is exact, not an approximation. The mean :math:`m` is kept rather than the sum
    :math:`\sum_k F_k w^*_k`, as the difference of two large numbers :math:`w S` and
    that sum would not vanish where it should: here the gradient is exactly 0 at the
    first task's weights, and later tasks misplace :math:`m` by about one rounding each.

    The penalty is stiff: plain gradient descent diverges where
    :math:`\alpha \lambda S_i > 2` for a learning rate :math:`\alpha`.

    Args:
      strength: :math:`\lambda \ge 0` of Kirkpatrick et al.; a number, a schedule
        ``step -> value`` over the steps of all tasks, or a scalar array. Codes that
        leave out the factor 1/2 need half of it.

    Returns:
      A transform to put in front of an optimizer; its update needs ``params``. Updates
      have the gradients' shapes and dtypes. The state is :class:`EWCState`: a step
      count and two arrays the size of the parameters, of float32 or the parameters'
      dtype if that is wider.

    Raises:
      ValueError: if ``strength`` is negative, infinite, NaN or no scalar; in the
        update, if ``params`` are missing or trees or shapes differ from the state's.
      TypeError: if ``strength`` is no number, or if a leaf is not of real floats.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from classp_jax import regularizers
      >>> optimizer = optax.chain(regularizers.ewc(strength=10.0), optax.sgd(0.1))
      >>> params = jnp.array([1.0, 2.0])
      >>> state = optimizer.init(params)
      >>> state = regularizers.consolidate(state, params, jnp.array([1.0, 0.0]))
      >>> gradients = jnp.zeros(2)
      >>> updates, state = optimizer.update(gradients, state, jnp.array([1.5, 2.5]))
      >>> print(updates)
      [-0.5 -0. ]

    References:
      Kirkpatrick et al., `Overcoming catastrophic forgetting in neural networks
      <https://arxiv.org/abs/1612.00796>`_, 2017, equation 3

    .. seealso:: :func:`online_ewc`, :func:`si`
    """
    return acting_on_anchor("ewc", pulled, strength)


def acting_on_anchor(
    name: str, act: Callable[..., optax.Updates], strength: ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """``act(updates, params, fisher, anchor, strength)``, with EWC's state."""
    strength = non_negative("strength", strength, schedule=True)

    def init_fn(params: optax.Params) -> EWCState:
        params = float_arrays(params, "parameter", real=True)
        return EWCState(
            jnp.zeros([], jnp.int32), wide_zeros(params), wide_zeros(params)
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, EWCState]:
        del extra_args
        require_state(state, EWCState, name)
        params = matched("parameters", required(name, params), state.anchor)
        updates = matched("gradients", updates, state.anchor)
        factor = at_step(strength, state.count)
        updates = act(updates, params, state.fisher, state.anchor, factor)
        return updates, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
