"""The library as it is built: what it needs, what it shows, and that it works without options.

Optional are liburing and NVTX's headers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nexus_ext import _native

ROOT = Path(__file__).parent.parent
LIBRARY = Path(str(_native.__file__))
ARCHIVES = [
    Path(folder) / "liburing.a"
    for folder in (
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
    )
]
URING_IS_INSTALLED = Path("/usr/include/liburing.h").exists() and any(
    archive.exists() for archive in ARCHIVES
)
# One text of reader_uring.cpp, and one of the file that stands in for it.
WITH_URING, WITHOUT_URING = b"io_uring is denied here", b"this build has no io_uring"
# What NVTX's headers look for in a tool.
WITH_NVTX = b"InitializeInjectionNvtx2"

STREAM = """
import json, sys
from pathlib import Path
import torch
import nexus_ext
from nexus_ext.checkpoint import Extent, File, Group, Stamp
from nexus_ext.engine import Engine, ReadMode

path = Path(sys.argv[1])
data = path.read_bytes()
with open(path, "rb") as file:
    stamp = Stamp.of(file.fileno())
size = len(data) // 6
groups = [Group("g", (), (Extent(0, size * i + 1, size, i),), size + i) for i in range(5)]
arenas = [torch.zeros(size + 4, dtype=torch.uint8) for _ in range(2)]
engine = Engine([File(path, stamp)], ReadMode(io="direct"))
engine.attach(arenas, groups, [0, 1, 0, 1, 0], range(5), 1)
for i in [*range(5)] * 2:
    engine.acquire(i, arenas[i % 2])
    want = data[size * i + 1 : size * (i + 1) + 1]
    assert bytes(arenas[i % 2].numpy())[i : i + size] == want
print(json.dumps(engine.stats() | {"package": nexus_ext.__file__}))
engine.close()
"""


def output_of(*command: object) -> str:
    done = subprocess.run(
        [*map(str, command)], check=True, capture_output=True, text=True, env=os.environ
    )
    return done.stdout


def needed_by(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", output_of("readelf", "-dW", library))


def exported_by(library: Path) -> set[str]:
    """Names of the functions and objects that others can link with."""
    table = output_of("readelf", "--dyn-syms", "-W", library)
    names = set()
    for line in table.splitlines():
        fields = line.split()
        if len(fields) >= 8 and fields[4] == "GLOBAL" and fields[6] != "UND":
            names.add(fields[7])
    return names


@pytest.fixture(scope="module")
def bare_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, built without options; the folder to import it from."""
    folder = tmp_path_factory.mktemp("bare")
    for name in ("csrc", "kernels", "nexus_ext"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    # torch's build helper looks for ninja on the path.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder,
        env=os.environ
        | {"NEXUS_URING": "0", "NEXUS_NVTX": "0", "NEXUS_CXXFLAGS": "-O0 -Werror", "PATH": path},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def library_in(folder: Path) -> Path:
    [library] = (folder / "nexus_ext").glob("_native*.so")
    return library


def check_links(library: Path) -> None:
    needed = needed_by(library)
    assert needed, "readelf found no needed library at all"
    for name in needed:
        assert not re.match(r"lib(uring|cuda|cudart|nvrtc|python|torch_cuda|torch_python)", name)
    # Nothing of ours can meet the symbols of another library.
    assert [name for name in exported_by(library) if "nexus" in name] == []
    assert "PyInit__native" in exported_by(library)


# -- the library under test --------------------------------------------------------------------


def test_the_library_needs_neither_liburing_nor_cuda_nor_a_python() -> None:
    check_links(LIBRARY)


def test_the_library_serves_every_python() -> None:
    assert LIBRARY.name == "_native.abi3.so"
    version_specific = [name for name in exported_by(LIBRARY) if name.startswith("PyInit")]
    assert version_specific == ["PyInit__native"]


def test_the_library_has_io_uring_where_liburing_is_installed() -> None:
    content = LIBRARY.read_bytes()
    assert (WITH_URING in content) == URING_IS_INSTALLED
    assert (WITHOUT_URING in content) == (not URING_IS_INSTALLED)


# -- without options ---------------------------------------------------------------------------


def check_without_uring(report: dict[str, Any], lab: Any) -> None:
    assert report["reader"] == "threads"
    assert report["io_mode"] == lab.expects("direct threads")[0]
    if report["io_mode"] == "direct":
        assert report["refusal"] == (
            "this build has no io_uring (liburing was not found when it was built)"
        )
    assert report["num_failed"] == 0


@pytest.mark.slow
def test_a_build_without_liburing_reads_directly_with_threads(
    lab: Any, bare_build: Path, run_python: Callable[..., str]
) -> None:
    """Where liburing is missing, the library under test is such a build, and must do the same."""
    path = lab.source(1_200_001).path
    report = json.loads(run_python(STREAM, path, PYTHONPATH=str(bare_build)))
    assert report["package"] == str(bare_build / "nexus_ext" / "__init__.py")
    check_without_uring(report, lab)
    check_links(library_in(bare_build))
    assert WITHOUT_URING in library_in(bare_build).read_bytes()
    assert WITH_NVTX not in library_in(bare_build).read_bytes()
    if not URING_IS_INSTALLED:
        check_without_uring(json.loads(run_python(STREAM, path)), lab)
