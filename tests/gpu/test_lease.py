"""One owner of the GPU, over real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gateway.gpu.lease import Lease, LeaseError, LeaseTaken, owner

HOLDER = """
import sys
from pathlib import Path
from gateway.gpu.lease import Lease

lease = Lease(Path(sys.argv[1]))
lease.acquire("127.0.0.1:8000")
print("holds", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gpu.lease"


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that owns it, until the context closes or the process is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"holds\n"
            yield process
        finally:
            process.kill()


@pytest.mark.integration
def test_the_second_gateway_names_the_first_and_what_to_do(path: Path) -> None:
    with holder(path) as first, pytest.raises(LeaseTaken) as refused:
        Lease(path).acquire("127.0.0.1:9000")

    said = str(refused.value)
    assert f"process {first.pid}, at 127.0.0.1:8000, since 20" in said
    assert "Stop that one first" in said
    assert f"gpu.lease (now {path})" in said


def test_two_in_one_process_do_not_share_it_either(path: Path) -> None:
    first, second = Lease(path), Lease(path)
    first.acquire("here")

    with pytest.raises(LeaseTaken, match=f"process {os.getpid()}, at here"):
        second.acquire("there")
    first.release()
    second.acquire("there")
    with pytest.raises(LeaseTaken, match="at there"):
        first.acquire("here")
    second.release()


def test_a_refusal_changes_nothing_for_the_owner(path: Path) -> None:
    first = Lease(path)
    first.acquire("here")
    written = path.read_bytes()
    with pytest.raises(LeaseTaken):
        Lease(path).acquire("there")

    assert path.read_bytes() == written
    with pytest.raises(LeaseTaken, match="at here"):
        Lease(path).acquire("there")
    first.release()


def test_it_may_be_acquired_and_released_again_and_again(path: Path) -> None:
    lease = Lease(path)
    lease.release()
    for _ in range(3):
        lease.acquire("here")
        lease.acquire("here")
        assert repr(lease) == f"<Lease {path} held>"
        lease.release()
        lease.release()

    assert repr(lease) == f"<Lease {path} not held>"
    assert path.read_bytes() == b""


@pytest.mark.integration
def test_what_a_killed_owner_left_is_no_obstacle(path: Path) -> None:
    with holder(path) as first:
        first.kill()
        first.wait()
        assert path.read_bytes()

        lease = Lease(path)
        lease.acquire("127.0.0.1:9000")

    assert f'"pid":{os.getpid()},'.encode() in path.read_bytes()
    lease.release()


@pytest.mark.parametrize("text", [b"", b"\x00\xff{", b'{"pid":"x"}', b"9" * 100_000])
def test_whatever_is_in_the_file_is_no_obstacle_and_no_name(path: Path, text: bytes) -> None:
    path.write_bytes(text)
    lease = Lease(path)
    lease.acquire("here")
    assert path.read_bytes().endswith(b"}")
    path.write_bytes(text)

    with pytest.raises(LeaseTaken, match="not written its name yet"):
        Lease(path).acquire("there")
    lease.release()


@pytest.mark.integration
def test_a_program_that_the_owner_started_does_not_hold_it(path: Path) -> None:
    lease = Lease(path)
    lease.acquire("here")
    # As careless as can be: everything that may be inherited is.
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False
    ) as survivor:
        try:
            lease.release()
            other = Lease(path)
            other.acquire("there")
            other.release()
            assert survivor.poll() is None
        finally:
            survivor.kill()


def test_no_other_user_can_read_it(path: Path) -> None:
    lease = Lease(path)
    lease.acquire("here")

    assert path.stat().st_mode & 0o777 == 0o600
    lease.release()


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("dear")
    path.symlink_to(victim)

    with pytest.raises(LeaseError, match="it is a symbolic link"):
        Lease(path).acquire("here")
    assert victim.read_text() == "dear"


def test_another_name_of_a_file_is_not_written_to(path: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("dear")
    path.hardlink_to(victim)

    with pytest.raises(LeaseError, match="not a regular file of this user alone"):
        Lease(path).acquire("here")
    assert victim.read_text() == "dear"


def test_what_is_no_file_is_refused(path: Path) -> None:
    os.mkfifo(path)

    with pytest.raises(LeaseError, match="not a regular file of this user alone"):
        Lease(path).acquire("here")


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("missing/gpu.lease", "No such file or directory"),
        ("file/gpu.lease", "Not a directory"),
        ("directory", "Is a directory"),
    ],
)
def test_a_path_that_cannot_be_written_says_so_and_what_to_do(
    tmp_path: Path, where: str, why: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "directory").mkdir()

    with pytest.raises(LeaseError, match=why) as refused:
        Lease(tmp_path / where).acquire("here")
    assert not isinstance(refused.value, LeaseTaken)
    assert str(refused.value).startswith(str(tmp_path / where))
    assert "gpu.lease" in str(refused.value)


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs a directory that root cannot write to")
def test_a_directory_that_is_not_ours_to_write_to_says_so() -> None:
    with pytest.raises(LeaseError, match=r"Permission denied|Read-only"):
        Lease(Path("/sys/gpu.lease")).acquire("here")


# Who has it, without taking it


@pytest.mark.integration
def test_the_owner_can_be_read_without_acquiring(path: Path) -> None:
    with holder(path) as first:
        found = owner(path)

    assert found is not None
    assert (found.pid, found.address) == (first.pid, "127.0.0.1:8000")


@pytest.mark.integration
def test_missing_released_and_left_behind_files_have_no_owner(
    path: Path,
) -> None:
    before = owner(path)
    lease = Lease(path)
    lease.acquire("127.0.0.1:8000")
    lease.release()
    released = owner(path)
    with holder(path) as first:
        first.kill()
        first.wait()
        left = owner(path)

    assert b"127.0.0.1:8000" in path.read_bytes()
    assert (before, released, left) == (None, None, None)


@pytest.mark.integration
def test_reading_the_owner_blocks_no_gateway(path: Path) -> None:
    with holder(path):
        owner(path)
    lease = Lease(path)
    lease.acquire("127.0.0.1:8000")
    owner(path)

    with pytest.raises(LeaseTaken):
        Lease(path).acquire("127.0.0.1:9000")
    lease.release()


def test_an_owner_that_has_not_written_its_name_is_not_made_up(path: Path) -> None:
    lease = Lease(path)
    lease.acquire("127.0.0.1:8000")
    path.write_bytes(b"")

    with pytest.raises(LeaseError, match="does not name the owner"):
        owner(path)
    lease.release()


def test_a_kernel_that_does_not_show_locks_is_reported(path: Path, tmp_path: Path) -> None:
    path.touch()

    with pytest.raises(LeaseError, match="does not show"):
        owner(path, proc=tmp_path)
