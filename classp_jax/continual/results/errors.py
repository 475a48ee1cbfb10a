"""The one error of this room."""

from classp_jax.continual.errors import ContinualError


class ResultsError(ContinualError):
    """Results that cannot be stored, read, merged or shown; the message is one line."""
