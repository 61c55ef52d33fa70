"""What no line of this package does: run what a file says, start a shell, end the process.

The syntax tree is searched, so that comments and messages may speak of these things.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("nexus_ext/**/*.py"), *ROOT.glob("kernels/**/*.py")])

# Modules whose formats run code when they are read, or that start shells.
MODULES = {
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "pickle",
    "pty",
    "shelve",
    "_pickle",
    "jsonpickle",
}
CALLS = {
    *("eval", "exec", "compile", "__import__", "exit", "quit", "breakpoint", "input"),
    *("builtins.eval", "builtins.exec", "builtins.compile"),
    *("os.system", "os.popen", "os.abort", "os._exit", "os.kill", "os.killpg", "sys.exit"),
    *("subprocess.getoutput", "subprocess.getstatusoutput"),
    *("torch.load", "torch.jit.load", "torch.serialization.load", "torch.hub.load"),
    *("np.load", "numpy.load", "np.fromregex", "yaml.load", "yaml.unsafe_load"),
}
PREFIXES = ("os.exec", "os.spawn", "os.posix_spawn")
NAMES = {"SystemExit"}
SWITCHES = {"shell", "allow_pickle", "trust_remote_code"}  # keywords that may only be False

EXCEPTIONS = {
    # A command tells its caller by its exit status whether it failed.
    ("nexus_ext/cli.py", "sys.exit"),
    # Signal 0 only asks whether a process is there.
    ("nexus_ext/owners.py", "os.kill"),
}


def forbidden(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of everything that is forbidden in a tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, name) for name in _imported(node) if _is_forbidden(name))
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, name) for name in _called(node))
        elif isinstance(node, ast.Attribute) and _is_forbidden(_dotted(node)):
            yield node.lineno, _dotted(node)
        elif isinstance(node, ast.Name) and node.id in NAMES:
            yield node.lineno, node.id


def _is_forbidden(name: str) -> bool:
    if name.split(".")[0] in MODULES:
        return True
    return "." in name and (name in CALLS or name.startswith(PREFIXES))


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    names = [alias.name for alias in node.names]
    if isinstance(node, ast.Import):
        return names
    return [f"{node.module}.{name}" for name in names]


def _called(node: ast.Call) -> Iterator[str]:
    if isinstance(node.func, ast.Name) and node.func.id in CALLS:
        yield node.func.id
    for keyword in node.keywords:
        is_off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg in SWITCHES and not is_off:
            yield keyword.arg
    if _dotted(node.func).endswith("import_module") and not (
        node.args and isinstance(node.args[0], ast.Constant)
    ):
        yield "import_module of a name that is not written here"


def _dotted(node: ast.AST) -> str:
    """`a.b.c` as text; "" for what is not a chain of names."""
    if isinstance(node, ast.Attribute):
        front = _dotted(node.value)
        return f"{front}.{node.attr}" if front else ""
    return node.id if isinstance(node, ast.Name) else ""


def test_the_package_is_searched() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert len(names) > 60
    assert {"nexus_ext/checkpoint.py", "nexus_ext/experts/find.py"} <= names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_forbidden_is_done(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    found = list(forbidden(ast.parse(path.read_text())))
    assert [hit for hit in found if (name, hit[1]) not in EXCEPTIONS] == []


def test_no_exception_is_left_over() -> None:
    used = {
        (path.relative_to(ROOT).as_posix(), hit)
        for path in SOURCES
        for _, hit in forbidden(ast.parse(path.read_text()))
    }
    assert used == EXCEPTIONS


@pytest.mark.parametrize(
    "text",
    [
        *("import pickle", "import pickle as p", "from pickle import loads", "import marshal, os"),
        *("eval('1')", "exec(text)", "compile(text, '', 'exec')", "__import__(name)", "exit()"),
        *("os.system(text)", "from os import system", "run = os.popen", "os.execvp(a, b)"),
        *("sys.exit(1)", "from sys import exit", "raise SystemExit", "raise SystemExit(1)"),
        *("subprocess.run(text, shell=True)", "run(text, shell=wanted)", "os._exit(1)"),
        *("torch.load(path)", "from torch import load", "torch.load(path, weights_only=True)"),
        *("np.load(path)", "load(path, allow_pickle=True)", "importlib.import_module(name)"),
        *("AutoModel.from_pretrained(path, trust_remote_code=True)",),
    ],
)
def test_the_search_finds(text: str) -> None:
    assert list(forbidden(ast.parse(text)))


@pytest.mark.parametrize(
    "text",
    [
        *("model.eval()", "torch.compile(model)", "re.compile(text)", "module.load(path)"),
        *("subprocess.run(words)", "run(words, shell=False)", "from json import load"),
        *("text = 'pickle.loads'", "importlib.import_module('transformers')", "def exit(): ..."),
    ],
)
def test_the_search_passes_over(text: str) -> None:
    assert not list(forbidden(ast.parse(text)))
