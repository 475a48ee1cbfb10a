"""A sum kept in bfloat16 that does not stall: unbiased, stochastic rounding."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def stored(x: jax.Array, dtype: Any, step: Any, leaf: int) -> jax.Array:
    """``x`` in the accumulator's dtype: rounded at random to bfloat16, else to nearest.

    A growing sum in bfloat16 that is rounded to nearest stands still once a term is
    below 1/512 of it. Rounded up with the probability of the part that is cut off, it
    is right on average. The random bits are a hash of element, leaf and step: no key
    in the state, the same bits on every run, and nothing that XLA writes to memory.
    """
    if x.dtype != jnp.float32 or dtype != jnp.bfloat16:
        return x.astype(dtype)
    index = jnp.uint32(leaf)
    for axis, size in enumerate(x.shape):
        place = lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        index = index * jnp.uint32(size) + place
    noise = _hash(index ^ _hash(jnp.asarray(step).astype(jnp.uint32))) >> 16
    bits = lax.bitcast_convert_type(x, jnp.uint32) + noise
    cut = lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    # Exact, and derivatives pass as through rounding to nearest.
    rounded = x + lax.stop_gradient(cut - x)
    # The bits of infinity and NaN are not to be added to.
    return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)


def _hash(x: jax.Array) -> jax.Array:
    """Chris Wellons' lowbias32, a mixing function for 32-bit integers."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
