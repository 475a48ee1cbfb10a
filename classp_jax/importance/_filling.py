"""Filling the accumulators from old data, before fine-tuning."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from classp_jax._arrays import (
    leaf_name,
    require_same_shapes,
    unwrapped,
    working_dtype,
    wrapped_like,
)
from classp_jax._hyperparams import non_negative
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
    information; a batch takes one gradient where they take one per example. Prefer them
    where time allows::

      gradient = jax.vmap(jax.grad(loss), in_axes=(None, 0))
      state = accumulate_importance(
          tx, state, params, gradient(params, examples), per_example=True
      )

    In a loop over batches of examples, do both in one compiled function, or give a
    generator that yields one batch's gradients after the other, such as
    ``finetune.gradients(loss, params, batches)``.

    Accumulators in bfloat16 are summed in float32 within one call, over all that an
    iterator yields, and rounded to nearest at its end: give them many examples per
    call, as a long loop of small calls stalls.

    With Flax NNX: ``optimizer.opt_state = accumulate_importance(optimizer.tx,
    optimizer.opt_state, nnx.state(model, nnx.Param), gradients)``. With Linen's
    ``TrainState``, give and replace its ``opt_state``.

    Args:
      tx: the optimizer, or any transform around it. Not ``optax.MultiSteps``, which
        hands on a gradient only every k-th step: fill what stands inside it.
      state: its state, such as ``tx.init(params)``.
      params: the parameters at which the gradients were taken.
      gradients: one batch's gradients, a tree like ``params``; with ``per_example`` a
        tree of ``[examples, *shape]``. Or an iterator of such trees. A NaN or infinite
        gradient is an error; under ``jit``, where none can be raised, it shows as NaN
        or infinity in the accumulator.
      per_example: whether the gradients have a leading axis of examples, over which
        :math:`|g|^p` is summed.
      strength: what each :math:`|g|^p` that this call adds is multiplied by; a number
        of at least 0 or a scalar array. Old sums leak as ``window`` says, whatever it
        is.
      **extra_args: what ``tx.update`` takes beyond gradients, state and parameters.
        ``accumulate_importance=True`` is added to it, for transforms that accumulate
        here only (``protect(frozen=True)``). A line search, such as that of
        ``optax.lbfgs``, refuses it unless ``value_fn`` has an argument of that name.

    Returns:
      The new state, with the tree, shapes and dtypes of ``state``.

    Raises:
      ValueError: if the gradients' tree or shapes are not those of ``params``, if the
        state holds no accumulator, or one inside ``optax.MultiSteps``; if an iterator
        is empty; outside of ``jit`` if a gradient is NaN or infinite, or a sum
        overflows, with the leaves and an iterator's batch; as the transform's own
        update. ``state`` is as it was.
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
    original = state
    state, params, extra_args = unwrapped((state, params, extra_args))
    _require_fillable(state)
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

    def unit(a: jax.Array) -> jax.Array:
        # So small at a strength of 0 that nothing is seen of what is added to a.
        limits = jnp.finfo(a.dtype)
        least = jnp.maximum(jnp.minimum(a, limits.max) * 2.0**-100, limits.tiny)
        return jnp.maximum(jnp.asarray(strength, a.dtype), least)

    # Narrow sums are rounded once, at the end. Those in units of the strength leak as
    # others do, and what is added to them counts that many times.
    as_it_is = isinstance(strength, float) and strength == 1

    def widened(a: jax.Array) -> jax.Array:
        a = a.astype(working_dtype(a))
        return a if as_it_is else a / unit(a)

    def narrowed(old: jax.Array, new: jax.Array) -> jax.Array:
        wide = old.astype(new.dtype)
        factor = jnp.where(wide == 0, jnp.asarray(strength, wide.dtype), unit(wide))
        return (new if as_it_is else factor * new).astype(old.dtype)

    new = map_accumulators(functools.partial(jax.tree.map, widened), state)
    is_many = isinstance(gradients, Iterator)
    batch = -1
    for batch, tree in enumerate(gradients if is_many else [gradients]):
        tree = unwrapped(tree)
        _require_gradients(tree, params, per_example, batch if is_many else None)
        arguments = (new, tree, params, extra_args)
        if per_example:
            new = compiled(filled_by_each, (), *arguments)((), *arguments)
        else:
            new = filled(*arguments)
    if batch < 0:
        raise ValueError(
            "The iterator of gradients is empty: nothing would be protected. A "
            "generator that was read before yields nothing any more."
        )
    new = map_accumulators(functools.partial(jax.tree.map, narrowed), state, new)
    _require_sums(state, new)
    return wrapped_like(new, original)


def _require_gradients(
    gradients: Any, params: Any, per_example: bool, batch: int | None
) -> None:
    """Raises unless they are like the parameters and, where that is known, finite."""
    expected = params
    if per_example:
        lengths = [jnp.shape(g)[0] for g in jax.tree.leaves(gradients) if jnp.ndim(g)]
        leading = lengths[:1] or [1]
        expected = jax.tree.map(
            lambda w: np.broadcast_to(0.0, (*leading, *jnp.shape(w))), params
        )
    require_same_shapes(gradients, expected, f"gradients (per_example={per_example})")
    # Integers may stand beside the optimizer, under optax.masked.
    floats = jax.tree.map(
        lambda g: g if jnp.issubdtype(getattr(g, "dtype", float), jnp.inexact) else 0.0,
        gradients,
    )
    bad = _where_false(jax.tree.map(_all_finite, floats))
    if bad:
        hold = "The old gradients hold"
        if batch is not None:
            hold = f"Batch {batch} of the old gradients (counted from 0) holds"
        raise ValueError(f"{hold} NaN or infinity, in {bad}. Nothing has been changed.")


def _require_sums(old: Any, new: Any) -> None:
    """Raises if a sum that was finite is so no longer, where that is known."""
    for before, after in zip(accumulators_in(old), accumulators_in(new), strict=True):
        bad = _where_false(jax.tree.map(_stayed_finite, before, after))
        if bad:
            raise ValueError(
                f"The sums of |g|^p overflow (or are NaN) in {bad}. Nothing has been "
                "changed. A smaller power, strength or number of gradients keeps them "
                "in the range of the accumulators' dtype."
            )


# Leaf by leaf, as they may be on different devices.
@jax.jit
def _all_finite(g: Any) -> Any:
    return jnp.isfinite(g).all()


@jax.jit
def _stayed_finite(before: Any, after: Any) -> Any:
    return (jnp.isfinite(after) | ~jnp.isfinite(before)).all()


def _where_false(tree: Any) -> str:
    """The leaves that are false, in words; none are where they are traced."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    is_known = not any(isinstance(leaf, Tracer) for _, leaf in found)
    return ", ".join(leaf_name(path) for path, leaf in found if is_known and not leaf)


def _require_fillable(state: Any) -> None:
    if not accumulators_in(state):
        raise no_accumulator()
    if accumulators_in(optax.tree.get_all_with_path(state, "MultiStepsState")):
        raise ValueError(
            "optax.MultiSteps hands on a gradient only every k-th step: fill the "
            "accumulators of the optimizer inside it, then put its state back, "
            "state._replace(inner_opt_state=...)."
        )
