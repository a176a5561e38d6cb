"""Compressed bodies, in case an engine compresses although it is asked not to."""

from __future__ import annotations

import zlib

GZIP_OR_DEFLATE = (b"gzip", b"x-gzip", b"deflate")
NONE = (b"", b"identity")


class Inflater:
    """Unpacks one gzip or deflate body, piece by piece.

    Args:
        limit: The most bytes that one piece may unpack to.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)

    def feed(self, data: bytes) -> bytes:
        """What a piece unpacks to, perhaps nothing yet; raises ValueError."""
        try:
            out = self._inflate.decompress(data, self._limit)
        except zlib.error as exc:
            msg = f"the body is not compressed as its head says: {exc}"
            raise ValueError(msg) from exc
        if self._inflate.unconsumed_tail:
            raise ValueError("the decompressed body is over the size limit of an answer")
        return out
