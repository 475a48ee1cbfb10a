"""The networks that have a name, as Flax NNX modules."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class MLP(nnx.Module):
    """Fully connected layers with ReLU between them."""

    def __init__(self, sizes: Sequence[int], rngs: nnx.Rngs):
        self.layers = nnx.List(
            [nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def _convolution_of_patches(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The shifted slices of ``x`` side by side, times the kernel as one matrix."""
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


def convolution(
    x: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: Any,
    **options: Any,
) -> jax.Array:
    """``lax.conv_general_dilated``, on a CPU as a product of patches where it can.

    XLA's own convolution is slow on a CPU, and slower inside a loop or with a batch of
    kernels. Pass this as ``conv_general_dilated`` to an ``nnx.Conv``: strides 1 and
    padding ``"VALID"`` are made a product, anything else stays as it is.
    """
    plain = (
        x.ndim == 4
        and tuple(window_strides) == (1, 1)
        and padding == "VALID"
        and options.get("feature_group_count", 1) == 1
    )
    if plain and jax.default_backend() == "cpu":
        return _convolution_of_patches(x, kernel)
    return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, **options)


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """Max-pooling by a maximum over reshaped axes.

    The gradient of ``reduce_window`` is a select-and-scatter, which takes half of a
    small network's training step on a CPU.
    """
    n, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


class CNN(nnx.Module):
    """The network of the CLASSP paper's vision experiment."""

    def __init__(self, shape: Sequence[int], num_classes: int, rngs: nnx.Rngs):
        height, width, channels = shape
        conv = functools.partial(
            nnx.Conv,
            kernel_size=(3, 3),
            padding="VALID",
            conv_general_dilated=convolution,
            rngs=rngs,
        )
        self.first, self.second = conv(channels, 32), conv(32, 64)
        flat = ((height - 4) // 2) * ((width - 4) // 2) * 64
        self.hidden = nnx.Linear(flat, 128, rngs=rngs)
        self.output = nnx.Linear(128, num_classes, rngs=rngs)
        # One draw for a whole channel, as in PyTorch's Dropout2d.
        self.channel_dropout = nnx.Dropout(0.25, broadcast_dims=(1, 2))
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None) -> jax.Array:
        x = nnx.relu(self.first(x))
        x = max_pool_2x2(nnx.relu(self.second(x)))
        x = self.channel_dropout(x, rngs=rngs)
        x = nnx.relu(self.hidden(x.reshape(x.shape[0], -1)))
        x = self.dropout(x, rngs=rngs)
        return self.output(x)


class Transformer(nnx.Module):
    """One post-norm encoder layer over token and position embeddings, mean-pooled."""

    def __init__(
        self,
        vocabulary_size: int,
        length: int,
        num_classes: int,
        rngs: nnx.Rngs,
        *,
        width: int,
        heads: int,
        feed_forward: int,
    ):
        self.tokens = nnx.Embed(vocabulary_size, width, rngs=rngs)
        self.positions = nnx.Embed(length, width, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(3)])
        self.attention = nnx.MultiHeadAttention(
            heads, width, decode=False, rngs=rngs, keep_rngs=False
        )
        self.widen = nnx.Linear(width, feed_forward, rngs=rngs)
        self.narrow = nnx.Linear(feed_forward, width, rngs=rngs)
        self.output = nnx.Linear(width, num_classes, rngs=rngs)
        self.dropout = nnx.Dropout(0.1)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None) -> jax.Array:
        real = x > 0
        h = self.tokens(x) + self.positions(jnp.arange(x.shape[1]))[None]
        h = self.norms[0](h)
        attended = self.attention(h, mask=real[:, None, None, :])
        attended = self.dropout(attended, rngs=rngs)
        h = self.norms[1](h + attended)
        widened = self.narrow(nnx.relu(self.widen(h)))
        widened = self.dropout(widened, rngs=rngs)
        h = self.norms[2](h + widened)
        weight = real.astype(h.dtype)[..., None]
        mean = jnp.sum(h * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1)
        return self.output(mean)
