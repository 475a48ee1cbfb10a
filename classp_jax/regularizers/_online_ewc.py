"""Online elastic weight consolidation: a running Fisher diagonal, the last anchor."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from classp_jax._arrays import float_arrays, require_state
from classp_jax._hyperparams import ScalarOrSchedule, at_step, checked, non_negative
from classp_jax.regularizers._penalty import (
    copied,
    hyperparameter_array,
    matched,
    pulled,
    required,
    wide_zeros,
)


class OnlineEWCState(NamedTuple):
    """State of :func:`online_ewc`."""

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    """Number of updates so far, int32."""
    decay: jax.typing.ArrayLike
    """What the next consolidation multiplies the old Fisher diagonal by."""
    fisher: optax.Params
    """A tree like the parameters: the decayed sum of Fisher diagonals."""
    anchor: optax.Params
    """A tree like the parameters: the weights at the last consolidation."""

    needs_fisher = True

    def end_of_task(self, params: Any, fisher: Any) -> "OnlineEWCState":
        """Decays the Fisher diagonal, adds the task's and moves the anchor."""
        params = matched("parameters", params, self.anchor)
        fisher = matched("Fisher diagonal", fisher, self.anchor)
        decay = jnp.asarray(self.decay)
        return self._replace(
            fisher=jax.tree.map(
                lambda s, f: decay.astype(s.dtype) * s + f.astype(s.dtype),
                self.fisher,
                fisher,
            ),
            anchor=copied(params, self.anchor),
        )


def online_ewc(
    strength: ScalarOrSchedule, decay: jax.typing.ArrayLike = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Elastic weight consolidation with one running Fisher diagonal, the last anchor.

    Pulls weights, ``strength`` :math:`\lambda` times, to those :math:`w^*_k` at the
    end of the last task :math:`k`, the harder the more they mattered so far: by a sum
    of the diagonals :math:`F_k` of each task's Fisher information, from
    :func:`fisher_diagonal`, whose old part shrinks by ``decay`` :math:`\gamma` a task.
    Call :func:`consolidate` with both at the end of each task. Before the first call
    the penalty, whose gradient is added, is exactly 0:

    .. math::
      \frac{\lambda}{2} \sum_i S_{k,i}\, (w_i - w^*_{k,i})^2, \qquad
      S_k = \gamma\, S_{k-1} + F_k, \qquad S_0 = 0

    The paper writes one more :math:`\gamma` in front of the penalty, a constant that is
    part of the strength here, and scales each Fisher matrix to the same size, which
    is left to the caller.

    Args:
      strength: :math:`\lambda \ge 0`; a number, a schedule ``step -> value`` over the
        steps of all tasks, or a scalar array.
      decay: :math:`\gamma` in [0, 1]; a number or a scalar array. 1 counts all tasks
        alike, 0 keeps only the last.

    Returns:
      A transform to put in front of an optimizer; its update needs ``params``. Updates
      have the gradients' shapes and dtypes. The state is :class:`OnlineEWCState`: two
      scalars and two arrays the size of the parameters, of float32 or the parameters'
      dtype if that is wider. It carries the decay of the last update, which is what
      :func:`consolidate` uses.

    Raises:
      ValueError: if ``strength`` is negative or ``decay`` outside [0, 1] (or NaN or no
        scalar); in the update, if ``params`` are missing or trees or shapes differ from
        the state's.
      TypeError: if an argument is no number, or if a leaf is not of real floats.

    Example:
      >>> import jax.numpy as jnp
      >>> from classp_jax import regularizers
      >>> tx = regularizers.online_ewc(strength=1.0, decay=0.5)
      >>> state = tx.init(jnp.zeros(2))
      >>> for anchor in (1.0, 2.0):
      ...     fisher = jnp.array([4.0, 0.0])
      ...     state = regularizers.consolidate(state, jnp.full(2, anchor), fisher)
      >>> print(state.fisher, state.anchor)
      [6. 0.] [2. 2.]

    References:
      Schwarz et al., `Progress & Compress: A scalable framework for continual learning
      <https://arxiv.org/abs/1805.06370>`_, 2018, section 4

      Huszár, `On Quadratic Penalties in Elastic Weight Consolidation
      <https://arxiv.org/abs/1712.03847>`_, 2017, on why the last anchor is enough

    .. seealso:: :func:`ewc`
    """
    strength = non_negative("strength", strength, schedule=True)
    decay = checked("decay", decay, "in [0, 1]", lambda x: 0 <= x <= 1)

    def init_fn(params: optax.Params) -> OnlineEWCState:
        params = float_arrays(params, "parameter", real=True)
        return OnlineEWCState(
            jnp.zeros([], jnp.int32),
            hyperparameter_array(decay),
            wide_zeros(params),
            wide_zeros(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, OnlineEWCState]:
        del extra_args
        require_state(state, OnlineEWCState, "online_ewc")
        params = matched("parameters", required("online_ewc", params), state.anchor)
        updates = matched("gradients", updates, state.anchor)
        factor = at_step(strength, state.count)
        updates = pulled(updates, params, state.fisher, state.anchor, factor)
        return updates, state._replace(
            count=optax.safe_increment(state.count), decay=hyperparameter_array(decay)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
