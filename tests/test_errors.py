"""The tree of errors is the one that is drawn, and native errors arrive as its members."""

from __future__ import annotations

import pickle
import re

import pytest

from nexus_ext import errors
from nexus_ext.errors import NexusError, from_native, to_native

KINDS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, NexusError)
}


def drawn_parents() -> dict[str, str]:
    """Class and base class as the docstring of the module draws them."""
    parents, path = {"NexusError": "Exception"}, ["NexusError"]
    for line in errors.__doc__.splitlines():
        if branch := re.match(r"^ {4}((?:[│ ] {3})*)[├└]── (\w+)", line):
            depth = len(branch[1]) // 4 + 1
            path[depth:] = [branch[2]]
            parents[branch[2]] = path[depth - 1]
    return parents


def test_the_drawn_tree_is_the_tree() -> None:
    assert {name: kind.__bases__[0].__name__ for name, kind in KINDS.items()} == drawn_parents()


def test_every_error_is_exported_in_order() -> None:
    assert errors.__all__ == [*sorted(KINDS), "from_native", "to_native"]


@pytest.mark.parametrize("kind", KINDS.values())
def test_every_error_says_what_it_means_and_survives_a_process_border(
    kind: type[NexusError],
) -> None:
    assert kind.__doc__
    again = pickle.loads(pickle.dumps(kind("rule, got, what to do")))
    assert type(again) is kind
    assert "rule, got, what to do" in str(again)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.BudgetError, ValueError),
        (errors.MissingExtra, ImportError),
        (errors.ReadError, OSError),
    ],
)
def test_what_the_standard_library_calls_alike_is_caught_alike(
    kind: type[NexusError], builtin: type[Exception]
) -> None:
    assert issubclass(kind, builtin)


@pytest.mark.parametrize("kind", KINDS)
def test_a_native_error_arrives_as_its_class(kind: str) -> None:
    typed = from_native(RuntimeError(f"nexus:{kind}: The disk, at offset 12: broken."))
    assert type(typed) is KINDS[kind]
    assert str(typed) == "The disk, at offset 12: broken."


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_that_native_code_keeps_comes_back_as_it_was(kind: str) -> None:
    came_back = from_native(RuntimeError(to_native(KINDS[kind]("a rule, what was got"))))
    assert type(came_back) is KINDS[kind]
    assert str(came_back) == "a rule, what was got"


def test_what_torch_puts_around_a_native_error_is_taken_off() -> None:
    text = "(deep inside) nexus:ReadError: Line one.\nLine two.\nException raised from f at x.cpp:1"
    assert str(from_native(RuntimeError(text))) == "Line one.\nLine two."


def test_an_interrupt_arrives_as_one() -> None:
    assert type(from_native(RuntimeError("nexus:Interrupted: while waiting"))) is KeyboardInterrupt


def test_other_errors_stay_what_they_are() -> None:
    error = RuntimeError("shapes cannot be multiplied")
    assert from_native(error) is error
