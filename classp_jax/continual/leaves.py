"""Leaves of a tree, as checkpoints hold them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from classp_jax.continual.errors import CheckpointError


def named(tree: Any) -> dict[str, Any]:
    """The leaves by their path.

    Raises:
      CheckpointError: if two have the same.
    """
    leaves = jax.tree.leaves_with_path(tree)
    by_path = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }
    if len(by_path) < len(leaves):
        raise CheckpointError("Two leaves of the tree have one path; rename a key.")
    return by_path


def is_key(leaf: Any) -> bool:
    """Whether it is a typed random key."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def kind(leaf: Any) -> str:
    """Dtype and shape, such as ``float32[3,4]``.

    Raises:
      CheckpointError: if it is neither array nor number.
    """
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    if not is_key(leaf) and dtype.kind in "OSU":
        raise CheckpointError(f"A checkpoint holds arrays and numbers, not {leaf!r}.")
    return f"{dtype}[{','.join(map(str, np.shape(leaf)))}]"


def copied(leaf: Any) -> Any:
    """A copy on the host; on a device where no host sees the whole array."""
    leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jnp.copy(leaf)
    return np.array(leaf, copy=True)


def as_leaf(leaf: Any, array: Any) -> Any:
    """What was read, as the leaf ``leaf`` is."""
    if array is None:
        array = np.zeros(leaf.shape, leaf.dtype)
    if is_key(leaf):
        key = jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))
        sharding = getattr(leaf, "sharding", None)
        return key if sharding is None else jax.device_put(key, sharding)
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return jnp.asarray(array)
    if isinstance(leaf, np.ndarray):
        return array
    return array[()] if isinstance(leaf, np.generic) else array.item()
