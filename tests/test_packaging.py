"""What is installed is complete, says what it is, and does nothing at import."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from importlib.metadata import entry_points, metadata, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import nexus_ext

PACKAGE = Path(nexus_ext.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
# What costs seconds, or a device, or is not everybody's.
HEAVY = ["accelerate", "huggingface_hub", "kvikio", "rich", "transformers", "triton", "typer"]


def module(name: str) -> ModuleType:
    return importlib.import_module(f"nexus_ext.{name}")


def run(code: str) -> Any:
    """What a fresh interpreter prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_public_names_are_sorted_and_there() -> None:
    assert nexus_ext.__all__ == sorted(nexus_ext.__all__)
    assert len(set(nexus_ext.__all__)) == len(nexus_ext.__all__)
    assert all(hasattr(nexus_ext, name) for name in nexus_ext.__all__)


def test_whatever_is_imported_at_the_top_is_public() -> None:
    names = {
        name
        for name, value in vars(nexus_ext).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "annotations"
    }
    assert names == set(nexus_ext.__all__)


def test_the_root_of_all_errors_is_public_and_the_others_have_a_module() -> None:
    errors = module("errors")
    assert nexus_ext.NexusError is errors.NexusError
    assert all(hasattr(errors, name) for name in errors.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_exports_what_it_has(name: str) -> None:
    exported = module(name).__all__
    assert len(set(exported)) == len(exported)
    assert all(hasattr(module(name), one) for one in exported)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_and_public_name_is_described(name: str) -> None:
    assert module(name).__doc__
    for public in module(name).__all__:
        value = getattr(module(name), public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{name}.{public}"


def test_the_kernels_are_installed_under_our_name() -> None:
    try:
        kernels = importlib.import_module("nexus_ext.kernels")
    except ImportError:
        pytest.fail("install the package (pip install -e .): nexus_ext.kernels is kernels/triton")
    assert kernels.__doc__
    # A folder kernels/ at the top must not be a package: Hugging Face has one of that name.
    assert not (PACKAGE.parent / "kernels" / "__init__.py").exists()


def test_importing_is_light_and_touches_no_device() -> None:
    code = f"""
import json, sys, torch
import torch._dynamo  # which looks for triton itself
before = set(sys.modules)
import nexus_ext
loaded = set(sys.modules) - before
print(json.dumps({{
    "heavy": [name for name in {HEAVY} if name in loaded],
    "cuda": torch.cuda.is_initialized(),
}}))
"""
    assert run(code) == {"heavy": [], "cuda": False}


def test_importing_opens_no_file_but_code_and_starts_no_thread() -> None:
    code = """
import json, os, sys, torch
descriptors = set(os.listdir("/proc/self/fd"))
num_threads = len(os.listdir("/proc/self/task"))
opened = []
def watch(event, args):
    if event == "open" and isinstance(args[0], str) and "w" in str(args[1] or ""):
        opened.append(args[0])
sys.addaudithook(watch)
sys.dont_write_bytecode = True
import nexus_ext
print(json.dumps([
    sorted(set(os.listdir("/proc/self/fd")) - descriptors),
    len(os.listdir("/proc/self/task")) - num_threads,
    opened,
]))
"""
    assert run(code) == [[], 0, []]


def test_the_kernels_need_no_triton_to_be_imported() -> None:
    code = """
import json, sys
sys.modules["triton"] = None
import nexus_ext.kernels
print(json.dumps("nexus_ext.kernels" in sys.modules))
"""
    assert run(code) is True


def test_version_and_licence_are_told() -> None:
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    assert f'version = "{version("nexus_ext")}"' in project
    assert metadata("nexus_ext")["License-Expression"] == "Apache-2.0"


def test_the_command_is_installed() -> None:
    (command,) = entry_points(group="console_scripts", name="nexus")
    assert command.value == "nexus_ext.cli:main"
    assert callable(command.load())


def test_types_come_along() -> None:
    assert (PACKAGE / "py.typed").exists()
    assert (PACKAGE / "_native.pyi").exists()


def test_every_package_is_installed() -> None:
    setup = PACKAGE.parent / "setup.py"
    if not setup.exists():
        pytest.skip("nexus_ext is installed; setup.py is not here to be read")
    calls = [node for node in ast.walk(ast.parse(setup.read_text())) if isinstance(node, ast.Call)]
    named = next(call for call in calls if ast.unparse(call.func) == "setup")
    listed = next(ast.literal_eval(k.value) for k in named.keywords if k.arg == "packages")
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(listed) == {"nexus_ext", "nexus_ext.kernels", *(f"nexus_ext.{f}" for f in folders)}
