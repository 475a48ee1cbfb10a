"""Old and fine-tuned weights put together, each where it matters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from classp_jax._accumulate import scaled
from classp_jax._arrays import float_arrays, unwrapped, working_dtype, wrapped_like
from classp_jax._hyperparams import positive
from classp_jax.finetune.importance import by_name, require_same, require_sums
from classp_jax.importance import accumulators
from classp_jax.importance._states import accumulators_in


def merge(
    old: Any,
    new: Any,
    importance: Any,
    *,
    eps: jax.typing.ArrayLike = 0.1,
    power: jax.typing.ArrayLike = 1.0,
) -> Any:
    r"""Goes from old weights to fine-tuned ones, less far where the old ones matter.

    ``old`` are the weights :math:`w_\text{old}` before fine-tuning, ``new`` those after
    it, :math:`w_\text{new}`, and ``importance`` says of each weight how much it matters
    to the old data, :math:`A`. ``eps`` is the :math:`\varepsilon` that :math:`A` is
    measured against, ``power`` the :math:`p` of the sums in it:

    .. math::
      w = w_\text{old} + \left( \frac{\varepsilon}{\varepsilon + A} \right)^{1/p}
      (w_\text{new} - w_\text{old})

    The brake of :func:`classp_jax.protect`, on the whole way at once. It costs no
    training: fine-tune with whatever optimizer, then choose ``eps`` on validation data
    of both tasks, from little new ability to all of it. It does most after training
    with :func:`classp_jax.regularizers.ewc`; see ``docs/finetuning.md``.

    Args:
      old: the weights before fine-tuning, a tree of floats or NNX's variables, such as
        ``nnx.state(model, nnx.Param)``. Importance is of these.
      new: the weights after it, the same tree.
      importance: what matters to the old data, at least 0: an optimizer state with
        accumulators, or a tree like ``old``, such as
        :func:`classp_jax.regularizers.fisher_diagonal` gives.
      eps: :math:`\varepsilon > 0`, in the unit of the importance, where a weight goes
        half the way (at ``power=1``). Near 0 only weights that do not matter move; the
        larger, the nearer to ``new``.
      power: :math:`p > 0`: 1 for sums of magnitudes, 2 for sums of squares such as a
        Fisher diagonal.

    Returns:
      A tree like ``old``, of its dtypes.

    Raises:
      ValueError: if names or shapes differ (all differences are named), if a number is
        out of its range, or if importance is NaN, infinite or negative (not under
        ``jit``).
      TypeError: if a leaf is not of real floats.

    Example:
      >>> import jax.numpy as jnp
      >>> from classp_jax import finetune
      >>> old, new = {"w": jnp.zeros(3)}, {"w": jnp.ones(3)}
      >>> importance = {"w": jnp.array([0.0, 1.0, 9.0])}
      >>> print(finetune.merge(old, new, importance, eps=1.0)["w"])
      [1.  0.5 0.1]

    References:
      The mean of old and new weights: Wortsman et al., `Robust fine-tuning of zero-shot
      models <https://arxiv.org/abs/2109.01903>`_, 2022. Weighted by Fisher information:
      Matena and Raffel, `Merging models with Fisher-weighted averaging
      <https://arxiv.org/abs/2111.09832>`_, 2022
    """
    eps, power = positive("eps", eps), positive("power", power)
    if accumulators_in(importance):
        importance = accumulators(importance)
    needed = by_name(old, "old weights")
    trained = by_name(new, "new weights")
    sums = by_name(importance, "importance")
    require_same(trained, needed, "The new weights' tree")
    require_same(sums, needed, "The importance")
    if not any(isinstance(leaf, Tracer) for leaf in sums.values()):
        require_sums(sums, "The importance")

    def merged(before: jax.Array, after: jax.Array, a: jax.Array) -> jax.Array:
        dtype = np.promote_types(working_dtype(before), working_dtype(after))
        way = after.astype(dtype) - before.astype(dtype)
        ratio = a.astype(dtype) / jnp.asarray(eps, dtype)
        way = scaled(way, ratio, True, 1.0, power, True)
        return (before.astype(dtype) + way).astype(before.dtype)

    leaves = [merged(needed[name], trained[name], sums[name]) for name in needed]
    tree = jax.tree.structure(float_arrays(unwrapped(old), "old weights", real=True))
    return wrapped_like(jax.tree.unflatten(tree, leaves), old)
