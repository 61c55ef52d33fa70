"""GPUDirect Storage: what is served, and what is said when something fails.

A kvikio made here stands for the real one where it must fail; the real one, where it is installed,
reads real bytes under the simulated driver, in a process of its own.
"""

from __future__ import annotations

import enum
import errno
import importlib.util
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nexus_ext import gds
from nexus_ext.checkpoint import Stamp
from nexus_ext.errors import CheckpointChanged, MissingExtra, ReadError
from nexus_ext.gds import GdsServer

HERE = Path(__file__).parent
NBYTES = 100_000
PATIENCE_SECONDS = 60


class Source:
    """Stands for the native reader that is served from outside."""

    def __init__(self) -> None:
        self.orders: queue.Queue[tuple[int, ...]] = queue.Queue()
        self.answers: queue.Queue[tuple[int, int, str]] = queue.Queue()
        self.abandoned: list[str] = []

    def take(self) -> tuple[int, ...]:
        order = self.orders.get()
        if not order:
            self.orders.put(())
        return order

    def answer(self, ticket: int, result: int, text: str) -> bool:
        self.answers.put((ticket, result, text))
        return True

    def abandon(self, reason: str) -> None:
        self.abandoned.append(reason)

    def stop(self) -> None:
        self.orders.put(())


class CompatMode(enum.Enum):
    OFF = 0
    ON = 1
    AUTO = 2


class Future:
    def __init__(self, read: Callable[[], int]) -> None:
        self._read = read

    def get(self) -> int:
        return self._read()


class FakeKvikio(ModuleType):
    """A kvikio that works: with cuFile, and with nvidia-fs. Tests break what they need."""

    CompatMode = CompatMode

    def __init__(self) -> None:
        super().__init__("kvikio")
        self.settings: dict[str, Any] = {"num_threads": 1, "compat_mode": CompatMode.AUTO}
        self.prefers_compat = False
        self.has_module = True
        self.opened: list[tuple[str, CompatMode]] = []
        self.num_open = 0
        self.registered: list[int] = []  # addresses
        self.num_reading = 0
        self.most_reading = 0
        self.lock = threading.Lock()
        self.go_on = threading.Event()
        self.go_on.set()
        self.defaults = ModuleType("kvikio.defaults")
        self.defaults.get = lambda key: self.settings[key]  # type: ignore[attr-defined]
        self.defaults.set = self.set_defaults  # type: ignore[attr-defined]
        self.defaults.is_compat_mode_preferred = (  # type: ignore[attr-defined]
            lambda: self.prefers_compat
        )
        self.cufile_driver = ModuleType("kvikio.cufile_driver")
        self.cufile_driver.get = lambda _: self.has_module  # type: ignore[attr-defined]
        kvikio = self

        class CuFile(FakeCuFile):
            owner = kvikio

        self.CuFile = CuFile

    def set_defaults(self, settings: dict[str, Any]) -> Any:
        before = dict(self.settings)
        self.settings |= settings

        class Restore:
            def __enter__(_) -> None: ...
            def __exit__(_, *error: object) -> None:
                self.settings = before

        return Restore()

    def memory_register(self, buffer: Any) -> None:
        self.registered.append(buffer.data_ptr())

    def memory_deregister(self, buffer: Any) -> None:
        self.registered.remove(buffer.data_ptr())

    # What a test may replace.
    def check_open(self, path: str) -> None: ...

    def result_of(self, num_read: int, offset: int) -> int:
        return num_read


class FakeCuFile:
    owner: FakeKvikio

    def __init__(self, path: str, flags: str) -> None:
        assert flags == "r"
        self.owner.opened.append((path, self.owner.settings["compat_mode"]))
        self.owner.check_open(path)
        self.descriptor = os.open(path, os.O_RDONLY)
        self.owner.num_open += 1

    def fileno(self) -> int:
        return self.descriptor

    def close(self) -> None:
        os.close(self.descriptor)
        self.owner.num_open -= 1

    def pread(self, buffer: Any, size: int, file_offset: int, task_size: int) -> Future:
        assert size == len(buffer) == task_size
        return Future(lambda: self.read(buffer, file_offset))

    def read(self, buffer: Any, offset: int) -> int:
        owner = self.owner
        with owner.lock:
            owner.num_reading += 1
            owner.most_reading = max(owner.most_reading, owner.num_reading)
        assert owner.go_on.wait(PATIENCE_SECONDS)
        with owner.lock:
            owner.num_reading -= 1
        num_read = owner.result_of(len(buffer), offset)
        if num_read > 0:
            buffer[:num_read] = memoryview(os.pread(self.descriptor, num_read, offset))
        return num_read


@pytest.fixture
def kvikio(monkeypatch: pytest.MonkeyPatch) -> FakeKvikio:
    fake = FakeKvikio()
    monkeypatch.setitem(sys.modules, "kvikio", fake)
    monkeypatch.setitem(sys.modules, "kvikio.defaults", fake.defaults)
    monkeypatch.setitem(sys.modules, "kvikio.cufile_driver", fake.cufile_driver)
    # Arenas lie in host memory here, and are to be taken for a device's.
    monkeypatch.setattr(gds, "_lies_on_device", lambda arena: True)
    return fake


class Bench:
    """A file, two arenas, and a server for them."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "weights.bin"
        self.data = os.urandom(NBYTES)
        self.path.write_bytes(self.data)
        self.source = Source()
        self.arenas = [torch.zeros(NBYTES, dtype=torch.uint8) for _ in range(2)]
        self.server: GdsServer | None = None
        self.num_tickets = 0

    def stamp(self) -> tuple[int, int, int, int]:
        with open(self.path, "rb") as file:
            return astuple(Stamp.of(file.fileno()))  # type: ignore[return-value]

    def serve(self, num_threads: int = 2) -> GdsServer:
        source = self.source
        self.server = GdsServer(
            [self.path],
            [self.stamp()],
            self.arenas,
            source.take,
            source.answer,
            source.abandon,
            num_threads=num_threads,
        )
        self.server.start()
        return self.server

    def ask(self, offset: int, nbytes: int, arena: int = 0, at: int = 0, file: int = 0) -> int:
        self.num_tickets += 1
        address = self.arenas[arena].data_ptr() + at
        self.source.orders.put((self.num_tickets, file, offset, nbytes, address))
        return self.num_tickets

    def answer(self) -> tuple[int, int, str]:
        return self.source.answers.get(timeout=PATIENCE_SECONDS)

    def read(self, *where: int, **more: int) -> tuple[int, str]:
        ticket = self.ask(*where, **more)
        answered, result, text = self.answer()
        assert answered == ticket
        return result, text

    def close(self) -> None:
        self.source.stop()
        if self.server is not None:
            self.server.close()


@pytest.fixture
def bench(tmp_path: Path, kvikio: FakeKvikio) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    kvikio.go_on.set()
    made.close()


# -- importing ---------------------------------------------------------------------------------


class NoLibrary(RuntimeError):
    """As cuda.pathfinder's, which is a RuntimeError too."""


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'kvikio'"),
        ImportError("cannot import name"),
        NoLibrary('Failure finding "libcufile.so.0"'),
        OSError("librapids_logger.so: cannot open shared object file"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_keeps_kvikio_from_importing_is_a_missing_extra(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Finder:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "kvikio":
                raise error

    monkeypatch.delitem(sys.modules, "kvikio", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    with pytest.raises(MissingExtra, match=r"pip install 'nexus_ext\[gds\]'") as caught:
        gds.import_kvikio()
    assert str(error) in str(caught.value)
    can, why = gds.available()
    assert not can
    assert str(error) in why


# -- what is possible here ---------------------------------------------------------------------


def test_available_tells_the_first_thing_that_is_missing(
    kvikio: FakeKvikio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gds.available() == (False, "there is no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kvikio.prefers_compat = True
    kvikio.settings["compat_mode"] = CompatMode.ON
    assert "KVIKIO_COMPAT_MODE" in gds.available()[1]
    kvikio.settings["compat_mode"] = CompatMode.AUTO
    monkeypatch.setattr(gds, "UDEV", tmp_path / "udev")
    assert "in a container, mount it" in gds.available()[1]
    monkeypatch.setattr(gds, "UDEV", tmp_path)
    assert "no libcufile" in gds.available()[1]
    kvikio.prefers_compat = False
    monkeypatch.setattr(gds, "NVIDIA_FS", tmp_path / "nvidia-fs")
    assert "nvidia-fs is not loaded" in gds.available()[1]
    monkeypatch.setattr(gds, "NVIDIA_FS", tmp_path)
    assert gds.available() == (True, "")
    assert kvikio.opened == []


def test_the_mode_is_gds_where_cufile_takes_the_file(bench: Bench, kvikio: FakeKvikio) -> None:
    server = bench.serve()
    assert (server.mode, server.reason, server.refusal) == ("gds", "", "")
    assert kvikio.opened == [(str(bench.path), CompatMode.OFF)]
    assert kvikio.settings["compat_mode"] == CompatMode.AUTO
    assert server.num_registered == len(kvikio.registered) == 2
    bench.close()
    assert (kvikio.registered, server.refusal) == ([], "")
    assert kvikio.num_open == 0


def test_the_mode_is_compat_where_kvikio_prefers_it(bench: Bench, kvikio: FakeKvikio) -> None:
    kvikio.prefers_compat = True
    server = bench.serve()
    assert server.mode == "compat"
    assert server.reason
    assert kvikio.opened == [(str(bench.path), CompatMode.ON)]
    assert kvikio.registered == []
    assert bench.read(5, 100) == (100, "")


def test_the_mode_is_compat_where_cufile_refuses_the_file(bench: Bench, kvikio: FakeKvikio) -> None:
    def check_open(path: str) -> None:
        if kvikio.settings["compat_mode"] == CompatMode.OFF:
            raise RuntimeError("file system is not supported")

    kvikio.check_open = check_open  # type: ignore[method-assign]
    server = bench.serve()
    assert server.mode == "compat"
    assert "file system is not supported" in server.reason
    assert bench.read(5, 100) == (100, "")


def test_the_mode_is_compat_where_cufile_reads_by_itself(bench: Bench, kvikio: FakeKvikio) -> None:
    kvikio.has_module = False
    server = bench.serve()
    assert server.mode == "compat"
    assert "nvidia-fs is not loaded" in server.reason
    # The kernel may let the disk write into device memory without the module.
    assert kvikio.opened == [(str(bench.path), CompatMode.OFF)]
    assert server.num_registered == 2


def test_without_a_device_cufile_is_not_asked(
    bench: Bench, kvikio: FakeKvikio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gds, "_lies_on_device", lambda arena: False)
    assert bench.serve().reason == "no arena lies on a CUDA device"
    assert kvikio.opened == [(str(bench.path), CompatMode.ON)]


def test_an_arena_that_is_not_registered_is_reported_and_read_into(
    bench: Bench, kvikio: FakeKvikio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def memory_register(buffer: torch.Tensor) -> None:
        raise RuntimeError("device pointer is managed memory")

    monkeypatch.setattr(kvikio, "memory_register", memory_register)
    server = bench.serve()
    assert (server.mode, server.num_registered) == ("gds", 0)
    assert server.refusal == "device pointer is managed memory"
    assert bench.read(0, 10) == (10, "")


def test_an_allocation_may_hold_two_arenas(
    bench: Bench, kvikio: FakeKvikio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def memory_register(buffer: torch.Tensor) -> None:
        if kvikio.registered:
            raise RuntimeError("device pointer already registered")
        kvikio.registered.append(buffer.data_ptr())

    monkeypatch.setattr(kvikio, "memory_register", memory_register)
    server = bench.serve()
    assert (server.num_registered, server.refusal) == (2, "")
    bench.close()
    assert (kvikio.registered, server.refusal) == ([], "")


# -- reading -----------------------------------------------------------------------------------


def test_bytes_land_at_their_address(bench: Bench) -> None:
    bench.serve()
    assert bench.read(1000, 5000, arena=1, at=37) == (5000, "")
    assert bytes(bench.arenas[1][37:5037].numpy()) == bench.data[1000:6000]
    assert int(bench.arenas[1][:37].sum()) == 0
    assert int(bench.arenas[1][5037:].sum()) == 0
    assert int(bench.arenas[0].sum()) == 0


def test_as_many_reads_are_in_flight_as_there_are_threads(bench: Bench, kvikio: FakeKvikio) -> None:
    kvikio.go_on.clear()
    bench.serve(num_threads=5)
    assert kvikio.settings["num_threads"] == 5
    tickets = {bench.ask(i * 10, 10, at=i * 10) for i in range(9)}
    while kvikio.most_reading < 5:
        threading.Event().wait(0.001)
    assert bench.source.answers.empty()
    kvikio.go_on.set()
    assert {bench.answer()[0] for _ in range(9)} == tickets
    assert kvikio.most_reading == 5
    assert bytes(bench.arenas[0][:90].numpy()) == bench.data[:90]


def test_kvikios_own_threads_are_never_taken_away(bench: Bench, kvikio: FakeKvikio) -> None:
    kvikio.settings["num_threads"] = 32
    bench.serve(num_threads=2)
    assert kvikio.settings["num_threads"] == 32


def test_slack_behind_the_end_of_the_file_is_not_asked_for(bench: Bench) -> None:
    bench.serve()
    assert bench.read(NBYTES - 10, 4096) == (10, "")
    assert bench.read(NBYTES, 4096) == (0, "")
    assert bench.read(NBYTES + 5000, 4096) == (0, "")


def test_a_short_read_is_answered_as_it_is(bench: Bench, kvikio: FakeKvikio) -> None:
    kvikio.result_of = lambda num_read, offset: num_read // 3  # type: ignore[method-assign]
    server = bench.serve()
    assert bench.read(0, 3000) == (1000, "")
    assert server.last_error == ""


@pytest.mark.parametrize("count", [0, -3, 5001])
def test_a_count_that_cannot_be_is_an_error(bench: Bench, kvikio: FakeKvikio, count: int) -> None:
    server = bench.serve()
    kvikio.CuFile.read = lambda *_: count  # type: ignore[method-assign]
    assert bench.read(0, 5000) == (
        -errno.EIO,
        f"kvikio answered a read of 5000 bytes with {count}",
    )
    assert "5000 bytes" in server.last_error


@pytest.mark.parametrize("error", [RuntimeError, OSError, ValueError])
def test_an_error_is_answered_with_its_text(
    bench: Bench, kvikio: FakeKvikio, error: type[Exception]
) -> None:
    def result_of(num_read: int, offset: int) -> int:
        if offset == 0:
            raise error("POSIX error on pread: Input/output error")
        return num_read

    kvikio.result_of = result_of  # type: ignore[method-assign]
    server = bench.serve()
    text = "kvikio: POSIX error on pread: Input/output error"
    assert bench.read(0, 100) == (-errno.EIO, text)
    assert server.last_error == text
    assert bench.read(100, 100) == (100, "")


def test_a_file_that_was_cut_has_ended(bench: Bench, kvikio: FakeKvikio) -> None:
    def result_of(num_read: int, offset: int) -> int:
        os.truncate(bench.path, 50)
        raise RuntimeError("POSIX error on pread: EOF")

    kvikio.result_of = result_of  # type: ignore[method-assign]
    bench.serve()
    assert bench.read(0, 100) == (0, "")


@pytest.mark.parametrize(("at", "nbytes"), [(NBYTES - 5, 6), (-1, 1), (0, NBYTES)])
def test_a_buffer_outside_the_arenas_is_refused(bench: Bench, at: int, nbytes: int) -> None:
    # One arena only, so that nothing known lies beside it.
    bench.arenas = [torch.zeros(NBYTES - 1 if nbytes == NBYTES else NBYTES, dtype=torch.uint8)]
    bench.serve()
    result, text = bench.read(0, nbytes, at=at)
    assert result == -errno.EIO
    assert "lie in no arena" in text


# -- opening -----------------------------------------------------------------------------------


def test_a_file_that_was_replaced_is_not_read(bench: Bench, kvikio: FakeKvikio) -> None:
    stamp = bench.stamp()
    other = bench.path.with_name("other")
    other.write_bytes(bench.data)
    other.replace(bench.path)
    bench.stamp = lambda: stamp  # type: ignore[method-assign]
    with pytest.raises(CheckpointChanged, match=r"weights\.bin was replaced or modified"):
        bench.serve()
    assert kvikio.num_open == 0


def test_a_file_that_cannot_be_opened_is_a_read_error(bench: Bench, kvikio: FakeKvikio) -> None:
    def check_open(path: str) -> None:
        raise RuntimeError("Unable to open file: Permission denied")

    kvikio.check_open = check_open  # type: ignore[method-assign]
    with pytest.raises(ReadError, match=r"weights\.bin: Unable to open file: Permission denied"):
        bench.serve()


# -- ending ------------------------------------------------------------------------------------


def test_closing_waits_for_the_reads_in_flight(bench: Bench, kvikio: FakeKvikio) -> None:
    kvikio.go_on.clear()
    server = bench.serve()
    bench.ask(0, 100)
    while kvikio.num_reading < 1:
        threading.Event().wait(0.001)
    bench.source.stop()
    closer = threading.Thread(target=server.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive()
    assert kvikio.num_open == 1
    kvikio.go_on.set()
    closer.join(PATIENCE_SECONDS)
    assert bench.answer() == (1, 100, "")
    assert bytes(bench.arenas[0][:100].numpy()) == bench.data[:100]
    assert kvikio.num_open == 0
    assert bench.source.abandoned == ["the reads through kvikio have ended"]
    server.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_owes_its_answer_and_the_last_one_gives_up(
    bench: Bench, kvikio: FakeKvikio
) -> None:
    def result_of(num_read: int, offset: int) -> int:
        if offset == 0:
            raise MemoryError("no more")
        return num_read

    kvikio.result_of = result_of  # type: ignore[method-assign]
    server = bench.serve(num_threads=2)
    assert bench.read(0, 100) == (-errno.EIO, "the thread that read died")
    assert bench.read(200, 100) == (100, "")
    assert bench.source.abandoned == []
    assert bench.read(0, 100)[0] == -errno.EIO
    server.close()
    assert bench.source.abandoned == ["a thread that reads died: MemoryError: no more"]


# -- the real one ------------------------------------------------------------------------------

REAL = """
import ctypes, importlib.util, os, queue, sys
from dataclasses import astuple
from pathlib import Path

spec = importlib.util.spec_from_file_location("simcuda", sys.argv[1])
simcuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(simcuda)
folder = Path(sys.argv[4])
sim = simcuda.load(simcuda.build(Path(sys.argv[2])))
assert sim.library.cuInit(0) == 0
sim.reset(seed=int(sys.argv[3]), max_delay_us=200)
# As torch does, whose context kvikio then uses.
assert sim.library.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), 0) == 0

import random
import torch
from nexus_ext.checkpoint import Stamp
from nexus_ext.gds import GdsServer, available

print(available())
sizes = [3_000_001, 70_000]
paths, stamps, data = [], [], []
for index, size in enumerate(sizes):
    path = folder / f"{index}.bin"
    data.append(os.urandom(size))
    path.write_bytes(data[-1])
    with open(path, "rb") as file:
        stamps.append(astuple(Stamp.of(file.fileno())))
    paths.append(path)
device = torch.zeros(4_000_000, dtype=torch.uint8)
host = torch.zeros(4_000_000, dtype=torch.uint8)
sim.declare_device(device.data_ptr(), device.numel())

orders, answers = queue.Queue(), queue.Queue()
def take():
    order = orders.get()
    if not order:
        orders.put(())
    return order

ends = []
server = GdsServer(
    paths, stamps, [device, host], take, lambda *answer: answers.put(answer), ends.append,
    num_threads=4,
)
print(server.mode, server.reason, sep=": ")
server.start()
random.seed(int(sys.argv[3]))
for arena in (device, host):
    want = bytearray(arena.numpy())
    at, asked = 0, {}
    for ticket in range(60):
        file = random.randrange(2)
        nbytes = random.choice([1, 511, 4096, 16383, 16384, 50_000, 65_537])
        offset = random.choice([0, 4096, random.randrange(sizes[file])])
        orders.put((ticket, file, offset, nbytes, arena.data_ptr() + at))
        bytes_there = data[file][offset : offset + nbytes]
        asked[ticket] = len(bytes_there)
        want[at : at + len(bytes_there)] = bytes_there
        at += nbytes + 3
    for _ in range(60):
        ticket, result, text = answers.get(timeout=60)
        assert (result, text) == (asked.pop(ticket), ""), (ticket, result, text)
    assert bytes(arena.numpy()) == bytes(want)

sim.fail("cuMemcpyHtoDAsync", 0, 2)
orders.put((1, 0, 0, 100_000, device.data_ptr()))
print(answers.get(timeout=60))
os.truncate(paths[0], 1000)
orders.put((2, 0, 900, 200, host.data_ptr()))
print(answers.get(timeout=60)[:2])
orders.put(())
server.close()
print(ends)
assert sim.counts()["num_bad_pointers"] == 0
assert sim.counts()["push_balance_total"] == 0
"""


@pytest.fixture(scope="session")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test builds the simulator, and the others find it."""
    return tmp_path_factory.mktemp("simcuda")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kvikio_reads_real_bytes_under_the_simulated_driver(
    tmp_path: Path, simulator: Path, seed: int
) -> None:
    if importlib.util.find_spec("kvikio") is None:
        pytest.skip("needs kvikio: pip install 'nexus_ext[gds]'")
    simcuda = HERE / "simcuda" / "simcuda.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", REAL, simcuda, simulator, str(seed), tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    can, mode, failed, cut, ends = done.stdout.splitlines()
    assert can == "(False, 'there is no CUDA device')"
    assert mode == "compat: no arena lies on a CUDA device"
    assert failed.startswith("(1, -5, 'kvikio: CUDA error")
    assert "CUDA_ERROR_OUT_OF_MEMORY" in failed
    assert cut == "(2, 100)"
    assert ends == "['the reads through kvikio have ended']"
