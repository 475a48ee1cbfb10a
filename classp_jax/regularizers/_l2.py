"""L2 to an anchor: weight decay to where the weights came from."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from classp_jax._arrays import float_arrays, require_state
from classp_jax._hyperparams import ScalarOrSchedule, at_step, non_negative
from classp_jax.regularizers._penalty import (
    copied,
    matched,
    pulled,
    required,
    wide_zeros,
)


class L2ToAnchorState(NamedTuple):
    """State of :func:`l2_to_anchor`."""

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    """Number of updates so far, int32."""
    anchor: optax.Params
    """The weights to be pulled to, a tree like the parameters."""


def l2_to_anchor(
    strength: ScalarOrSchedule, anchor: optax.Params | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Adds a pull to given weights, by default to the initial ones, to the updates.

    Weight decay, but to an ``anchor`` :math:`w_0`; ``strength`` :math:`\rho` is how
    strong it is. (To 0 it is ``optax.add_decayed_weights``.)

    .. math::
      u \leftarrow u + \rho\, (w - w_0)

    This is the gradient of :math:`\frac{\rho}{2} \|w - w_0\|^2`. Inside
    :func:`classp_jax.protect` it is weak where a weight has received many gradients and
    strong where it has not: ``protect(optax.chain(l2_to_anchor(rho),
    optax.sgd(alpha)), eps=eps, window=n)`` steps by

    .. math::
      w \leftarrow w - \alpha\, \varepsilon\,
      \frac{g + \rho\, (w - w_0)}{\varepsilon + A}

    at ``power=1``, so that weights no longer in use return to where they can learn
    again. This is the form that Bayesian gradient descent with forgetting has, where
    :math:`1/(\varepsilon + A)` is the variance of a weight and :math:`w_0` the prior's
    mean. In front of :func:`classp_jax.classp` the pull would count as a gradient and
    fill the accumulators.

    Args:
      strength: :math:`\rho \ge 0`, how strong the pull is; a number, a schedule
        ``step -> value`` or a scalar array.
      anchor: :math:`w_0`, a tree like the parameters; by default the parameters that
        the state is initialised with.

    Returns:
      A transform whose updates have their shapes and dtypes; its update needs
      ``params``. Its state is :class:`L2ToAnchorState`: a step count and a copy of
      the anchor in at least float32.

    Raises:
      ValueError: if ``strength`` is negative, infinite or NaN, if the update is called
        without ``params``, or if the anchor has another tree or other shapes.
      TypeError: if ``strength`` is no number, or if a leaf is not of real floats.

    Example:
      >>> import jax.numpy as jnp
      >>> from classp_jax import regularizers
      >>> tx = regularizers.l2_to_anchor(0.5)
      >>> state = tx.init(jnp.array([1.0, 2.0]))
      >>> updates, _ = tx.update(jnp.zeros(2), state, jnp.array([3.0, 2.0]))
      >>> print(updates)
      [1. 0.]

    References:
      Kumar, Marklund and Van Roy, `Maintaining Plasticity in Continual Learning via
      Regenerative Regularization <https://arxiv.org/abs/2308.11958>`_, 2023, on the
      pull to the initial weights alone (L2 Init), twice as strong at the same number

      Bonnet et al., `Bayesian continual learning and forgetting in neural networks
      <https://arxiv.org/abs/2504.13569>`_, 2025

      Li et al., `Explicit Inductive Bias for Transfer Learning with Convolutional
      Networks <https://arxiv.org/abs/1802.01483>`_, 2018, on the pull alone (L2-SP)
    """
    strength = non_negative("strength", strength, schedule=True)

    def init_fn(params: optax.Params) -> L2ToAnchorState:
        params = float_arrays(params, "parameter", real=True)
        target = params
        if anchor is not None:
            target = matched("anchor", anchor, params)
        return L2ToAnchorState(
            jnp.zeros([], jnp.int32), copied(target, wide_zeros(params))
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, L2ToAnchorState]:
        del extra_args
        require_state(state, L2ToAnchorState, "l2_to_anchor")
        params = matched("parameters", required("l2_to_anchor", params), state.anchor)
        updates = matched("gradients", updates, state.anchor)
        ones = jax.tree.map(lambda a: jnp.ones([], a.dtype), state.anchor)
        factor = at_step(strength, state.count)
        updates = pulled(updates, params, ones, state.anchor, factor)
        return updates, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
