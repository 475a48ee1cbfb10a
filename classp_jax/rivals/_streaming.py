"""Streaming EWC and MAS: importance and anchor as moving averages, no boundary."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from classp_jax._arrays import float_arrays, require_state
from classp_jax._hyperparams import (
    ScalarOrSchedule,
    at_step,
    checked,
    non_negative,
    one_of,
)
from classp_jax.regularizers._penalty import (
    copied,
    matched,
    pulled,
    required,
    wide_zeros,
)

_KINDS = ("squared", "absolute")


class StreamingState(NamedTuple):
    """State of :func:`streaming_importance`."""

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    """Number of updates so far, int32."""
    importance: optax.Params
    """A tree like the parameters: the moving average of ``g^2`` or ``|g|``, from 0."""
    anchor: optax.Params
    """A tree like the parameters: their moving average, from the first ones."""


def streaming_importance(
    strength: ScalarOrSchedule,
    importance_decay: jax.typing.ArrayLike = 0.999,
    anchor_decay: jax.typing.ArrayLike = 0.999,
    *,
    kind: str = "squared",
) -> optax.GradientTransformationExtraArgs:
    r"""Pulls weights to their own moving average, as hard as they have mattered.

    ``strength`` :math:`\lambda` is how hard, ``importance_decay`` :math:`\beta` how
    long the importance :math:`F` remembers gradients, ``anchor_decay`` :math:`\gamma`
    how long the average :math:`\bar w` remembers weights, and ``kind`` says whether
    gradients count by their square or their magnitude:

    .. math::
      u_t &= g_t + \lambda\, \hat F_{t-1}\, (w_t - \bar w_{t-1}), \\
      F_t &= \beta F_{t-1} + (1 - \beta)\, g_t^2 \quad \text{or} \quad
             \beta F_{t-1} + (1 - \beta)\, |g_t|, \qquad
      \hat F_t = \frac{F_t}{1 - \beta^t} \\
      \bar w_t &= \gamma\, \bar w_{t-1} + (1 - \gamma)\, w_t

    With the square it is a streaming EWC (the Fisher diagonal, empirical and of
    batches), with the magnitude a streaming MAS. Neither is told where a task ends.

    Args:
      strength: :math:`\lambda \ge 0`; a number, a schedule or a scalar array.
      importance_decay: :math:`\beta` in [0, 1).
      anchor_decay: :math:`\gamma` in [0, 1].
      kind: ``"squared"`` or ``"absolute"``.

    Returns:
      A transform to put in front of an optimizer; its update needs ``params``. The
      state is a step count and two arrays the size of the parameters.

    Raises:
      ValueError: if an argument is out of its range; in the update, if ``params`` is
        missing or if trees or shapes differ from the state's.
      TypeError: if a number is none, or if a leaf is not of real floats.

    Example:
      >>> import jax.numpy as jnp
      >>> from classp_jax import rivals
      >>> tx = rivals.streaming_importance(1.0, 0.5, 1.0)
      >>> state = tx.init(jnp.array([1.0]))
      >>> updates, state = tx.update(jnp.array([2.0]), state, jnp.array([1.0]))
      >>> updates, state = tx.update(jnp.array([0.0]), state, jnp.array([1.5]))
      >>> print(updates)
      [2.]

    References:
      Elsayed and Mahmood, `Addressing Loss of Plasticity and Catastrophic Forgetting in
      Continual Learning <https://arxiv.org/abs/2404.00781>`_, 2024, which compares with
      streaming forms

      Aljundi et al., `Memory Aware Synapses <https://arxiv.org/abs/1711.09601>`_, 2018
    """
    strength = non_negative("strength", strength, schedule=True)
    beta = checked(
        "importance_decay", importance_decay, "in [0, 1)", lambda x: 0 <= x < 1
    )
    gamma = checked("anchor_decay", anchor_decay, "in [0, 1]", lambda x: 0 <= x <= 1)
    one_of("kind", kind, _KINDS)

    def init_fn(params: optax.Params) -> StreamingState:
        params = float_arrays(params, "parameter", real=True)
        zeros = wide_zeros(params)
        return StreamingState(jnp.zeros([], jnp.int32), zeros, copied(params, zeros))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, StreamingState]:
        del extra_args
        require_state(state, StreamingState, "streaming_importance")
        params = matched(
            "parameters", required("streaming_importance", params), state.anchor
        )
        updates = matched("gradients", updates, state.anchor)
        steps = jnp.maximum(jnp.asarray(state.count), 1).astype(jnp.float32)
        share = 1 - jnp.power(jnp.asarray(beta, jnp.float32), steps)
        factor = jnp.asarray(at_step(strength, state.count), jnp.float32) / share
        pull = pulled(updates, params, state.importance, state.anchor, factor)

        def averaged(decay: Any, old: jax.Array, new: jax.Array) -> jax.Array:
            d = jnp.asarray(decay, old.dtype)
            return d * old + (1 - d) * new.astype(old.dtype)

        size = jnp.square if kind == "squared" else jnp.abs
        importance = jax.tree.map(
            lambda f, g: averaged(beta, f, size(g.astype(f.dtype))),
            state.importance,
            updates,
        )
        anchor = jax.tree.map(lambda a, w: averaged(gamma, a, w), state.anchor, params)
        count = optax.safe_increment(state.count)
        return pull, StreamingState(count, importance, anchor)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
