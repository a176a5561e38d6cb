"""One owner of the GPU: a file that is locked for as long as its owner lives.

The lock is the kernel's and goes with the process, however that ends, so a file that is
left behind is in nobody's way. What is written in it only names the owner.
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

#: The most that is read of what an owner wrote, bytes.
MAX_TEXT = 4096


class LeaseError(Exception):
    """The GPU cannot be had; the text says why and what to do."""


class LeaseTaken(LeaseError):
    """Another gateway has it."""


class Owner(msgspec.Struct, frozen=True):
    """What an owner says of itself: its process, where it serves, and since when it owns."""

    pid: int
    address: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid}, at {self.address}, since {self.since}"


class Lease:
    """The right to one GPU, from `acquire()` to `release()` or to the process's end.

    Args:
        path: The file; whoever uses the same one shares a GPU.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def __repr__(self) -> str:
        return f"<Lease {self.path} {'held' if self._file is not None else 'not held'}>"

    def acquire(self, address: str) -> None:
        """Own the GPU from now on; nothing happens if it is ours already.

        Args:
            address: Where this gateway serves, for whoever comes second.

        Raises:
            LeaseTaken: Another gateway owns it; the text names that one.
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
        """Own it no longer; nothing happens if it is not ours."""
        if self._file is not None:
            # It stays: who removes it while another opens it makes two owners.
            os.ftruncate(self._file, 0)
            # Said, and not left to close(): a program that is being started right now has
            # the file, too, until its exec() is through.
            fcntl.flock(self._file, fcntl.LOCK_UN)
            os.close(self._file)
            self._file = None

    def _open(self) -> int:
        # No link is followed, and no program we start gets it (Python sets O_CLOEXEC).
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            link = exc.errno == errno.ELOOP
            why = "it is a symbolic link" if link else exc.strerror or str(exc)
            raise self._unusable(why) from exc
        found = os.fstat(file)
        # In a directory that all may write to, somebody may have put it there for us.
        ours = found.st_uid == os.geteuid() and found.st_nlink == 1
        if not stat.S_ISREG(found.st_mode) or not ours:
            os.close(file)
            raise self._unusable("it is no file of this user alone")
        return file

    def _lock(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LeaseTaken(
                f"Another gateway owns the GPU: {_named(file)}. Only one can. Stop that one "
                "first; or, if this one has other cards, give it a file of its own: gpu.lease "
                f"(now {self.path})."
            ) from None

    def _unusable(self, why: str) -> LeaseError:
        return LeaseError(
            f"{self.path}, which keeps a second gateway from the GPU, cannot be used: {why}. "
            "Name another file that this user can write: gpu.lease"
        )


def usual_lease() -> Path:
    """Where this machine's gateways agree about its GPU."""
    directory = settings.environment().get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return Path(directory) / "twolane-gpu.lease"


def owner(path: Path, *, proc: Path = Path("/proc")) -> Owner | None:
    """Who owns the GPU that this file stands for; None: nobody.

    It is only read: an attempt to lock it would be in the way of a gateway that starts.

    Raises:
        LeaseError: It cannot be told.
    """
    try:
        found = path.lstat()
        locks = (proc / "locks").read_text().splitlines()
        # 1: FLOCK  ADVISORY  WRITE 708 fe:00:9981000 0 EOF
        held = any(
            " FLOCK " in line and f":{found.st_ino} " in line and " WRITE " in line
            for line in locks
        )
        said = path.read_bytes()[:MAX_TEXT] if held else b""
    except FileNotFoundError as exc:
        if exc.filename == str(path):
            return None
        raise LeaseError(f"this kernel does not tell who locks {path}") from exc
    except OSError as exc:
        raise LeaseError(f"{path} cannot be read: {exc.strerror}") from exc
    if not held:
        return None
    try:
        return msgspec.json.decode(said, type=Owner)
    except msgspec.MsgspecError as exc:
        raise LeaseError(f"{path} is locked, and does not say by whom") from exc


def _named(file: int) -> str:
    """Who wrote this file."""
    try:
        return str(msgspec.json.decode(os.pread(file, MAX_TEXT, 0), type=Owner))
    except msgspec.MsgspecError:
        return "it has just started and not said who it is"  # or has just begun to end
