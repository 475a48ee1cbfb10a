"""A small language model: movie reviews first, then sentences on finance."""

import collections
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from problems import Data, Problem, cut

from classp_jax.finetune.llama import Llama, LlamaConfig

LENGTH = 32
"""Words of a sequence."""
VOCABULARY = 4096
FROM_REVIEWS = 3072
"""How many words of the vocabulary are the reviews' most frequent ones."""
PADDING, UNKNOWN = 0, 1

SIZE: dict[str, Any] = {
    "hidden_size": 256,
    "num_layers": 4,
    "num_heads": 4,
    "mlp_size": 512,
}
"""Of the decoder: 3.7 million parameters, of which 1.0 embed words."""


def words(text: str) -> list[str]:
    """Lower-case words and marks; every number is one word."""
    found = re.findall(
        r"[a-z']+|\d[\d.,]*|[.!?%$]", text.lower().replace("<br />", " ")
    )
    return ["0" if word[0].isdigit() else word for word in found]


def texts(data_dir: pathlib.Path, cache: pathlib.Path) -> dict[str, np.ndarray]:
    """Token sequences ``[n, LENGTH]`` of each part, kept as one file."""
    file = cache / "language.npz"
    if file.exists():
        return dict(np.load(file))
    from classp_jax.continual.data.readers.tfds import read_tfds

    reviews = read_tfds("imdb_reviews", data_dir)
    split = {
        p: [words(t) for t in getattr(reviews, p).inputs()] for p in ("train", "test")
    }
    lines = (data_dir.parent / "phrasebank_50agree.tsv").read_text("utf-8").splitlines()
    # Some sentences stand there twice.
    sentences = sorted({line.partition("\t")[2] for line in lines})
    parts = cut(np.array(sentences, object), 3_800, 300, 600)
    finance = [[words(text) for text in part] for part in parts]

    def frequent(found: Any) -> list[str]:
        counts = collections.Counter(word for text in found for word in text)
        return sorted(counts, key=lambda word: (-counts[word], word))

    vocabulary = frequent(split["train"])[:FROM_REVIEWS]
    more = [w for w in frequent(finance[0]) if w not in set(vocabulary)]
    vocabulary += more[: VOCABULARY - UNKNOWN - 1 - len(vocabulary)]
    token_of = {word: k for k, word in enumerate(vocabulary, UNKNOWN + 1)}

    def tokens(text: list[str]) -> list[int]:
        return [token_of.get(word, UNKNOWN) for word in text]

    def chunks(found: Any, most: int) -> np.ndarray:
        """Pieces of reviews, of whole length."""
        pieces = (
            text[k : k + LENGTH]
            for text in map(tokens, found)
            for k in range(0, len(text) - LENGTH + 1, LENGTH)
        )
        rng = np.random.default_rng(0)
        return rng.permutation(np.array(list(pieces), np.int32))[:most]

    def padded(found: Any) -> np.ndarray:
        rows = [tokens(text)[:LENGTH] for text in found]
        return np.array(
            [row + [PADDING] * (LENGTH - len(row)) for row in rows], np.int32
        )

    arrays = {
        "old_train": chunks(split["train"], 150_000),
        "old_test": chunks(split["test"], 1_000),
        "new_train": padded(finance[0]),
        "new_validation": padded(finance[1]),
        "new_test": padded(finance[2]),
    }
    cache.mkdir(parents=True, exist_ok=True)
    np.savez(file, allow_pickle=False, **arrays)
    return arrays


def language(name: str, data_dir: pathlib.Path, cache: pathlib.Path) -> Problem:
    """Reviews, then financial sentences; a score is minus the loss a word, in nats."""
    arrays = texts(data_dir, cache)
    config = LlamaConfig(vocab_size=VOCABULARY, num_kv_heads=4, **SIZE)
    graph, _ = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))

    def init(seed: int) -> Any:
        state = nnx.state(Llama(config, rngs=nnx.Rngs(seed)), nnx.Param)
        return nnx.to_pure_dict(state)

    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, nnx.State(params))(tokens)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits(params, tokens[:, :-1]), tokens[:, 1:]
        )
        counts = tokens[:, 1:] != PADDING
        return jnp.where(counts, losses, 0.0).sum() / counts.sum()

    old = arrays["old_train"]
    return Problem(
        name=name,
        network=name,
        init=init,
        loss=loss,
        logits=logits,
        score=lambda params, tokens: -loss(params, tokens),
        old=Data(old[200:], old[:100], arrays["old_test"][:150]),
        new=Data(
            arrays["new_train"],
            arrays["new_validation"][:100],
            arrays["new_test"][:150],
        ),
        proxy=arrays["new_train"],
        seeds=dict.fromkeys((1000, *range(5)), 0),
        pretraining={"steps": 1_500, "batch": 24, "learning_rate": 4e-3},
        batch=16,
        checkpoints=(4, 8, 15, 25, 40, 60, 85, 120),
        fisher_kind="sampled",
    )
