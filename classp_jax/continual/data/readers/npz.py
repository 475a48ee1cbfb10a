"""NumPy files of arrays."""

import pathlib
import zipfile

import numpy as np

from classp_jax.continual.data.readers._common import first_line, open_error
from classp_jax.continual.data.sources import Source, source_from_arrays
from classp_jax.continual.errors import DataError

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def read_npz(path_text: str) -> Source:
    """The arrays ``x_train``, ``y_train``, ``x_test`` and ``y_test`` of a npz file.

    They are images, vectors or tokens, and labels, as for
    :func:`~classp_jax.continual.data.sources.source_from_arrays`.
    """
    path = pathlib.Path(path_text).expanduser()
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise DataError(f"{path} is no npz file.")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                missing = [key for key in _ARRAYS if key not in archive.files]
                if missing:
                    raise DataError(
                        f"{path} has no {', '.join(missing)}; needed: "
                        f"{', '.join(_ARRAYS)}, found: {', '.join(archive.files)}."
                    )
                arrays = [archive[key] for key in _ARRAYS]
    except DataError:
        raise
    except OSError as error:
        raise open_error(path, error) from error
    except Exception as error:
        # A damaged zip archive fails in too many ways to name them.
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
    return source_from_arrays(f"npz:{path_text}", arrays)
