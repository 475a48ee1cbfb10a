"""What a stream of tasks is made of, and the one seeded random generator.

Everything here is NumPy on the host. Tasks and seeds share one copy of the examples:
a :class:`Split` says which of them it holds and in what order their pixels stand.
"""

import dataclasses
import operator
from typing import NamedTuple, SupportsIndex

import numpy as np

from classp_jax.continual.errors import DataError


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Split:
    """Some examples of a data set, with their labels.

    Splits that hold examples of the same data set share the array ``x``, so that
    ``split.x is other.x`` tells what has to be stored only once.

    Attributes:
      x: the examples of the whole data set: images, uint8 or float32 ``[n_base,
        height, width, channels]``; vectors, float32 ``[n_base, features]``; or tokens,
        int32 ``[n_base, length]``.
      y: their labels in the task that the split belongs to, int32 ``[n_base]``.
      rows: which of them belong to this split, int32 ``[n]``, ascending; None: all.
      pixels: the order in which the pixels of an image (the features of a vector) are
        shown, int32 ``[height * width]``; None: as they are.

    Example:
      >>> x, y = np.arange(6, dtype=np.float32).reshape(3, 2), np.array([0, 1, 0])
      >>> split = Split(x, y, rows=np.array([0, 2]), pixels=np.array([1, 0]))
      >>> len(split)
      2
      >>> split.inputs()
      array([[1., 0.],
             [5., 4.]], dtype=float32)
      >>> split.labels()
      array([0, 0])
    """

    x: np.ndarray
    y: np.ndarray
    rows: np.ndarray | None = None
    pixels: np.ndarray | None = None

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.y if self.rows is None else self.rows)

    def indices(self) -> np.ndarray:
        """The rows, int32 ``[n]``, also where they are all."""
        if self.rows is None:
            return np.arange(len(self.y), dtype=np.int32)
        return self.rows

    def inputs(self) -> np.ndarray:
        """A copy of the examples as the task shows them, ``[n, ...]``."""
        x = self.x if self.rows is None else self.x[self.rows]
        if self.pixels is None:
            return x.copy() if x is self.x else x
        channels = x.shape[3:]
        by_pixel = x.reshape(len(x), len(self.pixels), *channels)
        return by_pixel[:, self.pixels].reshape(x.shape)

    def labels(self) -> np.ndarray:
        """A copy of their labels, int32 ``[n]``."""
        return self.y.copy() if self.rows is None else self.y[self.rows]


class Task(NamedTuple):
    """One task of a stream: three parts that share no example."""

    name: str
    train: Split
    validation: Split
    """Empty where nothing is held out."""
    test: Split
    classes: np.ndarray
    """Bool ``[num_classes]``: the outputs that may win in this task."""


class Stream(NamedTuple):
    """Tasks in the order in which they are learned."""

    name: str
    kind: str
    """``"image"``, ``"vector"`` or ``"text"`` (tokens; 0 fills up short texts)."""
    scenario: str
    """``"class-"``, ``"domain-"`` or ``"task-incremental"``."""
    tasks: tuple[Task, ...]
    num_classes: int
    """The number of outputs: labels are 0 to ``num_classes - 1``."""
    vocabulary_size: int
    """The number of different tokens; 0 unless the kind is ``"text"``."""


def generator(seed: SupportsIndex, *key: int) -> np.random.Generator:
    """The random numbers that a seed gives for one use, independent of other uses.

    Args:
      seed: any integer >= 0, of any size.
      *key: what the numbers are for, integers in [0, 2**32): a constant that belongs
        to the use, then for example the number of the task.

    Returns:
      A new generator at its beginning: the same for the same arguments.

    Raises:
      DataError: if the seed is not an integer >= 0.

    Example:
      >>> bool(generator(7, 1).random() == generator(7, 1).random())
      True
      >>> bool(generator(7, 1).random() == generator(7 + 2**64, 1).random())
      False
    """
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if number < 0 or isinstance(seed, bool | np.bool):
        raise DataError(f"seed must be an integer >= 0, got {seed!r}.")
    return np.random.default_rng(np.random.SeedSequence(number, spawn_key=key))
