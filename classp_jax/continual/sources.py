"""Where the data of an experiment comes from: embedded digits, TFDS, npz, tsv."""

import difflib
import importlib
import io
import numbers
import operator
import os
import pathlib
import re
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

SOURCES: dict[str, str] = {
    "digits": "1,797 handwritten digits of 8 x 8 pixels, embedded in scikit-learn",
    "tfds:NAME": "a prepared image or text classification set of TensorFlow Datasets",
    "npz:PATH": "images in a NumPy file: x_train, y_train, x_test, y_test",
    "tsv:PATH": "texts in a UTF-8 file, one a line: label, tab, text",
}
"""What :func:`load_source` takes, with one line each."""

TEST_FRACTION = 0.2
"""The share held out for testing where a source has no test part of its own."""

# One key for every use of randomness, so that no two share a random stream.
TEST_KEY, VALIDATION_KEY = 0, 1

_SUGGESTED = ("digits", "tfds:mnist", "tfds:fashion_mnist", "tfds:imdb_reviews")
_PREFIXES = ("tfds", "npz", "tsv")
_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_TFDS_NAME = re.compile(r"(\w+)(?:/([\w.+-]+))?(?::(\d+\.\d+\.\d+))?")
_TFDS_VERSION = re.compile(r"\d+\.\d+\.\d+")
_TFDS_CHUNK = 1024
_PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class SourceError(ValueError):
    """A source that is unknown, missing or holds bad data; says so on one line."""


class Split(NamedTuple):
    """Examples and their labels."""

    x: np.ndarray
    """Images, uint8 or float32 ``[n, height, width, channels]``; or texts, an object
    array ``[n]`` of str; or, in a task of a stream, tokens, int32 ``[n, length]``."""
    y: np.ndarray
    """Labels, int32 ``[n]``."""


class Source(NamedTuple):
    """A labelled data set in three parts that share no example."""

    name: str
    """As it was given to :func:`load_source`."""
    kind: str
    """``"image"`` or ``"text"``."""
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    """The name of every label from 0 on."""


def load_source(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> Source:
    """Loads a data set by name; nothing is downloaded and nothing is written.

    The test part is the source's own where it has one. ``digits``, ``tsv`` and TFDS
    sets without one get a test part of 20 %, the same for every seed. The validation
    part is cut from the training part by seed. Both cuts are stratified: a class loses
    its share up to one example. The order of the examples is kept.

    * ``digits``: the pixels 0 to 16 are scaled to 0 to 255, rounded down.
    * ``tfds:NAME`` (also ``NAME/CONFIG`` and ``NAME/CONFIG:VERSION``): a folder that
      TFDS has prepared as ``array_record``, read without TensorFlow. The part called
      ``test`` is the test part, else the one called ``validation``; a part whose labels
      are all -1, which is how TFDS says that they are withheld, does not count.
    * ``npz:PATH``: images ``[n, height, width]`` or ``[n, height, width, channels]``,
      uint8 or floating point; integer labels ``[n]`` or ``[n, 1]``.
    * ``tsv:PATH``: of texts that occur more than once the first line counts, whatever
      the labels of the others. Labels are numbered in the order of their names.

    Args:
      name: one of the patterns in :data:`SOURCES`.
      data_dir: the folder with prepared TFDS sets; by default the environment's
        ``TFDS_DATA_DIR``, else ``~/tensorflow_datasets``. Other sources ignore it.
      validation_fraction: the share of the training part that becomes the validation
        part, at least 0 (there is none then) and below 1.
      seed: decides which examples those are, >= 0.

    Returns:
      A :class:`Source`. Labels are int32; images are uint8 or float32 with four axes.

    Raises:
      SourceError: if the name is not known, the source is missing or a package that
        reads it is, or if it holds anything but finite images (or texts) of one shape
        with labels from 0 on, in parts of at least one example.

    Example:
      >>> digits = load_source("digits")
      >>> digits.train.x.shape, digits.validation.x.shape, digits.test.x.shape
      ((1295, 8, 8, 1), (143, 8, 8, 1), (359, 8, 8, 1))

    References:
      `TensorFlow Datasets <https://www.tensorflow.org/datasets>`_
    """
    (source,) = load_sources(
        name, [seed], data_dir=data_dir, validation_fraction=validation_fraction
    )
    return source


def load_sources(
    name: str,
    seeds: Sequence[int],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    validation_fraction: float = 0.1,
) -> list[Source]:
    """What :func:`load_source` gives for every one of several seeds, read once.

    Args:
      name: as for :func:`load_source`.
      seeds: as its ``seed``, one for each source.
      data_dir: as there.
      validation_fraction: as there.

    Returns:
      A :class:`Source` for every seed.

    Raises:
      SourceError: as there.

    Example:
      >>> [len(source.train.y) for source in load_sources("digits", [0, 1])]
      [1295, 1295]
    """
    parts = _read(name, data_dir)
    return [_source(name, parts, validation_fraction, seed) for seed in seeds]


def source_from_arrays(
    name: str,
    x_train: Any,
    y_train: Any,
    x_test: Any,
    y_test: Any,
    *,
    class_names: Sequence[str] | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> Source:
    """A source of images that are already in memory.

    Args:
      name: what messages and pictures call it.
      x_train: images ``[n, height, width]`` or ``[n, height, width, channels]``; uint8,
        or floating point, which becomes float32.
      y_train: their labels, integers ``[n]`` or ``[n, 1]`` from 0 on.
      x_test: images for testing, of the same shape and dtype.
      y_test: their labels.
      class_names: a name for every label; by default "0", "1" and so on up to the
        largest label in ``y_train``.
      validation_fraction: as for :func:`load_source`.
      seed: as for :func:`load_source`.

    Returns:
      A :class:`Source`.

    Raises:
      SourceError: as for :func:`load_source`.

    Example:
      >>> import numpy as np
      >>> x, y = np.zeros((20, 4, 4), np.uint8), np.arange(20) % 2
      >>> source_from_arrays("blank", x, y, x, y).train.x.shape
      (18, 4, 4, 1)
    """
    parts = _array_parts(x_train, y_train, x_test, y_test, class_names)
    return _source(name, parts, validation_fraction, seed)


def check_source(source: Source) -> None:
    """Raises :class:`SourceError` unless the source is what its docstring says.

    Example:
      >>> check_source(load_source("digits"))
    """
    if source.kind not in ("image", "text"):
        raise SourceError(
            f"{source.name}: kind must be 'image' or 'text', got {source.kind!r}."
        )
    if len(source.class_names) < 2 and len(source.train.y):
        raise SourceError(
            f"{source.name}: needs at least two classes, has {source.class_names}."
        )
    reference = np.asarray(source.train.x)
    for part, split in (
        ("training", source.train),
        ("validation", source.validation),
        ("test", source.test),
    ):
        where = f"{source.name}, {part} part"
        if part == "validation" and not len(split.y):
            continue
        check_split(where, split, len(source.class_names))
        if source.kind == "text":
            if split.x.ndim != 1 or not all(isinstance(text, str) for text in split.x):
                raise SourceError(f"{where}: texts must be str in an array [n].")
            continue
        if split.x.ndim != 4 or split.x.dtype not in (np.uint8, np.float32):
            raise SourceError(
                f"{where}: images must be uint8 or float32 [n, height, width, "
                f"channels], got {split.x.dtype} {list(split.x.shape)}."
            )
        if (split.x.shape[1:], split.x.dtype) != (reference.shape[1:], reference.dtype):
            raise SourceError(
                f"{where}: images are {split.x.dtype} {list(split.x.shape[1:])}, those "
                f"for training {reference.dtype} {list(reference.shape[1:])}."
            )


def check_split(where: str, split: Split, num_classes: int) -> None:
    """Raises :class:`SourceError` if a part is empty or has bad numbers or labels.

    Example:
      >>> import numpy as np
      >>> check_split("mine", Split(np.zeros((1, 2, 2, 1)), np.array([7], np.int32)), 3)
      Traceback (most recent call last):
        ...
      classp_jax.continual.sources.SourceError: mine: label 7 is not one of 0 to 2.
    """
    x, y = np.asarray(split.x), np.asarray(split.y)
    if y.ndim != 1 or y.dtype != np.int32:
        raise SourceError(
            f"{where}: labels must be int32 [n], got {y.dtype} {list(y.shape)}."
        )
    if x.ndim == 0 or len(x) != len(y):
        raise SourceError(
            f"{where}: has {len(x) if x.ndim else 'no'} examples, {len(y)} labels."
        )
    if x.size == 0:
        raise SourceError(f"{where}: is empty.")
    outside = (y < 0) | (y >= num_classes)
    if outside.any():
        raise SourceError(
            f"{where}: label {y[outside][0]} is not one of 0 to {num_classes - 1}."
        )
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        finite = np.isfinite(x).all(axis=tuple(range(1, x.ndim)))
        raise SourceError(
            f"{where}: {np.sum(~finite)} of {len(x)} examples hold NaN or infinite "
            f"numbers, the first is example {np.argmin(finite)}."
        )


def as_images(where: str, x: Any) -> np.ndarray:
    """Images as uint8 or float32 ``[n, height, width, channels]``.

    Example:
      >>> import numpy as np
      >>> as_images("mine", np.zeros((5, 8, 8))).shape
      (5, 8, 8, 1)
    """
    x = np.asarray(x)
    if x.ndim == 3:
        x = x[..., np.newaxis]
    if x.ndim != 4:
        raise SourceError(
            f"{where}: images must be [n, height, width] or [n, height, width, "
            f"channels], got shape {list(x.shape)}."
        )
    if x.dtype == np.uint8:
        return x
    if x.dtype.kind != "f":
        raise SourceError(
            f"{where}: images must be uint8 or floating point, got {x.dtype}."
        )
    # What float32 cannot hold becomes infinite, and is refused as such.
    with np.errstate(over="ignore"):
        return x.astype(np.float32)


def as_labels(where: str, y: Any) -> np.ndarray:
    """Labels as int32 ``[n]``.

    Example:
      >>> as_labels("mine", [[1], [0]])
      array([1, 0], dtype=int32)
    """
    y = np.asarray(y)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or (y.dtype.kind not in "iu" and y.size):
        raise SourceError(
            f"{where}: labels must be integers [n], got {y.dtype} {list(y.shape)}."
        )
    if y.size and (y.min() < 0 or y.max() > np.iinfo(np.int32).max):
        bad = y.min() if y.min() < 0 else y.max()
        raise SourceError(f"{where}: labels must be 0, 1, 2 and so on, got {bad}.")
    return y.astype(np.int32)


def check_fraction(validation_fraction: float) -> None:
    """Raises :class:`SourceError` unless the share is at least 0 and below 1.

    Example:
      >>> check_fraction(0.1)
    """
    number = isinstance(validation_fraction, numbers.Real)
    if not (number and 0 <= float(validation_fraction) < 1):
        raise SourceError(
            "validation_fraction must be at least 0 and below 1, got "
            f"{validation_fraction!r}."
        )


def generator(seed: int, *key: int) -> np.random.Generator:
    """The random numbers that a seed gives for one use, independent of other uses.

    Example:
      >>> generator(7, 1).random() == generator(7, 1).random()
      True
    """
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if number < 0 or isinstance(seed, bool):
        raise SourceError(f"seed must be an integer >= 0, got {seed!r}.")
    return np.random.default_rng(np.random.SeedSequence(number, spawn_key=key))


def hold_out(
    split: Split, fraction: float, rng: np.random.Generator
) -> tuple[Split, Split]:
    """Cuts a stratified part off: returns what is left and what was cut off.

    Of ``n`` examples ``floor(fraction * n)`` are cut off, and of every class its share,
    rounded up or down. The order of the examples is kept.

    Example:
      >>> import numpy as np
      >>> split = Split(np.arange(10), np.arange(10) % 2)
      >>> rest, held = hold_out(split, 0.4, np.random.default_rng(0))
      >>> len(rest.y), sorted(held.y.tolist())
      (6, [0, 0, 1, 1])
    """
    order = rng.permutation(len(split.y))
    order = order[np.argsort(split.y[order], kind="stable")]
    # With the examples in a row by class, every (1/fraction)-th one is cut off.
    taken = np.floor(np.arange(len(order) + 1) * fraction)
    held = np.zeros(len(order), bool)
    held[order[np.diff(taken) > 0]] = True
    return (
        Split(split.x[~held], split.y[~held]),
        Split(split.x[held], split.y[held]),
    )


class _Parts(NamedTuple):
    """What a reader found in the source."""

    kind: str
    train: Split
    test: Split | None
    class_names: tuple[str, ...]


def _read(name: str, data_dir: str | os.PathLike[str] | None) -> _Parts:
    """Hands the name to its reader."""
    prefix, _, rest = name.partition(":")
    if name == "digits":
        return _read_digits()
    if prefix == "tfds" and rest:
        return _read_tfds(rest, data_dir)
    if prefix == "npz" and rest:
        return _read_npz(rest)
    if prefix == "tsv" and rest:
        return _read_tsv(rest)
    raise SourceError(_unknown(name))


def _source(name: str, parts: _Parts, validation_fraction: float, seed: int) -> Source:
    """Cuts the parts that the source does not have itself, and checks all of them."""
    check_fraction(validation_fraction)
    train, test = parts.train, parts.test
    if len(train.x) != len(train.y):
        raise SourceError(
            f"{name}: has {len(train.x)} training examples, {len(train.y)} labels."
        )
    if test is None:
        train, test = hold_out(train, TEST_FRACTION, generator(0, TEST_KEY))
    train, validation = hold_out(
        train, validation_fraction, generator(seed, VALIDATION_KEY)
    )
    if validation_fraction > 0 and len(train.y) and not len(validation.y):
        raise SourceError(f"{name}, validation part: is empty.")
    source = Source(name, parts.kind, train, validation, test, parts.class_names)
    check_source(source)
    return source


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


def _import(module: str, extra: str) -> Any:
    """A package that only some sources need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SourceError(
            f"This source needs {error.name or module}, which is not installed: "
            f'pip install "classp-jax[{extra}]"'
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _open_error(path: pathlib.Path, error: OSError) -> SourceError:
    if isinstance(error, FileNotFoundError):
        return SourceError(f"There is no file {path}.")
    return SourceError(f"{path} cannot be read: {error.strerror or error}.")


def _read_digits() -> _Parts:
    data = _import("sklearn.datasets", "continual").load_digits()
    images = (data.images * (255 / 16)).astype(np.uint8)
    return _Parts(
        kind="image",
        train=Split(as_images("digits", images), as_labels("digits", data.target)),
        test=None,
        class_names=tuple(str(c) for c in range(10)),
    )


def _array_parts(
    x_train: Any,
    y_train: Any,
    x_test: Any,
    y_test: Any,
    class_names: Sequence[str] | None = None,
) -> _Parts:
    train = Split(as_images("x_train", x_train), as_labels("y_train", y_train))
    test = Split(as_images("x_test", x_test), as_labels("y_test", y_test))
    if class_names is None:
        num_classes = int(train.y.max(initial=0)) + 1
        # A stray large number must not become a head with a million outputs.
        if num_classes > max(len(train.y), 2):
            raise SourceError(
                f"y_train: labels must be 0, 1, 2 and so on, got {num_classes - 1} "
                f"among {len(train.y)} examples."
            )
        class_names = [str(label) for label in range(num_classes)]
    return _Parts("image", train, test, tuple(class_names))


def _read_npz(path_text: str) -> _Parts:
    path = pathlib.Path(path_text).expanduser()
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise SourceError(f"{path} is no npz file.")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                missing = [key for key in _ARRAYS if key not in archive.files]
                if missing:
                    raise SourceError(
                        f"{path} has no {', '.join(missing)}; needed: "
                        f"{', '.join(_ARRAYS)}, found: {', '.join(archive.files)}."
                    )
                arrays = [archive[key] for key in _ARRAYS]
    except SourceError:
        raise
    except OSError as error:
        raise _open_error(path, error) from error
    except Exception as error:
        # A damaged zip archive fails in too many ways to name them.
        raise SourceError(f"{path} cannot be read: {_first_line(error)}") from error
    try:
        return _array_parts(*arrays)
    except SourceError as error:
        raise SourceError(f"{path}, {error}") from error


def _read_tsv(path_text: str) -> _Parts:
    path = pathlib.Path(path_text).expanduser()
    label_of: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                label, _, text = (part.strip() for part in line.partition("\t"))
                if not (label and text):
                    raise SourceError(
                        f"{path}, line {number}: expected a label, a tab and a text."
                    )
                label_of.setdefault(text, label)
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is no UTF-8 text: {_first_line(error)}") from error
    except OSError as error:
        raise _open_error(path, error) from error
    if not label_of:
        raise SourceError(f"{path} is empty.")
    class_names = tuple(sorted(set(label_of.values())))
    number_of = {label: number for number, label in enumerate(class_names)}
    texts = np.empty(len(label_of), object)
    texts[:] = list(label_of)
    labels = np.array([number_of[label] for label in label_of.values()], np.int32)
    return _Parts("text", Split(texts, labels), None, class_names)


def _read_tfds(name: str, data_dir: str | os.PathLike[str] | None) -> _Parts:
    tfds = _import("tensorflow_datasets", "tfds")
    root = pathlib.Path(
        data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    ).expanduser()
    folder = _find_tfds(tfds, name, root)
    try:
        # From the folder alone: tfds.data_source would look at the data set's code
        # first, which may need TensorFlow or the network. Both read the same files.
        builder = tfds.builder_from_directory(str(folder))
        features = dict(builder.info.features.items())
        sizes = {part: info.num_examples for part, info in builder.info.splits.items()}
    except Exception as error:
        raise SourceError(f"{folder} cannot be read: {_first_line(error)}") from error
    x_key, y_key = _tfds_keys(tfds, name, builder.info, features)
    is_image = isinstance(features[x_key], tfds.features.Image)

    def read(part: str) -> Split:
        decoders = {x_key: tfds.decode.SkipDecoding()} if is_image else None
        try:
            data = builder.as_data_source(part, decoders=decoders)
            return _read_tfds_part(data, features[x_key], x_key, y_key)
        except NotImplementedError as error:
            raise SourceError(
                f"{folder} is not in the array_record format. Prepare the data set "
                f"again, into another folder, with {_tfds_command(name, 'FOLDER')}."
            ) from error
        except SourceError as error:
            raise SourceError(f"tfds:{name}, part {part!r}: {error}") from error
        except Exception as error:
            raise SourceError(
                f"{folder}, part {part!r}, cannot be read: {_first_line(error)}"
            ) from error

    if not sizes.get("train"):
        raise SourceError(
            f"tfds:{name} has no examples in a part called 'train'; it has "
            f"{', '.join(f'{part} ({size})' for part, size in sizes.items())}."
        )
    train, test = read("train"), None
    for part in ("test", "validation"):
        if test is None and sizes.get(part):
            test = read(part)
            if (test.y == -1).all():
                test = None
    label = features[y_key]
    class_names = label.names or [str(c) for c in range(label.num_classes or 0)]
    return _Parts("image" if is_image else "text", train, test, tuple(class_names))


def _tfds_command(name: str, root: object) -> str:
    return (
        f"`tfds build {name} --file_format=array_record --data_dir={root}` (needs "
        "TensorFlow and a network)"
    )


def _find_tfds(tfds: Any, name: str, root: pathlib.Path) -> pathlib.Path:
    """The folder of the newest prepared version of a data set."""
    asked = _TFDS_NAME.fullmatch(name)
    if asked is None:
        raise SourceError(
            f"{name!r} is no TFDS name: use NAME, NAME/CONFIG or NAME/CONFIG:VERSION."
        )
    dataset, config, version = asked.groups()
    # Folders are NAME/VERSION and NAME/CONFIG/VERSION.
    prepared = {
        file.parent.relative_to(root).parts: file.parent
        for depth in ("*/*", "*/*/*")
        for file in root.glob(f"{depth}/dataset_info.json")
        if _TFDS_VERSION.fullmatch(file.parent.name)
    }
    fitting = [
        parts
        for parts in prepared
        if parts[0] == dataset
        and (config is None or parts[1:-1] == (config,))
        and version in (None, parts[-1])
    ]
    configs = sorted({"/".join(parts[:-1]) for parts in fitting})
    if len(configs) > 1:
        raise SourceError(
            f"tfds:{dataset} is there in several configurations; name one: "
            f"{', '.join(f'tfds:{full}' for full in configs)}."
        )
    if fitting:
        newest = max(fitting, key=lambda parts: [int(n) for n in parts[-1].split(".")])
        return prepared[newest]
    holds = ", ".join(sorted("/".join(parts[:-1]) for parts in prepared))
    message = f"There is no tfds:{name} in {root}, which holds {holds or 'no data set'}"
    known = {*tfds.list_builders(with_community_datasets=False)}
    known |= {parts[0] for parts in prepared}
    similar = difflib.get_close_matches(dataset, sorted(known), n=1, cutoff=0.7)
    if similar and dataset not in known:
        raise SourceError(f"{message}; did you mean 'tfds:{similar[0]}'?")
    raise SourceError(
        f"{message}. Prepare it with {_tfds_command(name, root)}, or name the folder "
        "that has it with --data-dir."
    )


def _tfds_keys(
    tfds: Any, name: str, info: Any, features: dict[str, Any]
) -> tuple[str, str]:
    """The features that hold the image (or text) and the label."""
    supervised = info.supervised_keys
    if supervised and len(supervised) == 2 and {*supervised} <= {*features}:
        keys = features.keys() & {*supervised}
    else:
        keys = features.keys()
    found = {
        kind: [key for key in keys if isinstance(features[key], kind)]
        for kind in (tfds.features.Image, tfds.features.Text, tfds.features.ClassLabel)
    }
    inputs = found[tfds.features.Image] or found[tfds.features.Text]
    labels = found[tfds.features.ClassLabel]
    if len(inputs) != 1 or len(labels) != 1:
        raise SourceError(
            f"tfds:{name} is no image or text classification set: it needs one image "
            f"or text and one class label, and has {', '.join(sorted(features))}."
        )
    feature = features[inputs[0]]
    if isinstance(feature, tfds.features.Text):
        plain = feature.shape == ()
    else:
        plain = feature.np_dtype == np.uint8 and feature.shape[-1] in _PILLOW_MODES
    if not plain:
        raise SourceError(
            f"tfds:{name}: {inputs[0]!r} must be a uint8 image or a plain text, got "
            f"{_first_line(ValueError(repr(feature)))}."
        )
    return inputs[0], labels[0]


def _read_tfds_part(data: Any, feature: Any, x_key: str, y_key: str) -> Split:
    """All examples of one part, read in bulk."""
    images = len(feature.shape) == 3
    pillow = _import("PIL.Image", "tfds") if images else None
    y = np.empty(len(data), np.int32)
    x: np.ndarray = np.empty(len(data), object)
    for start in range(0, len(data), _TFDS_CHUNK):
        stop = min(start + _TFDS_CHUNK, len(data))
        examples = data.__getitems__(list(range(start, stop)))
        for i, example in enumerate(examples, start):
            y[i] = example[y_key]
            if pillow is None:
                x[i] = example[x_key].decode("utf-8")
                continue
            channels = feature.shape[-1]
            mode = _PILLOW_MODES[channels]
            with pillow.open(io.BytesIO(example[x_key])) as image:
                shape = (image.height, image.width, channels)
                decoded = image if image.mode == mode else image.convert(mode)
                pixels = np.frombuffer(decoded.tobytes(), np.uint8)
            if x.ndim == 1:
                x = np.empty((len(data), *shape), np.uint8)
            if shape != x.shape[1:]:
                raise SourceError(
                    f"images must all have one shape, got {list(x.shape[1:])} and "
                    f"{list(shape)}."
                )
            x[i] = pixels.reshape(shape)
    return Split(x, y)
