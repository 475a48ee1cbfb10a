"""From texts to tokens: one vocabulary and one array of tokens for all seeds."""

import itertools
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from classp_jax.continual.data.arrays import Split
from classp_jax.continual.data.sources import Source
from classp_jax.continual.errors import DataError

_PADDING, _UNKNOWN = 0, 1
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")


def as_tokens(
    sources: list[Source], text_length: int, vocabulary_size: int
) -> tuple[list[Source], int, dict[str, int]]:
    """Sources with their texts turned into tokens.

    Texts become lower-case words. The vocabulary is the most frequent words in what the
    sources have for training and validation, counted where the model sees them: in the
    first ``text_length`` words of a text. Which of these texts a seed holds out or
    leaves out does not matter to it, so that all seeds share one vocabulary and one
    array of tokens; texts for testing are never counted. Equally frequent words are
    taken in alphabetical order. Token 0 fills up short texts behind their end and 1 is
    every other word; a text without any word is one such word.

    Args:
      sources: sources of one kind; one that stands there twice is counted once. What
        is not texts comes back as it is.
      text_length: the number of words kept of a text.
      vocabulary_size: the largest number of different tokens, 0 and 1 among them.

    Returns:
      The sources; the number of different tokens, 0 for images and vectors; and those
      of the options that made a difference.

    Raises:
      DataError: if the sources are of several kinds.
    """
    kinds = {(source.kind, source.train.x.dtype == object) for source in sources}
    if kinds == {("text", True)}:
        tokens, words = _tokenised(sources, text_length, vocabulary_size)
        sizes = {"text_length": text_length, "vocabulary_size": vocabulary_size}
        return tokens, words, sizes
    if kinds == {("text", False)}:
        return sources, num_tokens(sources), {}
    if len(kinds) > 1:
        raise DataError(
            "All sources of a sequence must be of one kind, got "
            f"{', '.join(f'{data.name} ({data.kind})' for data in sources)}."
        )
    return sources, 0, {}


def num_tokens(sources: Sequence[Source]) -> int:
    """The number of different tokens of sources that hold tokens."""
    parts = [part.x for source in sources for part in (source.train, source.test)]
    return 1 + max(int(x.max()) for x in parts)


def _tokenised(
    sources: Sequence[Source], length: int, vocabulary_size: int
) -> tuple[list[Source], int]:
    distinct = {id(source): source for source in sources}.values()
    counts = Counter(
        word
        for source in distinct
        for text in source.train.inputs()
        for word in _words(text, length)
    )
    frequent = sorted(counts, key=lambda word: (-counts[word], word))
    kept = frequent[: vocabulary_size - _UNKNOWN - 1]
    token_of = {word: token for token, word in enumerate(kept, start=_UNKNOWN + 1)}
    tokens: dict[int, np.ndarray] = {}

    def view(split: Split) -> Split:
        if id(split.x) not in tokens:
            tokens[id(split.x)] = _tokens(split.x, length, token_of)
        return Split(tokens[id(split.x)], split.y, split.rows)

    result = {
        id(source): source._replace(train=view(source.train), test=view(source.test))
        for source in distinct
    }
    return [result[id(source)] for source in sources], len(token_of) + _UNKNOWN + 1


def _tokens(texts: np.ndarray, length: int, token_of: dict[str, int]) -> np.ndarray:
    tokens = np.full((len(texts), length), _PADDING, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        found = [token_of.get(word, _UNKNOWN) for word in _words(text, length)]
        row[: len(found) or 1] = found or _UNKNOWN
    return tokens


def _words(text: str, length: int) -> list[str]:
    """The first words of a text in lower case.

    Example:
      >>> _words("Isn't it GOOD -- 10/10?", 5)
      ["isn't", 'it', 'good', '10', '10']
    """
    found = _WORD.finditer(text.lower())
    return [word.group() for word in itertools.islice(found, length)]
