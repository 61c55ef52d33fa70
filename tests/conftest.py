"""What all tests share: a home of their own, seeds, the rule for tests that need a GPU, and files.

`lab` is the bench for tests of the native engine: random files, groups over their bytes, engines
that are closed when the test ends, and the bytes that every arena must hold.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import mmap
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

# Without a GPU Triton's kernels are interpreted; triton looks when it is first imported, by torch
# perhaps.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nexus_ext import _native
from nexus_ext.checkpoint import Extent, File, Group, Stamp
from nexus_ext.engine import Engine, Faults, ReadMode

if importlib.util.find_spec("hypothesis"):  # not where GPUs are
    import hypothesis

    # The same examples every time, however slow the machine.
    hypothesis.settings.register_profile("nexus", derandomize=True, deadline=None)
    hypothesis.settings.load_profile("nexus")

# Long enough for a machine that is busy with something else; nothing is measured by it.
PATIENCE_SECONDS = 60
PAGE = 4096
KIB = 1 << 10

# -- tests that need a GPU ---------------------------------------------------------------------


def _load_beside(name: str, folder: str = "simcuda") -> Any:
    """A module of tests/simcuda/, or of tests/ itself; neither is a package."""
    path = Path(__file__).parent / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# Tests import these by their names: what those of downloads share, and those of the cache.
for _name in ("http_server", "sleeper", "cache_bench"):
    if (Path(__file__).parent / f"{_name}.py").exists():  # test_conftest.py has this file alone
        _load_beside(_name, folder="")

# tests/test_on_simcuda.py starts a process with a simulated driver, for the tests that take either.
SIMULATED_DRIVER = os.environ.get("SIMCUDA")


def pytest_runtest_setup(item: pytest.Item) -> None:
    takes_simulated = item.get_closest_marker("takes_simcuda") is not None
    if item.get_closest_marker("needs_cuda") is not None:
        is_there, reason = torch.cuda.is_available(), "needs an NVIDIA GPU; torch sees none"
    elif item.get_closest_marker("needs_simcuda") is not None:
        is_there = SIMULATED_DRIVER is not None
        reason = "runs on the simulated driver: see test_on_simcuda.py"
    elif takes_simulated:
        is_there = SIMULATED_DRIVER is not None or torch.cuda.is_available()
        reason = "no NVIDIA GPU here; runs on the simulated driver: see test_on_simcuda.py"
    else:
        return
    if is_there:
        return
    if os.environ.get("FAIL_WITHOUT_CUDA") == "1" and not item.get_closest_marker("needs_simcuda"):
        pytest.fail("FAIL_WITHOUT_CUDA=1, and torch sees no CUDA device", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def _simulator() -> Any:
    assert SIMULATED_DRIVER is not None
    return _load_beside("simcuda").load(Path(SIMULATED_DRIVER))


@pytest.fixture
def sim_gpu(_simulator: Any) -> Iterator[Any]:
    """The simulated GPU, and nothing left behind on it."""
    gpu = _load_beside("gpus").SimGpu(_simulator)
    gpu.reset()
    yield gpu
    _simulator.reset()


@pytest.fixture(scope="session")
def kept_gpu(request: pytest.FixtureRequest) -> Any:
    """A GPU for libraries that keep handles: nobody resets it."""
    if SIMULATED_DRIVER is None:
        return _load_beside("gpus").RealGpu()
    made = _load_beside("gpus").SimGpu(request.getfixturevalue("_simulator"))
    made.reset()
    made.retain()
    made.sim.set_inline_current(True)
    return made


@pytest.fixture
def bench(gpu: Any, lab: Any) -> Iterator[Any]:
    """Makes engines on the GPU; see tests/simcuda/rigs.py."""
    made = _load_beside("rigs").Bench(gpu, lab)
    yield made
    made.close()


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Any:
    """The simulated GPU where there is one, else the real one."""
    if SIMULATED_DRIVER is not None:
        return request.getfixturevalue("sim_gpu")
    return _load_beside("gpus").RealGpu()


# -- what every test gets ----------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="session")
def _home_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fixtures that outlive a test must not write to the user's own home either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEXUS_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True)
def nexus_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty NEXUS_HOME for each test, outside its `tmp_path`."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("NEXUS_HOME", str(home))
    return home


@pytest.fixture
def poisoned_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads a freed arena, or a freed slot, reads NaN."""
    monkeypatch.setenv("NEXUS_POISON", "1")


@pytest.fixture(scope="module")
def one_quiet_thread() -> Iterator[None]:
    """For transformers models that are too small to share out."""
    import transformers

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a file of tests keeps its models."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def qwen(folder: Path) -> Iterator[Any]:
    """Three layers of twelve experts; a token takes four of each."""
    from tests.expert_subjects import make_subject

    made = make_subject("qwen3", "bf16", folder)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """A test draws the same numbers alone, in any order and after any other."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


# -- files -------------------------------------------------------------------------------------


@pytest.fixture
def write_checkpoint() -> Callable[..., dict[str, torch.Tensor]]:
    """Write a safetensors file of random tensors; returns them by name."""

    def write(
        path: Path, shapes: dict[str, Sequence[int]], dtype: torch.dtype = torch.float32
    ) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        tensors = {
            name: torch.randn(*shape, generator=generator).to(dtype)
            for name, shape in shapes.items()
        }
        save_file(tensors, path)
        return tensors

    return write


@dataclass(frozen=True)
class Source:
    """A file of random bytes and what is in it. `file` is what an engine is given."""

    path: Path
    data: np.ndarray[Any, np.dtype[np.uint8]]
    file: File


def stamped(path: Path) -> File:
    with open(path, "rb") as opened:
        return File(path, Stamp.of(opened.fileno()))


def write_source(path: Path, nbytes: int, seed: int = 0) -> Source:
    data = np.frombuffer(np.random.default_rng([seed, nbytes]).bytes(nbytes), np.uint8)
    with open(path, "wb") as file:
        file.write(data.tobytes())
        # Dirty pages could not be dropped from the cache.
        os.fsync(file.fileno())
    return Source(path, data, stamped(path))


# -- what this machine can do, found out without the engine ------------------------------------


@functools.cache
def takes_direct_reads(folder: Path) -> bool:
    path = folder / "probe"
    path.write_bytes(bytes(PAGE))
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return False
    try:
        # An anonymous mapping is aligned.
        return os.preadv(descriptor, [mmap.mmap(-1, PAGE)], 0) == PAGE
    except OSError:
        return False
    finally:
        os.close(descriptor)
        path.unlink()


def build_has_uring() -> bool:
    return b"io_uring is denied here" in Path(str(_native.__file__)).read_bytes()


@functools.cache
def kernel_has_uring() -> bool:
    params = ctypes.create_string_buffer(120)
    descriptor = ctypes.CDLL(None, use_errno=True).syscall(425, 4, params)  # io_uring_setup
    if descriptor >= 0:
        os.close(descriptor)
    return bool(descriptor >= 0)


# -- engines -----------------------------------------------------------------------------------

READERS = {
    "direct io_uring": ReadMode(io="direct"),
    "direct threads": ReadMode(io="direct", use_uring=False),
    "buffered threads": ReadMode(io="buffered"),
    "mmap copied": ReadMode(io="mmap"),
    "mmap in place": ReadMode(io="mmap"),
}


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest) -> str:
    """Each way to read in turn; see `READERS`."""
    return str(request.param)


@dataclass
class Rig:
    """An attached engine and what its arenas must hold."""

    engine: Engine
    sources: Sequence[Source]
    groups: Sequence[Group]
    arenas: Sequence[torch.Tensor]
    arena_of: Sequence[int]

    def arena(self, group: int) -> torch.Tensor:
        return self.arenas[self.arena_of[group]]

    def acquire(self, group: int) -> None:
        self.engine.acquire(group, self.arena(group))

    def acquire_held(self, group: int) -> None:
        group_id = self.engine.group_id(group)
        torch.ops.nexus.acquire_.held(self.arena(group), torch.zeros(1), group_id, group_id)

    def release(self, group: int) -> None:
        torch.ops.nexus.release_(self.arena(group), torch.zeros(1), [], self.engine.group_id(group))

    def num_wrong(self, group: int) -> int:
        """Bytes of the group's arena that are not the file's."""
        arena = self.arena(group).numpy()
        wrong = 0
        for extent in self.groups[group].extents:
            have = arena[extent.group_offset : extent.group_offset + extent.nbytes]
            want = self.sources[extent.file].data[extent.offset : extent.offset + extent.nbytes]
            wrong += extent.nbytes - int(np.count_nonzero(have == want))
        return wrong

    def sweep(self, passes: int = 1) -> None:
        """Acquire every group in order and compare every byte."""
        for _ in range(passes):
            for group in range(len(self.groups)):
                self.acquire(group)
                assert self.num_wrong(group) == 0, f"group {group} has wrong bytes"
            self.engine.end_pass()

    @property
    def stats(self) -> dict[str, Any]:
        return self.engine.stats()

    def wait_until(self, holds: Callable[[dict[str, Any]], bool]) -> None:
        """Look at the counters until a state is reached that must come."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not holds(stats := self.stats):
            assert time.monotonic() < deadline, stats
            threading.Event().wait(0.0005)

    def settle(self) -> None:
        """Until every read in flight has come back."""
        self.wait_until(lambda stats: stats["num_in_flight"] == 0)


class Lab:
    """Makes files and engines in a folder; closes the engines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._engines: list[Engine] = []
        self._num_files = 0

    def source(self, nbytes: int) -> Source:
        self._num_files += 1
        path = self.folder / f"weights{self._num_files}.bin"
        return write_source(path, nbytes, seed=self._num_files)

    @staticmethod
    def group(*places: tuple[int, int, int], gap: int = 0, start: int = 0) -> Group:
        """(file, offset, nbytes) after one another, `gap` bytes apart, from byte `start` on."""
        extents, end = [], start
        for file, offset, nbytes in places:
            extents.append(Extent(file, offset, nbytes, end))
            end += nbytes + gap
        return Group("group", (), tuple(extents), end)

    def slices(self, nbytes: int, num_groups: int) -> list[Group]:
        """Groups of `nbytes` one after another, from the first byte of file 0 on."""
        return [self.group((0, index * nbytes, nbytes)) for index in range(num_groups)]

    def engine(
        self,
        sources: Sequence[Source],
        mode: ReadMode,
        *,
        device: str = "cpu",
        poison: bool = False,
        faults: Faults | None = None,
    ) -> Engine:
        files = [source.file for source in sources]
        engine = Engine(files, mode, device=device, poison=poison, faults=faults)
        self._engines.append(engine)
        return engine

    def rig(
        self,
        sources: Sequence[Source],
        groups: Sequence[Group],
        reader: str = "direct io_uring",
        *,
        num_arenas: int = 3,
        num_resident: int = 0,
        lookahead: int | None = None,
        phase: int = 0,
        verify: str = "off",
        poison: bool = False,
        faults: Faults | None = None,
        **mode: Any,
    ) -> Rig:
        """An engine over `groups`; the first `num_resident` have arenas of their own.

        Arenas begin `phase` bytes behind a page boundary, filled with 0xff, and are used in turn;
        with "mmap in place" every group of one extent has the file's pages instead.
        """
        chosen = ReadMode(**{**READERS[reader].__dict__, **mode})
        engine = self.engine(sources, chosen, poison=poison, faults=faults)
        arenas: list[torch.Tensor] = []
        arena_of: list[int] = []
        largest = max((group.nbytes for group in groups), default=0)
        ring: list[int] = []
        for index, group in enumerate(groups):
            is_view = reader == "mmap in place" and len(group.extents) == 1
            if is_view:
                extent = group.extents[0]
                assert extent.group_offset == 0
                arenas.append(engine.map(extent.file, extent.offset, extent.nbytes))
            elif index < num_resident:
                arenas.append(make_arena(group.nbytes, phase))
            elif len(ring) < num_arenas:
                arenas.append(make_arena(largest, phase))
                ring.append(len(arenas) - 1)
            else:
                arena_of.append(ring[(index - num_resident) % num_arenas])
                continue
            arena_of.append(len(arenas) - 1)
        order = range(num_resident, len(groups))
        ahead = num_arenas - 1 if lookahead is None else lookahead
        if verify != "off":
            engine.attach(arenas, groups, arena_of, order, ahead)
            engine.set_digests([engine.digest(index) for index in range(len(groups))], verify)
        else:
            engine.attach(arenas, groups, arena_of, order, ahead)
        return Rig(engine, sources, groups, arenas, arena_of)

    def expects(self, reader: str) -> tuple[str, str]:
        """The io_mode and the reader's name (its beginning) that this machine allows."""
        io = READERS[reader].io
        if io == "mmap":
            return "mmap", "mmap"
        if io == "buffered" or not takes_direct_reads(self.folder):
            return "buffered", "threads"
        has_uring = reader == "direct io_uring" and build_has_uring() and kernel_has_uring()
        return "direct", "io_uring" if has_uring else "threads"

    def close(self) -> None:
        for engine in self._engines:
            engine.close()


def make_arena(nbytes: int, phase: int = 0) -> torch.Tensor:
    """Memory full of 0xff that begins `phase` bytes behind a page boundary."""
    memory = torch.full((nbytes + 2 * PAGE,), 0xFF, dtype=torch.uint8)
    start = -memory.data_ptr() % PAGE + phase
    return memory[start : start + nbytes]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.close()


# -- what tests counted --------------------------------------------------------------------------


class RecordCount(Protocol):
    """Of the fixture `record_count`."""

    def __call__(
        self, fact: str, number: int, outcomes: Mapping[str, int] | None = None
    ) -> None: ...


_FACT = "reliability: "


@pytest.fixture
def record_count(record_property: Callable[[str, object], None]) -> RecordCount:
    """Have a fact printed at the end of the run: what was done, how often, and what came of it.

    Tests that tell of one fact add up, whichever processes they ran in.
    """

    def record(fact: str, number: int, outcomes: Mapping[str, int] | None = None) -> None:
        counts = [[name, int(count)] for name, count in (outcomes or {}).items()]
        record_property(_FACT + fact, [["", int(number)], *counts])

    return record


def facts_of(reports: Iterable[Any]) -> dict[str, Counter[str]]:
    """The counts of each fact, by outcome; "" is how often it was tried."""
    facts: dict[str, Counter[str]] = {}
    for report in reports:
        for name, counts in report.user_properties if report.when == "call" else ():
            if name.startswith(_FACT):
                found = facts.setdefault(name.removeprefix(_FACT), Counter())
                for outcome, count in counts:
                    found[outcome] += count  # a 0 is told, too
    return facts


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what tests counted; it comes with their reports from other processes, too."""
    kinds = ("passed", "failed")
    facts = facts_of(one for kind in kinds for one in terminalreporter.getreports(kind))
    if facts:
        terminalreporter.section("reliability")
    for fact, counts in sorted(facts.items()):
        told = [f"{name} {count:,}".strip() for name, count in counts.items()]
        terminalreporter.write_line(f"{fact}: {', '.join(told)}")


# -- processes ---------------------------------------------------------------------------------


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Run a script with this interpreter and this package; returns what it printed."""

    def run(script: str, *args: object, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, args)],
            # The package is found where PYTHONPATH says, not in the current folder.
            env=os.environ | {"PYTHONSAFEPATH": "1"} | environment,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE_SECONDS,
        )
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@pytest.fixture
def drop_from_cache() -> Callable[[Path], None]:
    def drop(path: Path) -> None:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    return drop
