"""The one kind of error that a user can cause and mend."""


class UsageError(ValueError):
    """Something the user gave cannot work; the message names the key, the value and the mend.

    The command line prints the message alone and exits with code 2. It is a ``ValueError``, so Python
    callers need no import from here to catch it.

    Example:
        >>> raise UsageError("gate.tau is -1.0, but must be at least 0: use 0 for no gating")
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: gate.tau is -1.0, but must be at least 0: use 0 for no gating
    """


def require(condition: bool, message: str) -> None:
    """Raise :class:`UsageError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UsageError(message)
