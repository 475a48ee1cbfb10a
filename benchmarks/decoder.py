"""A decoder-only language model in plain JAX, sharded over every chip of a slice.

Layers are scanned and rematerialised; weights and gradients are kept in float32 and
computed with in bfloat16. Every weight matrix is cut into one piece a chip (fully
sharded data parallelism): a layer gathers its weights when it runs, and its gradients
are summed and cut up again on the way back.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ahead import AXIS
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Size(NamedTuple):
    """How large a decoder is."""

    layers: int
    width: int
    hidden: int
    """Width of the gated feed-forward network."""
    heads: int
    vocabulary: int
    tokens: int
    """Length of a sequence; every chip trains on one sequence a step."""


SIZES = {
    "1B": Size(18, 2048, 5632, 16, 32768, 2048),
    "7B": Size(32, 4096, 11008, 32, 32768, 2048),
}


def parameters(size: Size) -> dict[str, Any]:
    """The parameters as abstract arrays, every layer's stacked along the first axis."""
    width, hidden = size.width, size.hidden
    layer = {
        "attention_norm": (width,),
        "qkv": (width, 3 * width),
        "attention_out": (width, width),
        "mlp_norm": (width,),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    shapes = {
        "embedding": (size.vocabulary, width),
        "layers": {name: (size.layers, *shape) for name, shape in layer.items()},
        "norm": (width,),
        "logits": (width, size.vocabulary),
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def specs(params: dict[str, Any]) -> dict[str, Any]:
    """How each parameter is cut: along its first axis, behind that of the layers."""
    return (
        params
        | {
            name: jax.tree.map(lambda _: PartitionSpec(AXIS), params[name])
            for name in ("embedding", "norm", "logits")
        }
        | {
            "layers": jax.tree.map(
                lambda _: PartitionSpec(None, AXIS), params["layers"]
            )
        }
    )


def loss_function(size: Size, mesh: Mesh) -> Any:
    """``loss(params, tokens)``: next-token cross-entropy, the mean over all chips."""

    def local_loss(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        x = _gathered(params["embedding"])[tokens]

        @jax.checkpoint
        def layer(x: jax.Array, weights: dict[str, jax.Array]) -> tuple[Any, None]:
            weights = {name: _gathered(w) for name, w in weights.items()}
            x = x + _attention(_normalised(x, weights["attention_norm"]), weights, size)
            x = x + _feed_forward(_normalised(x, weights["mlp_norm"]), weights)
            return x, None

        x, _ = jax.lax.scan(layer, x, params["layers"])
        x = _normalised(x, _gathered(params["norm"]))
        logits = (x @ _gathered(params["logits"])).astype(jnp.float32)[:, :-1]
        wanted = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        loss = jnp.mean(jax.nn.logsumexp(logits, axis=-1) - wanted)
        return jax.lax.pmean(loss, AXIS)

    return jax.shard_map(
        local_loss,
        mesh=mesh,
        in_specs=(specs(parameters(size)), PartitionSpec(AXIS)),
        out_specs=PartitionSpec(),
    )


def shardings(mesh: Mesh, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters' shardings."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs(params),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def _gathered(weight: jax.Array) -> jax.Array:
    """All of a weight of which this chip has a piece, in bfloat16."""
    return jax.lax.all_gather(weight.astype(jnp.bfloat16), AXIS, tiled=True)


def _normalised(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    variance = jnp.mean(wide**2, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype) * scale


def _attention(x: jax.Array, weights: dict[str, jax.Array], size: Size) -> jax.Array:
    heads = (*x.shape[:2], size.heads, size.width // size.heads)
    q, k, v = (part.reshape(heads) for part in jnp.split(x @ weights["qkv"], 3, -1))
    out = jax.nn.dot_product_attention(_rotated(q), _rotated(k), v, is_causal=True)
    return out.reshape(x.shape) @ weights["attention_out"]


def _rotated(x: jax.Array) -> jax.Array:
    """Rotary position embedding."""
    half = x.shape[-1] // 2
    rate = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * rate
    cos, sin = (f(angle)[:, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _feed_forward(x: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
    return (jax.nn.silu(x @ weights["gate"]) * (x @ weights["up"])) @ weights["down"]
