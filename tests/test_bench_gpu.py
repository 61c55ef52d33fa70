"""The benchmark of a GPU, on the simulated driver: every part runs, and nothing passes for a GPU's.

What it would say of a GPU is in its tables: those are tested with figures that are made up.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "bench_gpu.py"
OURS = {"ram", "disk", "disk_few", "disk_all"}
PEERS = {"accelerate_cpu", "accelerate_disk", "diffusers_group"}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=560)


def load(name: str) -> Any:
    """A file of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, SCRIPT.with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of a dry run; `printed` is what it printed."""
    folder = tmp_path_factory.mktemp("gpu")
    done = run("--dry", "--json", folder / "dry.json", "--folder", folder / "work")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((folder / "work").iterdir()) == []
    result: dict[str, Any] = json.loads((folder / "dry.json").read_text())
    return result | {"printed": done.stdout}


def stream_of(result: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = result["parts"]["stream"]["result"]["stream"]
    return found


@pytest.mark.slow
def test_nothing_that_is_simulated_passes_for_a_gpus(dry: dict[str, Any]) -> None:
    assert dry["simulated"] is True
    assert dry["machine"]["gpu"]["name"] == "simulated"
    assert "SIMULATED DRIVER: these are no figures of a GPU" in dry["printed"]
    assert all(line["met"] is None for line in dry["targets"])


@pytest.mark.slow
def test_every_part_ran_or_gave_its_reason(dry: dict[str, Any]) -> None:
    assert list(dry["parts"]) == ["model", "ceilings", "stream", "quant", "compile"]
    for part in dry["parts"].values():
        assert part["status"] == "ran"
        assert not part["errors"]
        assert part["result"]
        assert all(part["skipped"].values())
    ceilings = dry["parts"]["ceilings"]["result"]
    assert {"h2d_nexus", "h2d_torch", "d2d", "disk"} <= ceilings.keys()
    stream = stream_of(dry)
    assert set(stream["transfers"]) == OURS
    skipped = dry["parts"]["stream"]["skipped"].keys()
    assert {line["arm"] for line in stream["peers"]} | skipped >= PEERS | {"gds"}


@pytest.mark.slow
def test_streamed_models_gave_the_resident_ones_numbers(dry: dict[str, Any]) -> None:
    stream = stream_of(dry)
    lines = stream["steps"] + stream["peers"]
    assert {line["arm"] for line in stream["steps"]} == OURS
    assert all(line["equals_resident"] for line in lines)
    assert all(line["host_syncs"] == 0 for line in stream["steps"] if "host_syncs" in line)
    quant = dry["parts"]["quant"]["result"]
    assert {line["what"] for line in quant["decode"]} == {
        "dequantize_nf4",
        "dequantize_nf4-nested",
        "dequantize_int8",
    }
    assert all(line["equals_reference"] for line in quant["decode"])
    assert [line["num_rows"] for line in quant["linear"]] == [1, 4, 8, 16, 64]


@pytest.mark.slow
def test_what_streams_from_ram_reads_no_file(dry: dict[str, Any]) -> None:
    transfers = stream_of(dry)["transfers"]
    assert transfers["ram"]["ram_groups"] == transfers["ram"]["streamed_groups"] > 2
    assert all(line["ram_groups"] == 0 for name, line in transfers.items() if name != "ram")


@pytest.mark.slow
def test_every_round_is_kept(dry: dict[str, Any]) -> None:
    stream = stream_of(dry)
    for line in stream["steps"] + stream["resident"]:
        assert len(line["step_seconds"]["rounds"]) == stream["num_rounds"] >= 2


# -- what goes wrong -------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    return load("bench_gpu")


@pytest.mark.slow
def test_a_part_that_fails_is_told(script: Any, tmp_path: Path) -> None:
    part = script.run_process("ceilings", tmp_path, None)  # there is no model, and hardly a GPU
    assert part["status"] == "error"
    assert "Error" in "".join(part["errors"].values())


def test_a_part_that_takes_too_long_is_ended(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(script.PARTS, "ceilings", 0.2)
    part = script.run_process("ceilings", tmp_path, None)
    assert part["status"] == "error"
    assert part["why"] == "ended after 0.2 s"
    assert part["seconds"] < 60


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU")
    done = run("--json", tmp_path / "result.json")
    assert done.returncode == 2
    assert "--dry" in done.stdout
    assert not (tmp_path / "result.json").exists()


def test_a_dry_run_is_no_result() -> None:
    done = run("--dry", "--json", ROOT / "benchmarks" / "results" / "gpu-none.json")
    assert done.returncode == 2
    assert "no result" in done.stdout


# -- verdicts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables() -> Any:
    return load("gpu_tables")


GOOD_STEP = {
    "arm": "ram",
    "tokens": 1,
    "step_over_bound": {"median": 1.04},
    "weight_stall_ratio": 0.02,
    "is_hidden": True,
    "host_syncs": 1,
    "device_peak_bytes": 900,
    "device_allowed_bytes": 1000,
}


def made_up(**changed: Any) -> dict[str, Any]:
    """A result on a GPU: one step from RAM, and one transfer."""
    stream = {
        "transfers": {"ram": {"source": "ram", "share_of_ceiling": {"median": 0.96}}},
        "resident": [{"tokens": 1, "host_syncs": 1}],
        "steps": [GOOD_STEP | changed],
    }
    return {"simulated": False, "parts": {"stream": {"result": {"stream": stream}}}}


def verdicts(tables: Any, result: dict[str, Any]) -> list[bool | None]:
    return [line["met"] for line in tables.targets(result)]


def test_targets_are_met_missed_or_not_judged(tables: Any) -> None:
    assert verdicts(tables, made_up()) == [True, None, True, None, True, True, True]


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"step_over_bound": {"median": 1.06}}, 2),
        ({"weight_stall_ratio": 0.04}, 4),
        ({"host_syncs": 2}, 5),
        ({"device_peak_bytes": 3 << 20}, 6),
    ],
)
def test_a_target_that_is_missed_is_told(tables: Any, changed: dict[str, Any], missed: int) -> None:
    found = verdicts(tables, made_up(**changed))
    assert [index for index, met in enumerate(found) if met is False] == [missed]


def test_the_worst_line_decides(tables: Any) -> None:
    result = made_up()
    worse = copy.deepcopy(GOOD_STEP) | {"step_over_bound": {"median": 2.0}, "arm": "ram"}
    result["parts"]["stream"]["result"]["stream"]["steps"].append(worse)
    assert tables.targets(result)[2]["got"] == 2.0


def test_nothing_measured_is_not_judged(tables: Any) -> None:
    assert set(verdicts(tables, {"simulated": False, "parts": {}})) == {None}


# -- make gpu --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_package_is_laid_out_without_being_installed(tmp_path: Path) -> None:
    """As `make gpu` has it: with kernels, an extension that loads, and its version."""
    command = [
        "make",
        "-s",
        "gpu-site",
        f"GPU_SITE={tmp_path}/site",
        f"GPU_PYTHON={sys.executable}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stdout + done.stderr
    code = """
import importlib.metadata, nexus_ext, nexus_ext.kernels, nexus_ext._native
print(nexus_ext.__file__, nexus_ext.kernels.__file__, nexus_ext._native.__file__, sep="\\n")
print(importlib.metadata.distribution("nexus_ext")._path)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}/site", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(f"{tmp_path}/site/") for path in done.stdout.split())
