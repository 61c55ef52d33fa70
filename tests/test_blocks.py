"""Which modules are the blocks of a model?"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import nn

from nexus_ext.blocks import find_blocks
from nexus_ext.errors import StreamError


def linear() -> nn.Linear:
    return nn.Linear(2, 2)


def linears(count: int) -> nn.ModuleList:
    return nn.ModuleList(linear() for _ in range(count))


class Parts(nn.Module):
    """Whatever it is given, under those names."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def names(model: nn.Module, groups: str | Iterable[str] | None = None) -> list[str]:
    found = find_blocks(model, groups)
    assert all(model.get_submodule(name) is module for name, module in found)
    return [name for name, _ in found]


@pytest.mark.parametrize(
    ("model", "blocks"),
    [
        (Parts(layers=linears(3)), ["layers.0", "layers.1", "layers.2"]),
        (Parts(a=Parts(deep=linears(2)), b=linear()), ["a.deep.0", "a.deep.1"]),
        (Parts(b=linears(2), a=linears(2)), ["b.0", "b.1", "a.0", "a.1"]),
        (Parts(chain=nn.Sequential(linear(), nn.ReLU(), linear())), ["chain.0", "chain.2"]),
        (Parts(words=nn.ModuleDict({"x": linear(), "y": linear()})), ["words.x", "words.y"]),
        (nn.ModuleList([linear(), linear()]), ["0", "1"]),
        (nn.Sequential(linear(), nn.ReLU(), nn.LayerNorm(2)), ["0", "2"]),
        # Two of one class suffice, and what stands beside them moves too.
        (nn.ModuleList([nn.LayerNorm(2), linear(), linear()]), ["0", "1", "2"]),
    ],
)
def test_repeated_children_of_the_outermost_container_are_the_blocks(
    model: nn.Module, blocks: list[str]
) -> None:
    assert names(model) == blocks


def test_a_container_inside_a_block_is_no_container_of_blocks() -> None:
    model = Parts(layers=nn.ModuleList([Parts(inner=linears(4)), Parts(inner=linears(4))]))
    assert names(model) == ["layers.0", "layers.1"]


def test_a_container_whose_name_begins_like_another_is_a_container_of_its_own() -> None:
    model = Parts(layers=linears(2), layers_too=linears(2))
    assert names(model) == ["layers.0", "layers.1", "layers_too.0", "layers_too.1"]


@pytest.mark.parametrize(
    "model",
    [
        linear(),
        Parts(a=linear(), b=linear()),
        Parts(layers=linears(1)),
        Parts(layers=nn.ModuleList([linear(), nn.LayerNorm(2)])),
        Parts(layers=nn.ModuleList([nn.ReLU(), nn.ReLU()])),
        nn.Sequential(nn.ReLU(), nn.ReLU()),
        nn.ModuleList(),
    ],
)
def test_nothing_repeated_is_refused_with_a_way_out(model: nn.Module) -> None:
    with pytest.raises(StreamError, match=rf"{type(model).__name__} shows none.*groups="):
        names(model)


@pytest.mark.parametrize(
    ("groups", "blocks"),
    [
        ("layers", ["layers.0", "layers.1", "layers.2"]),
        ("layers.1", ["layers.1"]),
        (["layers.2", "layers.0"], ["layers.2", "layers.0"]),
        (("head", "layers"), ["head", "layers.0", "layers.1", "layers.2"]),
        (iter(["head"]), ["head"]),
        (["layers.1", "layers", "layers.1"], ["layers.1", "layers.0", "layers.2"]),
    ],
)
def test_named_groups_come_in_the_order_of_their_names_and_once(
    groups: str | Iterable[str], blocks: list[str]
) -> None:
    assert names(Parts(layers=linears(3), head=linear()), groups) == blocks


def test_a_module_under_two_names_is_one_block() -> None:
    shared = linear()
    assert names(Parts(layers=nn.ModuleList([shared, linear(), shared]))) == [
        "layers.0",
        "layers.1",
    ]


def test_the_whole_model_may_be_one_block() -> None:
    assert names(linear(), "") == [""]


def test_children_without_parameters_are_left_out() -> None:
    model = Parts(chain=nn.Sequential(linear(), nn.Dropout(), nn.Tanh()), act=nn.ReLU())
    assert names(model, ["chain", "act"]) == ["chain.0"]


def test_an_unknown_name_is_refused_with_the_containers_there_are() -> None:
    model = Parts(layers=linears(2), tail=nn.Sequential(linear()))
    with pytest.raises(StreamError, match=r"no 'blocks'.*layers, tail"):
        names(model, "blocks")
    with pytest.raises(StreamError, match="it has: none"):
        names(linear(), "blocks")


@pytest.mark.parametrize("groups", [["layers.0", "layers.0.inner"], ["layers.0.inner", "layers"]])
def test_a_group_inside_another_is_refused_with_both_names(groups: list[str]) -> None:
    model = Parts(layers=nn.ModuleList(Parts(inner=linear()) for _ in range(2)))
    with pytest.raises(StreamError, match=r"'layers\.0\.inner' lies inside 'layers\.0'"):
        names(model, groups)


def test_looking_changes_nothing() -> None:
    model = Parts(layers=linears(3))
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    names(model)
    assert before == {n: id(t) for n, t in model.state_dict(keep_vars=True).items()}
    assert torch.is_grad_enabled()
