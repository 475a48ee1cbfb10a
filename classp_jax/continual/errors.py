"""The error that a user can cause."""


class ContinualError(ValueError):
    """Something a user can mend; the message is one line and says what to do."""
