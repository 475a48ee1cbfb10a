"""Arrays and trees of them: dtypes, paths, and checks that name the leaf."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def path_name(path: Any) -> str:
    """A leaf's place in its tree, such as ``encoder/kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_name(path: Any) -> str:
    """A leaf's place for a message; that of a bare array has no name."""
    return f"'{path_name(path)}'" if path else "the array"


def working_dtype(leaf: Any) -> np.dtype:
    """The real dtype to compute in: the leaf's, float32 if that is narrower."""
    # NumPy's promotion, which works in JAX's strict mode too.
    return np.promote_types(jnp.finfo(jnp.result_type(leaf)).dtype, np.float32)


def magnitude(g: jax.Array) -> jax.Array:
    """``|g|``, real, in the working dtype."""
    return jnp.abs(g).astype(working_dtype(g))


def kept(accepted: Any, x: jax.Array) -> jax.Array:
    """``x`` where accepted, else 0; ``accepted`` may be the bool True."""
    return x if accepted is True else jnp.where(accepted, x, jnp.zeros_like(x))


def float_arrays(tree: Any, what: str, *, real: bool = False) -> Any:
    """The tree with every leaf as a JAX array.

    Raises TypeError, with the leaf's path, unless all are of floats (complex ones too,
    unless ``real``).
    """
    kind = jnp.floating if real else jnp.inexact
    needed = "real floating-point" if real else "floating-point"

    def checked(path: Any, leaf: Any) -> Any:
        try:
            dtype = jnp.result_type(leaf)
            accepted = jnp.issubdtype(dtype, kind)
        except TypeError:  # strings, functions, objects
            dtype = getattr(leaf, "dtype", type(leaf).__name__)
            accepted = False
        if not accepted:
            raise TypeError(
                f"In the {what} tree, {leaf_name(path)} is of type {dtype}; {needed} "
                "leaves are needed. Keep others out of the optimizer with optax.masked "
                "or optax.partition."
            )
        # A ShapeDtypeStruct, which init may be given, is not to become an array.
        is_array = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
        return leaf if is_array else jnp.asarray(leaf, dtype)

    return jax.tree_util.tree_map_with_path(checked, tree)


def _axes_of_leaf(x: jax.Array, like: jax.Array) -> tuple[str, ...]:
    kinds: list[Any] = [jax.typeof(x), jax.typeof(like)]
    of_x, of_like = (kind.manual_axis_type.varying for kind in kinds)
    return tuple(of_x - of_like)


def whole_size(x: jax.Array, like: jax.Array) -> int:
    """The size of the whole leaf.

    Inside ``jax.shard_map`` a leaf is whole over the mesh axes over which ``x`` varies
    and ``like``, a number that is kept for the leaf, does not.
    """
    return x.size * math.prod(map(jax.lax.axis_size, _axes_of_leaf(x, like)))


def whole_sum(x: jax.Array, like: jax.Array, dtype: Any) -> jax.Array:
    """The sum over the whole leaf."""
    names = _axes_of_leaf(x, like)
    total = jnp.sum(x, dtype=dtype)
    return jax.lax.psum(total, names) if names else total


def require_state(state: Any, kind: type, method: str) -> None:
    """Raises TypeError unless the state is one of this method's."""
    if not isinstance(state, kind):
        raise TypeError(
            f"{method} was given a state of another transform: {kind.__name__} is "
            f"needed, got {type(state).__name__}."
        )


def transform(init: Any, step: Any, kind: type) -> Any:
    """A transform by ``step(gradients, state, params, **extra_args)``, all checked."""

    def init_fn(params: optax.Params) -> Any:
        return init(float_arrays(params, "parameter"))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        require_state(state, kind, "The transform")
        return step(float_arrays(updates, "gradient"), state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def require_same_tree(tree: Any, reference: Any, what: str = "gradients") -> None:
    """Raises ValueError unless the tree is that of a part of the state."""
    expected, found = jax.tree.structure(reference), jax.tree.structure(tree)
    if expected != found:
        raise ValueError(
            f"The {what} do not have the tree that is needed, such as the one that the "
            f"optimizer state was initialised for. Needed: {expected}. Found: {found}."
        )


def require_same_shapes(tree: Any, reference: Any, what: str = "gradients") -> None:
    """Raises ValueError unless tree and shapes are those of a part of the state."""
    require_same_tree(tree, reference, what)

    def check(path: Any, leaf: Any, like: Any) -> None:
        if jnp.shape(leaf) != jnp.shape(like):
            raise ValueError(
                f"In the {what}, {leaf_name(path)} has shape {jnp.shape(leaf)}, but "
                f"{jnp.shape(like)} is needed."
            )

    jax.tree_util.tree_map_with_path(check, tree, reference)


def _is_variable(node: Any) -> bool:
    # Told by what it offers: the core does not import Flax.
    return hasattr(type(node), "get_raw_value")


def unwrapped(tree: Any) -> Any:
    """The tree with arrays in the places of Flax NNX's variables."""
    return jax.tree.map(
        lambda node: node.get_raw_value() if _is_variable(node) else node,
        tree,
        is_leaf=_is_variable,
    )


def wrapped_like(tree: Any, original: Any) -> Any:
    """The tree's arrays in the places, or the variables, that ``original`` has."""
    return jax.tree.unflatten(jax.tree.structure(original), jax.tree.leaves(tree))
