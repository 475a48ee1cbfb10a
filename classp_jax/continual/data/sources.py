"""A source: a labelled data set as a reader found it, checked, with a test part."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from classp_jax.continual.data.arrays import Split, generator
from classp_jax.continual.errors import DataError

TEST_FRACTION = 0.2
"""The share held out for testing where a source has no test part of its own."""

# One key for every use of randomness, so that no two share a random stream.
TEST_KEY, VALIDATION_KEY = 0, 1

_ARRAY_NAMES = {2: ("x", "y"), 4: ("x_train", "y_train", "x_test", "y_test")}


class Source(NamedTuple):
    """A labelled data set."""

    name: str
    kind: str
    """``"image"``, ``"vector"`` or ``"text"``."""
    train: Split
    """What is for training and validation."""
    test: Split
    class_names: tuple[str, ...]
    """The name of every label from 0 on."""
    digest: str
    """A hash of everything that was read."""


class Examples(NamedTuple):
    """The inputs and labels of one part of a data set, as they were read."""

    kind: str
    x: np.ndarray
    """As in :class:`~classp_jax.continual.data.arrays.Split`; or texts, an object array
    ``[n]`` of str."""
    y: np.ndarray
    """Labels, int32 ``[n]``."""


def make_source(
    name: str, train: Examples, test: Examples | None, class_names: Iterable[str]
) -> Source:
    """Checks a data set, and cuts a test part where it has none.

    Args:
      name: what messages and pictures call it.
      train: what is for training, and for testing where ``test`` is None.
      test: what is for testing.
      class_names: a name for every label.

    Raises:
      DataError: if there are fewer than two classes, if a part is empty or has a label
        that is not a class, or if the examples for testing differ in shape or dtype
        from those for training.

    Example:
      >>> train = Examples("vector", np.ones((9, 3), np.float32), np.arange(9) % 2)
      >>> source = make_source("mine", train, None, ["no", "yes"])
      >>> len(source.train), len(source.test), source.train.x is source.test.x
      (8, 1, True)
    """
    class_names = tuple(class_names)
    if len(class_names) < 2:
        raise DataError(
            f"{name}: needs at least two classes, has {', '.join(class_names)}."
        )
    hashed = hashlib.sha256(repr(class_names).encode())
    for part, examples in (("training", train), ("test", test)):
        if examples is not None:
            _check_examples(f"{name}, {part} part", examples, len(class_names))
            _add_to_hash(hashed, examples)
    digest, whole = hashed.hexdigest(), Split(train.x, train.y)
    if test is None:
        rest, held = hold_out(whole, TEST_FRACTION, generator(0, TEST_KEY))
        if not len(held):
            raise DataError(
                f"{name}: {len(train.y)} examples are too few to hold "
                f"{TEST_FRACTION:.0%} out for testing."
            )
        return Source(name, train.kind, rest, held, class_names, digest)
    found, expected = (
        f"{e.kind} {e.x.dtype} {list(e.x.shape[1:])}" for e in (test, train)
    )
    if found != expected:
        raise DataError(
            f"{name}: a test example is {found}, a training example {expected}."
        )
    held = Split(test.x, test.y)
    return Source(name, train.kind, whole, held, class_names, digest)


def source_from_arrays(name: str, arrays: Sequence[Any]) -> Source:
    """A source of arrays that are in memory.

    Args:
      name: what messages and pictures call it.
      arrays: ``(x, y)`` or ``(x_train, y_train, x_test, y_test)``; see
        :func:`examples_from_arrays`.

    Raises:
      DataError: if an array is not what it should be.

    Example:
      >>> x, y = np.zeros((20, 4, 4), np.uint8), np.arange(20) % 2
      >>> source_from_arrays("blank", (x, y, x, y)).train.x.shape
      (20, 4, 4, 1)
    """
    train, test = examples_from_arrays(name, arrays, {})
    return make_source(name, train, test, class_names_of(name, [train]))


def examples_from_arrays(
    name: str, arrays: Sequence[Any], seen: dict[int, tuple[str, np.ndarray]]
) -> tuple[Examples, Examples | None]:
    """The training and the test part of ``(x, y)`` or of four arrays.

    Args:
      name: what messages call them.
      arrays: inputs as for :func:`as_inputs` and labels as for :func:`as_labels`.
      seen: what inputs became, by their id; one that comes again is not copied again.

    Raises:
      DataError: if an array is not what it should be.
    """
    names = None
    if isinstance(arrays, tuple | list):
        names = _ARRAY_NAMES.get(len(arrays))
    if names is None:
        raise DataError(
            f"{name}: must be (x, y) or (x_train, y_train, x_test, y_test), got "
            f"{_described(arrays)}."
        )
    parts = []
    for i in range(0, len(arrays), 2):
        x, y = arrays[i], arrays[i + 1]
        if id(x) not in seen:
            seen[id(x)] = as_inputs(f"{name}, {names[i]}", x)
        kind, inputs = seen[id(x)]
        labels = as_labels(f"{name}, {names[i + 1]}", y)
        if len(inputs) != len(labels):
            raise DataError(
                f"{name}: {names[i]} has {len(inputs)} examples, {names[i + 1]} "
                f"{len(labels)} labels."
            )
        parts.append(Examples(kind, inputs, labels))
    return parts[0], parts[1] if len(parts) == 2 else None


def class_names_of(name: str, parts: Sequence[Examples]) -> list[str]:
    """Names "0", "1" and so on, as many as the largest label needs.

    Raises:
      DataError: if there would be more classes than examples, for a stray large number
        must not become a head with a million outputs.
    """
    num_classes = 1 + max(int(part.y.max(initial=0)) for part in parts)
    num_examples = sum(len(part.y) for part in parts)
    if num_classes > max(num_examples, 2):
        raise DataError(
            f"{name}: labels must be 0, 1, 2 and so on, got {num_classes - 1} among "
            f"{num_examples} examples."
        )
    return [str(label) for label in range(num_classes)]


def as_inputs(where: str, x: Any) -> tuple[str, np.ndarray]:
    """The kind of some inputs, and the inputs as the library stores them.

    Args:
      where: what messages call them.
      x: images ``[n, height, width]`` or ``[n, height, width, channels]``, uint8 or
        floating point; vectors, floating point ``[n, features]``; or tokens, integers
        ``[n, length]`` from 0 on, where 0 fills up short texts.

    Returns:
      ``"image"`` and uint8 or float32 ``[n, height, width, channels]``, ``"vector"``
      and float32 ``[n, features]``, or ``"text"`` and int32 ``[n, length]``.

    Raises:
      DataError: for anything else, and for NaN or infinite numbers.

    Example:
      >>> kind, x = as_inputs("mine", np.zeros((5, 8, 8)))
      >>> kind, x.shape, x.dtype.name
      ('image', (5, 8, 8, 1), 'float32')
    """
    x = np.asarray(x)
    if x.ndim == 2 and x.dtype.kind in "iu" and x.dtype != np.uint8:
        if x.size and (x.min() < 0 or x.max() >= np.iinfo(np.int32).max):
            raise DataError(
                f"{where}: tokens must be 0, 1, 2 and so on, got {x.min()} to "
                f"{x.max()}; for vectors of numbers use floating point."
            )
        return "text", x.astype(np.int32, copy=False)
    if x.ndim == 2 and x.dtype == np.uint8:
        raise DataError(
            f"{where}: uint8 {list(x.shape)} may be pixels or tokens; use images [n, "
            "height, width], floating point for vectors, or int32 for tokens."
        )
    if x.ndim not in (2, 3, 4):
        raise DataError(
            f"{where}: must be images [n, height, width] or [n, height, width, "
            f"channels], vectors [n, features] or tokens [n, length], got shape "
            f"{list(x.shape)}."
        )
    kind = "vector" if x.ndim == 2 else "image"
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise DataError(
            f"{where}: {kind}s must be uint8 or floating point, got {x.dtype}."
        )
    if x.ndim == 4:
        _check_channels_last(where, x.shape)
    x = x[..., np.newaxis] if x.ndim == 3 else x
    return kind, x if x.dtype == np.uint8 else _as_float32(where, x)


def as_labels(where: str, y: Any) -> np.ndarray:
    """Labels as int32 ``[n]``.

    Args:
      where: what messages call them.
      y: integers ``[n]`` or ``[n, 1]`` from 0 on.

    Raises:
      DataError: for anything else.

    Example:
      >>> as_labels("mine", [[1], [0]])
      array([1, 0], dtype=int32)
    """
    y = np.asarray(y)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or (y.dtype.kind not in "iu" and y.size):
        raise DataError(
            f"{where}: labels must be integers [n], got {y.dtype} {list(y.shape)}; "
            "numpy.unique(y, return_inverse=True)[1] numbers other labels."
        )
    if y.size and (y.min() < 0 or y.max() > np.iinfo(np.int32).max):
        bad = np.argmin(y) if y.min() < 0 else np.argmax(y)
        raise DataError(
            f"{where}: labels must be 0, 1, 2 and so on, got {y[bad]} at example {bad}."
        )
    return y.astype(np.int32, copy=False)


def hold_out(
    split: Split, fraction: float, rng: np.random.Generator
) -> tuple[Split, Split]:
    """Cuts a stratified part off.

    Every class gives its share, rounded up or down, and a class with a single example
    gives nothing. Of the ``n`` examples of the other classes ``floor(fraction * n)``
    are cut off; where these are fewer than there are classes (or would leave fewer),
    they are drawn without regard to class.

    Args:
      split: what is cut.
      fraction: the share that is cut off, at least 0 and below 1.
      rng: decides which examples these are.

    Returns:
      What is left, and what was cut off.

    Example:
      >>> split = Split(np.arange(10), np.arange(10) % 2)
      >>> rest, held = hold_out(split, 0.4, generator(0))
      >>> len(rest), sorted(held.labels().tolist())
      (6, [0, 0, 1, 1])
    """
    rows = split.indices()
    counts = np.bincount(split.y[rows])
    several = rows[counts[split.y[rows]] > 1]
    held = several[:0]
    size, num_classes = int(fraction * len(several)), int(np.sum(counts > 1))
    if size:
        # Takes a second to import, and not everybody holds something out.
        from sklearn.model_selection import train_test_split

        stratified = num_classes <= min(size, len(several) - size)
        _, held = train_test_split(
            several,
            test_size=size,
            stratify=split.y[several] if stratified else None,
            random_state=int(rng.integers(2**32)),
        )
    held = np.sort(held)
    rest = np.setdiff1d(rows, held, assume_unique=True)
    return Split(split.x, split.y, rest), Split(split.x, split.y, held)


def _as_float32(where: str, x: np.ndarray) -> np.ndarray:
    # What float32 cannot hold becomes infinite, and is refused as such.
    with np.errstate(over="ignore"):
        x = x.astype(np.float32, copy=False)
    finite = np.isfinite(x).all(axis=tuple(range(1, x.ndim)))
    if not finite.all():
        raise DataError(
            f"{where}: example {np.argmin(finite)} holds NaN or infinite numbers "
            f"({np.sum(~finite)} of {len(x)} examples do)."
        )
    return x


def _check_channels_last(where: str, shape: tuple[int, ...]) -> None:
    """Refuses images whose channels stand before height and width.

    Few images are 1, 3 or 4 pixels high and about as wide as they have channels.
    """
    first, middle, last = shape[1:]
    alike = min(middle, last) > 4 and max(middle, last) <= 2 * min(middle, last)
    if first in (1, 3, 4) and alike:
        raise DataError(
            f"{where}: shape {list(shape)} looks like [n, channels, height, width]; "
            "images are [n, height, width, channels]: use numpy.moveaxis(x, 1, -1)."
        )


def _check_examples(where: str, examples: Examples, num_classes: int) -> None:
    x, y = examples.x, examples.y
    if x.size == 0:
        raise DataError(f"{where}: is empty.")
    outside = (y < 0) | (y >= num_classes)
    if outside.any():
        first = np.argmax(outside)
        raise DataError(
            f"{where}: label {y[first]} of example {first} is not one of the classes "
            f"0 to {num_classes - 1}."
        )


def _add_to_hash(hashed: Any, examples: Examples) -> None:
    for array in (examples.x, examples.y):
        hashed.update(f"{examples.kind} {array.dtype} {array.shape}".encode())
        if array.dtype != object:
            hashed.update(np.ascontiguousarray(array))
            continue
        for text in array:
            encoded = text.encode()
            hashed.update(b"%d " % len(encoded) + encoded)


def _described(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"{len(value)} arrays"
    return f"a {type(value).__name__}"
