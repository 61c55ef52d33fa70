"""Runs the GPU's tests on the simulated driver, each file in a process of its own.

What has loaded the simulated libcuda.so.1 would pass for a process with a GPU: hence another.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
FILES = sorted(path.name for path in HERE.glob("test_cuda_*.py"))


@pytest.fixture(scope="session")
def simulated_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("simcuda", HERE / "simcuda" / "simcuda.py")
    assert spec is not None
    assert spec.loader is not None
    simcuda: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(simcuda)
    driver: Path = simcuda.build(tmp_path_factory.mktemp("simcuda"))
    return driver


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", FILES)
def test_a_file_passes_on_the_simulated_driver(file: str, simulated_driver: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    environment = os.environ | {"SIMCUDA": str(simulated_driver), "PYTHONSAFEPATH": "1"}
    environment.pop("FAIL_WITHOUT_CUDA", None)
    done = subprocess.run(
        command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=900
    )
    print(done.stdout[-20_000:])
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-4_000:]
    # What is skipped there is what only a real GPU can show.
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert all("needs an NVIDIA GPU" in line for line in skipped)
