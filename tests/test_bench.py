"""Benchmarks at toy size: they run, they check their own results, and a limit really limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nexus_ext.arms import Arm, ArmSpec
from nexus_ext.demo import make_llama
from nexus_ext.errors import BudgetError, ConfigError
from nexus_ext.limit import MemoryLimit

BENCHMARKS = sorted((Path(__file__).parent.parent / "benchmarks").glob("bench_*.py"))
# It has tests of its own: test_bench_gpu.py.
BENCHMARKS = [script for script in BENCHMARKS if script.stem != "bench_gpu"]


@pytest.mark.timeout(700)
@pytest.mark.parametrize("script", BENCHMARKS, ids=lambda path: path.stem)
def test_the_benchmark_runs_at_toy_size(script: Path, tmp_path: Path) -> None:
    report = tmp_path / "result.json"
    command = [sys.executable, str(script), "--toy", "--json", str(report)]
    environment = os.environ | {"NEXUS_HOME": str(tmp_path)}
    if script.stem == "bench_stream":
        command += ["--only", "tokens" if _may_limit() else "a"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(report.read_text())


def _may_limit() -> bool:
    try:
        MemoryLimit(1 << 30).remove()
    except ConfigError:
        return False
    return True


def test_a_limited_process_is_inside_its_cgroup(tmp_path: Path) -> None:
    if not _may_limit():
        pytest.skip("cgroups are not ours to make here")
    make_llama(tmp_path / "m", num_blocks=3, hidden=32, intermediate=64, vocabulary=64)
    with Arm(ArmSpec("streamed", tmp_path / "m", 1, {"budget": "1MiB"}), 2 << 30) as arm:
        assert arm.step()["seconds"] > 0
        assert arm._limit is not None
        members = arm._limit.tasks.read_text().split()
    assert str(arm._process.pid) in members
    assert not arm._limit.tasks.exists()


def test_an_arm_raises_what_its_process_raised(tmp_path: Path) -> None:
    make_llama(tmp_path / "m", num_blocks=3, hidden=32, intermediate=64, vocabulary=64)
    with pytest.raises(BudgetError, match="smallest budget"):
        Arm(ArmSpec("streamed", tmp_path / "m", 1, {"budget": 1}))


def test_arms_agree_on_the_tokens(tmp_path: Path) -> None:
    make_llama(tmp_path / "m", num_blocks=4, hidden=32, intermediate=64, vocabulary=64)
    tokens = []
    for kind, options in (("streamed", {"io": "direct"}), ("resident", {}), ("accelerate", {})):
        with Arm(ArmSpec(kind, tmp_path / "m", 3, options)) as arm:
            tokens.append(arm.generate(5))
    assert tokens[0] == tokens[1] == tokens[2]
