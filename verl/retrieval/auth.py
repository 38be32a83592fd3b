"""The optional bearer token of the service: read from the environment, never from a flag or a file."""

from __future__ import annotations

import hmac
import os

from verl.errors import ConfigError

OPEN_PATHS = ("/health", "/ready")
"""Answered without the token, because what probes them often cannot send one."""

_SCHEME = b"bearer "


def token_from(variable: str) -> str:
    """Return the token in an environment variable; empty when no variable is named.

    Raises:
        ConfigError: the variable is not set, or holds what no header can carry.
    """
    if not variable:
        return ""
    token = os.environ.get(variable, "").strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        found = "holds characters that no header can carry" if token else "is not set"
        raise ConfigError(f"token_env={variable}: the variable {found}; set it to the token, in ASCII without spaces")
    return token


def is_authorised(header: bytes, token: str) -> bool:
    """Whether an `Authorization` header carries the token; the time this takes does not tell how much of it fits."""
    given = header[len(_SCHEME) :].strip() if header[: len(_SCHEME)].lower() == _SCHEME else b""
    return hmac.compare_digest(given, token.encode())
