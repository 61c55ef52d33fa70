"""The rules that all tests share hold: GPU tests skip or fail, and never pass unseen."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nexus_ext.config import home_folder

GPU_TEST = """
import pytest

@pytest.mark.needs_cuda
def test_on_a_gpu():
    pass
"""


def run_tests(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the tests of another folder under the rules of this one."""
    here = Path(__file__).parent
    for helper in here.glob("*.py"):
        if not helper.name.startswith("test_"):
            shutil.copy(helper, folder)
    shutil.copy(here.parent / "pyproject.toml", folder)
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "."],
        cwd=folder,
        env=ours | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("insists", "outcome"), [("0", "1 skipped"), ("1", "FAIL_WITHOUT_CUDA=1, and torch sees no")]
)
def test_a_missing_gpu_skips_or_fails(tmp_path: Path, insists: str, outcome: str) -> None:
    (tmp_path / "test_gpu.py").write_text(GPU_TEST)
    done = run_tests(tmp_path, FAIL_WITHOUT_CUDA=insists, CUDA_VISIBLE_DEVICES="")
    assert outcome in done.stdout
    assert (done.returncode != 0) == (insists == "1")


FACTS = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_counts(number, record_count):
    record_count("kills", 1000, {"lost": 0, "torn": number})

def test_fails(record_count):
    record_count("in vain", 7)
    raise AssertionError
"""


@pytest.mark.parametrize("workers", [[], ["-n2", "--dist=loadfile"]])
def test_what_tests_counted_is_printed_at_the_end(tmp_path: Path, workers: list[str]) -> None:
    for name in ("test_one.py", "test_two.py"):
        (tmp_path / name).write_text(FACTS)
    done = run_tests(tmp_path, *workers)
    assert "2 failed, 6 passed" in done.stdout, done.stdout + done.stderr
    section = done.stdout.partition(" reliability ")[2].splitlines()
    assert section[1:3] == ["in vain: 14", "kills: 6,000, lost 0, torn 6"]


def drawn() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


FIRST: list[list[float]] = []


@pytest.mark.parametrize("repeat", range(2))
def test_every_test_draws_the_same_numbers(repeat: int) -> None:
    FIRST.append(drawn())
    assert FIRST[-1] == FIRST[0]


@pytest.mark.parametrize("repeat", range(2))
def test_every_test_has_an_empty_home(nexus_home: Path, repeat: int) -> None:
    assert home_folder() == nexus_home
    assert list(nexus_home.iterdir()) == []
    (nexus_home / "something").touch()
