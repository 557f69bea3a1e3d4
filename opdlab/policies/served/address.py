"""Where a server is, and the token that it needs."""

import os
from urllib.parse import urlsplit

from opdlab.errors import require

TOKEN_VARIABLE = "OPDLAB_TEACHER_TOKEN"
"""Environment variable with the token of a teacher's server: no option, because saved configurations show options."""


def access_token(variable: str = TOKEN_VARIABLE) -> str | None:
    """Return the token in an environment variable; None without one.

    Raises:
        UsageError: it cannot be sent in a header.
    """
    token = os.environ.get(variable, "").strip()
    require(
        token.isascii() and (token.isprintable() or not token) and " " not in token,
        f"the token in {variable} has characters that cannot be sent: give letters, digits and punctuation",
    )
    return token or None


def checked_url(url: str, token_variable: str = TOKEN_VARIABLE) -> str:
    """Return the URL of a server without a slash or ``/v1`` at its end.

    Args:
        url: as the user wrote it.
        token_variable: environment variable with the server's token, for messages.

    Raises:
        UsageError: it is no URL of a server, or has parts that cannot be kept.

    Example:
        >>> checked_url("https://user:password@gpu1:8700")
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: url of gpu1 has a name or a password: leave it out, and give a token in ...
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    good = good and not any(character.isspace() for character in url)
    require(good, f"url is '{url}', but must begin with http:// or https:// and name a host")
    require(
        "@" not in parts.netloc,  # saved configurations show URLs
        f"url of {parts.hostname} has a name or a password: leave it out, and give a token in {token_variable}",
    )
    extra = url.partition("?")[2] or parts.fragment
    require(not extra, f"url is '{url}', but must end with the host or its path: leave out '{extra}'")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
