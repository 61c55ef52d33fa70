"""Who knows whom: the imports are those of the table, and nothing points upwards.

The table is the architecture. A new import is a new line here, or a mistake.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nexus_ext"
CSRC = ROOT / "csrc"

# What a module may import from this package, lower floors first.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "profiling": set(),
    "memory": {"errors"},
    "config": {"errors", "memory"},
    "blocks": {"errors"},
    "checkpoint": {"errors"},
    "plan": {"errors", "memory"},
    "ops": {"_native", "errors"},
    "digests": {"checkpoint"},
    "engine": {"checkpoint", "ops"},
    "rows": {"checkpoint", "engine", "errors", "ops"},
    "streamer": {
        "checkpoint",
        "config",
        "digests",
        "engine",
        "errors",
        "memory",
        "plan",
        "profiling",
        "rows",
    },
    "layout": {"blocks", "checkpoint", "errors"},
    "attachment": {"checkpoint", "errors", "ops", "streamer"},
    "subclass": {"attachment", "errors", "ops"},
    "export": {"attachment", "errors", "ops"},
    "module": {
        "attachment",
        "checkpoint",
        "config",
        "engine",
        "errors",
        "layout",
        "memory",
        "plan",
        "profiling",
        "streamer",
        "subclass",
    },
    "hub": {"errors"},
    "pretrained": {
        "checkpoint",
        "config",
        "errors",
        "hub",
        "layout",
        "module",
        "plan",
        "streamer",
    },
    "__init__": {
        "checkpoint",
        "errors",
        "export",
        "module",
        "plan",
        "pretrained",
        "profiling",
        "subclass",
    },
}
# The command line and what it runs: they see everything below, and nobody below sees them.
TOOLS = {"arms", "bench", "ceiling", "cli", "demo", "doctor", "limit"}

MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cu"})


def tree_of(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def imported(module: str) -> set[str]:
    """Modules of this package that a module imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "nexus_ext":
            names = [f"nexus_ext.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names = [str(node.module)]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("nexus_ext.")}
    return found


def test_every_module_has_its_place() -> None:
    assert set(MODULES) == ALLOWED.keys() | TOOLS


@pytest.mark.parametrize("module", ALLOWED)
def test_a_module_imports_what_the_table_allows_and_no_more(module: str) -> None:
    assert imported(module) == ALLOWED[module]


def test_the_table_points_downwards_only() -> None:
    below: set[str] = {"_native"}
    for module, targets in ALLOWED.items():
        assert targets <= below, module
        below.add(module)


@pytest.mark.parametrize("tool", sorted(TOOLS))
def test_a_tool_imports_from_below_and_from_other_tools_without_a_circle(tool: str) -> None:
    reached, waiting = set(), imported(tool) & TOOLS
    while waiting:
        reached |= waiting
        waiting = set().union(*map(imported, waiting)) & TOOLS - reached
    assert tool not in reached
    assert imported(tool) <= set(MODULES)


def names_in(module: str) -> set[str]:
    """Every dotted name that a module reads, and every module that it imports."""
    names = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Attribute | ast.Name):
            names.add(ast.unparse(node))
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("module", MODULES)
def test_no_module_unpickles(module: str) -> None:
    names = names_in(module)
    assert not {name for name in names if name.split(".")[0] in {"pickle", "dill", "joblib"}}
    assert "torch.load" not in names


@pytest.mark.parametrize("module", MODULES)
def test_only_config_reads_the_environment(module: str) -> None:
    reads = {"os.environ", "os.getenv", "os.environb"} & names_in(module)
    assert not reads or module == "config"


def handlers(module: str) -> list[ast.ExceptHandler]:
    return [node for node in ast.walk(tree_of(module)) if isinstance(node, ast.ExceptHandler)]


def catches_everything(handler: ast.ExceptHandler) -> bool:
    return handler.type is None or "Exception" in re.findall(r"\w+", ast.unparse(handler.type))


@pytest.mark.parametrize("module", MODULES)
def test_no_module_catches_everything(module: str) -> None:
    lines = [handler.lineno for handler in handlers(module) if catches_everything(handler)]
    assert lines == []


@pytest.mark.parametrize("module", MODULES)
def test_what_catches_base_exceptions_raises_them_again(module: str) -> None:
    for handler in handlers(module):
        if handler.type is not None and "BaseException" in ast.unparse(handler.type):
            assert isinstance(handler.body[-1], ast.Raise)
            assert handler.body[-1].exc is None


# -- native code ---------------------------------------------------------------------------------


def includes(path: Path) -> set[str]:
    return set(re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE))


def relative(path: Path) -> str:
    return str(path.relative_to(CSRC))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_readers_and_helpers_do_not_know_the_engine(path: Path) -> None:
    folder = path.relative_to(CSRC).parts[0]
    may_include = {
        "common": {"common"},
        "io": {"common", "io"},
        "device": {"common", "device"},
        "stream": {"common", "device", "io", "stream"},
    }
    known = {name.split("/")[0] for name in includes(path) if (CSRC / name).is_file()}
    if folder in may_include:
        assert known <= may_include[folder]


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_torch_and_python_come_in_by_one_door_each(path: Path) -> None:
    names = includes(path)
    has_torch = any(name.startswith(("torch/", "ATen/", "c10/")) for name in names)
    assert not has_torch or relative(path) == "library.cpp"
    assert "Python.h" not in names or relative(path) == "python_module.cpp"


def test_torch_is_used_by_its_stable_interface_only() -> None:
    names = [name for name in includes(CSRC / "library.cpp") if name.startswith("torch/")]
    assert names
    assert all(name.startswith(("torch/csrc/stable/", "torch/headeronly/")) for name in names)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_native_code_has_never_heard_of_a_model(path: Path) -> None:
    words = r"\b(layers?|experts?|llama|transformers?|attention|tokens?|embeddings?)\b"
    # What a message tells the user, who has heard of models, is not knowledge.
    code = re.sub(r'"(?:[^"\\]|\\.)*"', '""', path.read_text())
    assert re.findall(words, code, re.IGNORECASE) == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_native_code_does_not_read_the_environment(path: Path) -> None:
    assert "getenv" not in path.read_text()
