"""The ring when the kernel begins nothing of what it was given: checked by a program in C++.

The program is readers/uring.cpp; Python cannot reach readers below the engine.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
SOURCES = ["io/file.cpp", "io/pool.cpp", "io/reader_threads.cpp", "io/reader_uring.cpp"]


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not Path("/usr/include/liburing.h").exists():
        pytest.skip("no liburing here: the extension is built without io_uring, too")
    path = tmp_path_factory.mktemp("readers") / "uring"
    command = [*os.environ.get("CXX", "g++").split(), "-std=c++20", "-O1", "-g", "-Wall", "-Wextra"]
    command += ["-Werror", "-pthread", f"-I{CSRC}", f"{HERE / 'readers' / 'uring.cpp'}"]
    command += [str(CSRC / source) for source in SOURCES]
    subprocess.run([*command, "-luring", "-o", str(path)], check=True, timeout=300)
    return path


def test_what_the_kernel_never_begins_is_read_by_threads(program: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [program, tmp_path / "file.bin"], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    if done.stdout:
        pytest.skip(done.stdout.strip())
