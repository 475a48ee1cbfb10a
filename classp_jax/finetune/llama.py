"""A decoder as in Llama and the first Gemma, in Flax NNX.

Pre-norm blocks of causal attention with rotary positions and grouped keys and values,
and of a gated feed-forward network; RMSNorm; no biases.

Example:
  >>> import jax.numpy as jnp
  >>> from flax import nnx
  >>> from classp_jax.finetune.llama import Llama, LlamaConfig
  >>> config = LlamaConfig(
  ...     vocab_size=100, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
  ...     mlp_size=64,
  ... )
  >>> # Without weights, for those of a file; Llama(config, rngs=...) draws its own.
  >>> model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
  >>> tokens = jnp.array([[5, 3, 8, 0], [2, 2, 9, 1]], jnp.int32)
  >>> logits = nnx.eval_shape(lambda model, tokens: model(tokens), model, tokens)
  >>> print(logits.shape)  # [batch, time, vocab_size]
  (2, 4, 100)

References:
  Touvron et al., `LLaMA <https://arxiv.org/abs/2302.13971>`_, 2023

  Gemma Team, `Gemma <https://arxiv.org/abs/2403.08295>`_, 2024
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How Llama from 3.1 on slows the long rotary wavelengths, for longer texts.

    Wavelengths longer than ``original_length / low_frequency_factor`` become ``factor``
    times as long, those shorter than ``original_length / high_frequency_factor`` stay
    as they are, and those between take a part of both.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int

    def __call__(self, frequencies: jax.Array) -> jax.Array:
        """The frequencies, in radians per token, that take the place of these."""
        low, high = self.low_frequency_factor, self.high_frequency_factor
        turns = self.original_length * frequencies / (2 * jnp.pi)
        kept = jnp.clip((turns - low) / (high - low), 0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a decoder, and in what Llama and Gemma differ.

    The defaults are Llama's; :meth:`gemma` sets what Gemma does otherwise.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """How many heads of keys and values the query heads share; divides num_heads."""
    mlp_size: int
    head_dim: int | None = None
    """Features of one head; None for ``hidden_size / num_heads``."""
    activation: str = "silu"
    """Of the gate: ``"silu"``, or ``"gelu"`` for its tanh approximation."""
    tied: bool = True
    """Whether the logits are products with the embeddings, without a head of its own.
    Llama ties its smaller networks only, Gemma all."""
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    """What is added to a norm's scale before it multiplies: 1 in Gemma."""
    scale_embeddings: bool = False
    """Whether embeddings are multiplied by the root of hidden_size, as in Gemma."""
    rope_theta: float = 10_000.0
    """The base of the rotary wavelengths."""
    rope_scaling: RopeScaling | None = None
    """What Llama from 3.1 on does with them."""
    dtype: Any = None
    """What is computed in, such as ``jnp.bfloat16``; None for the parameters' dtype."""
    param_dtype: Any = jnp.float32

    @classmethod
    def gemma(cls, **sizes: Any) -> "LlamaConfig":
        """A configuration with what Gemma does otherwise, for the class's sizes."""
        gemma = {
            "activation": "gelu",
            "tied": True,
            "norm_eps": 1e-6,
            "norm_offset": 1.0,
            "scale_embeddings": True,
        }
        return cls(**(gemma | sizes))

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads = {self.num_heads}, "
                f"got {self.num_kv_heads}."
            )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads must divide hidden_size = {self.hidden_size} where "
                f"head_dim is not given, got {self.num_heads}."
            )
        if self.features_per_head % 2:
            raise ValueError(
                "Rotary positions turn pairs of features: head_dim must be even, "
                f"got {self.features_per_head}."
            )
        if self.activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(_ACTIVATIONS)}, "
                f"got {self.activation!r}."
            )

    @property
    def features_per_head(self) -> int:
        """``head_dim``, whether it was given or not."""
        return self.head_dim or self.hidden_size // self.num_heads


_ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}


class Llama(nnx.Module):
    """The decoder: ``model(tokens)`` with int32 ``[b, t]`` gives ``[b, t, vocab]``.

    A position sees itself and those before it, so padding on the right changes no
    logits but its own: leave it out of the loss.

    Args:
      config: its sizes.
      rngs: for the initial weights, normal with a standard deviation of 0.02.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=_INIT,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.layers = nnx.List(
            [Block(config, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.final_norm = RMSNorm(config)
        if not config.tied:
            self.head = _linear(config, config.hidden_size, config.vocab_size, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens)
        if self.config.scale_embeddings:
            # Rounded to x's dtype, as Gemma was trained.
            x = x * jnp.sqrt(float(self.config.hidden_size)).astype(x.dtype)
        for layer in self.layers:
            x = layer(x)
        x = self.final_norm(x)
        return self.embedding.attend(x) if self.config.tied else self.head(x)


class Block(nnx.Module):
    """Attention and a feed-forward network, each behind a norm and beside a sum."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = GatedMLP(config, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Attention(nnx.Module):
    """Causal attention; several query heads share one head of keys and values."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        queries = config.num_heads * config.features_per_head
        keys = config.num_kv_heads * config.features_per_head
        self.query = _linear(config, config.hidden_size, queries, rngs)
        self.key = _linear(config, config.hidden_size, keys, rngs)
        self.value = _linear(config, config.hidden_size, keys, rngs)
        self.output = _linear(config, queries, config.hidden_size, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        query, key, value = (
            # LoRA may have made a wider dtype of some.
            project(x)
            .astype(x.dtype)
            .reshape(*x.shape[:-1], -1, self.config.features_per_head)
            for project in (self.query, self.key, self.value)
        )
        query, key = (
            rotated(y, self.config.rope_theta, self.config.rope_scaling)
            for y in (query, key)
        )
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.reshape(*x.shape[:-1], -1))


class GatedMLP(nnx.Module):
    """``down(activation(gate(x)) * up(x))``: SwiGLU or GeGLU."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.activation = _ACTIVATIONS[config.activation]
        self.gate = _linear(config, config.hidden_size, config.mlp_size, rngs)
        self.up = _linear(config, config.hidden_size, config.mlp_size, rngs)
        self.down = _linear(config, config.mlp_size, config.hidden_size, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class RMSNorm(nnx.Module):
    """Division by the root of the mean square, in float32, and a scale."""

    def __init__(self, config: LlamaConfig):
        self.eps = config.norm_eps
        self.offset = config.norm_offset
        scale = jnp.full([config.hidden_size], 1 - self.offset, config.param_dtype)
        self.scale = nnx.Param(scale)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        scale = self.scale[...].astype(jnp.float32) + self.offset
        return (wide * jax.lax.rsqrt(mean_square + self.eps) * scale).astype(x.dtype)


def rotated(
    x: jax.Array, theta: float, scaling: RopeScaling | None = None
) -> jax.Array:
    """Rotary positions: pairs of features turned by an angle that grows with time.

    Feature i is paired with the one half a head further on, as in the checkpoints that
    Hugging Face distributes.

    Args:
      x: ``[..., time, heads, features]``.
      theta: the base of the wavelengths.
      scaling: what becomes of the frequencies; None for nothing.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None:
        frequencies = scaling(frequencies)
    times = jnp.arange(x.shape[-3], dtype=jnp.float32)
    angles = (times[:, None] * frequencies)[:, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


_INIT = nnx.initializers.normal(0.02)


def _linear(config: LlamaConfig, inputs: int, outputs: int, rngs: nnx.Rngs) -> Any:
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        kernel_init=_INIT,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )
