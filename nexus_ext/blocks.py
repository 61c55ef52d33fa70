"""Which modules are the blocks of a model: named by the user, or found.

Knows `nn.Module` trees and nothing of streaming.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from nexus_ext.errors import StreamError

__all__ = ["find_blocks"]


def find_blocks(
    model: nn.Module, groups: str | Iterable[str] | None
) -> list[tuple[str, nn.Module]]:
    """The (name, module) pairs that each become one group, in the order of names, then definition.

    Args:
        model: The whole model.
        groups: Names of blocks, or of containers (ModuleList, Sequential, ModuleDict) of blocks;
            None finds them: the outermost containers with repeated children.

    Raises:
        StreamError: A name that is not there, or nothing that repeats.
    """
    if groups is None:
        names = _repeating_containers(model)
    else:
        names = [groups] if isinstance(groups, str) else list(groups)
    # A module listed twice moves once.
    unique: dict[int, tuple[str, nn.Module]] = {}
    for name in names:
        for path, block in _expand(model, name):
            unique.setdefault(id(block), (path, block))
    found = [pair for pair in unique.values() if _has_parameters(pair[1])]
    _check_disjoint(found)
    if not found:
        raise StreamError(
            "Streaming needs repeated blocks (a ModuleList or Sequential of them), and "
            f"{type(model).__name__} shows none; name them: stream(..., groups=['encoder.layer'])."
        )
    return found


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict)


def _expand(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """The blocks a name stands for: a container's children, or the module itself."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        known = [path for path, child in model.named_modules() if _is_container(child)]
        raise StreamError(
            f"groups must name modules of {type(model).__name__}; there is no {name!r}. "
            f"Containers it has: {', '.join(known[:8]) or 'none'}."
        ) from None
    return _called_in(name, module)


def _called_in(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """A container's children; children that cannot be called are taken apart in turn."""
    if not _is_container(module):
        return [(name, module)]
    prefix = f"{name}." if name else ""
    return [
        pair
        for child_name, child in module.named_children()
        for pair in (
            _called_in(prefix + child_name, child)
            if isinstance(child, nn.ModuleList | nn.ModuleDict)
            else [(prefix + child_name, child)]
        )
    ]


def _repeating_containers(model: nn.Module) -> list[str]:
    """Outermost containers with at least two children of one class that hold parameters.

    A Sequential at the root needs no repetition: its children are the blocks.
    """
    if isinstance(model, nn.Sequential):
        return [""]
    found: list[str] = []
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if not is_inside and _is_container(module) and _repeats(module):
            found.append(name)
    return found


def _repeats(container: nn.Module) -> bool:
    kinds = Counter(type(child) for child in container.children() if _has_parameters(child))
    return max(kinds.values(), default=0) >= 2


def _check_disjoint(blocks: list[tuple[str, nn.Module]]) -> None:
    inside = {
        id(child): name for name, block in blocks for child in block.modules() if child is not block
    }
    for name, block in blocks:
        if id(block) in inside:
            raise StreamError(
                f"Groups must not contain each other; {name!r} lies inside {inside[id(block)]!r}. "
                "Name one of them."
            )
