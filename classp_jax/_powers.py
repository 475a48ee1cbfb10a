"""``|g|^p`` and ``g / b^(1/p)``, with forms of their own for the usual powers.

A static power of 0.5, 1, 1.5, 2, 3 or 4 costs a few multiplications, divisions and
square roots; every other static power, and a traced one, goes through
``jax.numpy.power``, which on a CPU is several times slower.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from classp_jax._hyperparams import cast


def power_of_magnitude(magnitude: jax.Array, power: Any) -> jax.Array:
    """``magnitude ** power``, elementwise, for ``magnitude >= 0``.

    Its derivatives at 0 are 0, also where a root's or a logarithm's would be infinite.
    """
    if isinstance(power, float) and power in (1.0, 2.0, 3.0, 4.0):
        return lax.integer_pow(magnitude, int(power))
    zero = magnitude == 0
    x = jnp.where(zero, jnp.ones_like(magnitude), magnitude)
    if isinstance(power, float) and power == 0.5:
        result = jnp.sqrt(x)
    elif isinstance(power, float) and power == 1.5:
        result = x * jnp.sqrt(x)
    else:
        result = jnp.power(x, cast(power, x.dtype))
    return jnp.where(zero, jnp.zeros_like(result), result)


def divide_by_root(g: jax.Array, base: jax.Array, power: Any) -> jax.Array:
    """``g / base ** (1 / power)``, elementwise, for ``base > 0``.

    Args:
      g: real or complex.
      base: real, of ``g``'s shape and precision.
      power: a static float or a scalar array.

    Returns:
      An array like ``g``. An infinite ``base`` gives 0 for a finite ``g``.
    """
    if jnp.iscomplexobj(g):
        return lax.complex(
            divide_by_root(g.real, base, power), divide_by_root(g.imag, base, power)
        )
    if isinstance(power, float):
        if power == 0.5:
            # base * base leaves the range long before g / base**2 does, and XLA turns
            # g / base / base into that.
            root = 1 / base
            return g * root * root
        if power == 1.0:
            return g / base
        if power == 1.5:
            root = _0_at_infinity(_reciprocal_cube_root, base)
            return g * (root * root)
        if power == 2.0:
            return g * lax.rsqrt(base)
        if power == 3.0:
            return g * _0_at_infinity(_reciprocal_cube_root, base)
        if power == 4.0:
            return g / jnp.sqrt(jnp.sqrt(base))
    # Half of the root, twice: the whole of it may leave the range where the result
    # does not. Bounded, as a g of 0 times infinity would be NaN.
    half = _0_at_infinity(lambda x: jnp.power(x, -0.5 / cast(power, x.dtype)), base)
    half = jnp.minimum(half, jnp.asarray(jnp.finfo(half.dtype).max, half.dtype))
    return g * half * half


def _0_at_infinity(root: Any, x: jax.Array) -> jax.Array:
    """``root(x)``, but 0 at infinity, with the derivative 0: its own may be NaN."""
    bounded = jnp.minimum(x, jnp.asarray(jnp.finfo(x.dtype).max, x.dtype))
    return jnp.where(x == np.inf, 0, root(bounded))


def _reciprocal_cube_root(x: jax.Array) -> jax.Array:
    """``x ** (-1/3)`` for positive normal ``x``, NaN for NaN.

    In float32 the exponent is divided by -3 in the bit pattern, which is right to
    3.5 %, and two fourth-order corrections follow: with ``r = 1 - x y^3``, the series
    of ``(1 - r)^(-1/3)`` turns the estimate ``y`` into the root. XLA compiles this to
    vector instructions, while its ``cbrt`` calls a scalar library function for each
    element on a CPU (8 times the time of the whole step). float64, where accuracy is
    wanted rather than speed, takes ``cbrt``.
    """
    if x.dtype != jnp.float32:
        return 1 / jnp.cbrt(x)
    bits = lax.bitcast_convert_type(x, jnp.int32)
    y = lax.bitcast_convert_type(
        jnp.int32(0x548C2B4B) - lax.div(bits, jnp.int32(3)), jnp.float32
    )
    for _ in range(2):
        r = 1 - x * y * y * y
        y = y + y * r * (1 / 3 + r * (2 / 9 + r * (14 / 81)))
    return y
