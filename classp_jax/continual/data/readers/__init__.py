"""Readers of data sets, one format a file; none downloads or writes anything."""

import difflib
import os

from classp_jax.continual.data.readers.digits import read_digits
from classp_jax.continual.data.readers.npz import read_npz
from classp_jax.continual.data.readers.tfds import read_tfds
from classp_jax.continual.data.readers.tsv import read_tsv
from classp_jax.continual.data.sources import Source
from classp_jax.continual.errors import DataError

SOURCES: dict[str, str] = {
    "digits": "1,797 handwritten digits of 8 x 8 pixels, embedded in scikit-learn",
    "tfds:NAME": "a prepared image or text classification set of TensorFlow Datasets",
    "npz:PATH": "a NumPy file with the arrays x_train, y_train, x_test and y_test",
    "tsv:PATH": "texts in a UTF-8 file, one per line: label, tab, text",
}
"""What :func:`read_source` takes, with one line each."""

_SUGGESTED = ("digits", "tfds:mnist", "tfds:fashion_mnist", "tfds:imdb_reviews")
_PREFIXES = ("tfds", "npz", "tsv")


def read_source(name: str, data_dir: str | os.PathLike[str] | None = None) -> Source:
    """Reads a data set by name.

    The test part is the source's own where it has one. The others (``digits``, ``tsv``
    and some of TFDS) get one of 20 %, stratified by class, the same for every seed.

    Args:
      name: one of the patterns in :data:`SOURCES`.
      data_dir: the folder with prepared TFDS sets; by default the environment's
        ``TFDS_DATA_DIR``, else ``~/tensorflow_datasets``. Other sources ignore it.

    Raises:
      DataError: if the name is not known, if the source is missing or a package that
        reads it is, or if it holds anything but what its reader describes.

    Example:
      >>> digits = read_source("digits")
      >>> digits.train.x.shape, len(digits.train), len(digits.test)
      ((1797, 8, 8, 1), 1438, 359)
    """
    prefix, _, rest = name.partition(":")
    if name == "digits":
        return read_digits()
    if prefix == "tfds" and rest:
        return read_tfds(rest, data_dir)
    if prefix == "npz" and rest:
        return read_npz(rest)
    if prefix == "tsv" and rest:
        return read_tsv(rest)
    raise DataError(_unknown(name))


def _unknown(name: str) -> str:
    """The message for a name that fits no pattern."""
    prefix, _, rest = name.partition(":")
    mistyped = difflib.get_close_matches(prefix, _PREFIXES, n=1) if rest else []
    similar = difflib.get_close_matches(name, _SUGGESTED, n=1, cutoff=0.4)
    if mistyped:
        hint = f"{mistyped[0]}:{rest}"
    elif name.endswith((".npz", ".tsv")):
        hint = f"{name[-3:]}:{name}"
    else:
        hint = "".join(similar)
    question = f"; did you mean {hint!r}?" if hint else "."
    return f"Unknown source {name!r}{question} Known: {', '.join(SOURCES)}"
