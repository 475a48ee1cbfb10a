"""Files that survive a crash, and folders that two processes can write to."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import filelock

from classp_jax.continual.results.errors import ResultsError

LOCK_NAME = ".lock"
"""The file in a folder that is locked while the folder is written to."""

_PATIENCE = 60.0  # seconds


@contextlib.contextmanager
def locked(folder: pathlib.Path, patience: float = _PATIENCE) -> Iterator[None]:
    """Holds a folder, made if need be, against all other processes and threads.

    The operating system lets go when the process ends, however it ends.

    Args:
      folder: what to hold.
      patience: how many seconds to wait for another that holds it.

    Raises:
      ResultsError: if the other does not let go, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / LOCK_NAME, timeout=patience)
        lock.acquire()
    except filelock.Timeout:
        raise ResultsError(
            f"Another process has been writing to {folder} for {patience:g} seconds; "
            "try again when it has ended, or use another folder."
        ) from None
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Puts a file in place in one step: a crash leaves the old one, or the new, whole.

    Two processes must not write one file at once: see :func:`locked`.

    Raises:
      ResultsError: in one line, if the file cannot be written, as on a full disk.
    """
    # One name, so that what a killed process leaves is overwritten by the next.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                # Without this, a power cut may leave the new name on an empty file.
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: pathlib.Path, error: OSError) -> ResultsError:
    return ResultsError(f"Cannot write {path}: {error.strerror or error}.")
