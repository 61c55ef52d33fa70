"""Everything about a GPU in one run: ceilings, streaming, peers, packed weights, compiled blocks.

    python benchmarks/bench_gpu.py --json FILE      on a machine with an NVIDIA GPU: make gpu
    python benchmarks/bench_gpu.py --dry            here: the same steps on the simulated driver

Each part is a process with a time limit; what it finds is written as it goes. An error of a part is
in the JSON, and makes the exit code 1. A dry run shows that the benchmark runs, and measures
nothing: its JSON says "simulated". See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
# The parts are in files beside this one, which PYTHONSAFEPATH hides.
sys.path.insert(0, str(HERE))

# In this order, and the most seconds each may take: five and a half of the eight minutes that
# `make gpu` has to build, to test and to measure.
PARTS = {"model": 45, "ceilings": 20, "stream": 165, "quant": 35, "compile": 70}
# A dry run may be one of many things on two processors.
_DRY_PATIENCE = 5
# Of a part's limit, what it plans with; the rest is for what it began.
_PLANNED = 0.75
_NO_GPU = "needs an NVIDIA GPU; --dry runs the same on the simulated driver, and measures nothing"


@dataclass(frozen=True)
class Options:
    """Of the whole, and of the process of a part (`part`, `driver`, `seconds`)."""

    is_dry: bool
    folder: Path
    only: tuple[str, ...]
    json: Path | None
    part: str | None
    driver: Path | None
    seconds: float

    @classmethod
    def of_command(cls) -> Options:
        parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
        parser.add_argument("--dry", action="store_true", help="on the simulated driver")
        parser.add_argument("--json", type=Path, help="default: benchmarks/results/gpu-NAME.json")
        parser.add_argument("--only", action="append", choices=PARTS, help="may be repeated")
        parser.add_argument("--folder", type=Path, help="for the model, on the disk to measure")
        for name in ("part", "driver", "seconds"):
            parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
        given = parser.parse_args()
        return cls(
            is_dry=given.dry,
            folder=given.folder or Path(tempfile.gettempdir()),
            only=tuple(given.only or PARTS),
            json=given.json,
            part=given.part,
            driver=Path(given.driver) if given.driver else None,
            seconds=float(given.seconds or 0),
        )


# -- a part, in its process ------------------------------------------------------------------------


def run_part(options: Options) -> None:
    """Measure one part; `json` is where its report goes, `folder` is the model's."""
    from gpu_place import RealPlace, SimulatedPlace
    from gpu_report import Report

    assert options.part is not None
    assert options.json is not None
    place = SimulatedPlace(options.driver) if options.driver else RealPlace()
    report = Report(options.json, _PLANNED * options.seconds)
    report["machine"] = place.machine()
    if options.part == "model":
        write_model(place, options.folder, report)
    else:
        importlib.import_module(f"gpu_{options.part}").measure(place, options.folder, report)
    report.save()


def write_model(place: Any, folder: Path, report: Any) -> None:
    from gpu_llama import shape_for, write_llama

    began = time.monotonic()
    nbytes = write_llama(folder, shape_for(place), place.where)
    report["bytes"] = nbytes
    report["gbps_to_disk"] = nbytes / (time.monotonic() - began) / 1e9


# -- all of them -----------------------------------------------------------------------------------


def run_all(options: Options) -> dict[str, Any]:
    began = time.monotonic()
    with _workplace(options.folder) as work:
        driver = build_driver(work) if options.is_dry else None

        def run(name: str) -> dict[str, Any]:
            part = run_process(name, work, driver)
            print(f"{name}: {part['status']}, {part['seconds']:.0f} s", flush=True)
            return part

        # Every other part reads the model.
        parts = {"model": run("model")}
        wanted = [name for name in options.only if name != "model"]
        # What is measured must be alone.
        with ThreadPoolExecutor(max_workers=2 if options.is_dry else 1) as pool:
            parts |= zip(wanted, pool.map(run, wanted), strict=True)
    machines = [part["result"].pop("machine") for part in parts.values() if part["result"]]
    return {
        "simulated": options.is_dry,
        "machine": machines[0] if machines else None,
        "git": _git(),
        "seconds": time.monotonic() - began,
        "parts": parts,
    }


@contextlib.contextmanager
def _workplace(parent: Path) -> Iterator[Path]:
    """A folder that is gone afterwards, whatever happens."""
    parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="nexus-gpu-", dir=parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def build_driver(work: Path) -> Path:
    from gpu_place import build_simulator

    return build_simulator(work / "simcuda")


def run_process(name: str, work: Path, driver: Path | None) -> dict[str, Any]:
    """A part in a process of its own: what it reported, and how it ended."""
    file, limit = work / f"{name}.json", PARTS[name] * (_DRY_PATIENCE if driver else 1)
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--json", str(file)]
    command += ["--folder", str(work / "llama"), "--seconds", str(limit)]
    command += ["--driver", str(driver)] if driver else []
    began = time.monotonic()
    with open(work / f"{name}.log", "w+") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
            why = "" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            why = f"ended after {limit} s"
        finally:
            _end(process)
        log.seek(0)
        said = log.read()
    found = json.loads(file.read_text()) if file.exists() else {}
    part = {key: found.get(key, {}) for key in ("result", "skipped", "errors")}
    if why:
        part["errors"][name] = f"{said[-4000:]}\n{why}"
    status = "error" if part["errors"] else "ran"
    seconds = time.monotonic() - began
    return {"status": status, "why": why, "seconds": seconds, "limit_seconds": limit, **part}


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it started: the compiler's workers, for example."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _git() -> str | None:
    """The commit, where there is a repository."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def result_file(options: Options, result: dict[str, Any]) -> Path | None:
    """What is simulated is never kept among the results."""
    if options.json or options.is_dry or not result["machine"]:
        return options.json
    name = re.sub(r"[^a-z0-9]+", "-", result["machine"]["gpu"]["name"].lower()).strip("-")
    return RESULTS / f"gpu-{name}.json"


def main() -> int:
    options = Options.of_command()
    if options.part:
        run_part(options)
        return 0
    if options.is_dry and options.json and RESULTS in options.json.resolve().parents:
        print("a dry run measures nothing, and is no result; choose another --json")
        return 2
    if not options.is_dry and not Path("/dev/nvidiactl").exists():
        print(_NO_GPU)
        return 2
    from gpu_tables import tables, targets

    result = run_all(options)
    result["targets"] = targets(result)
    print("\n" + tables(result))
    if file := result_file(options, result):
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {file}")
    errors = [part["errors"] for part in result["parts"].values() if part["errors"]]
    for text in [text for part in errors for text in part.values()]:
        print(f"\n{text}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
