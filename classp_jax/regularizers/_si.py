"""Synaptic intelligence (SI): importance from the path that training took."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from classp_jax._arrays import float_arrays, require_state
from classp_jax._hyperparams import ScalarOrSchedule, at_step, non_negative, positive
from classp_jax.regularizers._penalty import (
    copied,
    hyperparameter_array,
    matched,
    pulled,
    required,
    wide_zeros,
)


class SIState(NamedTuple):
    """State of :func:`si`. All trees are like the parameters."""

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    """Number of updates so far, int32."""
    damping: jax.typing.ArrayLike
    """What the next consolidation adds to the squared change of a weight."""
    importance: optax.Params
    """The importance of each weight to the tasks so far, 0 before the first ends."""
    anchor: optax.Params
    """The weights at the last consolidation, before the first at initialisation."""
    path_integral: optax.Params
    """Minus the sum over this task's steps of gradient times change of the weight."""
    previous_gradient: optax.Updates
    """The gradient of the last update, whose step is not in the path integral yet."""
    previous_params: optax.Params
    """The weights at the last update."""

    needs_fisher = False

    def path_integral_up_to(self, params: Any) -> Any:
        """The path integral with the last step, which led to ``params``."""
        return jax.tree.map(
            lambda total, g, old, w: total - g * (w.astype(old.dtype) - old),
            self.path_integral,
            self.previous_gradient,
            self.previous_params,
            params,
        )

    def end_of_task(self, params: Any, fisher: Any) -> "SIState":
        """Turns the path integral into importance and starts anew from ``params``."""
        del fisher
        params = matched("parameters", params, self.anchor)
        damping = jnp.asarray(self.damping)

        def raised(
            omega: jax.Array, path: jax.Array, a: jax.Array, w: jax.Array
        ) -> jax.Array:
            change = w.astype(a.dtype) - a
            new = omega + path / (change * change + damping.astype(a.dtype))
            return jnp.maximum(new, 0)

        path = self.path_integral_up_to(params)
        return self._replace(
            importance=jax.tree.map(raised, self.importance, path, self.anchor, params),
            anchor=copied(params, self.anchor),
            path_integral=wide_zeros(params),
            # No step is pending any more, also if the weights are changed between
            # tasks.
            previous_gradient=wide_zeros(params),
            previous_params=copied(params, self.anchor),
        )


def si(
    strength: ScalarOrSchedule, damping: jax.typing.ArrayLike = 0.1
) -> optax.GradientTransformationExtraArgs:
    r"""Synaptic intelligence: a weight counts by how much its moves lowered the loss.

    Pulls weights, ``strength`` :math:`c` times, to those at the end of the last task,
    the harder the more their moves lowered the loss for their length, to whose square
    ``damping`` :math:`\xi` is added. Call :func:`consolidate` at the end of each task;
    SI needs no Fisher information. Before the first call the penalty, whose gradient is
    added, is exactly 0:

    .. math::
      c \sum_i \Omega_i\, (w_i - \tilde w_i)^2, \qquad
      \Omega \leftarrow \max\!\left(0,\; \Omega +
      \frac{\omega}{(\tilde w' - \tilde w)^2 + \xi} \right), \qquad
      \omega = -\sum_t g_t\, (w_{t+1} - w_t)

    where :math:`\tilde w` and :math:`\tilde w'` are the weights at the end of the task
    before and of this one, and :math:`g_t` are the gradients of the loss alone as they
    reach this transform in a task's steps :math:`t`. Mind the factor: this penalty has
    :math:`c` where EWC's has :math:`\lambda / 2`.

    A transform does not see the step that the rest of its chain makes of a gradient. So
    it remembers gradient and weights, and adds a step to :math:`\omega` once it sees
    the next weights: at the next update, or at consolidation for the last step. This
    counts the steps as taken, whatever the optimizer made of them. Steps that did not
    happen (``optax.apply_if_finite``) are not counted.

    Like the authors' code, :math:`\Omega` is kept from falling below 0, where the
    penalty would drive weights away without bound.

    Put it first in a chain: what changes gradients before it (weight decay, another
    penalty) enters the importance. Initialise the state with the weights that the first
    task starts from.

    Args:
      strength: :math:`c \ge 0` of Zenke et al.; a number, a schedule ``step -> value``
        over the steps of all tasks, or a scalar array.
      damping: :math:`\xi > 0`, in units of a squared weight; a number or a scalar
        array. It bounds the importance of weights that hardly moved.

    Returns:
      A transform to put in front of an optimizer; its update needs ``params``. Updates
      have the gradients' shapes and dtypes. The state is :class:`SIState`: two scalars
      and five arrays the size of the parameters, of float32 or the parameters' dtype if
      that is wider. It carries the damping of the last update, which is what
      :func:`consolidate` uses.

    Raises:
      ValueError: if ``strength < 0`` or ``damping <= 0`` (or NaN, infinite, no scalar);
        in the update, if ``params`` are missing or trees or shapes differ from the
        state's.
      TypeError: if an argument is no number, or if a leaf is not of real floats.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from classp_jax import regularizers
      >>> optimizer = optax.chain(regularizers.si(1.0, damping=1.0), optax.sgd(0.5))
      >>> params = jnp.array([0.0, 0.0])
      >>> state = optimizer.init(params)
      >>> gradients = jnp.array([-2.0, 0.0])
      >>> updates, state = optimizer.update(gradients, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> state = regularizers.consolidate(state, params)
      >>> print(params, state[0].importance)
      [1. 0.] [1. 0.]

    References:
      Zenke, Poole and Ganguli, `Continual Learning Through Synaptic Intelligence
      <https://arxiv.org/abs/1703.04200>`_, 2017; code at
      https://github.com/ganguli-lab/pathint

    .. seealso:: :func:`ewc`, :func:`online_ewc`
    """
    strength = non_negative("strength", strength, schedule=True)
    damping = positive("damping", damping)

    def init_fn(params: optax.Params) -> SIState:
        params = float_arrays(params, "parameter", real=True)
        nothing = wide_zeros(params)
        return SIState(
            count=jnp.zeros([], jnp.int32),
            damping=hyperparameter_array(damping),
            importance=wide_zeros(params),
            anchor=copied(params, nothing),
            path_integral=wide_zeros(params),
            previous_gradient=wide_zeros(params),
            previous_params=copied(params, nothing),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SIState]:
        del extra_args
        require_state(state, SIState, "si")
        params = matched("parameters", required("si", params), state.anchor)
        updates = matched("gradients", updates, state.anchor)
        factor = 2 * at_step(strength, state.count)
        new_updates = pulled(updates, params, state.importance, state.anchor, factor)
        return new_updates, state._replace(
            count=optax.safe_increment(state.count),
            damping=hyperparameter_array(damping),
            path_integral=state.path_integral_up_to(params),
            previous_gradient=copied(updates, state.previous_gradient),
            previous_params=copied(params, state.anchor),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
