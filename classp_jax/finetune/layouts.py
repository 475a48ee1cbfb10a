"""Names and layouts of pretrained checkpoints, as Hugging Face distributes them.

Tables for :mod:`classp_jax.finetune.weights`: tensor names, and the leaves of
:class:`~classp_jax.finetune.llama.Llama` and :class:`~classp_jax.finetune.bert.Bert`
that they become. :mod:`classp_jax.torch_state` says what a table of your own looks
like. A table is a dict: add to it with ``LLAMA | {"lm_head.weight": None}``, rename
with ``{name.removeprefix("bert."): layout for name, layout in BERT.items()}``.
"""

from classp_jax.torch_state.layouts import Layout, Table, conv, dense, flat, same

__all__ = [
    "BERT",
    "BERT_GAMMA_BETA",
    "LLAMA",
    "Layout",
    "Table",
    "conv",
    "dense",
    "flat",
    "same",
]

LLAMA: Table = {
    "model.embed_tokens.weight": same("embedding/embedding"),
    "model.layers.{}.input_layernorm.weight": same("layers/{}/attention_norm/scale"),
    **{
        f"model.layers.{{}}.self_attn.{theirs}_proj.weight": dense(
            f"layers/{{}}/attention/{ours}/kernel"
        )
        for theirs, ours in zip(
            ["q", "k", "v", "o"], ["query", "key", "value", "output"], strict=True
        )
    },
    "model.layers.{}.post_attention_layernorm.weight": same("layers/{}/mlp_norm/scale"),
    **{
        f"model.layers.{{}}.mlp.{name}_proj.weight": dense(
            f"layers/{{}}/mlp/{name}/kernel"
        )
        for name in ("gate", "up", "down")
    },
    "model.norm.weight": same("final_norm/scale"),
    "lm_head.weight": dense("head/kernel"),
    # A constant, which early checkpoints hold.
    "model.layers.*.self_attn.rotary_emb.inv_freq": None,
}
"""Llama 1 to 3, and the first Gemma; also what has taken over their names and
architecture, such as Mistral without a window, SmolLM and TinyLlama."""


def _linear(name: str, path: str) -> dict[str, Layout]:
    return {
        f"{name}.weight": dense(f"{path}/kernel"),
        f"{name}.bias": same(f"{path}/bias"),
    }


def _norm(name: str, path: str) -> dict[str, Layout]:
    return {
        f"{name}.LayerNorm.weight": same(f"{path}/scale"),
        f"{name}.LayerNorm.bias": same(f"{path}/bias"),
    }


_LAYER = "bert.encoder.layer.{}"

BERT: Table = {
    "bert.embeddings.word_embeddings.weight": same("tokens/embedding"),
    "bert.embeddings.position_embeddings.weight": same("positions/embedding"),
    "bert.embeddings.token_type_embeddings.weight": same("types/embedding"),
    **_norm("bert.embeddings", "embedding_norm"),
    **_linear(f"{_LAYER}.attention.self.query", "layers/{}/attention/query"),
    **_linear(f"{_LAYER}.attention.self.key", "layers/{}/attention/key"),
    **_linear(f"{_LAYER}.attention.self.value", "layers/{}/attention/value"),
    **_linear(f"{_LAYER}.attention.output.dense", "layers/{}/attention/output"),
    **_norm(f"{_LAYER}.attention.output", "layers/{}/attention_norm"),
    **_linear(f"{_LAYER}.intermediate.dense", "layers/{}/up"),
    **_linear(f"{_LAYER}.output.dense", "layers/{}/down"),
    **_norm(f"{_LAYER}.output", "layers/{}/mlp_norm"),
    **_linear("bert.pooler.dense", "pooler"),
    # A constant, which early checkpoints hold, and the heads of pretraining.
    "bert.embeddings.position_ids": None,
    "cls.*": None,
}
"""BERT, cased or not, of any size."""

BERT_GAMMA_BETA: Table = {
    name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    ): layout
    for name, layout in BERT.items()
}
"""The same as converted from TensorFlow, such as ``bert-base-uncased``: its norms'
tensors are called gamma and beta."""
