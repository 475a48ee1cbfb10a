"""Sizes of pretrained networks, from the ``config.json`` beside their weights.

What a network of this package cannot do is refused by name, rather than left out.
"""

import json
import os
import pathlib
from typing import Any

from classp_jax.finetune.bert import BertConfig
from classp_jax.finetune.llama import LlamaConfig, RopeScaling


def llama_config(path: str | os.PathLike[str], **changes: Any) -> LlamaConfig:
    """The sizes of a checkpoint of Llama, Mistral or the first Gemma.

    Args:
      path: a ``config.json`` as Hugging Face distributes it, or its folder.
      **changes: fields of :class:`LlamaConfig` to set otherwise, such as ``dtype``.

    Raises:
      ValueError: if the file is no such configuration, or asks for what
        :class:`~classp_jax.finetune.llama.Llama` does not have: all is named.
    """
    path, found = _read(path, ("llama", "mistral", "gemma"))
    gemma = found["model_type"] == "gemma"
    # Newer files keep what is about rotary positions in one place.
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    _refuse(
        path,
        {
            "attention_bias": bool(found.get("attention_bias")),
            "mlp_bias": bool(found.get("mlp_bias")),
            "sliding_window": found.get("sliding_window") is not None,
            f"rope_type {rope_type}": rope_type not in ("default", "llama3"),
            f"hidden_act {found.get('hidden_act')}": not gemma
            and found.get("hidden_act", "silu") != "silu",
        },
    )
    scaling = None
    if rope_type == "llama3":
        absent = [name for name in _ROPE_SCALING if rope.get(name) is None]
        if absent:
            raise ValueError(
                f"{path} has rope_type llama3, and does not give {', '.join(absent)}."
            )
        scaling = RopeScaling(*(rope[name] for name in _ROPE_SCALING))
    theta = rope.get("rope_theta", found.get("rope_theta", 10_000.0))
    fields = {
        "vocab_size": found["vocab_size"],
        "hidden_size": found["hidden_size"],
        "num_layers": found["num_hidden_layers"],
        "num_heads": found["num_attention_heads"],
        "num_kv_heads": found.get("num_key_value_heads", found["num_attention_heads"]),
        "mlp_size": found["intermediate_size"],
        "head_dim": found.get("head_dim"),
        "norm_eps": found.get("rms_norm_eps", 1e-6),
        "rope_theta": float(theta),
        "rope_scaling": scaling,
        "tied": found.get("tie_word_embeddings", gemma),
    }
    make = LlamaConfig.gemma if gemma else LlamaConfig
    return make(**(fields | changes))


def bert_config(path: str | os.PathLike[str], **changes: Any) -> BertConfig:
    """The sizes of a checkpoint of BERT.

    Args:
      path: a ``config.json`` as Hugging Face distributes it, or its folder.
      **changes: fields of :class:`BertConfig` to set otherwise, such as ``dtype``.

    Raises:
      ValueError: if the file is no such configuration, or asks for what
        :class:`~classp_jax.finetune.bert.Bert` does not have: all is named.
    """
    path, found = _read(path, ("bert",))
    activation = found.get("hidden_act", "gelu")
    positions = found.get("position_embedding_type", "absolute")
    _refuse(
        path,
        {
            f"hidden_act {activation}": activation != "gelu",
            f"position_embedding_type {positions}": positions != "absolute",
        },
    )
    fields = {
        "vocab_size": found["vocab_size"],
        "hidden_size": found["hidden_size"],
        "num_layers": found["num_hidden_layers"],
        "num_heads": found["num_attention_heads"],
        "mlp_size": found["intermediate_size"],
        "max_length": found["max_position_embeddings"],
        "num_types": found.get("type_vocab_size", 2),
        "norm_eps": found.get("layer_norm_eps", 1e-12),
    }
    return BertConfig(**(fields | changes))


_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)


# In the order of the fields of RopeScaling.
_ROPE_SCALING = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def _read(path: Any, types: tuple[str, ...]) -> tuple[pathlib.Path, dict[str, Any]]:
    path = pathlib.Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    kind = found.get("model_type") if isinstance(found, dict) else None
    if kind not in types:
        raise ValueError(
            f"{path} must have a model_type of {' or '.join(types)}, found {kind!r}."
        )
    absent = [name for name in _SIZES if name not in found]
    if absent:
        raise ValueError(f"{path} does not give {', '.join(absent)}.")
    return path, found


def _refuse(path: pathlib.Path, problems: dict[str, bool]) -> None:
    found = [name for name, is_there in problems.items() if is_there]
    if found:
        raise ValueError(
            f"{path} asks for what this package's network does not have: "
            f"{', '.join(found)}."
        )
