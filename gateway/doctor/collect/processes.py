"""Observes sockets, processes and addresses, as the kernel shows them."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from gateway.doctor.collect.attempt import attempt
from gateway.doctor.observations import NotObserved, Process, Unknown, require

#: The state of a listening socket in /proc/net/tcp.
TCP_LISTEN = "0A"


@dataclass(frozen=True, slots=True)
class ListeningSocket:
    """A socket of this machine that listens."""

    address: str
    port: int
    inode: int


def listening_sockets(proc: Path) -> Iterator[ListeningSocket]:
    """The TCP sockets that listen in this network namespace."""
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text().splitlines()[1:]
        except FileNotFoundError:
            if table == "tcp":
                raise
            continue  # a kernel without IPv6
        for line in lines:
            fields = line.split()
            if fields[3] != TCP_LISTEN:
                continue
            address, _, port = fields[1].partition(":")
            words = (int(address[at : at + 8], 16) for at in range(0, len(address), 8))
            packed = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
            yield ListeningSocket(str(ip_address(packed)), int(port, 16), int(fields[9]))


class SocketTable:
    """The listening sockets of this machine, and the processes that have them."""

    def __init__(self, proc: Path) -> None:
        self._proc = proc
        self._sockets: list[ListeningSocket] | Unknown = attempt(
            lambda: list(listening_sockets(proc))
        )

    def on(self, port: int) -> list[ListeningSocket]:
        """The sockets that listen on this port; raises `NotObserved`."""
        return [entry for entry in require(self._sockets) if entry.port == port]

    def process_on(self, port: int) -> Process | None:
        """The process that listens on this port; None where this user cannot find it."""
        pid = _pid_of(self._proc, {entry.inode for entry in self.on(port)})
        return None if pid is None else read_process(self._proc, pid)


def _pid_of(proc: Path, inodes: set[int]) -> int | None:
    """The first process that has one of these sockets; None where this user cannot find it."""
    links = {f"socket:[{inode}]" for inode in inodes}
    pids = sorted(int(entry.name) for entry in proc.iterdir() if entry.name.isdecimal())
    for pid in pids:
        try:
            if any(str(fd.readlink()) in links for fd in (proc / str(pid) / "fd").iterdir()):
                return pid
        except OSError:  # it has ended, or belongs to another user
            continue
    return None


def read_process(proc: Path, pid: int) -> Process:
    """A process as the kernel shows it."""
    folder = proc / str(pid)
    return Process(
        pid,
        tuple((folder / "cmdline").read_text(errors="replace").strip("\0").split("\0")),
        attempt(lambda: _environment(folder)),
        attempt(lambda: _shm(folder)),
        attempt(lambda: _memlock(folder)),
    )


def _environment(folder: Path) -> Mapping[str, str]:
    entries = (folder / "environ").read_text(errors="replace").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def _shm(folder: Path) -> int:
    mount = folder / "root/dev/shm"
    if not os.path.ismount(mount):
        raise NotObserved("it has no /dev/shm, or none that this user may read")
    size = os.statvfs(mount)
    return size.f_blocks * size.f_frsize


def _memlock(folder: Path) -> int | None:
    for line in (folder / "limits").read_text().splitlines():
        if line.startswith("Max locked memory"):
            soft = line.split()[3]
            return None if soft == "unlimited" else int(soft)
    raise NotObserved("this kernel does not report its limit of locked memory")


def can_bind(address: str, port: int = 0) -> bool:
    """Whether the address belongs to this machine, and the port, if one is named, is free."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError:
        return False
    return True


async def resolve(host: str) -> tuple[str, ...]:
    """The addresses of a host name; raises `NotObserved` without any."""
    try:
        entries = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:  # UnicodeError: it cannot be a host name
        raise NotObserved(f"{host} is neither an address nor a known host name") from exc
    return tuple(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in entries))
