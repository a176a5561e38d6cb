"""The TLS settings of connections to https engines."""

from __future__ import annotations

import functools
import ssl


@functools.cache
def context() -> ssl.SSLContext:
    """TLS with the system's certificates, one for the process.

    Made at the first call, since it takes 40 ms and most engines are plain http.
    """
    return ssl.create_default_context()
