"""What the regularizers share: the pull to an anchor, and trees that match."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from classp_jax._hyperparams import cast
from classp_jax._trees import path_name


def wide_dtype(leaf: Any) -> np.dtype:
    """The dtype to keep and compute in: the leaf's, float32 if that is narrower."""
    # Not jax.numpy's promotion, which a strict setting forbids.
    return np.promote_types(jnp.result_type(leaf), np.float32)


def zeros(params: optax.Params) -> optax.Params:
    """Zeros of the parameters' shapes, of at least float32."""
    return jax.tree.map(lambda w: jnp.zeros_like(w, dtype=wide_dtype(w)), params)


def copied(tree: Any, like: Any) -> Any:
    """The tree in the dtypes of ``like``, in memory of its own.

    A state that shared a buffer with the parameters could not be donated with them.
    """
    return jax.tree.map(
        lambda leaf, r: jnp.array(leaf, dtype=r.dtype, copy=True), tree, like
    )


def hyperparameter_array(value: Any) -> jax.Array:
    """A hyperparameter as the state keeps it: a scalar of the default float dtype."""
    return jnp.asarray(value, jnp.result_type(float))


def require_real_leaves(tree: Any, what: str) -> None:
    """Raises TypeError unless every leaf is an array of real floats."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{what} leaf '{path_name(path)}' has dtype {dtype}; regularizers need "
                "real floating-point leaves. Keep others out with optax.masked or "
                "optax.partition."
            )


def matched(what: str, tree: Any, reference: Any) -> Any:
    """``tree`` without what ``reference`` masks out, checked against its shapes.

    Inside ``optax.masked`` and ``optax.partition`` the state holds only a part of the
    parameters, while :func:`consolidate` is given all of them.
    """

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    expected = jax.tree.structure(reference)
    try:
        part = jax.tree.map(
            lambda r, t: r if is_masked(r) else t, reference, tree, is_leaf=is_masked
        )
        same_tree = jax.tree.structure(part) == expected
    except ValueError:
        part, same_tree = None, False
    if not same_tree:
        raise ValueError(
            f"The {what} do not have the tree that the regularizer's state was "
            f"initialised for. State: {expected}. Found: {jax.tree.structure(tree)}."
        )
    require_real_leaves(part, what)
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(part),
        jax.tree.leaves(reference),
        strict=True,
    )
    for (path, leaf), r in pairs:
        if jnp.shape(leaf) != jnp.shape(r):
            raise ValueError(
                f"In the {what}, '{path_name(path)}' has shape {jnp.shape(leaf)}, but "
                f"the regularizer's state was initialised for shape {jnp.shape(r)}."
            )
    return part


def required(method: str, params: optax.Params | None) -> optax.Params:
    """The parameters; raises ValueError if the update was called without."""
    if params is None:
        raise ValueError(
            f"{method} needs the parameters: call update(gradients, state, params)."
        )
    return params


def pulled(
    updates: optax.Updates,
    params: optax.Params,
    importance: Any,
    anchor: Any,
    factor: Any,
) -> optax.Updates:
    """``g + factor * importance * (w - anchor)``, in the gradients' dtypes."""
    updates = matched("gradients", updates, anchor)
    params = matched("parameters", params, anchor)

    def leaf(g: jax.Array, w: jax.Array, f: jax.Array, a: jax.Array) -> jax.Array:
        dtype = np.promote_types(wide_dtype(g), a.dtype)
        distance = jnp.asarray(w).astype(dtype) - a.astype(dtype)
        pull = cast(factor, dtype) * (f.astype(dtype) * distance)
        return (g.astype(dtype) + pull).astype(g.dtype)

    return jax.tree.map(leaf, updates, params, importance, anchor)
