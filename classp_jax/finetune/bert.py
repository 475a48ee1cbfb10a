"""An encoder as in BERT, in Flax NNX.

Post-norm blocks of attention in both directions and a feed-forward network, learned
positions, and a pooler. A head for the task at hand is the user's own.

Example:
  >>> import jax.numpy as jnp
  >>> from flax import nnx
  >>> from classp_jax.finetune.bert import Bert, BertConfig
  >>> config = BertConfig(
  ...     vocab_size=50, hidden_size=16, num_layers=1, num_heads=2, mlp_size=32,
  ...     max_length=8,
  ... )
  >>> # Without weights, for those of a file; Bert(config, rngs=...) draws its own.
  >>> model = nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0)))
  >>> tokens = jnp.array([[2, 7, 9, 3], [2, 4, 3, 0]], jnp.int32)
  >>> def encode(model, tokens):
  ...     hidden = model(tokens, mask=tokens != 0)  # [batch, time, hidden_size]
  ...     return hidden, model.pooled(hidden)
  >>> hidden, pooled = nnx.eval_shape(encode, model, tokens)
  >>> print(hidden.shape, pooled.shape)
  (2, 4, 16) (2, 16)

References:
  Devlin et al., `BERT <https://arxiv.org/abs/1810.04805>`_, 2019
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The sizes of an encoder; the defaults are those of ``bert-base-uncased``."""

    vocab_size: int = 30_522
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_size: int = 3_072
    max_length: int = 512
    """The number of learned positions: the longest text."""
    num_types: int = 2
    """The number of token types, such as first and second sentence."""
    norm_eps: float = 1e-12
    dtype: Any = None
    """What is computed in, such as ``jnp.bfloat16``; None for the parameters' dtype."""
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads must divide hidden_size = {self.hidden_size}, "
                f"got {self.num_heads}."
            )


class Bert(nnx.Module):
    """The encoder, without dropout.

    Args:
      config: its sizes.
      rngs: for the initial weights, normal with a standard deviation of 0.02.
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.config = config
        embed = functools.partial(
            nnx.Embed,
            features=config.hidden_size,
            embedding_init=_INIT,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.tokens = embed(config.vocab_size)
        self.positions = embed(config.max_length)
        self.types = embed(config.num_types)
        self.embedding_norm = _norm(config, rngs)
        self.layers = nnx.List(
            [Block(config, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.pooler = _linear(config, config.hidden_size, config.hidden_size, rngs)

    def __call__(
        self,
        tokens: jax.Array,
        types: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """What the encoder makes of each token.

        Args:
          tokens: int32 ``[batch, time]``, of at most ``max_length``.
          types: of the tokens, int32 of the same shape; None for 0 everywhere.
          mask: bool of the same shape, False where a token is padding; None if none is.

        Returns:
          ``[batch, time, hidden_size]``; what stands at padding means nothing.

        Raises:
          ValueError: if the texts are too long.
        """
        length = tokens.shape[-1]
        if length > self.config.max_length:
            raise ValueError(
                f"The texts have {length} tokens, but there are positions for "
                f"{self.config.max_length}: cut them off."
            )
        types = jnp.zeros_like(tokens) if types is None else types
        positions = self.positions(jnp.arange(length))
        x = self.embedding_norm(self.tokens(tokens) + self.types(types) + positions)
        # A query sees all keys but padding.
        seen = None if mask is None else mask[:, None, None, :]
        for layer in self.layers:
            x = layer(x, seen)
        return x

    def pooled(self, hidden: jax.Array) -> jax.Array:
        """One vector a text: the first token's, projected, ``[batch, hidden_size]``."""
        return jnp.tanh(self.pooler(hidden[:, 0]))


class Block(nnx.Module):
    """Attention and a feed-forward network, each with a sum and a norm behind it."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs=rngs)
        self.attention_norm = _norm(config, rngs)
        self.up = _linear(config, config.hidden_size, config.mlp_size, rngs)
        self.down = _linear(config, config.mlp_size, config.hidden_size, rngs)
        self.mlp_norm = _norm(config, rngs)

    def __call__(self, x: jax.Array, seen: jax.Array | None) -> jax.Array:
        x = self.attention_norm(x + self.attention(x, seen))
        hidden = jax.nn.gelu(self.up(x), approximate=False)
        return self.mlp_norm(x + self.down(hidden))


class Attention(nnx.Module):
    """Attention in both directions."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        size = config.hidden_size
        self.query = _linear(config, size, size, rngs)
        self.key = _linear(config, size, size, rngs)
        self.value = _linear(config, size, size, rngs)
        self.output = _linear(config, size, size, rngs)

    def __call__(self, x: jax.Array, seen: jax.Array | None) -> jax.Array:
        query, key, value = (
            # LoRA may have made a wider dtype of some.
            project(x).astype(x.dtype).reshape(*x.shape[:-1], self.num_heads, -1)
            for project in (self.query, self.key, self.value)
        )
        mixed = jax.nn.dot_product_attention(query, key, value, mask=seen)
        return self.output(mixed.reshape(x.shape))


_INIT = nnx.initializers.normal(0.02)


def _linear(config: BertConfig, inputs: int, outputs: int, rngs: nnx.Rngs) -> Any:
    return nnx.Linear(
        inputs,
        outputs,
        kernel_init=_INIT,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


def _norm(config: BertConfig, rngs: nnx.Rngs) -> Any:
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.norm_eps,
        use_fast_variance=False,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )
