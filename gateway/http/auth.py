"""Who may use the gateway: anybody who sends one of its keys, or anybody at all."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping

from gateway.errors import Unauthorized


class Keys:
    """The keys that are let in. Without any, everybody is.

    Only digests are kept, each is compared in constant time, and all are compared, so
    that neither the time nor the log tells how near a guess came.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def holder(self, headers: Mapping[bytes, bytes]) -> str:
        """The name under which this client counts: `key-1`, `key-2`, …, or nothing.

        Raises:
            Unauthorized: A key is needed, and none of ours was sent.
        """
        if not self._digests:
            return ""
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key:
            raise Unauthorized("Send an API key: `Authorization: Bearer KEY`.")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise Unauthorized("This API key is not one of this gateway's.")
        return f"key-{matches.index(True) + 1}"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
