"""HTTP clients that cannot speak TLS: what makes a client expensive is to read the CAs, 42 ms."""

from __future__ import annotations

import ssl
from typing import Any

import httpx

#: Trusts nobody, so it costs nothing.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def async_client(base_url: str = "", **options: Any) -> httpx.AsyncClient:
    """A client for http:// that ignores the environment's proxies."""
    return httpx.AsyncClient(base_url=base_url, trust_env=False, verify=NO_TLS, **options)
