"""What a hyperparameter may be: a number, a schedule or a traced scalar.

Plain Python (and numpy) numbers are checked when a transform is built and stay
static, so that the compiled step is specialised to them. Arrays and tracers pass
through unchecked. Schedules are called with the step count.
"""

import functools
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Optax's own type of a schedule refuses ``lambda step: step > 100``.
ScalarOrSchedule: TypeAlias = jax.typing.ArrayLike | Callable[[Any], Any]
_REAL = (jnp.integer, jnp.floating, jnp.bool_)


def checked(
    name: str,
    value: Any,
    allowed: str,
    accepts: Callable[[float], bool],
    *,
    schedule: bool = False,
) -> Any:
    """Returns ``value``, as a Python float where it is a plain number.

    Args:
      name: the argument's name, for the message.
      value: what the user passed.
      allowed: what is allowed, in words, for the message.
      accepts: says whether a finite plain number is allowed.
      schedule: whether a callable ``step -> value`` is allowed too.

    Raises:
      TypeError: if ``value`` is neither a number nor an array (nor a schedule).
      ValueError: if it is a plain number that is not allowed, or no scalar.
    """
    if schedule and callable(value):
        return value
    if isinstance(value, jax.Array | np.ndarray):
        if jnp.ndim(value) != 0:
            raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}.")
        if not any(jnp.issubdtype(value.dtype, kind) for kind in _REAL):
            raise TypeError(f"{name} must be a real number, got dtype {value.dtype}.")
        return value
    # ml_dtypes' scalars, such as bfloat16's, are numpy's but no numbers.Real.
    is_number = isinstance(value, numbers.Real) or (
        isinstance(value, np.generic) and jnp.issubdtype(value.dtype, jnp.floating)
    )
    if not is_number or isinstance(value, bool):
        kinds = "a number, a schedule" if schedule else "a number"
        raise TypeError(
            f"{name} must be {kinds} or a scalar array ({allowed}), got {value!r} of "
            f"type {type(value).__name__}."
        )
    number = float(value)
    if not math.isfinite(number) or not accepts(number):
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")
    return number


non_negative = functools.partial(
    checked, allowed="finite and >= 0", accepts=lambda x: x >= 0
)
positive = functools.partial(checked, allowed="finite and > 0", accepts=lambda x: x > 0)

window_length = functools.partial(
    checked, allowed="finite and >= 1, or None", accepts=lambda x: x >= 1, schedule=True
)


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    """One of a few names (or None)."""
    if value not in allowed:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}."
        )
    return value


def switch(name: str, value: Any) -> Any:
    """On or off: a bool (or 0 or 1), a schedule or a scalar array."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    number = checked(
        name, value, "a bool, 0 or 1", lambda x: x in (0.0, 1.0), schedule=True
    )
    return bool(number) if isinstance(number, float) else number


def sum_dtype(name: str, dtype: Any) -> np.dtype | None:
    """A dtype whose sums neither stall nor soon overflow, or None."""
    if dtype is None:
        return None
    allowed = [jnp.dtype(kind) for kind in ("bfloat16", "float32", "float64")]
    try:
        # An array, which has a dtype, is what Optax's own injection makes of one.
        if not isinstance(dtype, jax.Array) and jnp.dtype(dtype) in allowed:
            return jnp.dtype(dtype)
    except TypeError:
        pass  # no dtype at all
    raise TypeError(f"{name} must be bfloat16, float32 or float64, got {dtype!r}.")


def at_step(value: Any, count: Any) -> Any:
    """The value at step ``count``: calls a schedule, returns anything else."""
    return value(count) if callable(value) else value


def cast(value: Any, dtype: Any) -> Any:
    """A hyperparameter ready to meet arrays of ``dtype``: numbers stay static."""
    return value if isinstance(value, bool | float) else jnp.asarray(value, dtype)


def inject_hyperparams(
    factory: Callable[..., optax.GradientTransformation],
    *,
    fixed: tuple[str, ...] = ("power",),
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """``optax.inject_hyperparams``, set for the transforms of this library.

    Puts an optimizer's hyperparameters into its state, where they can be read and
    changed while training. Optax's own function, called on :func:`classp` without
    further arguments, makes of every number a traced one of the parameters' dtype: a
    traced ``power`` takes the slow form, and in float16 an ``eps`` of 1e-9 is 0. Here
    the power stays a plain number and the others are float32 (write 1.0, as whole
    numbers stay integers); ``accumulator_dtype`` stays what it is, where Optax takes
    ``jnp.bfloat16`` for a schedule.

    Args:
      factory: a function that makes a transform, such as :func:`classp`.
      fixed: names of arguments that stay what they are, where the factory has them.
        ``()`` to change the power, too.

    Returns:
      A function with the factory's arguments. Its transform's state has a dict
      ``hyperparams``.

    Example:
      >>> import classp_jax
      >>> import jax.numpy as jnp
      >>> optimizer = classp_jax.inject_hyperparams(classp_jax.classp)(0.1, eps=1.0)
      >>> state = optimizer.init(jnp.zeros(3))
      >>> sorted(state.hyperparams)
      ['eps', 'learning_rate', 'prior', 'threshold']
      >>> state.hyperparams["learning_rate"] = jnp.asarray(0.01)

    .. seealso:: :func:`optax.inject_hyperparams`
    """
    known = inspect.signature(factory).parameters
    return optax.inject_hyperparams(
        factory,
        # A dtype can be called, and would be taken for a schedule.
        static_args={*fixed, "accumulator_dtype"}.intersection(known),
        hyperparam_dtype=jnp.float32,
    )
