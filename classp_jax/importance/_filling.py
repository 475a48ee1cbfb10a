"""Filling the accumulators from old data, before fine-tuning."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from classp_jax._arrays import (
    path_name,
    require_same_shapes,
    unwrapped,
    working_dtype,
    wrapped_like,
)
from classp_jax._hyperparams import cast, non_negative
from classp_jax.importance._states import (
    accumulators_in,
    map_accumulators,
    no_accumulator,
)
from classp_jax.regularizers._compiled import compiled


def accumulate_importance(
    tx: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params,
    gradients: optax.Updates | Iterator[optax.Updates],
    *,
    per_example: bool = False,
    strength: jax.typing.ArrayLike = 1.0,
    **extra_args: Any,
) -> Any:
    r"""Fills the accumulators from gradients of old data, without moving a weight.

    For a network that was not trained with CLASSP, such as a pretrained checkpoint:
    run what it already knows through this function, then fine-tune with the state it
    returns. Weights that mattered to the old data have large accumulators by then and
    move little. The sum grows with the number of gradients; that number, times
    ``strength``, is how strongly the old knowledge is protected.

    It runs the transform's own update once a gradient and keeps of the new state the
    accumulators only. What is accepted (``threshold``) and what is added (``power``,
    ``prior``) is as in training. Step counts, schedules, momenta and inner optimizers
    stay as they were: a schedule is read at the state's current count in every call,
    and momentum in front of CLASSP adds what it would add to the next step.

    Gradients of single examples (``per_example=True``) say more than those of batches,
    in whose mean cancels what the examples disagree on, and come closer to the Fisher
    information; a batch takes one gradient where they take one an example. Prefer them
    where time allows::

      gradient = jax.vmap(jax.grad(loss), in_axes=(None, 0))
      state = accumulate_importance(
          tx, state, params, gradient(params, examples), per_example=True
      )

    In a loop over batches of examples, do both in one compiled function, or give a
    generator that yields one batch's gradients after the other, such as
    ``finetune.gradients(loss, params, batches)``.

    Accumulators in bfloat16 are summed in float32 within one call and rounded to
    nearest at its end: give them many examples a call, as a long loop of small calls
    stalls.

    With Flax NNX: ``optimizer.opt_state = accumulate_importance(optimizer.tx,
    optimizer.opt_state, nnx.state(model, nnx.Param), gradients)``. With Linen's
    ``TrainState``, give and replace its ``opt_state``.

    Args:
      tx: the optimizer, or any transform around it. Not ``optax.MultiSteps``, which
        hands on a gradient only every k-th step: fill what stands inside it.
      state: its state, such as ``tx.init(params)``.
      params: the parameters at which the gradients were taken.
      gradients: one batch's gradients, a tree like ``params``; with ``per_example`` a
        tree of ``[examples, *shape]``. A NaN or infinite gradient shows as NaN or
        infinity in the accumulator. Or an iterator of such trees, each checked before
        it is added: one that is not finite is an error.
      per_example: whether the gradients have a leading axis of examples, over which
        :math:`|g|^p` is summed.
      strength: what the amount that this call adds is multiplied by; a number of at
        least 0 or a scalar array.
      **extra_args: what ``tx.update`` takes beyond gradients, state and parameters.
        ``accumulate_importance=True`` is added to it, for transforms that accumulate
        here only (``protect(frozen=True)``).

    Returns:
      The new state, with the tree, shapes and dtypes of ``state``.

    Raises:
      ValueError: if the gradients' tree or shapes are not those of ``params``, if the
        state holds no accumulator, or one inside ``optax.MultiSteps``; if an iterator
        is empty or yields a NaN or infinity, with the batch's number and the leaves;
        as the transform's own update. ``state`` is as it was.
      TypeError: as the transform's own update.

    Example:
      >>> import classp_jax
      >>> import jax
      >>> import jax.numpy as jnp
      >>> tx = classp_jax.classp(0.1)
      >>> params = jnp.array([1.0, -2.0])
      >>> old_data = jnp.array([[1.0, 0.0], [3.0, 0.0]])
      >>> gradient = jax.vmap(jax.grad(lambda w, x: w @ x), in_axes=(None, 0))
      >>> state = classp_jax.accumulate_importance(
      ...     tx, tx.init(params), params, gradient(params, old_data), per_example=True
      ... )
      >>> print(classp_jax.accumulators(state))
      [4. 0.]
    """
    strength = non_negative("strength", strength)
    if isinstance(gradients, Iterator):
        batch = -1
        options = {"per_example": per_example, "strength": strength, **extra_args}
        for batch, tree in enumerate(gradients):
            _require_finite(tree, batch)
            state = accumulate_importance(tx, state, params, tree, **options)
        if batch < 0:
            raise ValueError(
                "The iterator of gradients is empty: nothing would be protected. A "
                "generator that was read before yields nothing any more."
            )
        return state
    original = state
    state, params, gradients, extra_args = unwrapped(
        (state, params, gradients, extra_args)
    )
    _require_fillable(state)
    expected = params
    if per_example:
        lengths = [jnp.shape(g)[0] for g in jax.tree.leaves(gradients) if jnp.ndim(g)]
        leading = lengths[:1] or [1]
        expected = jax.tree.map(
            lambda w: np.broadcast_to(0.0, (*leading, *jnp.shape(w))), params
        )
    require_same_shapes(gradients, expected, f"gradients (per_example={per_example})")
    update = optax.with_extra_args_support(tx).update

    def filled(state: Any, gradients: Any, params: Any, extra_args: Any) -> Any:
        _, new = update(
            gradients, state, params, **extra_args, accumulate_importance=True
        )
        return map_accumulators(lambda _, new: new, state, new)

    def filled_by_each(_: Any, state: Any, gradients: Any, *others: Any) -> Any:
        return jax.lax.scan(
            lambda state, g: (filled(state, g, *others), None), state, gradients
        )[0]

    def strengthened_sum(old: jax.Array, new: jax.Array) -> jax.Array:
        if not (isinstance(strength, float) and strength == 1):
            old_wide = old.astype(new.dtype)
            new = old_wide + cast(strength, new.dtype) * (new - old_wide)
        return new.astype(old.dtype)

    # Narrow accumulators are rounded once, at the end.
    wide = map_accumulators(
        lambda sums: jax.tree.map(lambda a: a.astype(working_dtype(a)), sums), state
    )
    arguments = (wide, gradients, params, extra_args)
    if per_example:
        new = compiled(filled_by_each, (), *arguments)((), *arguments)
    else:
        new = filled(*arguments)
    strengthened = functools.partial(jax.tree.map, strengthened_sum)
    return wrapped_like(map_accumulators(strengthened, state, new), original)


@jax.jit
def _all_finite(tree: Any) -> Any:
    return jax.tree.map(lambda g: jnp.isfinite(g).all(), tree)


def _require_finite(tree: Any, batch: int) -> None:
    found = jax.tree_util.tree_leaves_with_path(_all_finite(unwrapped(tree)))
    bad = [path_name(path) for path, finite in found if not finite]
    if bad:
        raise ValueError(
            f"Batch {batch} of the old gradients (counted from 0) holds NaN or "
            f"infinity, in {', '.join(map(repr, bad))}. Nothing has been changed."
        )


def _require_fillable(state: Any) -> None:
    if not accumulators_in(state):
        raise no_accumulator()
    if accumulators_in(optax.tree.get_all_with_path(state, "MultiStepsState")):
        raise ValueError(
            "optax.MultiSteps hands on a gradient only every k-th step: fill the "
            "accumulators of the optimizer inside it, then put its state back, "
            "state._replace(inner_opt_state=...)."
        )
