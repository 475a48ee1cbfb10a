"""What an optimizer state and an update tell: density, accumulator, free weights."""

from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import optax

from classp_jax._accumulate import ScaleByGeneralizedAdagradState
from classp_jax._arrays import path_name


@overload
def update_density(
    updates: optax.Updates, *, per_leaf: Literal[False] = False
) -> jax.Array: ...
@overload
def update_density(
    updates: optax.Updates, *, per_leaf: Literal[True]
) -> dict[str, jax.Array]: ...
def update_density(
    updates: optax.Updates, *, per_leaf: bool = False
) -> jax.Array | dict[str, jax.Array]:
    """The share of weights that an update moves: that is not exactly 0.

    Args:
      updates: a tree of updates or of masked gradients. NaN counts as moving.
      per_leaf: whether to return the share of each leaf instead of that of all.

    Returns:
      A float32 scalar in [0, 1], or a dict of such by the leaf's path
      (``"encoder/kernel"``). The share of no weights at all is 0.

    Example:
      >>> import jax.numpy as jnp
      >>> import classp_jax
      >>> print(classp_jax.update_density({"w": jnp.array([0.0, 0.1, 0.0, -2.0])}))
      0.5
    """
    return _mean_over(_paths(updates), lambda u: u != 0, per_leaf)


@overload
def mean_accumulator(
    state: optax.OptState, *, per_leaf: Literal[False] = False
) -> jax.Array: ...
@overload
def mean_accumulator(
    state: optax.OptState, *, per_leaf: Literal[True]
) -> dict[str, jax.Array]: ...
def mean_accumulator(
    state: optax.OptState, *, per_leaf: bool = False
) -> jax.Array | dict[str, jax.Array]:
    """The mean of CLASSP's accumulator over all weights: ``average_grad_sum``.

    Args:
      state: any optimizer state that holds CLASSP's somewhere: chained, masked,
        partitioned, injected, or wrapped in another transform's.
      per_leaf: whether to return the mean of each leaf instead of that of all.

    Returns:
      A float32 scalar, in units of ``|g|^p``, or a dict of such by the leaf's path.
      The mean over no weights is 0. In the state of an ``nnx.Optimizer`` paths end in
      ``/value``; ``nnx.as_pure(state)`` has them without.

    Raises:
      ValueError: if the state holds no accumulator, or two for the same weight.

    Example:
      >>> import jax.numpy as jnp
      >>> import classp_jax
      >>> optimizer = classp_jax.classp(0.1)
      >>> g = jnp.array([1.0, -3.0])
      >>> _, state = optimizer.update(g, optimizer.init(g))
      >>> print(classp_jax.mean_accumulator(state))
      2.0
    """
    return _mean_over(_accumulators(state), lambda a: a, per_leaf)


@overload
def free_fraction(
    state: optax.OptState, *, per_leaf: Literal[False] = False
) -> jax.Array: ...
@overload
def free_fraction(
    state: optax.OptState, *, per_leaf: Literal[True]
) -> dict[str, jax.Array]: ...
def free_fraction(
    state: optax.OptState, *, per_leaf: bool = False
) -> jax.Array | dict[str, jax.Array]:
    """The share of weights that never moved: whose accumulator is exactly 0.

    Args:
      state: an optimizer state, as for :func:`mean_accumulator`.
      per_leaf: whether to return the share of each leaf instead of that of all.

    Returns:
      A float32 scalar in [0, 1], or a dict of such by the leaf's path. The share of
      no weights at all is 0.

    Raises:
      ValueError: if the state holds no accumulator, or two for the same weight.

    Example:
      >>> import jax.numpy as jnp
      >>> import classp_jax
      >>> optimizer = classp_jax.classp(0.1, threshold=0.01)
      >>> g = jnp.array([1.0, 0.05, 0.0, -3.0])
      >>> _, state = optimizer.update(g, optimizer.init(g))
      >>> print(classp_jax.free_fraction(state))
      0.5
    """
    return _mean_over(_accumulators(state), lambda a: a == 0, per_leaf)


def _paths(tree: Any) -> dict[str, jax.Array]:
    return {
        path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _accumulators(state: optax.OptState) -> dict[str, jax.Array]:
    """Every accumulator leaf in the state, by the path of its parameter."""

    def is_ours(node: Any) -> bool:
        return isinstance(node, ScaleByGeneralizedAdagradState)

    found: dict[str, jax.Array] = {}
    ours = [s for s in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(s)]
    if not ours:
        raise ValueError(
            "This optimizer state holds no CLASSP accumulator: it does not come from "
            "classp, classp_published or scale_by_generalized_adagrad."
        )
    for part in ours:
        for path, leaf in _paths(part.accumulator).items():
            if path in found:
                raise ValueError(
                    f"This optimizer state holds two accumulators for '{path}'."
                )
            found[path] = leaf
    return found


def _mean_over(
    leaves: dict[str, jax.Array],
    value: Callable[[jax.Array], jax.Array],
    per_leaf: bool,
) -> jax.Array | dict[str, jax.Array]:
    means = {
        path: jnp.mean(value(leaf), dtype=jnp.float32)
        if leaf.size
        else jnp.zeros([], jnp.float32)
        for path, leaf in leaves.items()
    }
    if per_leaf:
        return means
    total = sum(leaf.size for leaf in leaves.values())
    return sum(
        (means[path] * (leaf.size / max(total, 1)) for path, leaf in leaves.items()),
        jnp.zeros([], jnp.float32),
    )
