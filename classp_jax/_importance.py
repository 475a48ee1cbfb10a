"""Protecting weights that were trained elsewhere, before fine-tuning."""

import optax


def accumulate_importance(
    tx: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params,
    gradients: optax.Updates,
) -> optax.OptState:
    """Fills the accumulators from gradients of old data, without moving a weight.

    For a network that was not trained with CLASSP, such as a pretrained checkpoint:
    run batches of what it already knows through this function, then fine-tune with the
    state it returns. Weights that mattered to the old data have large accumulators by
    then and move little. It runs the transform and throws the updates away, so what
    counts as an accepted gradient (``threshold``) and as a term of the sum (``power``)
    is as in training, and so is what else the transform keeps: step counts advance,
    momentum builds up. The sum grows with the number of batches; that number is how
    strongly the old knowledge is protected. Gradients of single examples say more than
    those of batches, in whose mean what the examples disagree on cancels.

    Args:
      tx: the optimizer, or any transform around it.
      state: its state, such as ``tx.init(params)``.
      params: the parameters at which the gradients were taken.
      gradients: one batch's gradients, a tree like ``params``.

    Returns:
      The new state, with the tree, shapes and dtypes of ``state``.

    Raises:
      ValueError, TypeError: as the transform's own update.

    Example:
      >>> import classp_jax
      >>> import jax
      >>> import jax.numpy as jnp
      >>> tx = classp_jax.classp(0.1)
      >>> params = jnp.array([1.0, -2.0])
      >>> old_data = jnp.array([[1.0, 0.0], [3.0, 0.0]])
      >>> gradient = jax.grad(lambda w, x: (w @ x) ** 2)
      >>> def body(state, x):
      ...     return classp_jax.accumulate_importance(
      ...         tx, state, params, gradient(params, x)
      ...     ), None
      >>> state, _ = jax.lax.scan(body, tx.init(params), old_data)
      >>> print(classp_jax.free_fraction(state))
      0.5
    """
    tx = optax.with_extra_args_support(tx)
    _, state = tx.update(gradients, state, params, accumulate_importance=True)
    return state
