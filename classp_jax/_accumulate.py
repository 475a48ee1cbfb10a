"""How far weights move: generalized AdaGrad scaling and its accumulator."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from classp_jax._arrays import (
    kept,
    magnitude,
    require_same_shapes,
    transform,
    whole_size,
    whole_sum,
    working_dtype,
)
from classp_jax._hyperparams import (
    ScalarOrSchedule,
    at_step,
    cast,
    non_negative,
    one_of,
    positive,
    sum_dtype,
    switch,
    window_length,
)
from classp_jax._powers import divide_by_root, power_of_magnitude
from classp_jax._rounding import stored_sum

# The share of a step in the moving average of the squared gradient is 1 minus this.
_DECAY = 0.99


class ScaleByGeneralizedAdagradState(NamedTuple):
    """State of every transform here that accumulates."""

    count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    """Number of updates so far, int32."""
    accumulator: optax.Updates
    """A tree like the parameters: the sum of ``|g|^p`` over accepted gradients."""
    mean_square: jax.typing.ArrayLike
    """Float32 ``[leaves]``: a moving average of each leaf's mean squared gradient, not
    corrected for its start at 0. Stays 0 where ``eps_unit`` does not ask for it. A
    transform with a unit that takes over such a state counts the steps before as
    gradients of 0: the unit is too small until some hundred steps later."""


def scale_by_generalized_adagrad(
    power: jax.typing.ArrayLike = 1.0,
    eps: jax.typing.ArrayLike = 0.1,
    *,
    prior: jax.typing.ArrayLike = 0.0,
    window: ScalarOrSchedule | None = None,
    eps_unit: str | None = None,
    scaling: bool | ScalarOrSchedule = True,
    include_current: bool = True,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides gradients by the p-th root of the sum of their p-th powers so far.

    A weight that has received many gradients moves less and less. ``power`` :math:`p`
    is how fast it slows down, ``eps`` :math:`\varepsilon` how much gradient it takes
    until it does:

    .. math::
      A_t &= A_{t-1} + |g_t|^p, \qquad A_0 = 0 \\
      u_t &= \frac{g_t}{(\varepsilon + A_t)^{1/p}}

    :math:`\varepsilon` stands inside the root, so it *is* the accumulator's initial
    value: ``power=2, eps=0.1`` equals
    ``optax.adagrad(initial_accumulator_value=0.1, eps=0)`` but for the learning rate.
    While :math:`A` is small against :math:`\varepsilon` the transform is a constant
    factor :math:`\varepsilon^{-1/p}`.

    **A window**, to go on learning for ever. A sum that only grows ends learning. With
    a window of :math:`N` steps the accumulator leaks in every step, also for a weight
    whose gradient is 0 or masked:

    .. math::
      A_t = A_{t-1} \left(1 - \frac{1}{N}\right) + |g_t|^p

    Under a constant gradient :math:`A` then tends to :math:`N |g|^p`. A weight that
    gets no gradient becomes free again: its accumulator falls by the factor e in N
    steps.

    **A unit for epsilon.** ``eps`` is in units of :math:`|g|^p`, which are those of
    this network, layer and loss. With ``eps_unit="leaf"`` it counts in units of the
    leaf's own root mean square gradient :math:`s`, with ``"tree"`` of that of all
    leaves together:

    .. math::
      u_t = \frac{g_t}{(\varepsilon\, s_{t-1}^p + A_t)^{1/p}}, \qquad
      s_t^2 = \frac{1}{1 - d^t} \sum_{k \le t} (1 - d)\, d^{t-k}\, \overline{g_k^2},
      \qquad d = 0.99

    The unit is that of the steps before, so that the gradient is not read once more
    before the step. In the very first step, and until a leaf has had a nonzero
    gradient, there is no unit and nothing moves; the accumulators fill. The mean is
    over the whole leaf, however it is sharded, and in :func:`classp` over masked
    gradients, too. Gradients whose squares, or their sum over a leaf, leave float32
    (below 1e-19; above 1e19, or 1e15 in a large leaf) are of no unit: the small count
    as 0, and a step with a large one leaves the average as it is.

    **A prior** is a start without a scale: a weight's accumulator begins as if it had
    already received ``prior`` gradients of the size of its first one,

    .. math::
      A_t = c\,|g_t|^p + |g_t|^p \quad \text{where } A_{t-1} = 0 \ne g_t

    so that with :math:`\varepsilon = 0` the first step of every weight has the size
    :math:`(1 + c)^{-1/p}`, whatever its gradient and whenever it comes.

    Numerics. Powers 0.5, 1, 1.5, 2, 3 and 4 given as plain numbers have their own,
    fast forms; others and traced ones use ``jax.numpy.power``. Arithmetic is in
    float32, or in float64 where the gradient or the accumulator is. A gradient of
    exactly 0 gives an update of exactly 0, also at :math:`A = \varepsilon = 0`.
    Outside the normal range of the dtype: a sum :math:`\varepsilon + A` below the
    smallest normal number counts as 0 and gives no step; one that overflows to infinity
    gives no step from then on (at ``power=4`` in float32 a single gradient above 4e9
    does that). A NaN or infinite gradient shows as NaN in the update, and poisons the
    accumulator unless ``optax.apply_if_finite`` stands around the transform, with a
    ``max_consecutive_errors`` that is never reached, such as ``2**31 - 1``: it lets
    the step after that many bad ones through.
    Derivatives through the update are finite, and those of the formula where it has
    any; at a gradient of exactly 0 that is :math:`(\varepsilon + A)^{-1/p}`.

    Args:
      power: :math:`p > 0`, how fast a weight slows down; a number or a scalar array.
      eps: :math:`\varepsilon \ge 0`, what the accumulator has to outgrow before a
        weight slows down, in units of :math:`|g|^p` or as ``eps_unit`` says; a number
        or a scalar array.
      prior: :math:`c \ge 0`, the number of gradients that an accumulator begins with;
        a number or a scalar array.
      window: :math:`N \ge 1`, the number of steps that are remembered, or None for
        all; a number, a schedule ``step -> value`` or a scalar array. In float32 the
        sum of constant gradients is right to 1 % up to a hundred thousand steps, and at
        a million up to 10 % low.
      eps_unit: None, ``"leaf"`` or ``"tree"``: what epsilon is measured in.
      scaling: whether to divide. Off means: go on accumulating and return the gradient
        as it came. A bool, a schedule ``step -> bool`` or a scalar array.
      include_current: whether the gradient of step t is divided by :math:`A_t`
        (Algorithm 1 of the paper) or by the sum before it is added (its equation 1).
      accumulator_dtype: dtype of :math:`A`. By default float32 for narrower
        parameters, else the parameters' real dtype. ``bfloat16`` takes half the memory:
        its sums are rounded stochastically, so that they do not stall; each is off by
        about 5 % (root mean square), their mean over the weights is right. No float16,
        which takes as much memory and ends at 65,504.

    Returns:
      A transform whose updates have the gradients' shapes and dtypes. Its state is
      :class:`ScaleByGeneralizedAdagradState`: a step count, one real array the size of
      the parameters and one number per leaf, whatever the arguments.

    Raises:
      ValueError: if ``power <= 0``, ``eps < 0``, ``prior < 0`` or ``window < 1`` (or
        NaN, infinite, no scalar), or if the gradients' tree or shapes are not those of
        the state.
      TypeError: if an argument is no number, ``accumulator_dtype`` no dtype for it, or
        if a leaf has no floating-point dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> import classp_jax
      >>> tx = classp_jax.scale_by_generalized_adagrad(power=1.0, eps=0.0)
      >>> g = jnp.array([2.0, -4.0, 0.0])
      >>> state = tx.init(g)
      >>> for _ in range(2):
      ...     updates, state = tx.update(g, state)
      ...     print(updates)
      [ 1. -1.  0.]
      [ 0.5 -0.5  0. ]

    References:
      Ludwig, `CLASSP <https://arxiv.org/abs/2405.09637>`_, 2024

      Duchi et al., `Adaptive Subgradient Methods for Online Learning and Stochastic
      Optimization <https://jmlr.org/papers/v12/duchi11a.html>`_, 2011

    .. seealso:: :func:`classp`, :func:`optax.scale_by_rss`
    """
    rule = Accumulation(power, eps, prior, window, eps_unit, accumulator_dtype)
    return masked_scaling(
        lambda g, count: True, rule, scaling=scaling, include_current=include_current
    )


class Accumulation:
    """How an accumulator grows, and what epsilon is worth: checked arguments."""

    def __init__(
        self,
        power: Any,
        eps: Any,
        prior: Any = 0.0,
        window: Any = None,
        eps_unit: str | None = None,
        accumulator_dtype: Any = None,
    ):
        self.power = positive("power", power)
        self.eps = non_negative("eps", eps)
        self.prior = non_negative("prior", prior)
        self.window = None if window is None else window_length("window", window)
        self.eps_unit = one_of("eps_unit", eps_unit, (None, "leaf", "tree"))
        self.dtype = sum_dtype("accumulator_dtype", accumulator_dtype)

    def dtype_of(self, leaf: Any) -> Any:
        """The dtype of a parameter's accumulator."""
        return self.dtype or working_dtype(leaf)

    def term(self, size: jax.Array) -> jax.Array:
        """What a gradient of this magnitude adds."""
        return power_of_magnitude(size, self.power)

    stored = staticmethod(stored_sum)

    def init(self, params: optax.Params) -> ScaleByGeneralizedAdagradState:
        """Empty accumulators."""
        return ScaleByGeneralizedAdagradState(
            count=jnp.zeros([], jnp.int32),
            accumulator=jax.tree.map(
                lambda w: jnp.zeros_like(w, dtype=self.dtype_of(w)), params
            ),
            mean_square=jnp.zeros([len(jax.tree.leaves(params))], jnp.float32),
        )

    def grown(
        self, gradients: Any, accepted: Any, state: ScaleByGeneralizedAdagradState
    ) -> tuple[ScaleByGeneralizedAdagradState, Any]:
        """The state after a step, and the accumulators without its gradients."""
        require_same_shapes(gradients, state.accumulator)
        leaves, tree = jax.tree.flatten(gradients)

        def term(g: jax.Array, a: jax.Array, moves: Any) -> jax.Array:
            dtype = np.promote_types(working_dtype(g), a.dtype)
            # Masked before the power, as behind a mask of its own: the same roundings.
            return self.term(kept(moves, magnitude(g).astype(dtype)))

        terms = jax.tree.map(term, gradients, state.accumulator, accepted)
        before = jax.tree.map(
            lambda a, t: self._before(a.astype(t.dtype), t, state.count),
            state.accumulator,
            terms,
        )
        numbers = tree.unflatten(range(len(leaves)))
        stored = functools.partial(self.stored, state.count)
        after = jax.tree.map(stored, before, terms, state.accumulator, numbers)
        mean_square = jnp.asarray(state.mean_square)
        if self.eps_unit is not None and leaves:
            now = jnp.stack([_mean_square(g, mean_square) for g in leaves])
            # Not to be averaged: infinity minus itself, in the next step, is NaN.
            now = jnp.where(now == np.inf, mean_square, now)
            mean_square = mean_square + (1 - _DECAY) * (now - mean_square)
        count = optax.safe_increment(state.count)
        return ScaleByGeneralizedAdagradState(count, after, mean_square), before

    def _before(self, a: jax.Array, term: jax.Array, count: Any) -> jax.Array:
        """What the accumulator has leaked to, or the prior where it holds nothing."""
        if self.window is not None:
            window = window_length("window", at_step(self.window, count))
            # Not a * (1 - 1 / window): that factor has few digits of 1 / window.
            a = a - _bounded(a) * (1 / cast(window, a.dtype))
        if isinstance(self.prior, float) and self.prior == 0:
            return a
        # A prior of 0 makes 0 of an overflown term, too.
        return jnp.where(a == 0, cast(self.prior, a.dtype) * _bounded(term), a)

    def eps_now(self, state: ScaleByGeneralizedAdagradState, unknown: float) -> Any:
        """Each leaf's epsilon in units of ``|g|^p``; ``unknown`` where no unit is."""
        leaves, tree = jax.tree.flatten(state.accumulator)
        if self.eps_unit is None:
            return tree.unflatten([self.eps] * len(leaves))
        count = jnp.asarray(state.count).astype(jnp.float32)
        # In the first step 0 / 0 otherwise.
        share = -jnp.expm1(jnp.maximum(count, 1) * float(np.log(_DECAY)))
        mean_square = jnp.asarray(state.mean_square) / share
        if self.eps_unit == "tree":
            sizes = np.asarray([whole_size(a, mean_square) for a in leaves], np.float32)
            mean = jnp.sum(mean_square * (sizes / max(sizes.sum(), np.float32(1))))
            mean_square = jnp.full_like(mean_square, mean)
        # A NaN is no unit, and shall show.
        missing = mean_square <= 0
        root = jnp.sqrt(jnp.where(missing, jnp.ones_like(mean_square), mean_square))
        eps = cast(self.eps, jnp.float32) * power_of_magnitude(root, self.power)
        return tree.unflatten([*jnp.where(missing, jnp.full_like(eps, unknown), eps)])


def _bounded(x: jax.Array) -> jax.Array:
    """The largest finite number in place of infinity."""
    return jnp.minimum(x, jnp.asarray(jnp.finfo(x.dtype).max, x.dtype))


def _mean_square(g: jax.Array, like: jax.Array) -> jax.Array:
    parts = [g.real, g.imag] if jnp.iscomplexobj(g) else [g]
    # Negative, and divided last: on a CPU XLA would write an array to memory that is
    # needed twice, be it |g|^2 or a constant by which leaves of one size are divided.
    squares = [-x.astype(jnp.float32) * x.astype(jnp.float32) for x in parts]
    total = whole_sum(sum(squares[1:], squares[0]), like, jnp.float32)
    return -total / max(whole_size(g, like), 1)


def masked_scaling(
    accept: Callable[[jax.Array, jax.Array], Any],
    rule: Accumulation,
    *,
    scaling: bool | ScalarOrSchedule,
    include_current: bool = True,
    learning_rate: ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scaling of the gradients for which ``accept(g, count)`` is true; 0 for others.

    Masking and scaling in one expression per leaf. Behind a mask of its own the masked
    gradient would be an intermediate array that both the new accumulator and the update
    read, and XLA (CPU, jax 0.10) writes such an array to memory: 8 bytes of traffic a
    weight and a temporary the size of the parameters. ``accept`` is a comparison, which
    XLA repeats instead.
    """
    scaling = switch("scaling", scaling)
    if not isinstance(include_current, bool):
        raise TypeError(f"include_current must be a bool, got {include_current!r}.")

    def step(gradients: Any, state: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        accepted = jax.tree.map(lambda g: accept(g, state.count), gradients)
        new_state, before = rule.grown(gradients, accepted, state)
        scaling_now = at_step(scaling, state.count)
        updates = jax.tree.map(
            functools.partial(scaled, power=rule.power, scaling=scaling_now),
            gradients,
            new_state.accumulator if include_current else before,
            accepted,
            # Where no unit is known yet nothing moves: it is divided by infinity.
            rule.eps_now(state, np.inf),
        )
        if learning_rate is not None:
            rate = at_step(learning_rate, state.count)
            updates = jax.tree.map(lambda u: -cast(rate, u.dtype) * u, updates)
        return updates, new_state

    return transform(rule.init, step, ScaleByGeneralizedAdagradState)


def scaled(
    g: jax.Array, a: jax.Array, accepted: Any, eps: Any, power: Any, scaling: Any
) -> jax.Array:
    """``g / (a + eps)^(1/power)`` where accepted (and scaling is on), in g's dtype."""
    if isinstance(scaling, bool) and not scaling:
        return kept(accepted, g)
    dtype = np.promote_types(working_dtype(g), a.dtype)
    base = a.astype(dtype) + cast(eps, dtype)
    empty = base < jnp.finfo(dtype).tiny
    # No division by 0, also where its result would be left out: its derivative is not.
    base = jnp.where(empty, jnp.ones_like(base), base)
    wide = g.astype(np.promote_types(g.dtype, dtype))
    quotient = divide_by_root(wide, base, power).astype(g.dtype)
    # A NaN or infinite gradient is to show.
    quotient = kept(~(empty & jnp.isfinite(g)), quotient)
    if not isinstance(scaling, bool):
        quotient = jnp.where(jnp.asarray(scaling).astype(bool), quotient, g)
    return kept(accepted, quotient)
