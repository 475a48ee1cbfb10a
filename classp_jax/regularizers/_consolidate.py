"""The end of a task: regularizers take over its weights and what mattered in it.

A regularizer is a transform whose state, a NamedTuple, brings its own end of a task: a
method ``end_of_task(params, fisher)`` that returns the new state, and an attribute
``needs_fisher``. Nothing else has to know it.
"""

from typing import Any

import jax

from classp_jax._arrays import unwrapped, wrapped_like


def _is_regularizer(node: Any) -> bool:
    return hasattr(type(node), "end_of_task")


def _regularizers(state: Any) -> list[Any]:
    nodes = jax.tree.leaves(state, is_leaf=_is_regularizer)
    return [node for node in nodes if _is_regularizer(node)]


def needs_fisher(state: Any) -> bool:
    """Whether :func:`consolidate` needs a Fisher diagonal for this optimizer state.

    Args:
      state: any optimizer state, also without a regularizer. Only its tree counts, so
        this may be asked inside a traced function.

    Returns:
      True if the state holds that of :func:`ewc` or :func:`online_ewc`.

    Example:
      >>> import jax.numpy as jnp
      >>> from classp_jax import regularizers
      >>> params = jnp.zeros(3)
      >>> regularizers.needs_fisher(regularizers.ewc(1.0).init(params))
      True
      >>> regularizers.needs_fisher(regularizers.si(1.0).init(params))
      False
    """
    return any(node.needs_fisher for node in _regularizers(state))


def consolidate(state: Any, params: Any, fisher: Any = None) -> Any:
    """Tells every regularizer in an optimizer state that a task has ended.

    From then on :func:`ewc`, :func:`online_ewc` and :func:`si` hold the weights near
    ``params``, as their formulas say. What else is in the state stays as it is. A pure
    function: it works under ``jit``, ``vmap`` (over states, parameters and Fisher
    diagonals alike) and in ``lax.cond``.

    With Flax, take what it returns and go on training::

      # NNX, also inside nnx.jit
      params = nnx.state(model, nnx.Param)
      optimizer.opt_state = regularizers.consolidate(optimizer.opt_state, params)
      # Linen
      state = regularizers.consolidate(state, state.params)  # a TrainState

    Args:
      state: any optimizer state that holds a regularizer's somewhere: chained, masked,
        partitioned, injected, or wrapped in another transform's; or a tree that holds
        an optimizer state, such as a Linen ``TrainState``. Flax NNX's variables may
        stand in the arrays' places.
      params: the parameters at the end of the task, all of them also where the
        regularizer is masked; NNX's variables or arrays.
      fisher: for EWC, the diagonal of the task's Fisher information at ``params``, a
        tree like ``params`` with no negative entry, see :func:`fisher_diagonal`.
        :func:`needs_fisher` says whether it is needed; SI ignores it.

    Returns:
      The new state, with the tree, shapes and dtypes of ``state``, so that a compiled
      step goes on without being traced again.

    Raises:
      ValueError: if the state holds no regularizer, if a Fisher diagonal is needed and
        missing, or if a tree or a shape is not the state's.
      TypeError: if a leaf is not of real floats.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from classp_jax import regularizers
      >>> optimizer = optax.chain(regularizers.ewc(2.0), optax.sgd(1.0))
      >>> params = {"w": jnp.array([1.0])}
      >>> state = optimizer.init(params)
      >>> state = regularizers.consolidate(state, params, {"w": jnp.array([3.0])})
      >>> print(state[0].fisher["w"], state[0].anchor["w"])
      [3.] [1.]
    """
    if not _regularizers(state):
        raise ValueError(
            "This optimizer state holds no regularizer: it does not come from ewc, "
            "online_ewc or si."
        )
    if fisher is None and needs_fisher(state):
        raise ValueError(
            "fisher is needed to consolidate EWC: pass the diagonal of the Fisher "
            "information, such as fisher_diagonal(logits_fn, params, x)."
        )
    params, fisher = unwrapped((params, fisher))

    def consolidated(node: Any) -> Any:
        if not _is_regularizer(node):
            return node
        return wrapped_like(unwrapped(node).end_of_task(params, fisher), node)

    return jax.tree.map(consolidated, state, is_leaf=_is_regularizer)
