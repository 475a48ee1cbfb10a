"""Elastic weight consolidation as an implicit step, stable at any strength."""

from typing import Any

import jax
import numpy as np
import optax

from classp_jax._arrays import working_dtype
from classp_jax._hyperparams import ScalarOrSchedule, cast
from classp_jax.regularizers._ewc import acting_on_anchor


def implicit_ewc(
    strength: ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    r"""EWC's penalty as an implicit step behind the optimizer, stable at any strength.

    :func:`ewc` adds the gradient of its penalty, and plain gradient descent diverges
    where learning rate, strength and Fisher information multiply to more than 2. Here
    the penalty acts at the *new* weights. With the optimizer's update :math:`u` (its
    learning rate :math:`\alpha` and sign included), sum :math:`S` and mean :math:`m`
    as in :func:`ewc`, and ``strength`` :math:`\kappa = \alpha \lambda`,

    .. math::
      w \leftarrow \frac{w + u + \kappa S m}{1 + \kappa S}

    which for :math:`u = -\alpha g` is :math:`(w - \alpha g + \alpha \lambda S m) /
    (1 + \alpha \lambda S)`: a weighted mean of where the optimizer leads and of the
    anchor. The step cannot overshoot the anchor; what the optimizer does may still
    diverge, at too large a learning rate.

    Args:
      strength: :math:`\kappa \ge 0`, the learning rate times EWC's strength; a number,
        a schedule or a scalar array.

    Returns:
      A transform to put *behind* an optimizer; its update needs ``params``. The state
      is :class:`EWCState`; call :func:`consolidate` at the end of each task.

    Raises:
      ValueError: if ``strength`` is negative, infinite, NaN or no scalar; in the
        update, if ``params`` are missing or trees or shapes differ from the state's.
      TypeError: if ``strength`` is no number, or if a leaf is not of real floats.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from classp_jax import regularizers
      >>> optimizer = optax.chain(optax.sgd(0.5), regularizers.implicit_ewc(1e6))
      >>> state = optimizer.init(jnp.zeros(1))
      >>> state = regularizers.consolidate(state, jnp.zeros(1), jnp.ones(1))
      >>> updates, state = optimizer.update(jnp.zeros(1), state, jnp.array([2.0]))
      >>> print(updates.round(3))
      [-2.]

    References:
      Kirkpatrick et al., `Overcoming catastrophic forgetting in neural networks
      <https://arxiv.org/abs/1612.00796>`_, 2017

      Toulis and Airoldi, `Asymptotic and finite-sample properties of estimators based
      on stochastic gradients <https://arxiv.org/abs/1408.2923>`_, 2017, on implicit
      steps

    .. seealso:: :func:`ewc`
    """
    return acting_on_anchor("implicit_ewc", _solved, strength)


def _solved(updates: Any, params: Any, fisher: Any, anchor: Any, factor: Any) -> Any:
    """The updates to the weights at which the penalty's own step leads there."""

    def leaf(u: jax.Array, w: jax.Array, f: jax.Array, a: jax.Array) -> jax.Array:
        dtype = np.promote_types(working_dtype(u), a.dtype)
        stiffness = cast(factor, dtype) * f.astype(dtype)
        back = stiffness * (a.astype(dtype) - w.astype(dtype))
        return ((u.astype(dtype) + back) / (1 + stiffness)).astype(u.dtype)

    return jax.tree.map(leaf, updates, params, fisher, anchor)
