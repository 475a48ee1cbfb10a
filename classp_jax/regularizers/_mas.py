"""Memory aware synapses: importance from the size of the network's outputs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from classp_jax._arrays import float_arrays
from classp_jax.regularizers._fisher import number_of_examples
from classp_jax.regularizers._penalty import wide_zeros


def mas_importance(
    logits_fn: Callable[[Any, Any], jax.Array], params: Any, x: Any
) -> Any:
    r"""How much the outputs depend on every weight, without labels.

    ``logits_fn`` :math:`f` gives the outputs for the examples ``x``, :math:`x_1` to
    :math:`x_n`, at the weights ``params`` :math:`w`; what counts is how fast their
    squared size changes with a weight:

    .. math::
      \Omega_i = \frac{1}{n} \sum_{k=1}^n
        \left| \frac{\partial \|f(x_k)\|^2}{\partial w_i} \right|

    Give it to :func:`consolidate` in place of a Fisher diagonal: with
    :func:`online_ewc` (whose strength is then twice that of the paper, which has no
    factor 1/2) that is memory aware synapses.

    Args:
      logits_fn: ``logits_fn(params, x)`` returns logits ``[examples, classes]``.
      params: the weights at the end of the task.
      x: examples, ``[examples, ...]`` or a tree of such arrays.

    Returns:
      A tree like ``params``, in at least float32.

    Raises:
      ValueError: if there is no example, or not the same number in every array.
      TypeError: if a parameter is not of real floats.

    Example:
      >>> import jax.numpy as jnp
      >>> from classp_jax import regularizers
      >>> x = jnp.array([[1.0], [2.0]])
      >>> print(regularizers.mas_importance(lambda w, x: x * w, jnp.array([3.0]), x))
      [15.]

    References:
      Aljundi et al., `Memory Aware Synapses: Learning what (not) to forget
      <https://arxiv.org/abs/1711.09601>`_, 2018, equation 2
    """
    params = float_arrays(params, "parameter", real=True)
    x = jax.tree.map(jnp.asarray, x)
    count = number_of_examples(x)

    def size(params: Any, example: Any) -> jax.Array:
        batch = jax.tree.map(lambda leaf: leaf[None], example)
        return jnp.sum(jnp.square(logits_fn(params, batch)))

    def add(sums: Any, example: Any) -> tuple[Any, None]:
        gradient = jax.grad(size)(params, example)
        return jax.tree.map(
            lambda s, g: s + jnp.abs(g).astype(s.dtype), sums, gradient
        ), None

    sums, _ = jax.lax.scan(add, wide_zeros(params), x)
    return jax.tree.map(lambda s: s / count, sums)
