"""The reader that is served from outside, and the reader made of two: checked by a program in C++.

The program is readers/external.cpp; Python cannot reach readers below the engine.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
SOURCES = ["io/pool.cpp", "io/reader_external.cpp", "io/reader_split.cpp"]


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("readers") / "external"
    command = [*os.environ.get("CXX", "g++").split(), "-std=c++20", "-O1", "-g", "-Wall", "-Wextra"]
    command += ["-Werror", "-pthread", f"-I{CSRC}", f"{HERE / 'readers' / 'external.cpp'}"]
    command += [str(CSRC / source) for source in SOURCES]
    subprocess.run([*command, "-o", str(path)], check=True, timeout=120)
    return path


def test_every_check_of_the_program_holds(program: Path) -> None:
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
