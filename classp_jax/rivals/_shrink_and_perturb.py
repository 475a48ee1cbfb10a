"""Shrink and perturb, in every step."""

from typing import Any

import jax
import optax

from classp_jax._arrays import float_arrays
from classp_jax._hyperparams import cast, non_negative
from classp_jax.regularizers._penalty import matched, required
from classp_jax.rivals._noise import noise_like


def shrink_and_perturb(
    shrink: jax.typing.ArrayLike, deviation: jax.typing.ArrayLike
) -> optax.GradientTransformationExtraArgs:
    r"""Makes the weights a little smaller and adds noise, after the optimizer's step.

    Put it behind the optimizer whose update is :math:`u`. ``shrink`` :math:`\lambda` is
    the share of each weight that is taken off, ``deviation`` :math:`\sigma` the size of
    the noise:

    .. math::
      w \leftarrow (1 - \lambda)\, w + u + \xi, \qquad \xi \sim N(0, \sigma^2)

    Ash and Adams do this once for each new set of data; in every step it needs no
    boundary.

    Args:
      shrink: :math:`\lambda \ge 0`, the share of each weight that is taken off.
      deviation: :math:`\sigma \ge 0`, of the noise.

    Returns:
      A transform without state; its update needs ``params`` and ``key``.

    Raises:
      ValueError: if a number is negative, infinite or NaN; in the update, if ``params``
        or ``key`` is missing, or if trees or shapes differ.
      TypeError: if an argument is no number, or if a leaf is not of real floats.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from classp_jax import rivals
      >>> tx = rivals.shrink_and_perturb(0.25, 0.0)
      >>> params = jnp.array([2.0])
      >>> updates, _ = tx.update(
      ...     jnp.array([1.0]), tx.init(params), params, key=jax.random.key(0)
      ... )
      >>> print(updates)
      [0.5]

    References:
      Ash and Adams, `On Warm-Starting Neural Network Training
      <https://arxiv.org/abs/1910.08475>`_, 2020

      Dohare et al., `Loss of plasticity in deep continual learning
      <https://doi.org/10.1038/s41586-024-07711-7>`_, 2024, on doing it in every step
    """
    shrink = non_negative("shrink", shrink)
    deviation = non_negative("deviation", deviation)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        key: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        updates = float_arrays(updates, "gradient", real=True)
        params = matched("parameters", required("shrink_and_perturb", params), updates)

        def leaf(u: jax.Array, w: jax.Array, xi: jax.Array) -> jax.Array:
            smaller = cast(shrink, xi.dtype) * w.astype(xi.dtype)
            return (
                u.astype(xi.dtype) - smaller + cast(deviation, xi.dtype) * xi
            ).astype(u.dtype)

        noise = noise_like(params, key, "shrink_and_perturb")
        return jax.tree.map(leaf, updates, params, noise), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update_fn
    )
