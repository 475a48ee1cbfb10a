"""The end of a task: regularizers take over its weights and what mattered in it."""

from typing import Any

import jax
import optax

from classp_jax.regularizers._ewc import (
    EWCState,
    OnlineEWCState,
    consolidate_ewc,
    consolidate_online_ewc,
)
from classp_jax.regularizers._si import SIState, consolidate_si


def _is_ours(node: Any) -> bool:
    return isinstance(node, EWCState | OnlineEWCState | SIState)


def _parts(state: optax.OptState) -> list[Any]:
    return [s for s in jax.tree.leaves(state, is_leaf=_is_ours) if _is_ours(s)]


def needs_fisher(state: optax.OptState) -> bool:
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
    return any(isinstance(part, EWCState | OnlineEWCState) for part in _parts(state))


def consolidate(
    state: optax.OptState, params: optax.Params, fisher: Any = None
) -> optax.OptState:
    """Tells every regularizer in an optimizer state that a task has ended.

    From then on :func:`ewc`, :func:`online_ewc` and :func:`si` hold the weights near
    ``params``, as their formulas say. What else is in the state stays as it is. A pure
    function: it works under ``jit``, ``vmap`` (over states, parameters and Fisher
    diagonals alike) and in ``lax.cond``.

    Args:
      state: any optimizer state that holds a regularizer's somewhere: chained, masked,
        partitioned, injected, or wrapped in another transform's.
      params: the parameters at the end of the task, all of them also where the
        regularizer is masked.
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

    def ended(part: Any) -> Any:
        if isinstance(part, SIState):
            return consolidate_si(part, params)
        if isinstance(part, EWCState):
            return consolidate_ewc(part, params, fisher)
        if isinstance(part, OnlineEWCState):
            return consolidate_online_ewc(part, params, fisher)
        return part

    if not _parts(state):
        raise ValueError(
            "This optimizer state holds no regularizer: it does not come from ewc, "
            "online_ewc or si."
        )
    if fisher is None and needs_fisher(state):
        raise ValueError(
            "fisher is needed to consolidate EWC: pass the diagonal of the Fisher "
            "information, such as fisher_diagonal(logits_fn, params, x)."
        )
    return jax.tree.map(ended, state, is_leaf=_is_ours)
