"""A sum kept in bfloat16 that does not stall: unbiased, stochastic rounding."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def stored_sum(step: Any, a: jax.Array, term: jax.Array, like: Any, leaf: int) -> Any:
    """``a + term`` in the accumulator's dtype: at random to bfloat16, else to nearest.

    A growing sum in bfloat16 that is rounded to nearest stands still once a term is
    below 1/512 of it. Rounded up with the probability of the part that is cut off, it
    is right on average. The random bits are a hash of element, leaf and step: no key
    in the state, the same bits on every run, and nothing that XLA writes to memory.
    """
    if like.dtype != jnp.bfloat16:
        return (a + term).astype(like.dtype)
    a, term = a.astype(jnp.float32), term.astype(jnp.float32)
    total = a + term
    index = jnp.uint32(leaf)
    for axis, size in enumerate(total.shape):
        place = lax.broadcasted_iota(jnp.uint32, total.shape, axis)
        index = index * jnp.uint32(size) + place
    noise = _hash(index ^ _hash(jnp.asarray(step).astype(jnp.uint32)))
    bits = lax.bitcast_convert_type(total, jnp.uint32)
    # What float32 lost, in units of its last place: of a million terms it is 3 %.
    lost = (a - (total - (total - a))) + (term - (total - a))
    binade = lax.bitcast_convert_type(bits & jnp.uint32(0x7F800000), jnp.float32)
    # At least the smallest normal number: 0 / 0 is a NaN, if only in passing.
    lost = jnp.where(binade > 0, lost / jnp.maximum(binade, 2.0**-126) * 2.0**23, 0.0)
    lower = (noise & jnp.uint32(0xFFFF)).astype(jnp.float32) * 2.0**-16
    carry = jnp.floor(lost + lower).astype(jnp.int32).astype(jnp.uint32)
    cut = (bits + (noise >> 16) + carry) & jnp.uint32(0xFFFF0000)
    rounded = lax.bitcast_convert_type(cut, jnp.float32)
    # Exact, and derivatives pass as through rounding to nearest.
    rounded = total + lax.stop_gradient(rounded - total)
    # The bits of infinity and NaN are not to be added to.
    return jnp.where(jnp.isfinite(total), rounded, total).astype(like.dtype)


def _hash(x: jax.Array) -> jax.Array:
    """Chris Wellons' lowbias32, a mixing function for 32-bit integers."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
