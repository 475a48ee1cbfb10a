"""What an optimizer state and an update tell: density, accumulator, free weights."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from classp_jax._arrays import leaf_name, unwrapped, working_dtype
from classp_jax.importance._states import accumulators_in, no_accumulator


def accumulators(state: Any) -> Any:
    """The accumulators in an optimizer state, as a tree like the parameters.

    Args:
      state: any optimizer state that holds CLASSP's somewhere: chained, masked,
        partitioned, injected, or wrapped in another transform's. The state of an
        ``nnx.Optimizer`` and a Linen ``TrainState`` are such, too.

    Returns:
      A tree like the parameters, of arrays in units of ``|g|^p``. Where several
      transforms have a part of the weights each, their parts are put together; where
      none has, an ``optax.MaskedNode`` stands.

    Raises:
      ValueError: if the state holds no accumulator, two for the same weight, or
        accumulators of different trees of parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import classp_jax
      >>> optimizer = classp_jax.classp(0.1)
      >>> g = {"w": jnp.array([1.0, -3.0])}
      >>> _, state = optimizer.update(g, optimizer.init(g))
      >>> print(classp_jax.accumulators(state)["w"])
      [1. 3.]
    """
    trees = unwrapped(accumulators_in(state))
    if not trees:
        raise no_accumulator()
    return functools.reduce(_put_together, trees)


def mean_accumulator(state: Any, *, per_leaf: bool = False) -> Any:
    """The mean of CLASSP's accumulator over all weights: ``average_grad_sum``.

    Args:
      state: an optimizer state, as for :func:`accumulators`.
      per_leaf: whether to return the mean of each leaf instead of that of all.

    Returns:
      A float32 scalar, in units of ``|g|^p``, or a tree of such, like
      :func:`accumulators`. The mean over no weights is 0.

    Raises:
      ValueError: as :func:`accumulators`.

    Example:
      >>> import jax.numpy as jnp
      >>> import classp_jax
      >>> optimizer = classp_jax.classp(0.1)
      >>> g = jnp.array([1.0, -3.0])
      >>> _, state = optimizer.update(g, optimizer.init(g))
      >>> print(classp_jax.mean_accumulator(state))
      2.0
    """
    return _mean(accumulators(state), lambda a: a, per_leaf=per_leaf)


def free_fraction(state: Any, *, per_leaf: bool = False) -> Any:
    """The share of weights that nothing holds back: whose accumulator is still empty.

    Empty is an accumulator of 0, or below the smallest normal number of the dtype that
    CLASSP computes in, which it treats as 0. A prior begins only then. An accumulator
    says what has been added to it, which is not quite whether the weight has moved:

    - A weight that moved on gradients whose power ``|g|^p`` underflowed still counts as
      free, as it is: its next step is what its first was.
    - A weight with an accumulator from ``accumulate_importance`` is not free, though it
      has not moved since; likewise under ``scaling=False`` and in ``protect``.
    - With a window, a weight that moved long ago is nearly free, but is counted only
      once its accumulator has underflowed. Look at the size of :func:`accumulators`
      there instead.

    Args:
      state: an optimizer state, as for :func:`accumulators`.
      per_leaf: whether to return the share of each leaf instead of that of all.

    Returns:
      A float32 scalar in [0, 1], or a tree of such, like :func:`accumulators`. The
      share of no weights at all is 0. NaN does not count as free.

    Raises:
      ValueError: as :func:`accumulators`.

    Example:
      >>> import jax.numpy as jnp
      >>> import classp_jax
      >>> optimizer = classp_jax.classp(0.1, threshold=0.01)
      >>> g = jnp.array([1.0, 0.05, 0.0, -3.0])
      >>> _, state = optimizer.update(g, optimizer.init(g))
      >>> print(classp_jax.free_fraction(state))
      0.5
    """

    def is_empty(a: jax.Array) -> jax.Array:
        wide = working_dtype(a)
        return a.astype(wide) < jnp.finfo(wide).tiny

    return _mean(accumulators(state), is_empty, per_leaf=per_leaf)


def update_density(updates: Any, *, per_leaf: bool = False) -> Any:
    """The share of weights that an update moves: that is not exactly 0.

    Args:
      updates: a tree of updates or of masked gradients. NaN counts as moving.
      per_leaf: whether to return the share of each leaf instead of that of all.

    Returns:
      A float32 scalar in [0, 1], or a tree of such, like ``updates``. The share of no
      weights at all is 0.

    Example:
      >>> import jax.numpy as jnp
      >>> import classp_jax
      >>> print(classp_jax.update_density({"w": jnp.array([0.0, 0.1, 0.0, -2.0])}))
      0.5
    """
    return _mean(unwrapped(updates), lambda u: u != 0, per_leaf=per_leaf)


def _put_together(one: Any, other: Any, path: tuple[Any, ...] = ()) -> Any:
    """Two trees with masked places as one, where at most one of them has each leaf."""
    if isinstance(one, optax.MaskedNode):
        return other
    if isinstance(other, optax.MaskedNode):
        return one
    # One level deep.
    children, tree = jax.tree_util.tree_flatten_with_path(one, lambda x: x is not one)
    others, other_tree = jax.tree.flatten(other, lambda x: x is not other)
    if tree != other_tree or jax.tree_util.treedef_is_leaf(tree):
        raise ValueError(
            "This optimizer state holds accumulators of different trees of parameters, "
            f"or two accumulators for {leaf_name(path)}: look at the state of each "
            "optimizer alone."
        )
    return tree.unflatten(
        _put_together(child, theirs, (*path, *key))
        for (key, child), theirs in zip(children, others, strict=True)
    )


def _mean(tree: Any, value: Callable[[jax.Array], jax.Array], *, per_leaf: bool) -> Any:
    def mean(leaf: jax.Array) -> jax.Array:
        return jnp.sum(value(leaf), dtype=jnp.float32) / max(jnp.size(leaf), 1)

    means = jax.tree.map(mean, tree)
    if per_leaf:
        return means
    size = max(optax.tree.size(tree), 1)
    parts = jax.tree.map(lambda mean, leaf: mean * (jnp.size(leaf) / size), means, tree)
    return sum(jax.tree.leaves(parts), jnp.zeros([], jnp.float32))
