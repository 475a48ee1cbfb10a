"""Bayesian gradient descent: a mean and a deviation per weight, with forgetting."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from classp_jax._arrays import float_arrays, require_state
from classp_jax._hyperparams import (
    ScalarOrSchedule,
    at_step,
    cast,
    positive,
    window_length,
)
from classp_jax.regularizers._penalty import matched, required, wide_zeros
from classp_jax.rivals._noise import noise_like


class BayesianState(NamedTuple):
    """State of :func:`bayesian_gradient_descent`."""

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    """Number of updates so far, int32."""
    deviation: optax.Params
    """A tree like the parameters: the standard deviation of every weight."""


def bayesian_gradient_descent(
    evidence: jax.typing.ArrayLike,
    deviation: jax.typing.ArrayLike = 0.05,
    *,
    window: ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Every weight is a normal distribution that each batch makes narrower.

    The parameters are the means :math:`\mu`; the state holds the deviations
    :math:`\sigma`. ``evidence`` :math:`c` is for how many examples a batch counts,
    ``deviation`` :math:`\sigma_0` where the deviations begin, and ``window`` :math:`N`
    how many steps are remembered. With :math:`w = \mu + \sigma \epsilon`, the expected
    gradients :math:`a = c\,\mathrm{E}[\partial L / \partial w]` and
    :math:`b = c\,\mathrm{E}[\epsilon\, \partial L / \partial w]` are those of
    :func:`value_and_expected_gradients`, times :math:`c`:

    .. math::
      \mu &\leftarrow \mu - \sigma^2 a \\
      \sigma &\leftarrow \sigma \sqrt{1 + \bigl(\tfrac12 \sigma b\bigr)^2}
        - \tfrac12 \sigma^2 b

    That is Bayesian gradient descent. With a window it is MESU, which forgets: both are
    led back to the prior :math:`N(0, \sigma_0^2)` over N steps,

    .. math::
      \mu &\leftarrow \mu - \sigma^2 a - \frac{\sigma^2}{N \sigma_0^2}\, \mu \\
      \sigma &\leftarrow \sigma - \tfrac12 \sigma^2 b
        + \frac{\sigma}{2 N \sigma_0^2} (\sigma_0^2 - \sigma^2)

    where a large step may make :math:`\sigma` negative; only its size means anything.

    Args:
      evidence: :math:`c > 0`, for how many examples a batch counts. For a loss that is
        the mean over a batch, its size is the true posterior's.
      deviation: :math:`\sigma_0 > 0`, of the prior, with which all weights begin.
      window: :math:`N \ge 1`, the number of steps that are remembered, None for all.

    Returns:
      An optimizer for the means. Its update takes the pair of gradients that
      :func:`value_and_expected_gradients` returns, and needs ``params``. The state is a
      step count and one array the size of the parameters.

    Raises:
      ValueError: if a number is out of its range; in the update, if ``params`` is
        missing or if trees or shapes differ from the state's.
      TypeError: if an argument is no number, or if a leaf is not of real floats.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from classp_jax import rivals
      >>> optimizer = rivals.bayesian_gradient_descent(32.0, window=1000)
      >>> params = jnp.array([1.0])
      >>> state = optimizer.init(params)
      >>> (loss, _), gradients = rivals.value_and_expected_gradients(
      ...     lambda w: (jnp.sum(w * w), None), params, state, jax.random.key(0)
      ... )
      >>> updates, state = optimizer.update(gradients, state, params)

    References:
      Zeno et al., `Task Agnostic Continual Learning Using Online Variational Bayes
      <https://arxiv.org/abs/1803.10123>`_, 2018

      Bonnet et al., `Bayesian continual learning and forgetting in neural networks
      <https://arxiv.org/abs/2504.13569>`_, 2025
    """
    evidence = positive("evidence", evidence)
    prior = positive("deviation", deviation)
    window = None if window is None else window_length("window", window)

    def init_fn(params: optax.Params) -> BayesianState:
        params = float_arrays(params, "parameter", real=True)
        start = jax.tree.map(
            lambda z: z + jnp.asarray(prior, z.dtype), wide_zeros(params)
        )
        return BayesianState(jnp.zeros([], jnp.int32), start)

    def update_fn(
        updates: Any,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, BayesianState]:
        del extra_args
        require_state(state, BayesianState, "bayesian_gradient_descent")
        needed = required("bayesian_gradient_descent", params)
        params = matched("parameters", needed, state.deviation)
        of_mean, of_deviation = (
            matched("gradients", part, state.deviation) for part in updates
        )

        def forgetting(s: jax.Array) -> Any:
            """``1 / (N sigma_0^2)``."""
            memory = cast(at_step(window, state.count), s.dtype)
            return 1 / (memory * cast(prior, s.dtype) ** 2)

        def mean_step(a: jax.Array, m: jax.Array, s: jax.Array) -> jax.Array:
            wide = cast(evidence, s.dtype) * a.astype(s.dtype)
            if window is not None:
                wide += forgetting(s) * m.astype(s.dtype)
            return (-s * s * wide).astype(a.dtype)

        def deviation_after(b: jax.Array, s: jax.Array) -> jax.Array:
            half = 0.5 * s * cast(evidence, s.dtype) * b.astype(s.dtype)
            if window is not None:
                p = cast(prior, s.dtype)
                return s - s * half + 0.5 * s * forgetting(s) * (p * p - s * s)
            # sqrt(1 + h^2) - h, which loses all digits for large h as a difference.
            root = jnp.sqrt(1 + half * half)
            return s * jnp.where(half > 0, 1 / (root + jnp.abs(half)), root - half)

        steps = jax.tree.map(mean_step, of_mean, params, state.deviation)
        after = jax.tree.map(deviation_after, of_deviation, state.deviation)
        return steps, BayesianState(optax.safe_increment(state.count), after)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def value_and_expected_gradients(
    loss_fn: Callable[[Any], tuple[jax.Array, Any]],
    params: Any,
    state: BayesianState,
    key: jax.Array,
    *,
    samples: int = 1,
) -> tuple[tuple[jax.Array, Any], tuple[Any, Any]]:
    """The loss and its gradients, averaged over weights drawn from the distribution.

    Args:
      loss_fn: ``loss_fn(params)`` returns a scalar and a tree of float arrays.
      params: the means.
      state: of :func:`bayesian_gradient_descent`.
      key: for the draws.
      samples: how many weights to draw.

    Returns:
      ``(loss, auxiliary), (gradients of the means, of the deviations)``, each a mean
      over the draws; those of the deviations are the means of gradient times noise.
    """

    def one(key: jax.Array) -> Any:
        noise = noise_like(params, key, "value_and_expected_gradients")
        drawn = jax.tree.map(
            lambda m, s, e: m + (s * e).astype(m.dtype), params, state.deviation, noise
        )
        value, g = jax.value_and_grad(loss_fn, has_aux=True)(drawn)
        return value, (g, jax.tree.map(lambda a, e: a * e.astype(a.dtype), g, noise))

    if samples == 1:
        return one(key)
    drawn = jax.vmap(one)(jax.random.split(key, samples))
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), drawn)
