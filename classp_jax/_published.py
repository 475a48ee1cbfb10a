"""The PyTorch class published with the paper, reproduced step for step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from classp_jax._accumulate import Accumulation, masked_scaling
from classp_jax._arrays import magnitude
from classp_jax._hyperparams import (
    ScalarOrSchedule,
    at_step,
    cast,
    checked,
    non_negative,
)


def classp_published(
    learning_rate: ScalarOrSchedule = 0.2,
    threshold: ScalarOrSchedule = 0.5,
    power: jax.typing.ArrayLike = 1.0,
    eps: jax.typing.ArrayLike = 1e-5,
    *,
    scaling: bool | ScalarOrSchedule = True,
) -> optax.GradientTransformationExtraArgs:
    r"""What the PyTorch class published with the CLASSP paper computes.

    Use it to reproduce results obtained with that class, :func:`classp` for everything
    else. ``learning_rate`` :math:`\alpha`, ``power`` :math:`p` and ``eps``
    :math:`\varepsilon` are how far a weight moves, how fast it slows down and how much
    gradient that takes; ``threshold`` :math:`\tau` is about a whole *tensor* (leaf):
    below 0 it always moves, from 0 to below 1 if any of its gradients :math:`g` has a
    nonzero square, from 1 on never:

    .. math::
      [\exists i: g_i^2 \ne 0] > \tau: \qquad
      A &\leftarrow A + |g| \\
      w &\leftarrow w - \frac{\alpha\, g}{(A + \varepsilon)^{1/p}}

    Algorithm 1 compares the threshold with each squared gradient instead. And here the
    accumulator sums :math:`|g|` whatever :math:`p` is, so ``power=2`` divides by the
    root of a sum of magnitudes and is not AdaGrad.

    Two things are not reproduced: at ``eps=0`` the class divides 0 by 0 for a weight
    that has had no gradient, where this transform leaves the weight alone; and in one
    call with several parameter groups the class lets the first group's hyperparameters
    leak into the others, where ``optax.partition`` keeps them apart.

    Args:
      learning_rate: :math:`\alpha \ge 0`; a number, a schedule or a scalar array.
      threshold: :math:`\tau`, any finite number, a schedule or a scalar array.
      power: :math:`p > 0`; a number or a scalar array.
      eps: :math:`\varepsilon \ge 0`; a number or a scalar array.
      scaling: whether to divide (the class's ``apply_scaling``); a bool, a schedule or
        a scalar array.

    Returns:
      An optimizer with the state of :func:`classp`, but for the accumulator's dtype,
      which is the parameter's own, as in the class.

    Raises:
      ValueError: if a number is out of its range, infinite or NaN, or if the gradients'
        tree or shapes are not those of the state.
      TypeError: if an argument is no number, or if a leaf has no floating-point dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> import classp_jax
      >>> optimizer = classp_jax.classp_published(learning_rate=1.0, power=2, eps=0.0)
      >>> g = jnp.array([4.0, -9.0])
      >>> updates, state = optimizer.update(g, optimizer.init(g))
      >>> print(updates)
      [-2.  3.]

    References:
      Code of Ludwig, `CLASSP <https://arxiv.org/abs/2405.09637>`_, 2024, at
      https://github.com/oswaldoludwig/CLASSP, commit ea3fe3c
    """
    learning_rate = non_negative("learning_rate", learning_rate, schedule=True)
    threshold = checked("threshold", threshold, "finite", lambda _: True, schedule=True)

    def accept(g: jax.Array, count: jax.Array) -> jax.Array:
        return _any_nonzero_square(g) > cast(at_step(threshold, count), jnp.float32)

    rule = _SumOfMagnitudes(power, eps)
    return masked_scaling(accept, rule, scaling=scaling, learning_rate=learning_rate)


class _SumOfMagnitudes(Accumulation):
    """Whatever the power is, in the parameter's own dtype, rounded to nearest."""

    def dtype_of(self, leaf: Any) -> Any:
        return jnp.finfo(leaf.dtype).dtype

    def term(self, size: jax.Array) -> jax.Array:
        return size

    @staticmethod
    def stored(_: Any, a: jax.Array, term: jax.Array, like: Any, leaf: int) -> Any:
        return (a + term).astype(like.dtype)


def _any_nonzero_square(g: jax.Array) -> jax.Array:
    """1.0 if ``g^2 != 0`` anywhere, else 0.0; NaN counts as nonzero.

    The square is not computed: where it would underflow depends on whether the device
    keeps subnormal numbers, and PyTorch on a CPU does.
    """
    smallest = float(jnp.finfo(g.dtype).smallest_subnormal)
    # g^2 rounds to 0 exactly up to the root of half the smallest subnormal number.
    bound = (smallest / 2) ** 0.5
    return jnp.any(~(magnitude(g) <= bound)).astype(jnp.float32)
