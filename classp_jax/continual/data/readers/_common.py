"""What several readers need: packages that may be missing, and short messages."""

import importlib
import pathlib
from typing import Any

from classp_jax.continual.errors import DataError


def import_package(module: str, extra: str) -> Any:
    """A package that only some sources need, or an error that names the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"This source needs {error.name or module}, which is not installed: "
            f'pip install "classp-jax[{extra}]"'
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of another library's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def open_error(path: pathlib.Path, error: OSError) -> DataError:
    """Why a file cannot be opened."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"There is no file {path}.")
    return DataError(f"{path} cannot be read: {error.strerror or error}.")
