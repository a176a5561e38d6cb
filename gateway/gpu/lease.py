"""The lease: a file that one gateway keeps locked for as long as it owns the GPU.

The kernel releases the lock when the process ends, however that ends, so a file that is left
behind blocks nothing. Its text only names the owner.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from datetime import datetime
from pathlib import Path

import msgspec

from gateway import settings

#: The most that is read of an owner's text, bytes.
MAX_TEXT = 4096


class LeaseError(Exception):
    """The lease cannot be acquired or read; the text says why and what to do."""


class LeaseTaken(LeaseError):
    """Another gateway owns the GPU."""


class Owner(msgspec.Struct, frozen=True):
    """The owner of a lease: its process, the address where it serves, and since when it owns."""

    pid: int
    address: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid}, at {self.address}, since {self.since}"


class Lease:
    """The right to one GPU, from `acquire()` to `release()` or to the process's end.

    Args:
        path: The file; gateways with the same file share a GPU.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def __repr__(self) -> str:
        return f"<Lease {self.path} {'held' if self._file is not None else 'not held'}>"

    def acquire(self, address: str) -> None:
        """Own the GPU from now on; does nothing if it is owned here already.

        Args:
            address: Where this gateway serves, for the message of a second gateway.

        Raises:
            LeaseTaken: Another gateway owns it; the text names its process.
            LeaseError: The file cannot be used.
        """
        if self._file is not None:
            return
        file = self._open()
        try:
            self._lock(file)
            now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
            os.ftruncate(file, 0)
            os.pwrite(file, msgspec.json.encode(Owner(os.getpid(), address, now)), 0)
        except OSError as exc:
            os.close(file)
            raise self._unusable(exc.strerror or str(exc)) from exc
        except LeaseError:
            os.close(file)
            raise
        self._file = file

    def release(self) -> None:
        """Give the GPU up; does nothing if it is not owned here."""
        if self._file is not None:
            # The file stays: removing it while another gateway opens it makes two owners.
            os.ftruncate(self._file, 0)
            # Explicitly, and not by close() alone: a program that is being started right now
            # has the file open, too, until its exec() is through.
            fcntl.flock(self._file, fcntl.LOCK_UN)
            os.close(self._file)
            self._file = None

    def _open(self) -> int:
        # No link is followed, and no child process inherits it (Python sets O_CLOEXEC).
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            link = exc.errno == errno.ELOOP
            why = "it is a symbolic link" if link else exc.strerror or str(exc)
            raise self._unusable(why) from exc
        found = os.fstat(file)
        # In a directory that all users may write to, another user may have placed it.
        ours = found.st_uid == os.geteuid() and found.st_nlink == 1
        if not stat.S_ISREG(found.st_mode) or not ours:
            os.close(file)
            raise self._unusable("it is not a regular file of this user alone")
        return file

    def _lock(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LeaseTaken(
                f"Another gateway owns the GPU: {_named(file)}. Only one gateway can. Stop that "
                "one first; or, if this gateway has other cards, name another file in gpu.lease "
                f"(now {self.path})."
            ) from None

    def _unusable(self, why: str) -> LeaseError:
        return LeaseError(
            f"{self.path}, the file that keeps a second gateway from the GPU, cannot be used: "
            f"{why}. Name another file that this user can write in gpu.lease."
        )


def usual_lease() -> Path:
    """The lease file that the gateways of this machine use by default."""
    directory = settings.environment().get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return Path(directory) / "twolane-gpu.lease"


def owner(path: Path, *, proc: Path = Path("/proc")) -> Owner | None:
    """The owner of the GPU that this file stands for, or None.

    The file is only read: an attempt to lock it could stop a gateway that starts.

    Raises:
        LeaseError: It cannot be seen.
    """
    try:
        found = path.lstat()
        locks = (proc / "locks").read_text().splitlines()
        # 1: FLOCK  ADVISORY  WRITE 708 fe:00:9981000 0 EOF
        held = any(
            " FLOCK " in line and f":{found.st_ino} " in line and " WRITE " in line
            for line in locks
        )
        text = path.read_bytes()[:MAX_TEXT] if held else b""
    except FileNotFoundError as exc:
        if exc.filename == str(path):
            return None
        raise LeaseError(f"this kernel does not show which process locks {path}") from exc
    except OSError as exc:
        raise LeaseError(f"{path} cannot be read: {exc.strerror}") from exc
    if not held:
        return None
    try:
        return msgspec.json.decode(text, type=Owner)
    except msgspec.MsgspecError as exc:
        raise LeaseError(f"{path} is locked, but does not name the owner") from exc


def _named(file: int) -> str:
    """The owner that this file names."""
    try:
        return str(msgspec.json.decode(os.pread(file, MAX_TEXT, 0), type=Owner))
    except msgspec.MsgspecError:
        return "a process that has not written its name yet"  # or is just ending
