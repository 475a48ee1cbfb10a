"""Utility-based perturbed gradient descent (UPGD-W)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from classp_jax._arrays import float_arrays, require_state
from classp_jax._hyperparams import (
    ScalarOrSchedule,
    at_step,
    cast,
    checked,
    non_negative,
)
from classp_jax.regularizers._penalty import matched, required, wide_zeros
from classp_jax.rivals._noise import noise_like


class UPGDState(NamedTuple):
    """State of :func:`upgd`."""

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    """Number of updates so far, int32."""
    utility: optax.Params
    """A tree like the parameters: a moving average of ``-g w``, from 0."""


def upgd(
    learning_rate: ScalarOrSchedule,
    utility_decay: jax.typing.ArrayLike = 0.999,
    deviation: jax.typing.ArrayLike = 1e-3,
    weight_decay: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Protects the weights that the loss needs and perturbs the others.

    The utility of a weight is how much the loss would grow without it, to first order.
    Its moving average :math:`U`, which remembers by ``utility_decay`` :math:`\beta`,
    becomes a number between 0 and 1, by which the step and the noise are made smaller.
    ``learning_rate`` :math:`\alpha` is how far weights move, ``deviation``
    :math:`\sigma` the size of the noise, and ``weight_decay`` :math:`\rho` how strongly
    weights are pulled to 0:

    .. math::
      U_t &= \beta\, U_{t-1} - (1 - \beta)\, g_t w_t, \qquad
      \hat U_t = U_t / (1 - \beta^t) \\
      w_{t+1} &= (1 - \alpha \rho)\, w_t
        - 2 \alpha\, (g_t + \xi_t)
        \Bigl(1 - \operatorname{sigmoid}\frac{\hat U_t}{\max \hat U_t}\Bigr),
        \qquad \xi_t \sim N(0, \sigma^2)

    with the maximum over all weights of the network. The factor 2, which the paper's
    experiments have, makes a weight without utility move by the full step. Where no
    weight has a utility above 0 all count as useless.

    Args:
      learning_rate: :math:`\alpha`; a number, a schedule or a scalar array.
      utility_decay: :math:`\beta` in [0, 1), of the moving average.
      deviation: :math:`\sigma \ge 0`, of the noise.
      weight_decay: :math:`\rho \ge 0`.

    Returns:
      An optimizer; its update needs ``params`` and ``key``. The state is a step count
      and one array the size of the parameters, in at least float32.

    Raises:
      ValueError: if a number is out of its range; in the update, if ``params`` or
        ``key`` is missing, or if trees or shapes differ from the state's.
      TypeError: if an argument is no number, or if a leaf is not of real floats.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from classp_jax import rivals
      >>> optimizer = rivals.upgd(0.1, deviation=0.0)
      >>> params = jnp.array([1.0, 1.0])
      >>> state, key = optimizer.init(params), jax.random.key(0)
      >>> gradients = jnp.array([-1.0, 1.0])
      >>> updates, state = optimizer.update(gradients, state, params, key=key)
      >>> print(jnp.round(100 * updates))
      [  5. -15.]

    References:
      Elsayed and Mahmood, `Addressing Loss of Plasticity and Catastrophic Forgetting in
      Continual Learning <https://arxiv.org/abs/2404.00781>`_, 2024, Algorithm 1
    """
    learning_rate = non_negative("learning_rate", learning_rate, schedule=True)
    beta = checked("utility_decay", utility_decay, "in [0, 1)", lambda x: 0 <= x < 1)
    deviation = non_negative("deviation", deviation)
    weight_decay = non_negative("weight_decay", weight_decay)

    def init_fn(params: optax.Params) -> UPGDState:
        params = float_arrays(params, "parameter", real=True)
        return UPGDState(jnp.zeros([], jnp.int32), wide_zeros(params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        key: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, UPGDState]:
        del extra_args
        require_state(state, UPGDState, "upgd")
        params = matched("parameters", required("upgd", params), state.utility)
        updates = matched("gradients", updates, state.utility)
        noise = noise_like(state.utility, key, "upgd")
        count = optax.safe_increment(state.count)

        def averaged(u: jax.Array, g: jax.Array, w: jax.Array) -> jax.Array:
            b = jnp.asarray(beta, u.dtype)
            return b * u - (1 - b) * g.astype(u.dtype) * w.astype(u.dtype)

        utility = jax.tree.map(averaged, state.utility, updates, params)
        # The correction of the start cancels: it is the same for all weights.
        leaves = [jnp.max(u).astype(jnp.float32) for u in jax.tree.leaves(utility)]
        largest = jnp.max(jnp.stack(leaves))
        useful = largest > 0
        unit = jnp.where(useful, largest, jnp.ones_like(largest))
        rate = at_step(learning_rate, state.count)

        def step(g: jax.Array, w: jax.Array, u: jax.Array, xi: jax.Array) -> jax.Array:
            share = jnp.where(useful, u / unit.astype(u.dtype), jnp.zeros_like(u))
            noisy = g.astype(u.dtype) + cast(deviation, u.dtype) * xi
            a = cast(rate, u.dtype)
            moved = -2 * a * noisy * (1 - jax.nn.sigmoid(share))
            decayed = a * cast(weight_decay, u.dtype) * w.astype(u.dtype)
            return (moved - decayed).astype(g.dtype)

        updates = jax.tree.map(step, updates, params, utility, noise)
        return updates, UPGDState(count, utility)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
