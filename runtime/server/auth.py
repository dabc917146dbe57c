"""Keys of clients: compared in constant time, and known afterwards by a digest alone."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...engines.errors import RequestError
from ..page import PATHS
from .errors import ApiError

OPEN = ("/health", "/v2/health/live", "/v2/health/ready", "/version", "/metrics", "/openapi.json", *PATHS)
"""Paths that need no key: what they say is no client's."""


class Keys:
    """The keys that open the server; none: it is open."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        """Take the keys; raises `RequestError` for one that no header can hold."""
        for key in keys:
            if not key.isascii() or not key.isprintable() or not key or " " in key:
                raise RequestError("a key is empty, or has a space or a letter beyond ASCII: give others")
        self._keys = tuple(key.encode() for key in keys)

    def owner(self, path: str, headers: Mapping[bytes, str]) -> str:
        """Return whose a request is: a digest of its key, or an empty text where no key is needed.

        Raises `ApiError` 401 without a right key. It takes as long for every wrong one.
        """
        if not self._keys or path in OPEN:
            return ""
        given = _given(headers)
        encoded, right = given.encode("utf-8", "replace"), False
        for key in self._keys:
            right |= hmac.compare_digest(hashlib.sha256(key).digest(), hashlib.sha256(encoded).digest())
        if not right:
            said = "the key is not one of this server's" if given else "no key was sent"
            raise ApiError(
                401,
                f"{said}: send it as `Authorization: Bearer KEY`",
                "invalid_api_key",
                kind="authentication_error",
                headers={"www-authenticate": 'Bearer realm="latentrt"'},
            )
        return hashlib.sha256(b"latentrt owner " + encoded).hexdigest()[:16]


def _given(headers: Mapping[bytes, str]) -> str:
    """Return the key of a request, which may be the password of a user of any name."""
    kind, _, given = headers.get(b"authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return given.strip()
    if kind.lower() == "basic":
        try:
            user, colon, password = base64.b64decode(given.strip(), validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            return ""
        return password if colon else user
    return headers.get(b"x-api-key", "")


def keys_of_file(path: Path) -> tuple[str, ...]:
    """Return the keys in a file, one a line; raises `RequestError` for a file without one."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "no UTF-8"
        raise RequestError(f"--api-key-file {path} cannot be read ({why}): give a file with one key a line") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise RequestError(f"--api-key-file {path} holds no key: write one a line")
    return keys
