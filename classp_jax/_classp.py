"""CLASSP, Algorithm 1 of the paper: threshold mask, scaling, learning rate."""

from typing import Any

import jax
import optax

from classp_jax._accumulate import Accumulation, masked_scaling
from classp_jax._hyperparams import ScalarOrSchedule, at_step, non_negative
from classp_jax._masks import passes


def classp(
    learning_rate: ScalarOrSchedule,
    threshold: ScalarOrSchedule = 0.0,
    power: jax.typing.ArrayLike = 1.0,
    eps: jax.typing.ArrayLike = 0.1,
    *,
    prior: jax.typing.ArrayLike = 0.0,
    window: ScalarOrSchedule | None = None,
    eps_unit: str | None = None,
    scaling: bool | ScalarOrSchedule = True,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""CLASSP: a weight moves only on large gradients, and less the more it has moved.

    ``learning_rate`` :math:`\alpha` is how far a weight moves, ``threshold``
    :math:`\tau` how large its squared gradient has to be for that, ``power`` :math:`p`
    how fast it slows down, and ``eps`` :math:`\varepsilon` how much gradient it takes
    until it does. For every weight, with gradient :math:`g_t` and accumulator
    :math:`A_0 = 0`:

    .. math::
      |g_t|^2 > \tau: \qquad
      A_t &= A_{t-1} + |g_t|^p \\
      w_t &= w_{t-1} - \frac{\alpha\, g_t}{(\varepsilon + A_t)^{1/p}}

    and where :math:`|g_t|^2 \le \tau` neither :math:`A` nor :math:`w` changes. This is
    Algorithm 1 of the paper. The class published with the paper computes something
    else: :func:`classp_published`.

    Equal, bit for bit, to ``optax.chain(mask_by_threshold(threshold),
    scale_by_generalized_adagrad(power, eps), optax.scale_by_learning_rate(...))``, with
    less memory traffic. :math:`\varepsilon` is the accumulator's initial value, so
    ``classp(lr, power=2, eps=0.1)`` equals ``optax.adagrad(lr,
    initial_accumulator_value=0.1, eps=0)``. The first steps of a weight have the rate
    :math:`\alpha\,\varepsilon^{-1/p}` while its accumulator is small against
    :math:`\varepsilon`, and the size :math:`\alpha` when it is not: with a small
    :math:`\varepsilon` the first step of every weight is :math:`\alpha` whatever its
    gradient. ``prior`` says that size directly, without a scale to guess: with
    ``eps=0`` it is :math:`\alpha\,(1 + c)^{-1/p}` for every weight, also for one whose
    first accepted gradient comes in a later task.

    Put momentum or weight decay *before* ``classp`` in a chain, if at all: behind it
    they move weights that the threshold froze. To keep another optimizer, momentum and
    all, put :func:`protect` around it. For hyperparameters that change while training,
    see :func:`inject_hyperparams`. Accumulators from elsewhere are put into a state by
    ``optax.tree.set(state, accumulator=sums)``.

    Args:
      learning_rate: :math:`\alpha \ge 0`, how far a weight moves; a number, a schedule
        or a scalar array.
      threshold: :math:`\tau \ge 0`, what a squared gradient must exceed for its weight
        to move, see :func:`mask_by_threshold`; a number, a schedule or a scalar array.
      power: :math:`p > 0`, how fast a weight slows down; 1 keeps old tasks best. As all
        the following see :func:`scale_by_generalized_adagrad`.
      eps: :math:`\varepsilon \ge 0`, what the accumulator has to outgrow before a
        weight slows down. Choose it as carefully as the learning rate.
      prior: :math:`c \ge 0`, the number of gradients that an accumulator begins with.
      window: the number of steps that are remembered; None for all.
      eps_unit: what epsilon is measured in: None for units of :math:`|g|^p`, ``"leaf"``
        or ``"tree"`` for those of the root mean square gradient.
      scaling: whether to divide; off gives plain SGD on accepted gradients while the
        accumulator fills. A bool, a schedule or a scalar array.
      accumulator_dtype: dtype of the accumulator, by default at least float32.

    Returns:
      An optimizer whose updates have the gradients' shapes and dtypes. Its state is
      :class:`ScaleByGeneralizedAdagradState`: a step count, one real array the size of
      the parameters and one number per leaf. Its tree is the same for all arguments, so
      that one ``classp`` may take over the state of another at a task boundary.

    Raises:
      ValueError: if a number is out of its range, infinite or NaN, or if the gradients'
        tree or shapes are not those of the state.
      TypeError: if an argument is no number, or if a leaf has no floating-point dtype.

    Example:
      >>> import classp_jax
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> optimizer = classp_jax.classp(learning_rate=2.0, threshold=1e-4)
      >>> params = jnp.array([1.0, 2.0, 3.0])
      >>> state = optimizer.init(params)
      >>> loss = lambda w: jnp.sum(w**2)
      >>> for _ in range(50):
      ...     gradients = jax.grad(loss)(params)
      ...     updates, state = optimizer.update(gradients, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{loss(params):.3f}")
      0.000

    References:
      Ludwig, `CLASSP: a Biologically-Inspired Approach to Continual Learning through
      Adjustment Suppression and Sparsity Promotion
      <https://arxiv.org/abs/2405.09637>`_, 2024

    .. seealso:: :func:`mask_by_threshold`, :func:`mask_to_density`,
      :func:`scale_by_generalized_adagrad`, :func:`protect`, :func:`classp_published`
    """
    learning_rate = non_negative("learning_rate", learning_rate, schedule=True)
    threshold = non_negative("threshold", threshold, schedule=True)
    return masked_scaling(
        lambda g, count: passes(g, at_step(threshold, count)),
        Accumulation(power, eps, prior, window, eps_unit, accumulator_dtype),
        scaling=scaling,
        learning_rate=learning_rate,
    )
