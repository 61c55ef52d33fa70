"""Where a better way to read is refused, a worse one takes over, with the same bytes, and says so.

Refusals are real ones where they can be had: a tmpfs, a seccomp filter as Docker has it, a memory
lock limit, a file system that takes no direct I/O.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nexus_ext.engine import Faults, ReadMode, measure_read

KIB = 1 << 10
MIB = 1 << 20
GROUP = 256 * KIB

# Streams a file of random bytes twice, compares every byte, and prints what the engine reports.
STREAM = """
import json, sys
from pathlib import Path
import torch
from nexus_ext.checkpoint import Extent, File, Group, Stamp
from nexus_ext.engine import Engine, ReadMode

def stream(path, **mode):
    path = Path(path)
    data = path.read_bytes()
    with open(path, "rb") as file:
        stamp = Stamp.of(file.fileno())
    size = len(data) // 8
    groups = [Group("g", (), (Extent(0, size * i, size, 0),), size) for i in range(8)]
    arenas = [torch.zeros(size, dtype=torch.uint8) for _ in range(3)]
    engine = Engine([File(path, stamp)], ReadMode(**mode))
    arena_of = [i % 3 for i in range(8)]
    engine.attach(arenas, groups, arena_of, range(8), 2)
    for i in [*range(8)] * 2:
        engine.acquire(i, arenas[arena_of[i]])
        assert bytes(arenas[arena_of[i]].numpy()) == data[size * i : size * (i + 1)]
    report = engine.stats()
    engine.close()
    print(json.dumps({key: report[key] for key in ("io_mode", "reader", "refusal", "num_failed")}))
"""

DENY_URING = (
    STREAM
    + """
import ctypes, errno, struct

EPERM, NR, ALLOW, ERRNO = 1, 425, 0x7FFF0000, 0x00050000
program = b"".join(struct.pack("HBBI", *line) for line in (
    (0x20, 0, 0, 0),            # load the number of the system call
    (0x15, 0, 1, NR),           # io_uring_setup?
    (0x06, 0, 0, ERRNO | EPERM),
    (0x06, 0, 0, ALLOW),
))
buffer = ctypes.create_string_buffer(program, len(program))
filter = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(buffer)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0           # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, filter, 0, 0) == 0      # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
assert libc.syscall(NR, 4, ctypes.create_string_buffer(120)) == -1
assert ctypes.get_errno() == EPERM
stream(sys.argv[1])
"""
)

FEW_LOCKED_PAGES = (
    STREAM
    + """
import os, resource
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)  # and with it goes CAP_IPC_LOCK
stream(sys.argv[1])
"""
)


def report_of(said: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(said.splitlines()[-1])
    assert report["num_failed"] == 0
    return report


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    shm = Path("/dev/shm")
    if not shm.is_dir() or not os.access(shm, os.W_OK):
        pytest.skip("no tmpfs to write to at /dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shm))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """On a disk, and any user may look into it, which `tmp_path` forbids."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


# -- direct reads refused ----------------------------------------------------------------------


def test_tmpfs_steps_down_to_buffered(lab: Any, memory_folder: Path) -> None:
    lab.folder = memory_folder
    source = lab.source(8 * GROUP + 5)
    rig = lab.rig([source], lab.slices(GROUP, 8))
    rig.sweep(passes=2)
    stats = rig.stats
    assert (stats["io_mode"], stats["reader"]) == ("buffered", "threads")
    assert stats["refusal"] == (
        f"O_DIRECT is refused for {source.path}: the file lives in memory (tmpfs), where direct "
        "I/O has no meaning"
    )
    assert stats["bytes_staged"] == 0
    report = measure_read(str(source.path), ReadMode(), MIB)
    assert (report["io_mode"], report["refusal"]) == ("buffered", stats["refusal"])


@pytest.mark.parametrize("reader", ["buffered threads", "mmap copied", "mmap in place"])
def test_other_modes_work_on_tmpfs(lab: Any, memory_folder: Path, reader: str) -> None:
    lab.folder = memory_folder
    rig = lab.rig([lab.source(8 * GROUP)], lab.slices(GROUP, 8), reader)
    rig.sweep(passes=2)
    assert rig.stats["refusal"] == ""


def test_one_file_in_memory_makes_the_mode_buffered(
    lab: Any, memory_folder: Path, tmp_path: Path
) -> None:
    """Reported is the worst of all files; the other one is still read past the page cache."""
    on_disk = lab.source(4 * GROUP + 3)
    lab.folder = memory_folder
    in_memory = lab.source(4 * GROUP + 3)
    groups = [lab.group((0, i * GROUP + 1, GROUP), (1, i * GROUP + 3, GROUP)) for i in range(4)]
    rig = lab.rig([on_disk, in_memory], groups, chunk_bytes=64 * KIB)
    rig.sweep(passes=2)
    stats = rig.stats
    assert stats["io_mode"] == "buffered"
    assert f"O_DIRECT is refused for {in_memory.path}" in stats["refusal"]


NO_DIRECT = STREAM + "stream(sys.argv[1])"


def test_a_file_system_without_direct_reads_steps_down(tmp_path: Path) -> None:
    """ext4 with data=journal answers STATX_DIOALIGN with zeros, which are no alignment."""
    if os.getuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4 to mount a file system of its own")
    image, mount = tmp_path / "image", tmp_path / "mount"
    mount.mkdir()
    with open(image, "wb") as file:
        file.truncate(32 * MIB)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    script = (
        'mount -o loop,data=journal "$1" "$2" || exit 77\n'
        'head -c 2000003 /dev/urandom > "$2/weights.bin"\n'
        'exec "$3" -c "$4" "$2/weights.bin"'
    )
    # The mount is seen by this shell alone, and ends with it.
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", image, mount, sys.executable, NO_DIRECT],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    report = report_of(done.stdout)
    assert (report["io_mode"], report["reader"]) == ("buffered", "threads")
    assert report["refusal"].endswith("the file system reports no direct I/O for this file")


@pytest.mark.parametrize("reader", ["direct io_uring", "direct threads"])
@pytest.mark.parametrize("refuse_ppm", [20_000, 1_000_000])
@pytest.mark.parametrize("phase", [0, 1])
def test_direct_reads_refused_in_mid_stream_go_on_buffered(
    lab: Any, reader: str, refuse_ppm: int, phase: int
) -> None:
    """One read alone is refused, or all in flight at once: no error either way."""
    rig = lab.rig(
        [lab.source(8 * GROUP)],
        lab.slices(GROUP, 8),
        reader,
        phase=phase,
        chunk_bytes=64 * KIB,
        poison=True,
        faults=Faults(refuse_ppm=refuse_ppm),
    )
    rig.sweep(passes=12)
    stats = rig.stats
    assert stats["num_failed"] == 0
    assert stats["io_mode"] == "buffered"
    assert stats["refusal"].startswith("O_DIRECT is refused for ")
    if lab.expects(reader)[0] != "direct":
        assert stats["num_injected_refusals"] == 0
        return
    assert stats["refusal"].endswith("Invalid argument")
    # Asked for once: what follows the refusal is not refused again.
    assert 1 <= stats["num_injected_refusals"] <= stats["depth"]


# -- io_uring refused --------------------------------------------------------------------------


def test_without_the_system_call_threads_take_over(
    lab: Any, run_python: Callable[..., str]
) -> None:
    """As in Docker, whose filter answers io_uring_setup with EPERM."""
    report = report_of(run_python(DENY_URING, lab.source(8 * GROUP).path))
    io_mode, name = lab.expects("direct threads")
    assert (report["io_mode"], report["reader"]) == (io_mode, name)
    if lab.expects("direct io_uring")[1] == "io_uring":
        assert report["refusal"] == "io_uring is denied here: Operation not permitted"
    else:
        assert report["refusal"] != ""


def test_with_few_locked_pages_the_ring_works_without_fixed_buffers(
    lab: Any, open_folder: Path, run_python: Callable[..., str]
) -> None:
    """Room for the ring itself, which newer kernels count as well, and not for the arenas."""
    lab.folder = open_folder
    source = lab.source(8 * GROUP)
    source.path.chmod(0o644)
    report = report_of(run_python(FEW_LOCKED_PAGES, source.path, 64 * KIB))
    assert (report["io_mode"], report["reader"]) == lab.expects("direct io_uring")
    assert report["refusal"] == "" or report["reader"] == "threads"


def test_without_locked_pages_the_ring_or_threads_work(
    lab: Any, open_folder: Path, run_python: Callable[..., str]
) -> None:
    lab.folder = open_folder
    source = lab.source(8 * GROUP)
    source.path.chmod(0o644)
    report = report_of(run_python(FEW_LOCKED_PAGES, source.path, 0))
    if report["reader"] == "threads":  # the kernel denies even an empty ring, or direct reads
        assert report["refusal"] != ""
    else:
        assert report["reader"] == "io_uring"


def test_threads_may_be_asked_for(lab: Any) -> None:
    rig = lab.rig([lab.source(8 * GROUP)], lab.slices(GROUP, 8), "direct threads")
    rig.sweep()
    assert rig.stats["reader"] == "threads"
