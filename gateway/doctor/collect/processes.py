"""Sockets and processes, as the kernel shows them."""

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
from gateway.doctor.observations import (
    NotObserved,
    Process,
)

#: The state of a socket that listens, in the kernel's table.
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
            continue  # no IPv6 here
        for line in lines:
            fields = line.split()
            if fields[3] != TCP_LISTEN:
                continue
            address, _, port = fields[1].partition(":")
            words = (int(address[at : at + 8], 16) for at in range(0, len(address), 8))
            packed = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
            yield ListeningSocket(str(ip_address(packed)), int(port, 16), int(fields[9]))


def holder(proc: Path, inodes: set[int]) -> int | None:
    """The first process that has one of these sockets; None where none is seen to."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    pids = sorted(int(entry.name) for entry in proc.iterdir() if entry.name.isdecimal())
    for pid in pids:
        try:
            if any(str(fd.readlink()) in wanted for fd in (proc / str(pid) / "fd").iterdir()):
                return pid
        except OSError:  # it has ended, or is another user's
            continue
    return None


def process(proc: Path, pid: int) -> Process:
    """What the kernel tells of a process."""
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
    place = folder / "root/dev/shm"
    if not os.path.ismount(place):
        raise NotObserved("it has no /dev/shm, or not one that this user may look at")
    found = os.statvfs(place)
    return found.f_blocks * found.f_frsize


def _memlock(folder: Path) -> int | None:
    for line in (folder / "limits").read_text().splitlines():
        if line.startswith("Max locked memory"):
            soft = line.split()[3]
            return None if soft == "unlimited" else int(soft)
    raise NotObserved("this kernel does not tell how much memory it may lock")


def can_bind(address: str, port: int = 0) -> bool:
    """Whether this address is one of this machine's, and the port free if one is named."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError:
        return False
    return True


async def resolve(host: str) -> tuple[str, ...]:
    """The addresses that a host name stands for."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:  # the second: it cannot even be asked for
        raise NotObserved(f"{host} is no address and no known name") from exc
    return tuple(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))


def conflict(address: str, own: tuple[str, ...]) -> bool:
    """Whether who listens there is in the way of who wants to listen here."""
    anywhere = {"0.0.0.0", "::"}  # noqa: S104 - compared with
    return address in anywhere or address in own or not anywhere.isdisjoint(own)
