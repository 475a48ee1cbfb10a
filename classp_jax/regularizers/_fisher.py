"""The diagonal of the Fisher information of a classifier."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import PartitionSpec as P

from classp_jax._arrays import float_arrays, working_dtype
from classp_jax.regularizers._compiled import compiled
from classp_jax.regularizers._penalty import wide_zeros

_KINDS = ("exact", "sampled", "empirical")


def fisher_diagonal(
    logits_fn: Callable[[Any, Any], jax.Array],
    params: optax.Params,
    x: Any,
    y: Any = None,
    *,
    kind: str = "exact",
    key: Any = None,
    batch_size: int = 32,
    classes: Any = None,
) -> Any:
    r"""The diagonal of a classifier's Fisher information, for EWC.

    How much the classes that ``logits_fn`` gives the examples ``x``, :math:`x_1` to
    :math:`x_N`, depend on each of the weights ``params`` :math:`w`:

    .. math::
      F_i = \frac{1}{N} \sum_{n=1}^{N} \mathbb{E}_{c}
      \left( \frac{\partial \log p(c \mid x_n, w)}{\partial w_i} \right)^2, \qquad
      p(c \mid x, w) = \mathrm{softmax}(\mathrm{logits\_fn}(w, x))_c

    The gradients are those of single examples. The square of a batch's mean gradient is
    another quantity, smaller by about the batch size. ``kind`` says which classes
    :math:`c` the expectation is over:

    ``"exact"``
      All classes, with the probabilities :math:`p(c \mid x_n, w)` that the model gives
      them. The default: it is the definition of the Fisher information, has no sampling
      noise and needs no labels. It takes one gradient per class and example.
    ``"sampled"``
      One class per example, drawn from the model: an unbiased estimate of the exact
      value for one gradient per example.
    ``"empirical"``
      The label :math:`y_n`. This is no estimate of the Fisher information: on examples
      that the model fits well it goes to 0 as the square of the error (the exact value
      goes with the error itself), and examples that it gets wrong dominate it.

    To save time take fewer examples rather than another kind.

    Called with plain arrays it loops in Python over one compiled step, since XLA runs a
    convolution in a loop of its own slowly on a CPU. ``logits_fn`` is traced on every
    call, so it may capture values that change, and compiled only if it reads otherwise
    than before. Under ``jit`` or ``vmap`` it is one ``lax.scan``. Parameters and
    examples may be sharded over a mesh, of automatic or explicit axes.

    Args:
      logits_fn: ``(params, x) -> logits``; takes examples along the first axis and
        gives logits of shape ``[examples, classes]``. It is called with one example at
        a time, so it must treat examples independently (no batch statistics).
      params: the weights :math:`w`, real floats.
      x: N examples, an array or a tree of arrays with the examples along the first
        axis.
      y: the labels, integers of shape ``[N]``. Only ``"empirical"`` uses them.
      kind: ``"exact"``, ``"sampled"`` or ``"empirical"``.
      key: a ``jax.random`` key. Only ``"sampled"`` uses it; the same key draws the same
        classes whatever ``batch_size`` is.
      batch_size: how many gradients to compute side by side. Memory is about
        ``batch_size`` times that of the parameters, whatever N is.
      classes: which classes may occur in this task, bools of shape ``[classes]``, as
        for one head of a network with several. The others have probability 0. All of
        them by default.

    Returns:
      A tree like ``params``, of float32 or the parameters' dtype if that is wider, with
      no negative entry.

    Raises:
      ValueError: if ``kind`` is unknown, what it needs is missing, a shape does not
        fit, there is no example, ``batch_size < 1``, no class is allowed, or a label is
        no allowed class (labels and classes are looked at unless they are traced).
      TypeError: if a dtype does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from classp_jax import regularizers
      >>> logits_fn = lambda w, x: x @ w
      >>> w, x = jnp.zeros((1, 2)), jnp.array([[1.0], [3.0]])
      >>> print(regularizers.fisher_diagonal(logits_fn, w, x).round(4))
      [[1.25 1.25]]

    References:
      Martens, `New Insights and Perspectives on the Natural Gradient Method
      <https://arxiv.org/abs/1412.1193>`_, 2020

      Kunstner, Balles and Hennig, `Limitations of the Empirical Fisher Approximation
      for Natural Gradient Descent <https://arxiv.org/abs/1905.12558>`_, 2019

      van de Ven, `On the Computation of the Fisher Information in Continual Learning
      <https://arxiv.org/abs/2502.11756>`_, 2025
    """
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer):
        raise TypeError(f"batch_size must be an integer, got {batch_size!r}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if kind == "sampled" and key is None:
        raise ValueError("key is needed for kind='sampled', got None.")
    params = float_arrays(params, "parameter", real=True)
    x = jax.tree.map(jnp.asarray, x)
    examples = number_of_examples(x)
    num_classes = _number_of_classes(logits_fn, params, x)
    classes = _checked_classes(classes, num_classes)
    y = _checked_labels(y, examples, classes) if kind == "empirical" else None
    if kind != "sampled":
        key = None

    terms = examples * (num_classes if kind == "exact" else 1)
    lanes = min(int(batch_size), terms)
    # Broadcast, not made: a sum has the sharding of its parameter.
    sums = jax.tree.map(
        lambda w: jnp.broadcast_to(w, (lanes, *w.shape)), wide_zeros(params)
    )
    step = functools.partial(_add_squares, logits_fn, kind)
    # The lanes sum on their own: a sum over them in each step would write every
    # gradient to memory first, which takes many times as long on a CPU.
    arguments = (params, x, y, key, classes)
    blocks = -(-terms // lanes)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arguments)):
        sums, _ = jax.lax.scan(
            lambda sums, i: (step(sums, i, *arguments), None),
            sums,
            jnp.arange(blocks, dtype=jnp.int32),
        )
    else:
        step = compiled(step, sums, np.int32(0), *arguments)
        for i in range(blocks):
            sums = step(sums, np.int32(i), *arguments)
    return jax.tree.map(lambda s: jnp.sum(s, axis=0) / examples, sums)


def _add_squares(
    logits_fn: Callable[[Any, Any], jax.Array],
    kind: str,
    sums: Any,
    i: Any,
    params: Any,
    x: Any,
    y: Any,
    key: Any,
    classes: jax.Array,
) -> Any:
    """Adds one squared gradient to each lane: the i-th block of all the terms.

    A term is an example, or a pair of an example and a class if ``kind`` is exact.
    """
    lanes = jax.tree.leaves(sums)[0].shape[0]
    num_classes = classes.size
    examples = jax.tree.leaves(x)[0].shape[0]
    classes_each = num_classes if kind == "exact" else 1
    term = i * lanes + jnp.arange(lanes, dtype=jnp.int32)
    # The last block may be ragged: its excess terms repeat the last one, times 0.
    is_real = term < examples * classes_each
    term = jnp.minimum(term, examples * classes_each - 1)
    n = term // classes_each
    x, y = jax.tree.map(lambda leaf: _taken(leaf, n), (x, y))

    def gradient(term: Any, n: Any, is_real: Any, example: Any, label: Any) -> Any:
        example = jax.tree.map(lambda leaf: leaf[None], example)
        logits, vjp = jax.vjp(
            lambda params: _replicated(logits_fn(params, example)[0]), params
        )
        wide = logits.astype(working_dtype(logits))
        wide = jnp.where(classes, wide, -jnp.inf)
        p = jax.nn.softmax(wide)
        if kind == "exact":
            c = term % classes_each
            # The square root of the weight that the squared gradient has.
            weight = jnp.sqrt(p[c])
        else:
            c = (
                label
                if kind == "empirical"
                else jax.random.categorical(jax.random.fold_in(key, n), wide)
            )
            weight = jnp.ones_like(p[0])
        # d log p_c / d logits = onehot(c) - p. The entry of c is taken as the sum of
        # the others: 1 - p_c has no correct digit where the model is sure of itself.
        is_c = jnp.arange(num_classes, dtype=jnp.int32) == c.astype(jnp.int32)
        others = jnp.where(is_c, 0, p)
        score = jnp.where(is_c, jnp.sum(others), -others)
        score = jnp.where(is_real, weight * score, 0)
        return vjp(score.astype(logits.dtype))[0]

    gradients = jax.vmap(gradient)(term, n, is_real, x, y)
    return jax.tree.map(lambda s, g: s + jnp.square(g.astype(s.dtype)), sums, gradients)


def _explicit_sharding(array: Any) -> Any:
    """The sharding in the array's type, None if a compiler decides on it."""
    sharding = jax.typeof(array).sharding
    is_explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    return sharding if is_explicit else None


def _taken(array: jax.Array, rows: jax.Array) -> jax.Array:
    """These rows, on every device that the rows were sharded over."""
    sharding = _explicit_sharding(array)
    if sharding is not None:
        sharding = sharding.update(spec=P(None, *sharding.spec[1:]))
    return array.at[rows].get(out_sharding=sharding)


def _replicated(array: jax.Array) -> jax.Array:
    sharding = _explicit_sharding(array)
    if sharding is None:
        return array
    return jax.sharding.reshard(array, sharding.update(spec=P()))


def number_of_examples(x: Any) -> int:
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(x)}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        shapes = sorted({jnp.shape(leaf) for leaf in jax.tree.leaves(x)})
        raise ValueError(
            "x must hold at least one example, along the first axis of every array, "
            f"got arrays of shapes {shapes}."
        )
    return lengths.pop()[0]


def _number_of_classes(logits_fn: Callable[..., Any], params: Any, x: Any) -> int:
    def logits_of_the_first(params: Any, x: Any) -> Any:
        first = jnp.zeros(1, jnp.int32)
        return logits_fn(params, jax.tree.map(lambda leaf: _taken(leaf, first), x))

    logits = jax.eval_shape(logits_of_the_first, params, x)
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != 1 or shape[1] < 1:
        raise ValueError(
            "logits_fn must return one array of shape [examples, classes]; for one "
            f"example it returns {logits}."
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits_fn must return real floats, got {logits.dtype}.")
    return shape[1]


def _checked_classes(classes: Any, num_classes: int) -> jax.Array:
    if classes is None:
        return jnp.ones(num_classes, bool)
    classes = np.asarray(classes) if isinstance(classes, list | tuple) else classes
    if jnp.shape(classes) != (num_classes,):
        raise ValueError(
            f"classes must have shape ({num_classes},), one bool per class, got shape "
            f"{jnp.shape(classes)}."
        )
    if jnp.result_type(classes) != jnp.bool_:
        raise TypeError(f"classes must be bools, got {jnp.result_type(classes)}.")
    if not isinstance(classes, Tracer) and not np.any(classes):
        raise ValueError("classes must allow at least one class, got none.")
    return jnp.asarray(classes)


def _checked_labels(y: Any, examples: int, classes: jax.Array) -> jax.Array:
    if y is None:
        raise ValueError("y is needed for kind='empirical', got None.")
    y = np.asarray(y) if isinstance(y, list | tuple) else y
    if jnp.shape(y) != (examples,):
        raise ValueError(
            f"y must have shape ({examples},), one label per example, got shape "
            f"{jnp.shape(y)}."
        )
    if not jnp.issubdtype(jnp.result_type(y), jnp.integer):
        raise TypeError(f"y must be integers, got {jnp.result_type(y)}.")
    if not any(isinstance(a, Tracer) for a in (y, classes)):
        allowed = np.flatnonzero(classes)
        if not np.isin(y, allowed).all():
            wrong = np.setdiff1d(y, allowed)
            raise ValueError(
                f"y must hold allowed classes only (of {classes.size}), got {wrong[0]}."
            )
    return jnp.asarray(y).astype(jnp.int32)
