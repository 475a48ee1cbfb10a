"""Inputs standardised by the moments of what a run has seen so far."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Moments(NamedTuple):
    """Of every number of an input, over the examples of all steps so far.

    They are told no task boundary, and all examples count alike.
    """

    count: Any
    """Examples, float32."""
    mean: Any
    """Float32, in the shape of one input."""
    squares: Any
    """Sum of the squared distances from the mean, likewise."""

    @classmethod
    def none(cls, shape: tuple[int, ...]) -> "Moments":
        """Before the first example."""
        return cls(jnp.zeros([]), jnp.zeros(shape), jnp.zeros(shape))

    def after(self, x: jax.Array) -> "Moments":
        """With a batch of examples more, ``[b, ...]``.

        References:
          Chan, Golub and LeVeque, `Updating formulae and a pairwise algorithm for
          computing sample variances <https://doi.org/10.1007/978-3-642-51461-6_3>`_,
          1982
        """
        own = jnp.mean(x, axis=0)
        squares = jnp.sum((x - own) ** 2, axis=0)
        count = self.count + x.shape[0]
        share, apart = x.shape[0] / count, own - self.mean
        return Moments(
            count,
            self.mean + share * apart,
            self.squares + squares + share * self.count * apart**2,
        )

    def standardised(self, x: jax.Array) -> jax.Array:
        """Examples by these moments; what has never varied is only centred.

        No example that the moments are taken of comes out above the root of the count.
        """
        variance = self.squares / jnp.maximum(self.count, 1)
        # Rounding alone makes a constant number vary by less than this.
        varies = variance > 1e-10 * self.mean**2
        return (x - self.mean) / jnp.sqrt(jnp.where(varies, variance, 1))
