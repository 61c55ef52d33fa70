"""GPUDirect Storage: serves the engine's reads into device memory through kvikio's CuFile.

Owns kvikio's files, the registration of the arenas, and the threads that read. It knows requests by
their tickets, and neither the engine nor groups.

    take ─▶ CuFile.pread ─▶ get ─▶ answer        in each of `num_threads` threads

Note [One request, one task]
kvikio cuts a read into tasks for its own threads, and when one of them fails, the error comes back
while the others still write. So every request is one task: once it is answered, with an error or
not, nobody writes into its buffer any more. What keeps the disk busy is the number of requests.

Note [Compatibility modes]
There are two, one below the other. kvikio reads by itself (POSIX, through bounce buffers) where
libcufile is missing, under WSL, or where /run/udev is not there, as in most containers; left alone
it steps down silently, file by file. So files are opened with its fallback forbidden, and what it
says is the reason reported. cuFile in turn reads by itself without the kernel module nvidia-fs,
unless the kernel can do without (PCI P2PDMA), which it does not tell: that counts as "compat" too.
libcufile never comes back from opening its driver on a machine without one, so it is not asked
unless an arena lies on a CUDA device.
"""

from __future__ import annotations

import bisect
import errno
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nexus_ext.errors import CheckpointChanged, MissingExtra, ReadError

__all__ = ["DEFAULT_NUM_THREADS", "GdsServer", "available"]

# A thread is a request in flight; an NVMe disk is saturated by eight of a few MiB.
DEFAULT_NUM_THREADS = 8
# The kernel module that lets the disk write into device memory, where it is loaded.
NVIDIA_FS = Path("/proc/driver/nvidia-fs")
# kvikio looks no further than whether it is there; udev says which disk a file lies on.
UDEV = Path("/run/udev")

# What kvikio raises: RuntimeError for its own, CUDA's, cuFile's and the system's errors, the others
# from Python's side of it.
KVIKIO_ERRORS = (RuntimeError, OSError, ValueError, OverflowError, NotImplementedError)

# kvikio's defaults belong to the process: files are opened one server at a time.
_opening = threading.Lock()

Take = Callable[[], Sequence[int]]
Answer = Callable[[int, int, str], object]
Abandon = Callable[[str], object]


def import_kvikio() -> Any:
    """The package kvikio.

    Raises:
        MissingExtra: It cannot be imported. Without libcufile it raises a RuntimeError, with a
            library that does not load an OSError.
    """
    try:
        import kvikio
        import kvikio.cufile_driver
        import kvikio.defaults
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingExtra(
            'io="gds" reads through kvikio, which cannot be imported here '
            f"({type(error).__name__}: {error}). Install it: pip install 'nexus_ext[gds]'; "
            'or read with io="direct".'
        ) from error
    return kvikio


def available() -> tuple[bool, str]:
    """Whether reads would go from the disk straight into device memory here, and why not.

    Opens no driver and no file; a file system that cannot do it is found out by opening a file.
    """
    try:
        kvikio = import_kvikio()
    except MissingExtra as error:
        return False, str(error)
    if not torch.cuda.is_available():
        return False, "there is no CUDA device"
    reason = _why_kvikio_reads(kvikio) or _why_cufile_reads(NVIDIA_FS.exists())
    return not reason, reason


def _why_kvikio_reads(kvikio: Any) -> str:
    """Why kvikio will not even try cuFile; empty if it will."""
    if not kvikio.defaults.is_compat_mode_preferred():
        return ""
    if kvikio.defaults.get("compat_mode") == kvikio.CompatMode.ON:
        return "kvikio is set to its compatibility mode (KVIKIO_COMPAT_MODE)"
    if not UDEV.is_dir():
        return f"{UDEV} is not there; in a container, mount it (-v {UDEV}:{UDEV}:ro)"
    return "kvikio finds no libcufile, or this is WSL"


def _why_cufile_reads(has_module: bool) -> str:
    """Why cuFile reads by itself; empty if it does not."""
    if has_module:
        return ""
    return (
        "the kernel module nvidia-fs is not loaded; cuFile reads by itself, or by PCI P2PDMA, and "
        "does not tell which"
    )


def _lies_on_device(arena: torch.Tensor) -> bool:
    return arena.is_cuda


@dataclass
class _File:
    """A file that kvikio has open, and the descriptor that it can be looked at through."""

    path: str
    cufile: Any
    descriptor: int

    def size(self) -> int:
        return os.fstat(self.descriptor).st_size


class GdsServer:
    """Reads into device memory what `take` asks for, and answers it.

    Owns kvikio's files, its threads and the registration of the arenas; keeps the arenas alive
    until it is closed. A request whose buffer lies in no arena is answered as failed.

    Attributes:
        mode: What reads really do: "gds", or "compat" (by way of host memory).
        reason: Why "compat"; empty for "gds".
        num_registered: Arenas that cuFile has mapped for direct access.
        refusal: Why an arena was not registered, if one was refused; it is read into nevertheless.
        last_error: What the last failed read said; empty if none failed.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        stamps: Sequence[tuple[int, int, int, int]],
        arenas: Sequence[torch.Tensor],
        take: Take,
        answer: Answer,
        abandon: Abandon,
        *,
        num_threads: int = DEFAULT_NUM_THREADS,
    ) -> None:
        """Open the files and register the arenas. Serves nothing before `start`.

        Args:
            paths: The files, in the order of their numbers.
            stamps: What each must be: device, inode, size in bytes, mtime in ns.
            arenas: 1-D uint8 tensors, contiguous; host memory only where it stands for a device's.
            take: Blocks without the GIL; returns ticket, file, offset, nbytes and address, or
                nothing once there will be no more requests.
            answer: Gets ticket, result (bytes read, 0 at the end of the file, or -errno) and the
                text of an error.
            abandon: Gets the reason why nobody serves any more; called after the last read.
            num_threads: Reads in flight at once.

        Raises:
            MissingExtra: kvikio cannot be imported.
            ReadError: A file cannot be opened.
            CheckpointChanged: A file is not what its stamp says.
        """
        self._kvikio = import_kvikio()
        self._take = take
        self._answer = answer
        self._abandon = abandon
        self._num_threads = num_threads
        self._arenas = sorted(arenas, key=torch.Tensor.data_ptr)
        self._starts = [arena.data_ptr() for arena in self._arenas]
        self._files: list[_File] = []
        self._registered: list[torch.Tensor] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._num_alive = 0
        self._farewell = "the reads through kvikio have ended"
        self.num_registered = 0
        self.refusal = ""
        self.last_error = ""
        self.reason = ""
        if not any(map(_lies_on_device, arenas)):
            self.reason = "no arena lies on a CUDA device"
        try:
            with _opening:
                self._settle()
                for path, stamp in zip(paths, stamps, strict=True):
                    self._open(str(path), stamp)
            if not self.reason:
                self._register()
                self.reason = self._ask_cufile()
        except BaseException:
            self.close()
            raise

    @property
    def mode(self) -> str:
        return "compat" if self.reason else "gds"

    def start(self) -> None:
        """Start serving. Once only; if it fails, end the requests before `close`."""
        self._num_alive = self._num_threads
        for index in range(self._num_threads):
            # Daemons: a program that forgets to close its engine must be able to end.
            thread = threading.Thread(target=self._serve, name=f"nexus-gds-{index}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """End the threads, give registrations and files back. Call when `take` gives no more.

        Blocks until every read is answered. May be called twice.
        """
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        while self._registered:
            try:
                self._kvikio.memory_deregister(self._registered.pop())
            except KVIKIO_ERRORS as error:
                # It is unmapped with its memory at the latest.
                self.refusal = str(error)
        while self._files:
            self._files.pop().cufile.close()
        self._arenas.clear()
        self._starts.clear()

    # -- opening -----------------------------------------------------------------------------------

    def _settle(self) -> None:
        """As many threads of kvikio's as ours wait for; the pool belongs to the process."""
        defaults = self._kvikio.defaults
        if defaults.get("num_threads") < self._num_threads:
            defaults.set({"num_threads": self._num_threads})
        self.reason = self.reason or _why_kvikio_reads(self._kvikio)

    def _open(self, path: str, stamp: tuple[int, int, int, int]) -> None:
        file = self._open_in_best_mode(path)
        self._files.append(file)
        info = os.fstat(file.descriptor)
        if (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns) != tuple(stamp):
            raise CheckpointChanged(
                f"A checkpoint must stay as it is while it is streamed; {path} was replaced or "
                "modified. Load it again."
            )

    def _open_in_best_mode(self, path: str) -> _File:
        """See Note [Compatibility modes]."""
        if self.reason:
            return self._open_as(path, self._kvikio.CompatMode.ON)
        try:
            return self._open_as(path, self._kvikio.CompatMode.OFF)
        except ReadError as error:
            file = self._open_as(path, self._kvikio.CompatMode.ON)
            self.reason = f"cuFile refuses {path}: {error.__cause__}"
            return file

    def _ask_cufile(self) -> str:
        """Why cuFile reads by itself. It knows since its driver is open: since the first file."""
        try:
            return _why_cufile_reads(self._kvikio.cufile_driver.get("is_gds_available"))
        except KVIKIO_ERRORS as error:
            return f"cuFile does not tell how it reads: {error}"

    def _open_as(self, path: str, compat_mode: Any) -> _File:
        try:
            with self._kvikio.defaults.set({"compat_mode": compat_mode}):
                cufile = self._kvikio.CuFile(path, "r")
            return _File(path, cufile, cufile.fileno())
        except KVIKIO_ERRORS as error:
            raise ReadError(
                f"A file must be readable; kvikio cannot open {path}: {error}. Check its "
                'permissions, or read with io="direct".'
            ) from error

    def _register(self) -> None:
        for arena in self._arenas:
            try:
                self._kvikio.memory_register(arena)
                self._registered.append(arena)
            except KVIKIO_ERRORS as error:
                # What is registered is the whole allocation, which another arena may lie in.
                if "already registered" not in str(error):
                    self.refusal = str(error)
                    continue
            self.num_registered += 1

    # -- serving -----------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while request := self._take():
                self._serve_one(*request)
        except BaseException as error:
            self.last_error = f"a thread that reads died: {type(error).__name__}: {error}"
            self._farewell = self.last_error
            raise
        finally:
            with self._lock:
                self._num_alive -= 1
                is_last = self._num_alive == 0
            if is_last:
                self._abandon(self._farewell)

    def _serve_one(self, ticket: int, file: int, offset: int, nbytes: int, address: int) -> None:
        result, text = -errno.EIO, "the thread that read died"
        try:
            result, text = self._read(self._files[file], offset, nbytes, address)
        finally:
            # An answer is owed, also when the thread does not survive what it met.
            if result < 0:
                self.last_error = text
            self._answer(ticket, result, text)

    def _read(self, file: _File, offset: int, nbytes: int, address: int) -> tuple[int, str]:
        # kvikio takes a request for bytes behind the end of the file as a whole for an error.
        wanted = min(nbytes, file.size() - offset)
        if wanted <= 0:
            return 0, ""
        try:
            buffer = self._buffer(address, wanted)
            # See Note [One request, one task].
            num_read = self._kvikio_read(file, buffer, wanted, offset)
        except KVIKIO_ERRORS as error:
            if file.size() < offset + wanted:
                return 0, ""
            return -errno.EIO, f"kvikio: {error}"
        if not 0 < num_read <= wanted:
            return -errno.EIO, f"kvikio answered a read of {wanted} bytes with {num_read}"
        return num_read, ""

    def _kvikio_read(self, file: _File, buffer: Any, nbytes: int, offset: int) -> int:
        future = file.cufile.pread(buffer, nbytes, offset, nbytes)
        return int(future.get())

    def _buffer(self, address: int, nbytes: int) -> Any:
        """The bytes at an address, in the arena that holds them."""
        index = bisect.bisect_right(self._starts, address) - 1
        arena = self._arenas[index] if index >= 0 else None
        begin = address - self._starts[index]
        if arena is None or begin + nbytes > arena.numel():
            raise ValueError(f"{nbytes} bytes at address {address:#x} lie in no arena")
        part = arena[begin : begin + nbytes]
        return part if part.is_cuda else part.numpy()
