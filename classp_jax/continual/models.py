"""Flax NNX networks behind a pure ``init`` and ``apply`` pair."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from classp_jax.continual._names import nearest

Params = Any
"""A nested dict of float32 arrays."""


class Model(NamedTuple):
    """A network as two pure functions."""

    name: str
    init: Callable[[jax.Array], Params]
    """``init(key)``: the parameters, a nested dict of float32 arrays."""
    apply: Callable[[Params, jax.Array, jax.Array | None], jax.Array]
    """``apply(params, inputs, key)``: logits ``[batch, num_classes]``. With a key the
    network trains (dropout is drawn from it), with None it is evaluated."""
    convolutional: bool
    """Whether it convolves: XLA runs a convolution inside a loop, or with a batch of
    kernels, some 20 times slower on a CPU than a plain one."""


class _MLP(nnx.Module):
    def __init__(self, sizes: Sequence[int], rngs: nnx.Rngs):
        self.layers = nnx.List(
            [nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)]
        )

    def __call__(self, x: jax.Array, dropout: nnx.Rngs | None) -> jax.Array:
        del dropout
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def _max_pool_2x2(x: jax.Array) -> jax.Array:
    """Max-pooling by a maximum over reshaped axes.

    The gradient of ``reduce_window`` is a select-and-scatter, which takes half of a
    small network's training step on a CPU.
    """
    n, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


class _CNN(nnx.Module):
    """The network of the CLASSP paper's vision experiment."""

    def __init__(self, shape: Sequence[int], num_classes: int, rngs: nnx.Rngs):
        height, width, channels = shape
        self.first = nnx.Conv(channels, 32, (3, 3), padding="VALID", rngs=rngs)
        self.second = nnx.Conv(32, 64, (3, 3), padding="VALID", rngs=rngs)
        flat = ((height - 4) // 2) * ((width - 4) // 2) * 64
        self.hidden = nnx.Linear(flat, 128, rngs=rngs)
        self.output = nnx.Linear(128, num_classes, rngs=rngs)
        # One draw for a whole channel, as in PyTorch's Dropout2d.
        self.channel_dropout = nnx.Dropout(0.25, broadcast_dims=(1, 2))
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x: jax.Array, dropout: nnx.Rngs | None) -> jax.Array:
        off = dropout is None
        x = nnx.relu(self.first(x))
        x = _max_pool_2x2(nnx.relu(self.second(x)))
        x = self.channel_dropout(x, deterministic=off, rngs=dropout)
        x = nnx.relu(self.hidden(x.reshape(x.shape[0], -1)))
        x = self.dropout(x, deterministic=off, rngs=dropout)
        return self.output(x)


class _Transformer(nnx.Module):
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

    def __call__(self, x: jax.Array, dropout: nnx.Rngs | None) -> jax.Array:
        off = dropout is None
        real = x > 0
        h = self.tokens(x) + self.positions(jnp.arange(x.shape[1]))[None]
        h = self.norms[0](h)
        attended = self.attention(h, mask=real[:, None, None, :])
        attended = self.dropout(attended, deterministic=off, rngs=dropout)
        h = self.norms[1](h + attended)
        widened = self.narrow(nnx.relu(self.widen(h)))
        widened = self.dropout(widened, deterministic=off, rngs=dropout)
        h = self.norms[2](h + widened)
        weight = real.astype(h.dtype)[..., None]
        mean = jnp.sum(h * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1)
        return self.output(mean)


def _uniform(params: Params, key: jax.Array) -> Params:
    """Weights and biases from ``U(-b, b)`` with ``b = 1 / sqrt(fan-in)``."""
    names = sorted(params)
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    if "kernel" not in params:
        return {name: _uniform(params[name], keys[name]) for name in names}
    bound = math.prod(params["kernel"].shape[:-1]) ** -0.5
    return {
        name: jax.random.uniform(
            keys[name], params[name].shape, minval=-bound, maxval=bound
        )
        for name in names
    }


def _pure(
    name: str,
    make: Callable[[nnx.Rngs], nnx.Module],
    *,
    convolutional: bool = False,
    initialisation: str = "flax",
) -> Model:
    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(params=0)))
    graph, state = nnx.split(abstract, nnx.Param)
    structure = jax.tree.structure(state)

    def init(key: jax.Array) -> Params:
        _, params = nnx.split(make(nnx.Rngs(params=key)), nnx.Param)
        params = nnx.to_pure_dict(params)
        return _uniform(params, key) if initialisation == "pytorch" else params

    def apply(params: Params, inputs: jax.Array, key: jax.Array | None) -> jax.Array:
        # NNX's state has the same leaves in the same order as its pure dict.
        module = nnx.merge(graph, structure.unflatten(jax.tree.leaves(params)))
        dropout = None if key is None else nnx.Rngs(dropout=key)
        return module(inputs, dropout)  # pyright: ignore[reportCallIssue]

    return Model(name, init, apply, convolutional)


MODELS = {
    "mlp": "fully connected ReLU network, --hidden names its widths",
    "cnn": "the CLASSP paper's: two 3x3 convolutions, max-pool, dropout, dense 128",
    "transformer": "one encoder layer over 30 tokens, for text",
}


INITIALISATIONS = ("flax", "pytorch")


def make_model(
    name: str,
    input_shape: Sequence[int],
    num_classes: int,
    *,
    hidden: Sequence[int] = (128, 128),
    vocabulary_size: int = 0,
    width: int = 64,
    heads: int = 4,
    feed_forward: int = 256,
    initialisation: str = "flax",
) -> Model:
    """A network by its name.

    Args:
      name: one of ``MODELS``.
      input_shape: of one example: ``(height, width, channels)``, or ``(length,)`` for
        the tokens of a text.
      num_classes: the number of logits.
      hidden: the widths of the MLP's hidden layers.
      vocabulary_size: the number of different tokens, for the transformer.
      width: the transformer's width.
      heads: the number of its attention heads.
      feed_forward: the width of its feed-forward layer.
      initialisation: ``"flax"``, its layers' own (normal with variance 1 / fan-in,
        biases 0), or ``"pytorch"``, that of PyTorch's layers, for the MLP and the CNN:
        uniform between +-1 / sqrt(fan-in), biases too, a third of that variance.

    Returns:
      A :class:`Model`. Its parameters are float32; inputs are float32 images or int32
      tokens with 0 for padding.

    Raises:
      ValueError: for an unknown name, or a model that cannot read such inputs.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from classp_jax.continual.models import make_model
      >>> model = make_model("mlp", (8, 8, 1), 10, hidden=(32,))
      >>> params = model.init(jax.random.key(0))
      >>> model.apply(params, jnp.zeros((5, 8, 8, 1)), None).shape
      (5, 10)
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}{nearest(name, MODELS)}")
    if initialisation not in INITIALISATIONS:
        raise ValueError(
            f"unknown initialisation {initialisation!r}"
            f"{nearest(initialisation, INITIALISATIONS)}"
        )
    shape = tuple(input_shape)
    if (name == "transformer") != (len(shape) == 1):
        wanted = "text" if name == "transformer" else "images"
        raise ValueError(f"model {name!r} reads {wanted}, got inputs of shape {shape}")
    if name == "mlp":
        size = 1
        for axis in shape:
            size *= axis
        sizes = (size, *hidden, num_classes)
        return _pure(
            name, lambda rngs: _MLP(sizes, rngs), initialisation=initialisation
        )
    if name == "cnn":
        if len(shape) != 3 or min(shape[:2]) < 6:
            raise ValueError(f"model 'cnn' needs images of at least 6x6, got {shape}")
        return _pure(
            name,
            lambda rngs: _CNN(shape, num_classes, rngs),
            convolutional=True,
            initialisation=initialisation,
        )
    if initialisation != "flax":
        raise ValueError(
            f"initialisation {initialisation!r} is for the models 'mlp' and 'cnn'"
        )
    if width % heads:
        raise ValueError(f"width {width} is not a multiple of heads {heads}")
    return _pure(
        name,
        lambda rngs: _Transformer(
            vocabulary_size,
            shape[0],
            num_classes,
            rngs,
            width=width,
            heads=heads,
            feed_forward=feed_forward,
        ),
    )
