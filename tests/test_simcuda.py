"""The simulated CUDA driver keeps CUDA's promises, breaks every other hope, and notices misuse.

The library is loaded under another name than the driver's, so that nothing else in this process
takes it for one; what ends or outlives a process is tried in a process of its own.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

PAGE = mmap.PAGESIZE
NBYTES = 4 * PAGE
HERE = Path(__file__).parent
NON_BLOCKING = 1
DISABLE_TIMING = 2

INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED, DEINITIALIZED = 1, 2, 3, 4
INVALID_CONTEXT, INVALID_HANDLE, NOT_READY, CONTEXT_IS_DESTROYED = 201, 400, 600, 709
ALREADY_REGISTERED, NOT_REGISTERED, CAPTURE_UNSUPPORTED = 712, 713, 900
ILLEGAL_ADDRESS, LAUNCH_FAILED = 700, 719


def _load_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simcuda", HERE / "simcuda" / "simcuda.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


simcuda = _load_module()
DRIVER_CALLS = [name for name in simcuda.DRIVER if name.startswith("cu")]
DESCRIBING = ["cuGetErrorName", "cuGetErrorString"]
OF_LIBRARY = [*DESCRIBING, "cuInit", "cuDriverGetVersion", "cuGetProcAddress_v2"]
WITHOUT_CONTEXT = [
    "cuThreadExchangeStreamCaptureMode",
    *OF_LIBRARY,
    *(name for name in DRIVER_CALLS if name.startswith(("cuDevice", "cuPointer"))),
    *(name for name in DRIVER_CALLS if name.startswith("cuCtx") and name != "cuCtxGetDevice"),
]

# -- the bench ---------------------------------------------------------------------------------


class Bench:
    """A program that uses device 0, and its memory."""

    def __init__(self, sim: Any) -> None:
        self.sim = sim
        self.maps: list[mmap.mmap] = []
        self.enter(0)

    def code(self, name: str, *arguments: Any) -> int:
        return int(getattr(self.sim.library, name)(*arguments))

    def empty(self, name: str) -> int:
        """The code of a call whose arguments must not matter."""
        return self.code(name, *(kind() for kind in simcuda.DRIVER[name]))

    def do(self, name: str, *arguments: Any) -> None:
        assert self.code(name, *arguments) == 0, name

    def make(self, name: str, *arguments: Any) -> int:
        """The handle that a call gives through its first argument."""
        handle = ctypes.c_void_p()
        self.do(name, ctypes.byref(handle), *arguments)
        return handle.value or 0

    def enter(self, device: int) -> None:
        self.do("cuCtxPushCurrent_v2", self.make("cuDevicePrimaryCtxRetain", device))

    def leave(self) -> None:
        device = ctypes.c_int()
        self.do("cuCtxGetDevice", ctypes.byref(device))
        self.do("cuCtxPopCurrent_v2", None)
        self.do("cuDevicePrimaryCtxRelease_v2", device.value)

    def stream(self) -> int:
        return self.make("cuStreamCreate", NON_BLOCKING)

    def event(self) -> int:
        return self.make("cuEventCreate", DISABLE_TIMING)

    def pageable(self, nbytes: int = NBYTES, value: int = 0) -> np.ndarray:
        self.maps.append(mmap.mmap(-1, nbytes))
        memory = np.frombuffer(self.maps[-1], dtype=np.uint8)
        memory[:] = value
        return memory

    def pinned(self, nbytes: int = NBYTES, value: int = 0) -> np.ndarray:
        memory = self.pageable(nbytes, value)
        self.do("cuMemHostRegister_v2", memory.ctypes.data, nbytes, 0)
        return memory

    def arena(self, nbytes: int = NBYTES, device: int = 0) -> np.ndarray:
        memory = self.pageable(nbytes)
        self.sim.declare_device(memory.ctypes.data, nbytes, device)
        return memory

    def h2d(self, to: np.ndarray, source: np.ndarray, stream: int | None) -> int:
        at = to.ctypes.data, source.ctypes.data
        return self.code("cuMemcpyHtoDAsync_v2", *at, source.nbytes, stream)

    def consume(self, arena: np.ndarray, stream: int | None) -> np.ndarray:
        """What a kernel on the stream finds in the arena, once it has run."""
        found = self.pageable(arena.nbytes)
        self.sim.enqueue_copy(stream, found.ctypes.data, arena.ctypes.data, arena.nbytes)
        return found

    def count(self, name: str) -> int:
        return int(self.sim.counts()[name])


@pytest.fixture(scope="session")
def library_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(simcuda.build(tmp_path_factory.mktemp("simcuda"), soname="libsimcuda.so.1"))


@pytest.fixture(scope="session")
def loaded(library_path: Path) -> Any:
    sim = simcuda.load(library_path, mode=ctypes.RTLD_LOCAL)
    assert sim.library.cuInit(0) == 0
    return sim


@pytest.fixture
def sim(loaded: Any) -> Iterator[Any]:
    loaded.reset()
    yield loaded
    loaded.reset()


@pytest.fixture
def bench(sim: Any) -> Iterator[Bench]:
    made = Bench(sim)
    yield made
    sim.reset()  # while its memory is still mapped


def run_process(path: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in which `simcuda` is the module and `sim` the loaded simulator."""
    prologue = (
        "import ctypes, importlib.util, os, sys\n"
        f"spec = importlib.util.spec_from_file_location('simcuda', {str(simcuda.__file__)!r})\n"
        "simcuda = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(simcuda)\n"
        f"sim = simcuda.load({str(path)!r})\n"
    )
    command = [sys.executable, "-c", prologue + program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


# -- devices and contexts ----------------------------------------------------------------------


def test_before_cu_init_nothing_works(library_path: Path) -> None:
    program = f"""
for name in {[name for name in DRIVER_CALLS if name not in OF_LIBRARY]}:
    arguments = [kind() for kind in simcuda.DRIVER[name]]
    print(getattr(sim.library, name)(*arguments))
"""
    done = run_process(library_path, program)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {str(NOT_INITIALIZED)}


def test_cuda_does_not_survive_a_fork(library_path: Path) -> None:
    program = """
assert sim.library.cuInit(0) == 0
count = ctypes.c_int()
child = os.fork()
if child == 0:
    os._exit(sim.library.cuDeviceGetCount(ctypes.byref(count)))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = run_process(library_path, program)
    assert done.stdout.split() == [str(NOT_INITIALIZED)], done.stderr


def test_the_loader_finds_it_as_the_driver(library_path: Path) -> None:
    path = simcuda.build(library_path.parent)
    program = """
found = ctypes.CDLL("libcuda.so.1")
assert ctypes.cast(found.cuInit, ctypes.c_void_p).value == ctypes.cast(
    sim.library.cuInit, ctypes.c_void_p
).value
assert ctypes.CDLL(None).aoti_torch_get_current_cuda_stream is not None
"""
    done = run_process(path, program)
    assert done.returncode == 0, done.stderr


def test_devices_are_counted_and_named(sim: Any) -> None:
    sim.set_device_count(3)
    number = ctypes.c_int()
    assert sim.library.cuDeviceGetCount(number) == 0
    assert number.value == 3
    assert sim.library.cuDeviceGet(number, 3) == 101
    name = ctypes.create_string_buffer(64)
    assert sim.library.cuDeviceGetName(name, len(name), 2) == 0
    assert name.value == b"Simulated device 2"
    assert sim.library.cuDriverGetVersion(number) == 0
    assert number.value == 13000
    assert sim.library.cuDeviceGetAttribute(number, 75, 0) == 0
    assert number.value == 9
    sim.set_device_count(0)
    assert sim.library.cuInit(0) == 100


@pytest.mark.parametrize("name", [name for name in DRIVER_CALLS if name not in WITHOUT_CONTEXT])
def test_a_call_that_needs_a_context_says_so(sim: Any, name: str) -> None:
    arguments = [kind() for kind in simcuda.DRIVER[name]]
    assert getattr(sim.library, name)(*arguments) == INVALID_CONTEXT


def test_contexts_are_a_stack_of_each_thread(bench: Bench) -> None:
    bench.enter(1)
    device = ctypes.c_int()
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(bench.code("cuCtxGetDevice", device)))
    thread.start()
    thread.join()
    assert codes == [INVALID_CONTEXT]
    bench.do("cuCtxGetDevice", device)
    assert device.value == 1
    assert bench.count("push_balance") == 2
    bench.leave()
    bench.leave()
    assert bench.code("cuCtxPopCurrent_v2", None) == INVALID_CONTEXT
    assert not bench.sim.leaks()


def test_set_current_replaces_the_top_of_the_stack(bench: Bench) -> None:
    first = bench.make("cuCtxGetCurrent")
    second = bench.make("cuDevicePrimaryCtxRetain", 1)
    bench.do("cuCtxSetCurrent", second)
    assert bench.make("cuCtxGetCurrent") == second != first
    assert bench.count("push_balance") == 1
    bench.do("cuCtxSetCurrent", None)
    assert bench.make("cuCtxGetCurrent") == 0
    assert bench.count("push_balance") == 0


def test_a_context_that_nobody_retains_is_destroyed(bench: Bench) -> None:
    context = bench.make("cuCtxGetCurrent")
    bench.do("cuDevicePrimaryCtxRelease_v2", 0)
    assert bench.empty("cuStreamCreate") == CONTEXT_IS_DESTROYED
    assert bench.code("cuCtxPushCurrent_v2", context) == CONTEXT_IS_DESTROYED
    assert bench.code("cuDevicePrimaryCtxRelease_v2", 0) == INVALID_CONTEXT
    assert bench.code("cuCtxPushCurrent_v2", 12345) == INVALID_CONTEXT


def test_every_call_is_found_by_its_plain_name(bench: Bench) -> None:
    for name in DRIVER_CALLS:
        found, status = ctypes.c_void_p(), ctypes.c_int()
        plain = name.removesuffix("_v2").encode()
        bench.do("cuGetProcAddress_v2", plain, found, 13000, 0, status)
        expected = ctypes.cast(getattr(bench.sim.library, name), ctypes.c_void_p)
        assert (found.value, status.value) == (expected.value, 0), name
    bench.do("cuGetProcAddress_v2", b"cuNoSuchCall", found, 13000, 0, status)
    assert (found.value, status.value) == (None, 1)


def test_errors_have_names(bench: Bench) -> None:
    text = ctypes.c_char_p()
    bench.do("cuGetErrorName", 719, text)
    assert text.value == b"CUDA_ERROR_LAUNCH_FAILED"
    bench.do("cuGetErrorString", 719, text)
    assert text.value == b"unspecified launch failure"
    assert bench.code("cuGetErrorName", 12345, text) == INVALID_VALUE
    assert text.value is None


# -- copies ------------------------------------------------------------------------------------


def test_a_copy_from_registered_memory_reads_its_source_late(bench: Bench) -> None:
    stream, source, arena = bench.stream(), bench.pinned(value=1), bench.arena()
    bench.sim.hold_stream(stream)
    assert bench.h2d(arena, source, stream) == 0
    source[:] = 2
    assert (arena == simcuda.GARBAGE).all()
    bench.sim.hold_stream(stream, False)
    bench.do("cuStreamSynchronize", stream)
    assert (arena == 2).all()
    assert bench.count("num_pageable_copies") == 0


def test_a_copy_from_pageable_memory_is_staged(bench: Bench) -> None:
    stream, source, arena = bench.stream(), bench.pageable(value=1), bench.arena()
    bench.sim.hold_stream(stream)
    assert bench.h2d(arena, source, stream) == 0
    source[:] = 2
    bench.sim.hold_stream(stream, False)
    bench.do("cuStreamSynchronize", stream)
    assert (arena == 1).all()
    assert bench.count("num_pageable_copies") == 1


def test_a_source_that_is_rewritten_meanwhile_arrives_in_parts(bench: Bench) -> None:
    """For some seed the copy is caught in the middle."""
    for seed in range(200):
        bench.sim.reset(seed, max_delay_us=2000)
        bench.enter(0)
        stream, source, arena = bench.stream(), bench.pinned(value=1), bench.arena()
        bench.h2d(arena, source, stream)
        while bench.code("cuStreamQuery", stream) == NOT_READY:
            if (arena == 1).any():
                source[:] = 2
        if len(set(arena)) == 2:
            return
    pytest.fail("no copy was ever seen half done")


def test_bytes_move_down_up_and_across(bench: Bench) -> None:
    stream, source, arenas = bench.stream(), bench.pinned(), [bench.arena(), bench.arena()]
    source[:] = np.arange(NBYTES) % 251
    bench.h2d(arenas[0], source, stream)
    at = [arena.ctypes.data for arena in arenas]
    bench.do("cuMemcpyDtoDAsync_v2", at[1], at[0], NBYTES, stream)
    fetched = bench.pinned()
    bench.do("cuMemcpyDtoHAsync_v2", fetched.ctypes.data, at[1], NBYTES, stream)
    bench.do("cuMemsetD8Async", at[0], 0xFF, NBYTES, stream)
    bench.do("cuStreamSynchronize", stream)
    assert (fetched == source).all()
    assert (arenas[0] == 0xFF).all()
    counts = bench.sim.counts()
    for way in ["h2d", "d2h", "d2d"]:
        assert (counts[f"num_{way}"], counts[f"{way}_bytes"]) == (1, NBYTES)
    assert counts["largest_h2d_bytes"] == NBYTES


def test_a_copy_to_pageable_memory_is_done_when_the_call_returns(bench: Bench) -> None:
    stream, arena, found = bench.stream(), bench.arena(), bench.pageable()
    bench.sim.enqueue_delay(stream, 3000)
    bench.do("cuMemcpyDtoHAsync_v2", found.ctypes.data, arena.ctypes.data, NBYTES, stream)
    assert (found == simcuda.GARBAGE).all()


def test_device_memory_must_be_declared(bench: Bench) -> None:
    stream, source, arena = bench.stream(), bench.pinned(), bench.arena()
    assert bench.h2d(bench.pageable(), source, stream) == INVALID_VALUE
    assert bench.h2d(arena[1:], source, stream) == INVALID_VALUE
    assert bench.h2d(arena, arena, stream) == INVALID_VALUE
    outside = bench.pageable().ctypes.data
    assert bench.code("cuMemsetD8Async", outside, 0, 1, stream) == INVALID_VALUE
    assert bench.count("num_bad_pointers") == 4
    assert bench.count("num_h2d") == 0


def test_any_memory_may_pass_for_a_device(bench: Bench) -> None:
    bench.sim.set_any_memory_is_device(True)
    stream, source, target = bench.stream(), bench.pinned(value=3), bench.pageable()
    assert bench.h2d(target, source, stream) == 0
    bench.do("cuStreamSynchronize", stream)
    assert (target == 3).all()


def test_a_copy_must_not_straddle_two_registered_ranges(bench: Bench) -> None:
    stream, source, arena = bench.stream(), bench.pageable(), bench.arena()
    for at in [0, 2 * PAGE]:
        bench.do("cuMemHostRegister_v2", source.ctypes.data + at, 2 * PAGE, 0)
    assert bench.h2d(arena, source, stream) == INVALID_VALUE
    assert bench.h2d(arena, source[: 2 * PAGE], stream) == 0


def test_registration_is_exact(bench: Bench) -> None:
    at = bench.pageable().ctypes.data

    def register(offset: int, nbytes: int, flags: int = 0) -> int:
        return bench.code("cuMemHostRegister_v2", at + offset, nbytes, flags)

    assert register(1, PAGE) == INVALID_VALUE
    assert register(0, PAGE + 1) == INVALID_VALUE
    assert register(0, 0) == INVALID_VALUE
    assert register(0, PAGE, 0x10) == INVALID_VALUE
    assert register(PAGE, PAGE) == 0
    assert register(0, 2 * PAGE) == ALREADY_REGISTERED
    assert register(PAGE, PAGE) == ALREADY_REGISTERED
    bench.sim.set_registered_limit(2 * PAGE)
    assert register(2 * PAGE, 2 * PAGE) == OUT_OF_MEMORY
    assert register(2 * PAGE, PAGE) == 0
    assert bench.count("registered_bytes") == 2 * PAGE
    assert bench.code("cuMemHostUnregister", at) == NOT_REGISTERED
    assert bench.code("cuMemHostUnregister", at + PAGE) == 0
    assert bench.code("cuMemHostUnregister", at + PAGE) == NOT_REGISTERED


def test_memory_forgotten_in_use_is_counted_and_left_alone(bench: Bench) -> None:
    stream, source, arena = bench.stream(), bench.pinned(value=1), bench.arena()
    bench.sim.hold_stream(stream)
    bench.h2d(arena, source, stream)
    bench.sim.forget_device(arena.ctypes.data)
    bench.sim.hold_stream(stream, False)
    bench.do("cuStreamSynchronize", stream)
    assert (arena == simcuda.GARBAGE).all()
    assert bench.count("num_use_after_free") == 1


def test_memory_unregistered_in_use_is_counted(bench: Bench) -> None:
    stream, source, arena = bench.stream(), bench.pinned(), bench.arena()
    bench.sim.hold_stream(stream)
    bench.h2d(arena, source, stream)
    bench.do("cuMemHostUnregister", source.ctypes.data)
    assert bench.count("num_unregistered_in_use") == 1


def test_memory_at_rest_is_forgotten_without_complaint(bench: Bench) -> None:
    stream, source, arena = bench.stream(), bench.pinned(), bench.arena()
    bench.h2d(arena, source, stream)
    bench.do("cuStreamSynchronize", stream)
    bench.sim.forget_device(arena.ctypes.data)
    bench.do("cuMemHostUnregister", source.ctypes.data)
    assert bench.count("num_use_after_free") == bench.count("num_unregistered_in_use") == 0


def test_pointers_are_told_apart(bench: Bench) -> None:
    device, host, unknown = bench.arena(), bench.pinned(), bench.pageable()
    kind, ordinal = ctypes.c_uint(), ctypes.c_int()
    kinds = []
    for memory in [device, host, unknown]:
        asked = (ctypes.c_int * 2)(2, 9)
        answers = (ctypes.c_void_p * 2)(ctypes.addressof(kind), ctypes.addressof(ordinal))
        bench.do("cuPointerGetAttributes", 2, asked, answers, memory.ctypes.data + 1)
        kinds.append((kind.value, ordinal.value))
    assert kinds == [(2, 0), (1, 0), (0, -2)]
    at = ctypes.addressof(kind)
    assert bench.code("cuPointerGetAttribute", at, 2, device.ctypes.data) == 0
    assert bench.code("cuPointerGetAttribute", at, 2, unknown.ctypes.data) == INVALID_VALUE


# -- streams and events ------------------------------------------------------------------------


def test_an_event_that_was_never_recorded_counts_as_complete(bench: Bench) -> None:
    stream, event, arena = bench.stream(), bench.event(), bench.arena()
    bench.do("cuEventQuery", event)
    bench.do("cuEventSynchronize", event)
    bench.do("cuStreamWaitEvent", stream, event, 0)
    bench.h2d(arena, bench.pinned(value=1), stream)
    bench.do("cuStreamSynchronize", stream)
    assert (arena == 1).all()


def test_a_wait_orders_after_the_record_before_it(bench: Bench) -> None:
    lane, reader, ready, arena = bench.stream(), bench.stream(), bench.event(), bench.arena()
    bench.sim.hold_stream(lane)
    bench.h2d(arena, bench.pinned(value=1), lane)
    bench.do("cuEventRecord", ready, lane)
    bench.do("cuStreamWaitEvent", reader, ready, 0)
    found = bench.consume(arena, reader)
    assert bench.code("cuEventQuery", ready) == NOT_READY
    assert bench.code("cuStreamQuery", reader) == NOT_READY
    bench.sim.hold_stream(lane, False)
    bench.do("cuStreamSynchronize", reader)
    assert (found == 1).all()
    bench.do("cuEventQuery", ready)


def test_recording_again_does_not_disturb_earlier_waits(bench: Bench) -> None:
    done, held, reader, event = bench.stream(), bench.stream(), bench.stream(), bench.event()
    bench.sim.hold_stream(done)
    bench.sim.hold_stream(held)
    bench.do("cuEventRecord", event, done)
    bench.do("cuStreamWaitEvent", reader, event, 0)
    bench.do("cuEventRecord", event, held)
    bench.sim.hold_stream(done, False)
    bench.do("cuStreamSynchronize", reader)
    assert bench.code("cuEventQuery", event) == NOT_READY
    bench.sim.hold_stream(held, False)
    bench.do("cuEventSynchronize", event)


def test_streams_without_order_overtake_each_other(bench: Bench) -> None:
    winners = set()
    for seed in range(200):
        bench.sim.reset(seed, max_delay_us=300)
        bench.enter(0)
        arena = bench.arena()
        for value in [1, 2]:
            bench.h2d(arena, bench.pinned(value=value), bench.stream())
        bench.sim.drain()
        winners.update(arena)
        if winners == {1, 2}:
            return
    pytest.fail(f"only {winners} ever came last")


def test_a_destroyed_stream_finishes_its_work(bench: Bench) -> None:
    stream, event, arena = bench.stream(), bench.event(), bench.arena()
    source = bench.pinned(value=1)
    bench.sim.hold_stream(stream)
    bench.h2d(arena, source, stream)
    bench.do("cuEventRecord", event, stream)
    other = bench.stream()
    bench.do("cuStreamWaitEvent", other, event, 0)
    bench.do("cuStreamDestroy_v2", stream)
    bench.do("cuEventDestroy_v2", event)
    bench.do("cuStreamSynchronize", other)
    assert (arena == 1).all()
    assert bench.code("cuStreamSynchronize", stream) == INVALID_HANDLE
    assert bench.code("cuEventQuery", event) == INVALID_HANDLE
    assert bench.code("cuStreamDestroy_v2", None) == INVALID_HANDLE
    assert bench.count("num_bad_handles") == 2


def test_devices_share_waits_and_no_records(bench: Bench) -> None:
    stream, event = bench.stream(), bench.event()
    bench.enter(1)
    foreign, arena = bench.stream(), bench.arena(device=1)
    assert bench.code("cuEventRecord", event, foreign) == INVALID_HANDLE
    assert bench.code("cuEventRecord", event, None) == INVALID_HANDLE
    at = arena.ctypes.data
    assert bench.code("cuMemsetD8Async", at, 0, NBYTES, stream) == INVALID_HANDLE
    bench.do("cuEventRecord", event, stream)
    bench.do("cuStreamWaitEvent", foreign, event, 0)
    assert bench.h2d(arena, bench.pinned(), foreign) == 0


def test_what_slows_others_down_is_counted(bench: Bench) -> None:
    bench.make("cuStreamCreate", 0)
    bench.make("cuStreamCreateWithPriority", NON_BLOCKING, -1)
    bench.make("cuEventCreate", 0)
    bench.make("cuEventCreate", DISABLE_TIMING | 1)
    counts = bench.sim.counts()
    assert counts["num_blocking_streams"] == 1
    assert counts["num_timing_events"] == 1


def test_blocking_the_host_is_counted_by_thread(bench: Bench) -> None:
    event = bench.event()
    bench.do("cuEventSynchronize", event)
    bench.sim.mark_caller_thread()
    bench.do("cuEventSynchronize", event)
    bench.do("cuStreamSynchronize", None)
    assert bench.count("num_synchronize") == 3
    assert bench.count("num_synchronize_caller") == 2


def test_a_stream_that_is_captured_answers_no_questions(bench: Bench) -> None:
    stream, event, other = bench.stream(), bench.event(), bench.event()
    status = ctypes.c_int()
    bench.do("cuEventRecord", event, stream)
    bench.sim.set_capturing(stream)
    bench.do("cuStreamIsCapturing", stream, status)
    assert status.value == 1
    for name, handle in [
        ("cuStreamSynchronize", stream),
        ("cuStreamQuery", stream),
        ("cuEventQuery", event),
        ("cuEventSynchronize", event),
    ]:
        assert bench.code(name, handle) == CAPTURE_UNSUPPORTED
    bench.do("cuEventQuery", other)
    bench.sim.set_capturing(stream, 2)
    assert bench.code("cuEventQuery", other) == CAPTURE_UNSUPPORTED
    bench.sim.set_capturing(stream, 0)
    bench.do("cuStreamIsCapturing", stream, status)
    assert status.value == 0
    bench.do("cuEventSynchronize", event)


# -- the caller's stream -----------------------------------------------------------------------


def current_stream(sim: Any, device: int = 0) -> int:
    stream = ctypes.c_void_p()
    assert sim.library.aoti_torch_get_current_cuda_stream(device, stream) == 0
    return stream.value or 0


def test_a_threads_own_stream_goes_before_the_processes(sim: Any) -> None:
    streams = [sim.create_stream(0), sim.create_stream(0), sim.create_stream(1)]
    assert current_stream(sim) == 0
    sim.set_default_stream(streams[0])
    assert current_stream(sim) == streams[0]
    sim.set_current_stream(streams[1])
    sim.set_current_stream(streams[2])
    assert (current_stream(sim, 0), current_stream(sim, 1)) == (streams[1], streams[2])
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(current_stream(sim)))
    thread.start()
    thread.join()
    assert seen == [streams[0]]
    sim.set_current_stream(None)
    assert (current_stream(sim, 0), current_stream(sim, 1)) == (streams[0], 0)
    assert not sim.leaks()


def test_torch_has_no_stream_for_a_device_that_is_not_there(sim: Any) -> None:
    assert sim.library.aoti_torch_get_current_cuda_stream(2, ctypes.c_void_p()) == 1


def test_the_current_stream_can_be_the_host_itself(bench: Bench) -> None:
    for seed in range(20):
        bench.sim.reset(seed, max_delay_us=300)
        bench.enter(0)
        lane, ready, arena = bench.stream(), bench.event(), bench.arena()
        bench.sim.set_inline_current(True)
        bench.h2d(arena, bench.pinned(value=1), lane)
        bench.do("cuEventRecord", ready, lane)
        bench.do("cuStreamWaitEvent", None, ready, 0)
        assert (arena == 1).all()
        assert bench.h2d(arena, bench.pinned(value=2), None) == 0
        assert (arena == 2).all()
        bench.do("cuEventRecord", ready, None)
        bench.do("cuEventQuery", ready)
        assert bench.count("num_synchronize") == 0


# -- waits that somebody forgot ----------------------------------------------------------------

NUM_ROUNDS = 4


def stream_weights(bench: Bench, seed: int, drop: str, polls: bool = False) -> list[int]:
    """A ring of one slot and one arena: the values that each round's kernel found."""
    bench.sim.reset(seed, max_delay_us=300)
    bench.enter(0)
    lane, current = bench.stream(), bench.sim.create_stream()
    ready, free = bench.event(), bench.event()
    slot, arena = bench.pinned(), bench.arena()
    bench.sim.drop(drop)
    found = []
    for number in range(NUM_ROUNDS):
        if polls:
            while bench.code("cuEventQuery", ready) == NOT_READY:
                pass
        else:
            bench.do("cuEventSynchronize", ready)
        slot[:] = number
        bench.do("cuStreamWaitEvent", lane, free, 0)
        assert bench.h2d(arena, slot, lane) == 0
        bench.do("cuEventRecord", ready, lane)
        bench.do("cuStreamWaitEvent", current, ready, 0)
        found.append(bench.consume(arena, current))
        bench.do("cuEventRecord", free, current)
    bench.sim.drain()
    return [int(memory[0]) if len(set(memory)) == 1 else -1 for memory in found]


@pytest.mark.parametrize("polls", [False, True])
def test_weights_are_right_with_all_waits(bench: Bench, polls: bool) -> None:
    for seed in range(20):
        assert stream_weights(bench, seed, "", polls) == list(range(NUM_ROUNDS))
        assert bench.count("num_dropped") == 0


@pytest.mark.parametrize(
    "drop",
    ["wait:lane", "wait:current", "record:lane", "record:current", "synchronize", "query"],
)
def test_weights_are_wrong_for_some_seed_without(bench: Bench, drop: str) -> None:
    for seed in range(300):
        if stream_weights(bench, seed, drop, polls=drop == "query") != list(range(NUM_ROUNDS)):
            assert bench.count("num_dropped") > 0
            return
    pytest.fail(f"nobody missed {drop}")


def test_a_single_call_can_be_dropped(bench: Bench) -> None:
    held, lane, event = bench.stream(), bench.stream(), bench.event()
    bench.sim.hold_stream(held)
    bench.do("cuEventRecord", event, held)
    bench.sim.drop("query,wait:lane#1")
    bench.do("cuEventQuery", event)
    for _ in range(3):
        bench.do("cuStreamWaitEvent", lane, event, 0)
    assert bench.count("num_dropped") == 2
    bench.sim.drop("")
    assert bench.code("cuEventQuery", event) == NOT_READY
    with pytest.raises(ValueError, match="sim_drop"):
        bench.sim.drop("wait:somewhere")


# -- failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in DRIVER_CALLS if name not in DESCRIBING])
def test_any_call_can_be_made_to_fail(bench: Bench, name: str) -> None:
    bench.sim.fail(name.removesuffix("_v2"), 0, OUT_OF_MEMORY)
    assert bench.empty(name) == OUT_OF_MEMORY
    assert bench.count("num_failures") == 1
    assert bench.sim.calls()[name] >= 1
    bench.do("cuCtxGetDevice", ctypes.c_int())


def test_torchs_own_call_can_be_made_to_fail(bench: Bench) -> None:
    bench.sim.fail("aoti_torch_get_current_cuda_stream", 0, 1)
    assert bench.empty("aoti_torch_get_current_cuda_stream") == 1


def test_the_nth_call_fails_and_the_next_does_not(bench: Bench) -> None:
    bench.sim.fail("cuCtxGetDevice", 2, LAUNCH_FAILED)
    bench.sim.fail("*", 4, OUT_OF_MEMORY)
    codes = [bench.code("cuCtxGetDevice", ctypes.c_int()) for _ in range(6)]
    assert codes == [0, 0, LAUNCH_FAILED, 0, OUT_OF_MEMORY, 0]


def test_a_lost_context_answers_every_call_alike(bench: Bench) -> None:
    bench.sim.fail("*", 0, ILLEGAL_ADDRESS, sticky=True)
    for name in DRIVER_CALLS:
        if name not in DESCRIBING:
            assert bench.empty(name) == ILLEGAL_ADDRESS, name
    bench.do("cuGetErrorName", ILLEGAL_ADDRESS, ctypes.c_char_p())


def test_a_lost_context_lets_go_of_what_is_released(bench: Bench) -> None:
    stream, event, memory = bench.stream(), bench.event(), bench.pinned()
    bench.sim.fail("*", 0, ILLEGAL_ADDRESS, sticky=True)
    assert bench.empty("cuCtxGetDevice") == ILLEGAL_ADDRESS
    assert len(bench.sim.leaks()) == 6
    for name, argument in [
        ("cuMemHostUnregister", memory.ctypes.data),
        ("cuEventDestroy_v2", event),
        ("cuStreamDestroy_v2", stream),
        ("cuCtxPopCurrent_v2", None),
        ("cuDevicePrimaryCtxRelease_v2", 0),
    ]:
        assert bench.code(name, argument) == ILLEGAL_ADDRESS
    assert not bench.sim.leaks()


def test_a_copy_that_fails_later_loses_the_context(bench: Bench) -> None:
    stream, event, source = bench.stream(), bench.event(), bench.pinned(value=1)
    arenas = [bench.arena() for _ in range(3)]
    bench.sim.fail_async(1, ILLEGAL_ADDRESS)
    bench.sim.hold_stream(stream)
    for arena in arenas:
        assert bench.h2d(arena, source, stream) == 0
    bench.do("cuEventRecord", event, stream)
    bench.sim.hold_stream(stream, False)
    assert bench.code("cuEventSynchronize", event) == ILLEGAL_ADDRESS
    assert bench.code("cuEventQuery", event) == ILLEGAL_ADDRESS
    assert [int(arena[0]) for arena in arenas] == [1, simcuda.GARBAGE, simcuda.GARBAGE]


def test_a_driver_that_is_gone_says_so(bench: Bench) -> None:
    stream = bench.stream()
    bench.sim.enqueue_delay(stream, 10**9)
    bench.sim.deinitialise()
    names = [name for name in DRIVER_CALLS if name not in DESCRIBING]
    for name in names:
        assert bench.empty(name) == DEINITIALIZED, name
    assert bench.count("num_calls_after_shutdown") == len(names)


def test_leaks_are_what_a_closed_program_still_holds(bench: Bench) -> None:
    stream, event, memory = bench.stream(), bench.event(), bench.pinned()
    assert bench.sim.leaks() == {
        "live_streams": 1,
        "live_events": 1,
        "registered_ranges": 1,
        "registered_bytes": NBYTES,
        "retains": 1,
        "push_balance_total": 1,
    }
    bench.do("cuMemHostUnregister", memory.ctypes.data)
    bench.do("cuEventDestroy_v2", event)
    bench.do("cuStreamDestroy_v2", stream)
    bench.leave()
    assert not bench.sim.leaks()


def test_a_deadlock_ends_in_a_report(library_path: Path) -> None:
    program = """
cuda = sim.library
sim.set_patience(0.2)
cuda.cuInit(0)
context, held, blocked, event = (ctypes.c_void_p() for _ in range(4))
cuda.cuDevicePrimaryCtxRetain(context, 0)
cuda.cuCtxPushCurrent_v2(context)
cuda.cuStreamCreate(held, 1)
cuda.cuStreamCreate(blocked, 1)
cuda.cuEventCreate(event, 2)
sim.hold_stream(held.value)
cuda.cuEventRecord(event, held)
cuda.cuStreamWaitEvent(blocked, event, 0)
cuda.cuStreamSynchronize(blocked)
"""
    done = run_process(library_path, program)
    assert done.returncode == -signal.SIGABRT
    assert "stream 2 waits for record 1 of event 3 on stream 1" in done.stderr
    assert "a host thread, in cuStreamSynchronize, waits for the end of stream 2" in done.stderr
    assert "stream 1 on device 0, held by the test: 0 of 1 operations done" in done.stderr


# -- resets ------------------------------------------------------------------------------------


def test_a_reset_forgets_everything(bench: Bench) -> None:
    for _ in range(200):
        bench.sim.drop("query")
        bench.sim.fail("cuEventQuery", 5, OUT_OF_MEMORY)
        bench.sim.set_registered_limit(NBYTES)
        stream, source, arena = bench.stream(), bench.pinned(), bench.arena()
        bench.sim.enqueue_delay(stream, 10**9)
        bench.h2d(arena, source, stream)
        bench.sim.reset()
        assert not bench.sim.leaks()
        assert not bench.sim.calls()
        assert sum(value for value in bench.sim.counts().values() if isinstance(value, int)) == 0
        assert (arena == simcuda.GARBAGE).all()
        bench.enter(0)
        assert bench.code("cuStreamSynchronize", stream) == INVALID_HANDLE
