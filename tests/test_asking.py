"""The order in which bytes on their way are asked for; see `nexus_ext.asking`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO

from nexus_ext.asking import Asking


class FakeShard:
    """Of a file: what was wanted last, and what has landed."""

    nbytes = 1000
    has_ended = False

    def __init__(self) -> None:
        self.wanted: list[tuple[int, int]] = []
        self.num_wants = 0
        self.wants_all = False
        self.there: list[tuple[int, int]] = []

    def want(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.wanted = list(ranges)
        self.num_wants += 1

    def want_all(self) -> None:
        self.wants_all = True

    def landed(self) -> list[tuple[int, int]]:
        return self.there

    def open(self) -> BinaryIO:
        raise NotImplementedError

    def wait(self, offset: int, nbytes: int) -> None:
        raise NotImplementedError

    def result(self) -> object:
        raise NotImplementedError


def make() -> tuple[Asking, FakeShard, FakeShard]:
    one, two = FakeShard(), FakeShard()
    return Asking([one, two], window_bytes=100), one, two


def test_a_window_of_the_plan_is_asked_for_in_its_order() -> None:
    asking, one, two = make()
    asking.expect([(1, 0, 60), (0, 0, 60), (0, 60, 60)])
    asking.ask()
    assert (one.wanted, two.wanted) == ([(0, 60)], [(0, 60)])
    two.there = [(0, 60)]
    asking.ask()
    assert one.wanted == [(0, 60), (60, 60)]
    assert one.wants_all
    assert two.wants_all


def test_the_rest_waits_until_all_of_the_plan_is_asked_for() -> None:
    asking, one, two = make()
    asking.expect([(0, 0, 100), (1, 0, 100)])
    asking.ask()
    assert not one.wants_all
    assert not two.wants_all
    one.there = [(0, 100)]
    asking.ask()
    assert one.wants_all
    assert two.wants_all


def test_who_is_waited_for_comes_first_and_stops_the_plan() -> None:
    asking, one, two = make()
    asking.expect([(0, 0, 60), (0, 60, 60), (1, 500, 60)])
    asking.ask()
    asking.hasten([(0, 900, 10), (1, 0, 10)])
    asking.ask()
    assert one.wanted == [(900, 10), (0, 60), (60, 60)]
    assert two.wanted == [(0, 10)]
    one.there = [(0, 120)]
    asking.ask()
    assert two.wanted == [(0, 10)], "the plan waits while somebody does"
    one.there += [(900, 10)]
    two.there = [(0, 10)]
    asking.ask()
    assert two.wanted == [(500, 60)]


def test_of_many_who_are_waited_for_a_window_at_a_time() -> None:
    asking, one, _ = make()
    asking.hasten([(0, 60 * n, 60) for n in range(4)])
    asking.ask()
    assert one.wanted == [(0, 60), (60, 60)]
    assert not one.wants_all
    one.there = [(0, 60)]
    asking.ask()
    assert one.wanted == [(60, 60), (120, 60)]


def test_what_is_there_is_not_asked_for() -> None:
    asking, one, two = make()
    one.there = [(0, 500)]
    asking.expect([(0, 10, 10), (1, 0, 10)])
    asking.hasten([(0, 100, 10)])
    asking.ask()
    assert (one.num_wants, two.wanted) == (0, [(0, 10)])


def test_nothing_is_asked_for_again_that_nobody_added_to() -> None:
    asking, one, two = make()
    asking.expect([(0, 0, 60), (1, 0, 60)])
    asking.ask()
    asking.ask()
    assert (one.num_wants, two.num_wants) == (1, 1)


def test_it_says_that_there_is_something_new() -> None:
    asking, one, _ = make()
    assert not asking.is_new
    asking.hasten([(0, 0, 1)])
    assert asking.is_new
    asking.ask()
    assert not asking.is_new
    assert one.wants_all, "that was all"
    asking.expect([(0, 5, 1)])
    assert asking.is_new
    one.there = [(0, 1)]
    asking.ask()
    assert one.wanted == [(5, 1)]
