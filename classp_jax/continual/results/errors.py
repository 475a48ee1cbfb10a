"""The one error of this room."""

from classp_jax.continual.errors import ContinualError


class ResultsError(ContinualError):
    """Storing, reading, merging or showing results failed; the message is one line."""
