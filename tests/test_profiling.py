"""Ranges as a profiler sees them: a tool of our own (nvtx_tool.cpp) is attached, and tells all."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nexus_ext import _native, profiling
from nexus_ext.profiling import annotate
from nexus_ext.quant.packing import NF4

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
LIBRARY = Path(str(_native.__file__))

Event = dict[str, Any]
# What began inside of a range: (name, bytes, ranges inside).
Ranges = list[tuple[str, int, Any]]
Run = Callable[..., str]
Record = Callable[..., list[Event]]


def folders_with_headers() -> list[Path]:
    """As setup.py finds them."""
    wheels = [folder for entry in sys.path for folder in Path(entry).glob("nvidia/*/include")]
    toolkits = [Path(os.environ["CUDA_HOME"]) / "include"] if os.environ.get("CUDA_HOME") else []
    found = [*wheels, *toolkits, Path("/usr/include")]
    return [folder for folder in found if (folder / "nvtx3/nvToolsExt.h").exists()]


@pytest.fixture(scope="module")
def headers() -> Path:
    if not folders_with_headers():
        pytest.skip("needs NVTX's headers: pip install nvidia-nvtx")
    return folders_with_headers()[0]


def compile_native(*arguments: object) -> None:
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    done = subprocess.run(
        ["c++", *flags, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def tool(headers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("tool") / "tool.so"
    compile_native(
        *("-shared", "-fPIC", "-isystem", headers, TESTS / "nvtx_tool.cpp", "-o", library)
    )
    return library


@pytest.fixture
def attached(tool: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a process that is profiled."""
    events = str(tmp_path / "events")
    return {"NVTX_INJECTION64_PATH": str(tool), "NEXUS_TEST_EVENTS": events}


def events_of(attached: dict[str, str]) -> list[Event]:
    path = Path(attached["NEXUS_TEST_EVENTS"])
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert {event["domain"] for event in events} <= {"nexus"}
    return events


@pytest.fixture
def record(attached: dict[str, str], run_python: Run) -> Record:
    """Run a script, profiled; its events, all of which are of our domain."""

    def run(script: str, *args: object, **environment: str) -> list[Event]:
        run_python(script, *args, **attached, **environment)
        return events_of(attached)

    return run


def nested(events: list[Event]) -> Ranges:
    """The ranges of one thread, each with those inside."""
    assert len({event["thread"] for event in events}) == 1
    open_ranges: list[Ranges] = [[]]
    for event in events:
        if event["event"] == "push":
            inside: Ranges = []
            open_ranges[-1].append((event["name"], event["nbytes"], inside))
            open_ranges.append(inside)
        else:
            assert event["event"] == "pop"
            open_ranges.pop()
            assert open_ranges, "more pops than pushes"
    assert len(open_ranges) == 1, "more pushes than pops"
    return open_ranges[0]


# -- Python ------------------------------------------------------------------------------------

ANNOTATE = """
import torch
from nexus_ext.profiling import annotate

with annotate("copy", 7):
    with annotate("read", 1 << 40):
        pass
    with annotate("wait", torch.zeros(3, 5, dtype=torch.bfloat16)):
        pass
try:
    with annotate("dequantize", 0):
        raise KeyError
except KeyError:
    pass
"""


def test_ranges_nest_and_have_names_and_bytes(record: Record) -> None:
    assert nested(record(ANNOTATE)) == [
        ("copy", 7, [("read", 1 << 40, []), ("wait", 30, [])]),
        ("dequantize", 0, []),
    ]


# -- dequantise ----------------------------------------------------------------------------------

# 67 * 64 elements: 2144 bytes of 4-bit codes, in 67 blocks.
PACKED = """
import torch
import nexus_ext
from nexus_ext.quant import cuda, reference
from nexus_ext.quant.packing import GGML, INT8, NF4, NestedNF4

ops, shape, f32 = torch.ops.nexus, (67, 64), torch.float32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
weight = torch.randn(shape)
q, absmax = ops.quantize_nf4(weight, 64)
want = reference.dequantize_nf4(q, absmax, 64, shape, f32)
"""
NATIVE = """
assert torch.equal(ops.dequantize_nf4(q, absmax, 64, shape, f32), want)
ops.dequantize_nf4.out(q, absmax, 64, shape, f32, out=torch.empty(shape))
q, absmax, nested_absmax, offset = ops.quantize_nf4_nested(weight, 64)
code = torch.arange(256.0)
ops.dequantize_nf4_nested(q, absmax, nested_absmax, code, offset, 64, 256, shape, f32)
q, scale = ops.quantize_int8(weight)
ops.dequantize_int8(q, scale, f32)
ops.dequantize_ggml(torch.zeros(67 * 2 * 18, dtype=torch.uint8), "q4_0", shape, f32)
"""
EAGER = """
NF4(shape, 64).decode({"q": q, "absmax": absmax}, f32)
q, scale = ops.quantize_int8(weight)
INT8(shape).decode({"q": q, "scale": scale}, f32)
"""
GROUPED = """
arena = torch.cat([q, absmax.view(torch.uint8), q, absmax.view(torch.uint8)])
offsets = torch.tensor([[0, 2144], [2412, 2412 + 2144]])
both = ops.dequantize_nf4_grouped(arena, offsets, None, None, 64, 256, 2, shape, f32)
assert torch.equal(both[1], want)
"""
LAUNCH = """
import warnings
warnings.simplefilter("ignore")  # numpy's, which interprets
out = torch.empty(shape, device=DEVICE)
q, absmax = q.to(DEVICE), absmax.to(DEVICE)
cuda.KERNELS["dequantize_nf4.out"](q, absmax, 64, shape, f32, out=out)
assert torch.equal(out.cpu(), want)
arena = torch.cat([q, absmax.view(torch.uint8)])
offsets = torch.tensor([[0, 2144]], device=DEVICE)
cuda.KERNELS["dequantize_nf4_grouped"](arena, offsets, None, None, 64, 256, 1, shape, f32)
q, scale = ops.quantize_int8(weight.to(DEVICE))
cuda.KERNELS["dequantize_int8"](q, scale, f32)
"""

STREAMED = """
import tempfile
import torch
from nexus_ext.checkpoint import Extent, File, Group, Stamp
from nexus_ext.engine import Engine, ReadMode
with tempfile.NamedTemporaryFile() as file:
    file.write(bytes(40000))
    file.flush()
    groups = [Group("g", (), (Extent(0, 1000 * i + 1, 9000, 0),), 9000) for i in range(3)]
    arenas = [torch.zeros(9000, dtype=torch.uint8) for _ in range(2)]
    engine = Engine([File(file.name, Stamp.of(file.fileno()))], ReadMode(io="direct"))
    engine.attach(arenas, groups, [0, 1, 0], range(3), 1)
    for group, arena in ((0, 0), (1, 1), (2, 0)):
        engine.acquire(group, arenas[arena])
    engine.close()
"""


@pytest.fixture
def native_ranges(headers: Path) -> None:
    """The library under test was built with NVTX, since its headers are here."""
    assert b"InitializeInjectionNvtx2" in LIBRARY.read_bytes(), (
        "the library was built before NVTX's headers came: python setup.py build_ext --inplace"
    )


@pytest.mark.usefixtures("native_ranges")
def test_every_native_dequantize_is_a_range_with_its_packed_bytes(record: Record) -> None:
    sizes = [2144, 2144, 2144, 67 * 64, 67 * 2 * 18]
    assert nested(record(PACKED + NATIVE)) == [("dequantize", size, []) for size in sizes]


@pytest.mark.usefixtures("native_ranges")
def test_each_unit_of_a_group_is_a_range(record: Record) -> None:
    assert nested(record(PACKED + GROUPED)) == [("dequantize", 2144, [])] * 2


@pytest.mark.usefixtures("native_ranges")
def test_a_packing_decodes_in_one_range(record: Record) -> None:
    assert nested(record(PACKED + EAGER)) == [("dequantize", size, []) for size in (2144, 67 * 64)]


@pytest.mark.usefixtures("native_ranges")
def test_reads_copies_and_waits_are_ranges_with_their_bytes(record: Record) -> None:
    events = [event for event in record(STREAMED) if event["event"] in ("push", "start")]
    sizes = {name: {e["nbytes"] for e in events if e["name"] == name} for name in ("copy", "wait")}
    assert sizes == {"copy": {9000}, "wait": {9000}}
    # A read is of the aligned pages around, where files are read in such.
    reads = [event["nbytes"] for event in events if event["name"] == "read"]
    assert len(reads) >= 3
    assert min(reads) >= 9000


def test_every_launch_on_a_gpu_is_a_range(record: Record) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton: pip install 'nexus_ext[triton]'")
    environment = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    assert nested(record(PACKED + LAUNCH, **environment)) == [
        ("dequantize", size, []) for size in (2144, 2144, 67 * 64)
    ]


# -- without a tool ------------------------------------------------------------------------------

DETACHED = """
import os
os.environ.pop("NVTX_INJECTION64_PATH", None)
"""


def test_without_a_tool_nothing_happens(attached: dict[str, str], run_python: Run) -> None:
    same = 'print(annotate("read", 1) is annotate("copy", torch.zeros(2)))'
    assert run_python(DETACHED + ANNOTATE + PACKED + NATIVE + same, **attached).strip() == "True"
    assert events_of(attached) == []


# -- torch.compile -------------------------------------------------------------------------------

COMPILED = """
from nexus_ext.profiling import annotate

packing, parts = NF4(shape, 64), {"q": q, "absmax": absmax}

def run(x):
    with annotate("copy", x):
        return x @ packing.decode(parts, f32).t()

torch._dynamo.config.error_on_recompile = True
compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
for num_rows in (2, 3, 4):
    x = torch.randn(num_rows, 64)
    assert torch.equal(compiled(x), x @ want.t())
"""


@pytest.mark.usefixtures("native_ranges")
def test_what_is_compiled_has_the_native_ranges_alone(record: Record) -> None:
    assert nested(record(PACKED + COMPILED)) == [("dequantize", 2144, [])] * 3


def test_a_range_neither_breaks_a_graph_nor_makes_another() -> None:
    weight = torch.randn(8, 64)
    q, absmax = torch.ops.nexus.quantize_nf4(weight, 64)
    parts, packing = {"q": q, "absmax": absmax}, NF4((8, 64), 64)
    num_graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        nonlocal num_graphs
        num_graphs += 1
        return graph

    @torch.compile(backend=count, fullgraph=True, dynamic=True)
    def run(x: torch.Tensor) -> torch.Tensor:
        with annotate("read", x):
            return x @ packing.decode(parts, x.dtype).t()

    for num_rows in (2, 3):
        run(torch.randn(num_rows, 64))
        # Whether a tool is there is asked outside; that must not make the graph a different one.
        profiling._tool()
    assert num_graphs == 1


# -- range.h -------------------------------------------------------------------------------------

DRIVER = """
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <utility>
#include "common/range.h"

using nexus::AsyncRange;
using nexus::Range;
using Clock = std::chrono::steady_clock;

int main() {
  {
    const Range outer("copy", 7);
    const Range inner("read", int64_t{1} << 40);
  }
  {
    AsyncRange first("read", 1);
    AsyncRange second("read", 2);  // overlaps
    first.end();
    first.end();
    AsyncRange moved = std::move(second);
    second.end();
    std::thread([range = std::move(moved)]() mutable { range.end(); }).join();
    first = AsyncRange("wait", 3);
    first = AsyncRange("copy", 4);
  }
  constexpr int kCount = 1'000'000;
  const auto start = Clock::now();
  if (std::getenv("NEXUS_TEST_EVENTS") == nullptr) {
    for (int i = 0; i < kCount; ++i) const Range range("read", i);
  }
  const std::chrono::duration<double, std::nano> spent = Clock::now() - start;
  std::printf("%d %.1f\\n", nexus::has_nvtx(), spent.count() / kCount);
}
"""


@pytest.fixture(scope="module", params=["range.cpp", "range_absent.cpp"])
def driver(
    request: pytest.FixtureRequest, headers: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A program around one of the two files that setup.py chooses from."""
    folder = tmp_path_factory.mktemp("driver")
    (folder / "main.cpp").write_text(DRIVER)
    program = folder / str(request.param)
    common = CSRC / "common" / str(request.param)
    compile_native(
        *("-I", CSRC, "-isystem", headers, folder / "main.cpp", common, "-o", program, "-ldl")
    )
    return program


def output_of(program: Path, environment: dict[str, str]) -> list[str]:
    done = subprocess.run([program], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_build_says_whether_it_has_nvtx(driver: Path) -> None:
    has_nvtx, nanoseconds = output_of(driver, {})
    assert has_nvtx == str(int(driver.name == "range.cpp"))
    print(f"{driver.name}: {nanoseconds} ns a range, without a tool")


def test_native_ranges_nest_and_asynchronous_ones_overlap(
    driver: Path, attached: dict[str, str]
) -> None:
    output_of(driver, attached)
    events = events_of(attached)
    if driver.name == "range_absent.cpp":
        assert events == []
        return
    assert nested(events[:4]) == [("copy", 7, [("read", 1 << 40, [])])]
    # Each ends once; a range that is assigned to ends after the new one begins.
    assert [(event["event"], event["id"]) for event in events[4:]] == [
        *(("start", 1), ("start", 2), ("end", 1), ("end", 2)),
        *(("start", 3), ("start", 4), ("end", 3), ("end", 4)),
    ]
    started = [event for event in events if event["event"] == "start"]
    assert [(event["name"], event["nbytes"]) for event in started] == [
        *(("read", 1), ("read", 2), ("wait", 3), ("copy", 4)),
    ]
    ended_elsewhere = next(
        event for event in events if event["event"] == "end" and event["id"] == 2
    )
    assert ended_elsewhere["thread"] != events[0]["thread"]


def test_a_name_that_is_not_in_the_table_does_not_compile(tmp_path: Path) -> None:
    source = tmp_path / "misspelt.cpp"
    source.write_text('#include "common/range.h"\nconst nexus::Range range("raed", 1);\n')
    done = subprocess.run(
        ["c++", "-std=c++20", "-fsyntax-only", "-I", CSRC, source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "kRangeNames lacks this name" in done.stderr
