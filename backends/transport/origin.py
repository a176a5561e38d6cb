"""The address of an engine: host, port, and a path in front of the API's."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Origin:
    """Where to connect, and the path with which every request there begins."""

    host: str
    port: int
    tls: bool
    prefix: str = ""

    @classmethod
    def of(cls, url: str) -> Origin:
        """The origin of a base URL; raises ValueError where it is not one."""
        parts = urlsplit(url)
        surplus = parts.query or parts.fragment or parts.username  # would be dropped silently
        if parts.scheme not in ("http", "https") or not parts.hostname or surplus:
            msg = f"{url!r} is not a base URL: write http://HOST:PORT"
            raise ValueError(msg)
        tls = parts.scheme == "https"
        port = parts.port or (443 if tls else 80)
        return cls(parts.hostname, port, tls, parts.path.rstrip("/"))

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"
