"""Checks and small helpers on trees of parameters and gradients."""

from typing import Any

import jax
import jax.numpy as jnp


def path_name(path: Any) -> str:
    """A leaf's place in its tree, such as ``encoder/kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def float_arrays(tree: Any, what: str) -> Any:
    """The tree, bare numbers made arrays; TypeError unless all are of floats."""

    def checked(path: Any, leaf: Any) -> Any:
        dtype = getattr(leaf, "dtype", None) or jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"{what} leaf '{path_name(path)}' has dtype {dtype}; CLASSP needs "
                "floating-point leaves. Keep others out of the optimizer with "
                "optax.masked or optax.partition."
            )
        # A ShapeDtypeStruct, which init may be given, has a dtype and is no array.
        return leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)

    return jax.tree_util.tree_map_with_path(checked, tree)


def require_same_tree(gradients: Any, state_tree: Any) -> None:
    """Raises ValueError unless the gradients have the tree of the state's part."""
    expected = jax.tree.structure(state_tree)
    found = jax.tree.structure(gradients)
    if expected != found:
        raise ValueError(
            "The gradients do not have the tree that the optimizer state was "
            f"initialised for. State: {expected}. Gradients: {found}."
        )


def require_same_shapes(gradients: Any, accumulator: Any) -> None:
    """Raises ValueError unless the gradients have the accumulator's tree and shapes."""
    require_same_tree(gradients, accumulator)
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(gradients),
        jax.tree.leaves(accumulator),
        strict=True,
    )
    for (path, g), a in pairs:
        if jnp.shape(g) != jnp.shape(a):
            raise ValueError(
                f"The gradient of '{path_name(path)}' has shape {jnp.shape(g)}, but "
                f"the optimizer state was initialised for shape {jnp.shape(a)}."
            )
