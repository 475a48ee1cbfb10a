"""Leaves of a tree, as checkpoints hold them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
        if sharding is not None and not sharding.is_fully_addressable:
            data = jax.make_array_from_callback(
                np.shape(array), sharding, lambda index: array[index]
            )
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return key if sharding is None else jax.device_put(key, sharding)
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return jnp.asarray(array)
    if isinstance(leaf, np.ndarray):
        return array
    return array[()] if isinstance(leaf, np.generic) else array.item()


def least(number: int, devices: Sequence[Any]) -> int:
    """The least of the numbers that the processes give which have these devices.

    All of them call it, in the same order as what else they do on the devices.
    """
    if len({device.process_index for device in devices}) < 2:
        return number
    mesh = Mesh(np.array(devices), ("devices",))
    cut, whole = (NamedSharding(mesh, PartitionSpec(*p)) for p in (["devices"], []))
    with jax.enable_x64(True):
        given = jax.make_array_from_callback(
            (len(devices),), cut, lambda index: np.full(1, number)
        )
        return int(jax.jit(jnp.min, out_shardings=whole)(given))


def lifted(leaf: Any, processes: Sequence[int]) -> jax.Array:
    """A leaf of processes without the first one, as an array that they share.

    Orbax writes arrays of NumPy in the first process only, and no array of JAX that
    lies in one process whole. So one is said to have a second copy elsewhere, which is
    never made.
    """
    if isinstance(leaf, jax.Array):
        return leaf
    holders = [*processes] if len(processes) > 1 else [*processes, 0]
    devices = [jax.local_devices(process_index=holder)[0] for holder in holders]
    sharding = NamedSharding(Mesh(np.array(devices), ("devices",)), PartitionSpec())
    # Numbers keep their 64 bits.
    with jax.enable_x64(True):
        return jax.make_array_from_callback(
            np.shape(leaf), sharding, lambda index: leaf[index]
        )
