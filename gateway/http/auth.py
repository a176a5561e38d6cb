"""API keys: a request is let in with one of them, or without any where none is configured."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping

from gateway.errors import Unauthorized


class Keys:
    """The API keys of one purpose. Without any key, every request is let in.

    Only digests are stored. Every digest is compared, each in constant time, so the duration
    does not show how close a guess came.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def name_of(self, headers: Mapping[bytes, bytes]) -> str:
        """The name of the key that a request was sent with: such as `key-1`.

        Empty where no key is required. The name goes into the log and the queue, the key does
        not.

        Raises:
            Unauthorized: A key is required, and the request has none or an unknown one.
        """
        if not self._digests:
            return ""
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key:
            raise Unauthorized("Send an API key: `Authorization: Bearer KEY`.")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise Unauthorized("This API key is not valid for this path.")
        return f"key-{matches.index(True) + 1}"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
