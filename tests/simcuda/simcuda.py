"""Builds and steers the simulated `libcuda.so.1`: CUDA's driver calls over host memory.

The library's streams are threads that run late by seeded delays, its "device memory" is host memory
that a test declares, and it counts what a program may not do. Load it before the program under test
looks for `libcuda.so.1`: the loader then finds this one by its name.

    simulator = simcuda.load(simcuda.build(folder))
    simulator.reset(seed=3, max_delay_us=500)
    ...
    assert not simulator.leaks()
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import uuid
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCES = ["world.cpp", "gate.cpp", "calls_context.cpp", "calls_stream.cpp"]
SOURCES += ["calls_memory.cpp", "calls_kvikio.cpp", "controls.cpp"]
SONAME = "libcuda.so.1"
FLAGS = "-std=c++20 -O1 -g -Wall -Wextra -Werror -fPIC -pthread -fvisibility=hidden"
# What declared device memory holds before anything is copied to it.
GARBAGE = 0xDB

# -- building ----------------------------------------------------------------------------------


def build(folder: Path, soname: str = SONAME) -> Path:
    """Makes the simulator `folder / soname`, unless it is there and newer than its sources.

    Another `soname` than the driver's keeps the loader from taking it for the driver.
    """
    newest_source = max(path.stat().st_mtime for path in [Path(__file__), *HERE.glob("*.h")])
    newest_source = max(newest_source, *((HERE / name).stat().st_mtime for name in SOURCES))

    def make(target: Path, arguments: list[str], program: str = "") -> Path:
        if target.exists() and target.stat().st_mtime > newest_source:
            return target
        unfinished = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
        command = [*os.environ.get("CXX", "g++").split(), *FLAGS.split()]
        command += ["-o", str(unfinished), *arguments]
        done = subprocess.run(command, input=program, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the simulator cannot be built:\n{done.stderr}")
        return unfinished.replace(target)

    # As one translation unit they compile in a third of the time.
    program = "".join(f'#include "{name}"\n' for name in SOURCES)
    compiled = make(folder / "simcuda.o", [f"-I{HERE}", "-c", "-x", "c++", "-"], program)
    return make(folder / soname, ["-shared", f"-Wl,-soname,{soname}", str(compiled)])


# -- loading -----------------------------------------------------------------------------------

CONTROLS: dict[str, tuple[Any, list[Any]]] = {
    "sim_reset": (None, [c_uint64, c_int64]),
    "sim_set_device_count": (c_int, [c_int]),
    "sim_set_patience": (None, [c_int64]),
    "sim_declare_device": (c_int, [c_void_p, c_int64, c_int]),
    "sim_forget_device": (c_int, [c_void_p]),
    "sim_set_any_memory_is_device": (None, [c_int]),
    "sim_set_registered_limit": (None, [c_int64]),
    "sim_create_stream": (c_void_p, [c_int]),
    "sim_set_current_stream": (c_int, [c_void_p]),
    "sim_set_default_stream": (c_int, [c_void_p]),
    "sim_mark_caller_thread": (None, []),
    "sim_set_inline_current": (None, [c_int]),
    "sim_hold_stream": (c_int, [c_void_p, c_int]),
    "sim_set_capturing": (c_int, [c_void_p, c_int]),
    "sim_enqueue_delay": (c_int, [c_void_p, c_int64]),
    "sim_enqueue_copy": (c_int, [c_void_p, c_void_p, c_void_p, c_int64]),
    "sim_drain": (c_int, []),
    "sim_fail": (None, [c_char_p, c_int64, c_int, c_int]),
    "sim_fail_async": (None, [c_int64, c_int]),
    "sim_deinitialise": (None, []),
    "sim_drop": (c_int, [c_char_p]),
    "sim_calls": (c_int64, [c_char_p, c_int64]),
    "sim_counts": (c_int64, [c_char_p, c_int64]),
}

# Arguments of the driver's calls; all return a CUresult.
DRIVER: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuDriverGetVersion": [POINTER(c_int)],
    "cuGetErrorName": [c_int, POINTER(c_char_p)],
    "cuGetErrorString": [c_int, POINTER(c_char_p)],
    "cuGetProcAddress_v2": [c_char_p, POINTER(c_void_p), c_int, c_uint64, POINTER(c_int)],
    "cuDeviceGetCount": [POINTER(c_int)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetName": [c_char_p, c_int, c_int],
    "cuDeviceGetAttribute": [POINTER(c_int), c_int, c_int],
    "cuDevicePrimaryCtxRetain": [POINTER(c_void_p), c_int],
    "cuDevicePrimaryCtxRelease_v2": [c_int],
    "cuCtxPushCurrent_v2": [c_void_p],
    "cuCtxPopCurrent_v2": [POINTER(c_void_p)],
    "cuCtxSetCurrent": [c_void_p],
    "cuCtxGetCurrent": [POINTER(c_void_p)],
    "cuCtxGetDevice": [POINTER(c_int)],
    "cuStreamCreate": [POINTER(c_void_p), c_uint],
    "cuStreamCreateWithPriority": [POINTER(c_void_p), c_uint, c_int],
    "cuStreamDestroy_v2": [c_void_p],
    "cuStreamSynchronize": [c_void_p],
    "cuStreamQuery": [c_void_p],
    "cuStreamWaitEvent": [c_void_p, c_void_p, c_uint],
    "cuStreamIsCapturing": [c_void_p, POINTER(c_int)],
    "cuThreadExchangeStreamCaptureMode": [POINTER(c_int)],
    "cuEventCreate": [POINTER(c_void_p), c_uint],
    "cuEventDestroy_v2": [c_void_p],
    "cuEventRecord": [c_void_p, c_void_p],
    "cuEventQuery": [c_void_p],
    "cuEventSynchronize": [c_void_p],
    "cuMemcpyHtoDAsync_v2": [c_uint64, c_void_p, c_size_t, c_void_p],
    "cuMemcpyDtoHAsync_v2": [c_void_p, c_uint64, c_size_t, c_void_p],
    "cuMemcpyDtoDAsync_v2": [c_uint64, c_uint64, c_size_t, c_void_p],
    "cuMemsetD8Async": [c_uint64, ctypes.c_ubyte, c_size_t, c_void_p],
    "cuMemHostRegister_v2": [c_void_p, c_size_t, c_uint],
    "cuMemHostUnregister": [c_void_p],
    "cuPointerGetAttribute": [c_void_p, c_int, c_uint64],
    "cuPointerGetAttributes": [c_uint, POINTER(c_int), POINTER(c_void_p), c_uint64],
    "aoti_torch_get_current_cuda_stream": [c_int32, POINTER(c_void_p)],
}


def load(path: Path, mode: int = ctypes.RTLD_GLOBAL) -> Sim:
    """Loads a built simulator into this process, for everyone who looks for it afterwards."""
    return Sim(ctypes.CDLL(str(path), mode=mode))


class Sim:
    """The controls of a loaded simulator. There is one world per process.

    Streams are the driver's handles, as integers; None or 0 is the legacy default stream of the
    thread's current device. A control that is given a stream or memory that it does not know, or a
    word that it does not know, raises ValueError.

    `library` has the driver's own functions, with their argument types set.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        for name, (result, arguments) in CONTROLS.items():
            function = getattr(library, name)
            function.restype = result
            function.argtypes = arguments
        for name, arguments in DRIVER.items():
            getattr(library, name).argtypes = arguments

    def _control(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            raise ValueError(f"{name}{arguments} is refused with code {code}")

    # -- the world -----------------------------------------------------------------------------

    def reset(self, seed: int = 0, max_delay_us: int = 0) -> None:
        """Forgets everything but that cuInit was called: settings, counts, failures, handles.

        Operations still queued are dropped, and their threads joined. No other thread may be in a
        call. Afterwards each stream draws from `seed` whether it is instant, uneven or slow, and
        is late by at most `max_delay_us` before each operation.
        """
        self._control("sim_reset", seed, max_delay_us)

    def set_device_count(self, count: int) -> None:
        """The number of devices, 2 unless told; with 0 cuInit fails with NO_DEVICE."""
        self._control("sim_set_device_count", count)

    def set_patience(self, seconds: float) -> None:
        """How long nothing may move while somebody waits before the process is aborted; 20 s."""
        self._control("sim_set_patience", int(seconds * 1000))

    # -- memory --------------------------------------------------------------------------------

    def declare_device(self, pointer: int, nbytes: int, device: int = 0) -> None:
        """Makes host memory pass for a device's; it is filled with GARBAGE."""
        self._control("sim_declare_device", pointer, nbytes, device)

    def forget_device(self, pointer: int) -> None:
        """Takes back a declaration. Nothing touches the memory once this returns.

        With operations still queued on it, this counts as `num_use_after_free`.
        """
        self._control("sim_forget_device", pointer)

    def set_any_memory_is_device(self, on: bool) -> None:
        """Accepts any memory as a device's, declared or not, and looks no further."""
        self._control("sim_set_any_memory_is_device", on)

    def set_registered_limit(self, nbytes: int) -> None:
        """Bytes that may be registered at a time, beyond which it is OUT_OF_MEMORY; -1: any."""
        self._control("sim_set_registered_limit", nbytes)

    # -- the program's caller ------------------------------------------------------------------

    def create_stream(self, device: int = 0) -> int:
        """A stream that the caller of the program computes on; it counts as no leak."""
        return int(self.library.sim_create_stream(device))

    def set_current_stream(self, stream: int | None) -> None:
        """Torch's current stream of the calling thread, on the stream's device.

        None takes back all the thread has set: then the process's streams are current, else the
        legacy default stream. A stream that was ever current is one of the caller's; every other
        is a lane.
        """
        self._control("sim_set_current_stream", stream)

    def set_default_stream(self, stream: int | None) -> None:
        """Torch's current stream, on its device, of all threads that have set none."""
        self._control("sim_set_default_stream", stream)

    def mark_caller_thread(self) -> None:
        """From now on this thread's host-blocking calls count as `num_synchronize_caller`."""
        self._control("sim_mark_caller_thread")

    def set_inline_current(self, on: bool) -> None:
        """Makes the caller's streams be the host thread itself, for models that run on the CPU.

        What is enqueued on them is done when the call returns; a wait blocks the host.
        """
        self._control("sim_set_inline_current", on)

    # -- streams -------------------------------------------------------------------------------

    def hold_stream(self, stream: int | None, on: bool = True) -> None:
        """A held stream starts nothing until it is let go, or destroyed."""
        self._control("sim_hold_stream", stream, on)

    def set_capturing(self, stream: int | None, mode: int = 1) -> None:
        """0: no; 1: the stream is captured; 2: and in the global mode, which forbids all queries.

        What is enqueued on it is executed all the same.
        """
        self._control("sim_set_capturing", stream, mode)

    def enqueue_delay(self, stream: int | None, us: int) -> None:
        """A kernel that takes time."""
        self._control("sim_enqueue_delay", stream, us)

    def enqueue_copy(self, stream: int | None, to: int, source: int, nbytes: int) -> None:
        """A kernel that reads device memory, piece by piece, when it executes."""
        self._control("sim_enqueue_copy", stream, to, source, nbytes)

    def drain(self) -> None:
        """Waits until all streams have done what is enqueued; counted nowhere."""
        self._control("sim_drain")

    # -- failures ------------------------------------------------------------------------------

    def fail(self, call: str, nth: int, code: int, sticky: bool = False) -> None:
        """The nth call of that name from now on does nothing and returns `code`.

        `call` is a name with or without its version, or "*" for any. Sticky: the context is lost,
        and every later call but cuGetError* returns `code` too; those that release something
        release it nevertheless.
        """
        self._control("sim_fail", call.encode(), nth, code, sticky)

    def fail_async(self, nth_copy: int, code: int) -> None:
        """The nth copy from now on is accepted; when it executes, the context is lost instead."""
        self._control("sim_fail_async", nth_copy, code)

    def deinitialise(self) -> None:
        """The driver is gone, as at the end of a process: every call returns DEINITIALIZED."""
        self._control("sim_deinitialise")

    def drop(self, what: str) -> None:
        """Leaves out calls, as if the program had forgotten them: they succeed and do nothing.

        Words separated by commas; "" for none: wait:lane, wait:current (cuStreamWaitEvent on a
        lane, or on a stream of the caller), record:lane, record:current, query (any event is
        done), synchronize (cuEventSynchronize returns at once). "wait:lane#3" is one such call
        from now on, counted from 0. `counts()["num_dropped"]` says whether it met any.
        """
        self._control("sim_drop", what.encode())

    # -- questions -----------------------------------------------------------------------------

    def _question(self, name: str) -> dict[str, Any]:
        text = ctypes.create_string_buffer(1 << 16)
        length = getattr(self.library, name)(text, len(text))
        assert length < len(text)
        return dict(json.loads(text.value))

    def calls(self) -> dict[str, int]:
        """How often each call was made since the reset, failed ones included, by exported name."""
        return self._question("sim_calls")

    def counts(self) -> dict[str, Any]:
        """What lives, what was copied, and what a program should not have done.

        `push_balance` is the calling thread's; `retains` is a list by device.
        """
        return self._question("sim_counts")

    def leaks(self) -> dict[str, int]:
        """What a closed program still holds, by name; empty if nothing."""
        counts = self.counts()
        counts["retains"] = sum(counts["retains"])
        kinds = ["live_streams", "live_events", "registered_ranges", "registered_bytes"]
        kinds += ["retains", "push_balance_total"]
        return {kind: counts[kind] for kind in kinds if counts[kind] != 0}
