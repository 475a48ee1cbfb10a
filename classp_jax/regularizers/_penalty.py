"""What the regularizers share: the pull to an anchor, and trees that match."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from classp_jax._arrays import float_arrays, require_same_shapes, working_dtype
from classp_jax._hyperparams import cast


def hyperparameter_array(value: Any) -> jax.Array:
    """A hyperparameter as the state keeps it: a scalar of the default float dtype."""
    return jnp.asarray(value, jnp.result_type(float))


def wide_zeros(tree: Any) -> Any:
    """Zeros of the leaves' shapes, in the working dtype."""
    return jax.tree.map(lambda w: jnp.zeros_like(w, dtype=working_dtype(w)), tree)


def copied(tree: Any, like: Any) -> Any:
    """The tree in the dtypes of ``like``, in memory of its own.

    A state that shared a buffer with the parameters could not be donated with them.
    """
    return jax.tree.map(
        lambda leaf, r: jnp.array(leaf, dtype=r.dtype, copy=True), tree, like
    )


def matched(what: str, tree: Any, reference: Any) -> Any:
    """``tree`` without what ``reference`` masks out, checked against its shapes.

    Inside ``optax.masked`` and ``optax.partition`` the state holds only a part of the
    parameters, while :func:`consolidate` is given all of them.
    """

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    try:
        part = jax.tree.map(
            lambda r, t: r if is_masked(r) else t, reference, tree, is_leaf=is_masked
        )
    except ValueError:
        part = tree  # which differs, as the check below says
    require_same_shapes(part, reference, what)
    return float_arrays(part, what, real=True)


def required(method: str, params: optax.Params | None) -> optax.Params:
    """The parameters; raises ValueError if the update was called without."""
    if params is None:
        raise ValueError(
            f"{method} needs the parameters: call update(gradients, state, params)."
        )
    return params


def pulled(
    updates: Any,
    params: Any,
    importance: Any,
    anchor: Any,
    factor: Any,
) -> optax.Updates:
    """``g + factor * importance * (w - anchor)``, in the gradients' dtypes."""

    def leaf(g: jax.Array, w: jax.Array, f: jax.Array, a: jax.Array) -> jax.Array:
        dtype = np.promote_types(working_dtype(g), a.dtype)
        distance = w.astype(dtype) - a.astype(dtype)
        pull = cast(factor, dtype) * (f.astype(dtype) * distance)
        return (g.astype(dtype) + pull).astype(g.dtype)

    return jax.tree.map(leaf, updates, params, importance, anchor)
