"""The errors that a user can cause; every message is one line."""

from typing import Any

import numpy as np


class ContinualError(ValueError):
    """Something that was asked for does not work; the message is one line.

    It says what is wrong, where, and what to do. The command line prints the message
    alone; any other exception is a fault of the library and keeps its traceback.
    """


class DataError(ContinualError):
    """Data that is missing, damaged or does not fit what is to be made of it."""


class CheckpointError(ContinualError):
    """Writing, reading or using a checkpoint failed; the message is one line."""


class Stopped(ContinualError):  # noqa: N818 - nothing went wrong
    """Training was ended from outside, and what it had done has been saved."""


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over; the message is one line."""


def check_count(name: str, value: Any, least: int) -> None:
    """Raises ContinualError unless the value is a whole number of at least so much."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least:
        raise ContinualError(f"{name} must be a whole number >= {least}, got {value!r}")
