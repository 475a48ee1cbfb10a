"""Where PyTorch's tensors lie in a tree of JAX's parameters, and how they are turned.

A table maps tensor names to layouts. ``{}`` in a name and its leaves is a number, such
as a layer's: ``"layers.{}.linear.weight": dense("layers/{}/linear/kernel")``. A name
mapped to None is left out; it may hold ``*``.
"""

import fnmatch
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from classp_jax._arrays import path_name, unwrapped

Groups = tuple[tuple[int, ...], ...]


class Layout(NamedTuple):
    """How one tensor of PyTorch holds one leaf, or several along its first axis."""

    leaves: tuple[str, ...]
    groups: Callable[[int], Groups]
    """From a leaf's number of axes: which of them make up each of the tensor's."""


Table = Mapping[str, Layout | None]


def same(*leaves: str) -> Layout:
    """Nothing is turned: embeddings, biases, norms.

    Args:
      *leaves: the leaf's path, such as ``"embedding/embedding"``; of several leaves
        that are stacked along the tensor's first axis, all of them in that order.
    """
    return Layout(leaves, lambda ndim: tuple((axis,) for axis in range(ndim)))


def flat(*leaves: str) -> Layout:
    """All axes in one: a bias that JAX keeps by heads, ``[heads, features]``.

    Args:
      *leaves: as for :func:`same`.
    """
    return Layout(leaves, lambda ndim: (tuple(range(ndim)),))


def dense(*leaves: str, inputs: int = 1) -> Layout:
    """A matrix: ``[out, in]`` in PyTorch, ``[in, out]`` in JAX.

    JAX's leaf may have several axes of inputs or outputs, as attention has heads:
    ``dense(path)`` for queries ``[in, heads, features]``, ``dense(path, inputs=2)`` for
    the output projection ``[heads, features, out]``, and ``dense(query, key, value)``
    where PyTorch keeps the three in one tensor.

    Args:
      *leaves: as for :func:`same`.
      inputs: how many of the leaf's axes, the first ones, are inputs.
    """
    return Layout(
        leaves, lambda ndim: (tuple(range(inputs, ndim)), tuple(range(inputs)))
    )


def conv(*leaves: str) -> Layout:
    """A convolution: OIHW in PyTorch, HWIO in JAX, or with fewer or more dimensions.

    Transposed convolutions lie otherwise in PyTorch.

    Args:
      *leaves: as for :func:`same`.
    """

    def groups(ndim: int) -> Groups:
        spatial = ((axis,) for axis in range(ndim - 2))
        return ((ndim - 1,), (ndim - 2,), *spatial)

    return Layout(leaves, groups)


def by_path(tree: Any) -> dict[str, Any]:
    """The tree's leaves by path; Flax NNX's variables count as the arrays they hold."""
    leaves = jax.tree_util.tree_leaves_with_path(unwrapped(tree))
    return {path_name(path): leaf for path, leaf in leaves}


def read_leaves(
    leaves: Mapping[str, Any],
    table: Table,
    shapes: Mapping[str, tuple[int, ...]],
    get: Callable[[str], np.ndarray],
    source: str,
) -> dict[str, jax.Array]:
    """The leaves' new values, each with the leaf's dtype and sharding.

    Args:
      leaves: by path; only their shapes, dtypes and shardings count.
      table: names and layouts.
      shapes: of all tensors that there are, by name.
      get: a tensor by its name.
      source: what an error calls the tensors, such as a file's name.

    Raises:
      ValueError: if tensors are missing, left over, of another shape or no floats:
        all are named.
    """
    wanted = _expanded(table, leaves)
    needed = tensor_shapes(leaves, table)
    left_out = [name for name, layout in table.items() if layout is None]
    filled = {path for layout in wanted.values() for path in layout.leaves}
    _raise_for(
        f"{source} does not fit the parameters.",
        {
            "Missing": [f"{n} {s}" for n, s in needed.items() if n not in shapes],
            "Not known to the table, or without a parameter": [
                f"{name} {shape}"
                for name, shape in shapes.items()
                if name not in needed
                and not any(fnmatch.fnmatchcase(name, part) for part in left_out)
            ],
            "Of another shape": [
                f"{name} {shapes[name]}, needed {shape}"
                for name, shape in needed.items()
                if name in shapes and shapes[name] != shape
            ],
            "Parameters that the table has no tensor for": [
                path for path in leaves if path not in filled
            ],
        },
    )
    found = {}
    for name, layout in wanted.items():
        tensor = get(name)
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(
                f"{source}: tensor {name} is of dtype {tensor.dtype}; floating-point "
                "weights are needed, not quantized ones."
            )
        parts = [tensor]
        if len(layout.leaves) > 1:
            lengths = [_shape(layout, leaves[path])[0] for path in layout.leaves]
            parts = np.split(tensor, np.cumsum(lengths)[:-1])
        for path, part in zip(layout.leaves, parts, strict=True):
            found[path] = _placed(_to_leaf(part, layout, leaves[path]), leaves[path])
    return found


def tensors_of(leaves: Mapping[str, Any], table: Table) -> dict[str, np.ndarray]:
    """The tensors of PyTorch that hold the leaves, by name.

    Raises:
      ValueError: if the table has no tensor for some leaves: all are named.
    """
    wanted = _expanded(table, leaves)
    filled = {path for layout in wanted.values() for path in layout.leaves}
    missing = [path for path in leaves if path not in filled]
    _raise_for(
        "The parameters cannot be written.",
        {"The table has no tensor for": missing},
    )
    tensors = {}
    for name, layout in wanted.items():
        parts = [_to_tensor(leaves[path], layout) for path in layout.leaves]
        tensors[name] = np.concatenate(parts) if len(parts) > 1 else parts[0].copy("C")
    return tensors


def tensor_shapes(
    leaves: Mapping[str, Any], table: Table
) -> dict[str, tuple[int, ...]]:
    """The shapes in PyTorch, by name."""
    wanted = _expanded(table, leaves)
    return {name: _tensor_shape(layout, leaves) for name, layout in wanted.items()}


def with_leaves(tree: Any, values: Mapping[str, Any]) -> Any:
    """The tree with some leaves replaced, by path."""
    paths = by_path(tree)
    new = [values.get(path, leaf) for path, leaf in paths.items()]
    return jax.tree.unflatten(jax.tree.structure(tree), new)


def _expanded(table: Table, leaves: Mapping[str, Any]) -> dict[str, Layout]:
    """The layouts of the leaves that there are, without ``{}``."""
    found, absent = {}, []
    for name, layout in table.items():
        if layout is None:
            continue
        pattern = re.escape(layout.leaves[0]).replace(r"\{\}", r"(\d+)")
        for match in (re.fullmatch(pattern, path) for path in leaves):
            if match:
                numbered = tuple(p.format(*match.groups()) for p in layout.leaves)
                absent += [path for path in numbered if path not in leaves]
                concrete = layout._replace(leaves=numbered)
                found[name.format(*match.groups())] = concrete
    _raise_for("The table does not fit the parameters.", {"No parameters": absent})
    return found


def _raise_for(start: str, problems: Mapping[str, list[str]]) -> None:
    parts = [
        f"{what}: {', '.join(names)}." for what, names in problems.items() if names
    ]
    if parts:
        raise ValueError(" ".join([start, *parts]))


def _shape(layout: Layout, leaf: Any) -> tuple[int, ...]:
    """The shape in PyTorch of what the tensor holds of this leaf."""
    groups = layout.groups(len(leaf.shape))
    return tuple(math.prod(leaf.shape[axis] for axis in axes) for axes in groups)


def _tensor_shape(layout: Layout, leaves: Mapping[str, Any]) -> tuple[int, ...]:
    first, *others = (_shape(layout, leaves[path]) for path in layout.leaves)
    if any(not first or shape[1:] != first[1:] for shape in others):
        raise ValueError(
            f"The parameters {', '.join(layout.leaves)} cannot share a tensor: their "
            f"shapes there would be {', '.join(map(str, [first, *others]))}."
        )
    return (sum(s[0] for s in [first, *others]), *first[1:]) if others else first


def _to_tensor(leaf: Any, layout: Layout) -> np.ndarray:
    array = np.asarray(leaf)
    order = [axis for axes in layout.groups(array.ndim) for axis in axes]
    return array.transpose(order).reshape(_shape(layout, array))


def _to_leaf(tensor: np.ndarray, layout: Layout, leaf: Any) -> np.ndarray:
    order = [axis for axes in layout.groups(len(leaf.shape)) for axis in axes]
    grouped = tensor.reshape([leaf.shape[axis] for axis in order])
    return grouped.transpose(np.argsort(order, stable=True))


def _placed(array: np.ndarray, leaf: Any) -> jax.Array:
    committed = isinstance(leaf, jax.ShapeDtypeStruct) or getattr(
        leaf, "committed", False
    )
    sharding = leaf.sharding if committed else None
    return jax.device_put(np.array(array, leaf.dtype, order="C"), sharding)
