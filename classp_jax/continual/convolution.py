"""Convolutions as matrix products, for CPUs."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_TILE = 4
_TILED_FROM = 8
"""From this many channels on tiles are faster than patches."""

# The transforms of F(4 x 4, 3 x 3) in Lavin and Gray, 2016, arXiv:1509.09308: B^T of
# the inputs, G of the kernel and A^T of the outputs.
_OF_INPUTS = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_OF_KERNEL = np.array(
    [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]
)
_OF_OUTPUTS = np.array(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
)


def convolution(
    x: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: Any,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **options: Any,
) -> jax.Array:
    """``jax.lax.conv_general_dilated``, on a CPU as matrix products where it can be.

    XLA's own convolution is slow on a CPU, slower inside a loop, and slower still with
    a batch of kernels. Give this to a Flax layer as ``conv_general_dilated``; it has
    the layer's parameters and, to float32's precision, its results. Convolutions in two
    dimensions with stride 1 and padding ``"VALID"`` become products; 3x3 ones of 8 and
    more channels with a quarter of the multiplications (Winograd's algorithm on tiles
    of 4x4 outputs), others by placing all shifted inputs side by side. What remains,
    and everything on accelerators, is left to XLA.

    Args:
      x: ``[batch, height, width, channels]``.
      kernel: ``[height, width, channels, features]``.
      window_strides: as in ``conv_general_dilated``, like everything that follows.
      padding: ``"VALID"`` for a product.
      lhs_dilation: 1 for a product.
      rhs_dilation: 1 for a product.
      dimension_numbers: of those layouts, as Flax gives them.
      feature_group_count: 1 for a product.
      **options: passed on to ``conv_general_dilated``.

    Returns:
      ``[batch, rows, columns, features]``.

    Example:
      >>> from flax import nnx
      >>> layer = nnx.Conv(
      ...     32,
      ...     64,
      ...     (3, 3),
      ...     padding="VALID",
      ...     conv_general_dilated=convolution,
      ...     rngs=nnx.Rngs(0),
      ... )
      >>> layer(jnp.ones((5, 26, 26, 32))).shape
      (5, 24, 24, 64)
    """
    steps = (*window_strides, *(lhs_dilation or ()), *(rhs_dilation or ()))
    plain = (
        x.ndim == 4
        and padding == "VALID"
        and feature_group_count == 1
        and all(step == 1 for step in steps)
    )
    if not plain or jax.default_backend() != "cpu":
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            feature_group_count,
            **options,
        )
    if kernel.shape[:2] == (3, 3) and kernel.shape[2] >= _TILED_FROM:
        return _by_tiles(x, kernel)
    return _by_patches(x, kernel)


def _by_patches(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The shifted inputs side by side, times the kernel as one matrix."""
    height, width, channels, features = kernel.shape
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    patches = jnp.concatenate(
        [
            x[:, i : i + rows, j : j + columns]
            for i in range(height)
            for j in range(width)
        ],
        axis=-1,
    )
    return patches @ kernel.reshape(height * width * channels, features)


def _by_tiles(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Winograd's algorithm: tiles of 6x6 inputs give 4x4 outputs by 36 products.

    Each transform of rows and columns is one product with a Kronecker square, and tiles
    overlap by concatenation: the gradient of either is as cheap as itself.
    """
    batch, height, width, channels = x.shape
    features, size = kernel.shape[-1], _TILE + 2
    down, across = -(-(height - 2) // _TILE), -(-(width - 2) // _TILE)
    rows, columns = (down + 1) * _TILE, (across + 1) * _TILE
    x = jnp.pad(x, ((0, 0), (0, rows - height), (0, columns - width), (0, 0)))
    x = x.reshape(batch, down + 1, _TILE, columns, channels)
    x = jnp.concatenate([x[:, :-1], x[:, 1:, :2]], axis=2)
    x = x.reshape(batch, down, size, across + 1, _TILE, channels)
    x = jnp.concatenate([x[:, :, :, :-1], x[:, :, :, 1:, :2]], axis=4)
    x = x.transpose(2, 4, 0, 1, 3, 5).reshape(size * size, -1)

    def transformed(matrix: np.ndarray, values: jax.Array) -> jax.Array:
        return jnp.asarray(np.kron(matrix, matrix), values.dtype) @ values

    tiles = transformed(_OF_INPUTS, x).reshape(size * size, -1, channels)
    weights = transformed(_OF_KERNEL / 24, kernel.reshape(9, -1))
    products = tiles @ weights.reshape(size * size, channels, features)
    y = transformed(_OF_OUTPUTS, products.reshape(size * size, -1))
    y = y.reshape(_TILE, _TILE, batch, down, across, features)
    y = y.transpose(2, 3, 0, 4, 1, 5)
    y = y.reshape(batch, down * _TILE, across * _TILE, features)
    return y[:, : height - 2, : width - 2]
