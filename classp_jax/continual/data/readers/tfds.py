"""Prepared data sets of TensorFlow Datasets."""

import difflib
import io
import os
import pathlib
import re
from typing import Any

import numpy as np

from classp_jax.continual.data.readers._common import first_line, import_package
from classp_jax.continual.data.sources import Examples, Source, make_source
from classp_jax.continual.errors import DataError

_NAME = re.compile(r"(\w+)(?:/([\w.+-]+))?(?::(\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_CHUNK = 1024
_PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def read_tfds(name: str, data_dir: str | os.PathLike[str] | None) -> Source:
    """A folder that TFDS has prepared as ``array_record``, read without TensorFlow.

    The part called ``test`` is the test part, else the one called ``validation``; a
    part whose labels are all -1, which is how TFDS says that they are withheld, does
    not count.

    Args:
      name: ``NAME``, ``NAME/CONFIG`` or ``NAME/CONFIG:VERSION``; by default the newest
        version.
      data_dir: the folder with prepared sets; by default the environment's
        ``TFDS_DATA_DIR``, else ``~/tensorflow_datasets``.

    References:
      `TensorFlow Datasets <https://www.tensorflow.org/datasets>`_
    """
    tfds = import_package("tensorflow_datasets", "tfds")
    root = pathlib.Path(
        data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    ).expanduser()
    folder = _find(tfds, name, root)
    try:
        # From the folder alone: tfds.data_source would look at the data set's code
        # first, which may need TensorFlow or the network. Both read the same files.
        builder = tfds.builder_from_directory(str(folder))
        features = dict(builder.info.features.items())
        sizes = {part: info.num_examples for part, info in builder.info.splits.items()}
    except Exception as error:
        raise DataError(f"{folder} cannot be read: {first_line(error)}") from error
    x_key, y_key = _keys(tfds, name, builder.info, features)
    is_image = isinstance(features[x_key], tfds.features.Image)

    def read(part: str) -> Examples:
        decoders = {x_key: tfds.decode.SkipDecoding()} if is_image else None
        try:
            data = builder.as_data_source(part, decoders=decoders)
            return _read_part(data, features[x_key], x_key, y_key)
        except NotImplementedError as error:
            raise DataError(
                f"{folder} is not in the array_record format. Prepare the data set "
                f"again, into another folder, with {_command(name, 'FOLDER')}."
            ) from error
        except DataError as error:
            raise DataError(f"tfds:{name}, part {part!r}: {error}") from error
        except Exception as error:
            raise DataError(
                f"{folder}, part {part!r}, cannot be read: {first_line(error)}"
            ) from error

    if not sizes.get("train"):
        raise DataError(
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
    return make_source(f"tfds:{name}", train, test, class_names)


def _command(name: str, root: object) -> str:
    return (
        f"`tfds build {name} --file_format=array_record --data_dir={root}` (needs "
        "TensorFlow and a network)"
    )


def _find(tfds: Any, name: str, root: pathlib.Path) -> pathlib.Path:
    """The folder of the newest prepared version of a data set."""
    asked = _NAME.fullmatch(name)
    if asked is None:
        raise DataError(
            f"{name!r} is no TFDS name: use NAME, NAME/CONFIG or NAME/CONFIG:VERSION."
        )
    dataset, config, version = asked.groups()
    # Folders are NAME/VERSION and NAME/CONFIG/VERSION.
    prepared = {
        file.parent.relative_to(root).parts: file.parent
        for depth in ("*/*", "*/*/*")
        for file in root.glob(f"{depth}/dataset_info.json")
        if _VERSION.fullmatch(file.parent.name)
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
        raise DataError(
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
        raise DataError(f"{message}; did you mean 'tfds:{similar[0]}'?")
    raise DataError(
        f"{message}. Prepare it with {_command(name, root)}, or name the folder "
        "that has it as data_dir (--data-dir on the command line)."
    )


def _keys(tfds: Any, name: str, info: Any, features: dict[str, Any]) -> tuple[str, str]:
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
        raise DataError(
            f"tfds:{name} is no image or text classification set: it needs one image "
            f"or text and one class label, and has {', '.join(sorted(features))}."
        )
    feature = features[inputs[0]]
    if isinstance(feature, tfds.features.Text):
        plain = feature.shape == ()
    else:
        plain = feature.np_dtype == np.uint8 and feature.shape[-1] in _PILLOW_MODES
    if not plain:
        raise DataError(
            f"tfds:{name}: {inputs[0]!r} must be a uint8 image or a plain text, got "
            f"{first_line(ValueError(repr(feature)))}."
        )
    return inputs[0], labels[0]


def _read_part(data: Any, feature: Any, x_key: str, y_key: str) -> Examples:
    """All examples of one part, read in bulk."""
    images = len(feature.shape) == 3
    pillow = import_package("PIL.Image", "tfds") if images else None
    y = np.empty(len(data), np.int32)
    x: np.ndarray = np.empty(len(data), object)
    for start in range(0, len(data), _CHUNK):
        stop = min(start + _CHUNK, len(data))
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
                raise DataError(
                    f"images must all have one shape, got {list(x.shape[1:])} and "
                    f"{list(shape)}."
                )
            x[i] = pixels.reshape(shape)
    return Examples("image" if images else "text", x, y)
