"""Sizes from the files beside pretrained weights."""

import json
from typing import Any

import jax.numpy as jnp
import pytest
from flax import nnx

from classp_jax.finetune.bert import Bert, BertConfig
from classp_jax.finetune.configs import bert_config, llama_config
from classp_jax.finetune.llama import Llama, RopeScaling
from classp_jax.torch_state.layouts import by_path


def config_file(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(fields), encoding="utf-8")
    return file


# As in the files beside the weights of Llama 3.2 1B, Gemma 2B and bert-base-uncased.
LLAMA_FILE: Any = {
    "model_type": "llama",
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
GEMMA_FILE: Any = {
    "model_type": "gemma",
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
BERT_FILE: Any = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "vocab_size": 30522,
}


def size(model: Any) -> int:
    return sum(leaf.size for leaf in by_path(nnx.state(model, nnx.Param)).values())


def test_the_sizes_of_known_checkpoints_are_read(tmp_path):
    config_file(tmp_path, **LLAMA_FILE)
    config = llama_config(tmp_path, dtype=jnp.bfloat16)
    assert config.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    assert (config.rope_theta, config.dtype) == (500_000.0, jnp.bfloat16)
    # What is known of these checkpoints: their numbers of parameters.
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    assert size(model) == 1_235_814_400
    gemma = llama_config(config_file(tmp_path, **GEMMA_FILE))
    assert (gemma.tied, gemma.norm_offset, gemma.activation) == (True, 1.0, "gelu")
    model = nnx.eval_shape(lambda: Llama(gemma, rngs=nnx.Rngs(0)))
    assert size(model) == 2_506_172_416
    bert = bert_config(config_file(tmp_path, **BERT_FILE))
    assert bert == BertConfig()
    model = nnx.eval_shape(lambda: Bert(bert, rngs=nnx.Rngs(0)))
    assert size(model) == 109_482_240


def test_networks_that_are_not_ours_are_refused(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0}
    for read, fields, match in (
        (llama_config, {"model_type": "qwen3"}, "llama or mistral or gemma, .*'qwen3'"),
        (llama_config, {"attention_bias": True, "rope_scaling": yarn},
         "does not have: attention_bias, rope_type yarn"),
        (llama_config, {"sliding_window": 4096}, "does not have: sliding_window"),
        (llama_config, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
         "llama3, and does not give low_freq_factor, high_freq_factor, "
         "original_max_position_embeddings"),
        (bert_config, {"model_type": "bert", "hidden_act": "relu"}, "hidden_act relu"),
        (bert_config, {"model_type": "bert", "hidden_act": "gelu",
         "position_embedding_type": "relative_key"}, "relative_key"),
    ):  # fmt: skip
        file = config_file(tmp_path, **(LLAMA_FILE | fields))
        with pytest.raises(ValueError, match=match):
            read(file)
    with pytest.raises(ValueError, match="does not give vocab_size, hidden_size"):
        llama_config(config_file(tmp_path, model_type="llama"))
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        llama_config(tmp_path)
