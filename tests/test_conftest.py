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


@pytest.mark.parametrize(
    ("insists", "outcome"), [("0", "1 skipped"), ("1", "FAIL_WITHOUT_CUDA=1, and torch sees no")]
)
def test_a_missing_gpu_skips_or_fails(tmp_path: Path, insists: str, outcome: str) -> None:
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    shutil.copy(Path(__file__).parent.parent / "pyproject.toml", tmp_path)
    (tmp_path / "test_gpu.py").write_text(GPU_TEST)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_gpu.py"],
        cwd=tmp_path,
        env=os.environ | {"FAIL_WITHOUT_CUDA": insists, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert outcome in done.stdout
    assert (done.returncode != 0) == (insists == "1")


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
