"""Which tensors of a checkpoint the rows of an expert's parameter are made of.

transformers says how a parameter of all experts is made: tensors of single experts are stacked,
gate and up joined. The same steps are taken here with names instead of tensors, and end in a list
for each expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from nexus_ext.checkpoint import Checkpoint, Entry
from nexus_ext.conversion import Converted
from nexus_ext.errors import CheckpointMismatch, StreamError

__all__ = ["Cut", "Gathering", "fused", "listed", "refuse"]

_MOST_LISTED = 6


@dataclass(frozen=True)
class Cut:
    """What an expert has of a tensor of the checkpoint: all, or one of `of` equal parts."""

    entry: Entry
    part: int = 0
    of: int = 1


def fused(entry: Entry, count: int) -> list[list[Cut]]:
    """For each expert its part of a tensor of all of them."""
    return [[Cut(entry, number, count)] for number in range(count)]


class Gathering:
    """How one parameter, called `name` in the model, of `count` experts is made."""

    def __init__(self, name: str, count: int, made: Converted, checkpoint: Checkpoint) -> None:
        self._name = name
        self._count = count
        self._made = made
        self._checkpoint = checkpoint

    def cuts(self) -> list[list[Cut]]:
        """For each expert what its rows are made of, in order.

        Raises:
            CheckpointMismatch: A tensor is missing, or there are more than experts.
            StreamError: An operation that does more than stack and join rows.
        """
        waiting: Mapping[str, Sequence[str]] = self._made.sources
        values: dict[str, list[list[Cut]]] = {}
        for operation in self._made.operations:
            kind, dim = type(operation).__name__, getattr(operation, "dim", None)
            if kind == "MergeModulelist" and dim == 0 and waiting:
                values = {p: self._stacked(p, names) for p, names in waiting.items()}
            elif kind == "Concatenate" and dim == 1:
                values |= {p: self._whole(p, names) for p, names in waiting.items()}
                ordered = zip(*values.values(), strict=True)
                values = {"": [[cut for rows in same for cut in rows] for same in ordered]}
            else:
                self._refuse_operation(repr(operation))
            waiting = {}
        if len(values) != 1:
            self._refuse_operation("having no more")
        return next(iter(values.values()))

    def _stacked(self, pattern: str, names: Sequence[str]) -> list[list[Cut]]:
        """One tensor for each expert, in the order of their numbers; all must be there."""
        template, by_number = _numbered(names)
        template = template or pattern.replace("\\", "")
        for number in range(self._count):
            if number not in by_number:
                refuse(
                    f"expert {number} of {self._name} needs "
                    f"{template.replace('*', str(number), 1)}, and {self._checkpoint.path} has "
                    f"{len(names)} of {self._count} such tensors"
                )
        wanted = [by_number[number] for number in range(self._count)]
        if len(names) != self._count:
            extra = [name for name in names if name not in wanted]
            refuse(
                f"{self._name} has {self._count} experts, and {self._checkpoint.path} has more: "
                f"{listed(extra)}"
            )
        return [[Cut(self._checkpoint.entries[name])] for name in wanted]

    def _whole(self, pattern: str, names: Sequence[str]) -> list[list[Cut]]:
        """One tensor of all experts."""
        if len(names) != 1:
            there = f": {listed(names)}" if names else ""
            refuse(
                f"{self._name} needs one tensor for {pattern}, and {self._checkpoint.path} has "
                f"{len(names)}{there}"
            )
        return fused(self._checkpoint.entries[names[0]], self._count)

    def _refuse_operation(self, which: str) -> NoReturn:
        raise StreamError(
            f"Experts stream by ranges of bytes, stacked and joined by rows, but {self._name} is "
            f"made of {listed(self._made.names)} by {self._made}, and {which} is neither. Write "
            "them as the model has them, with transformers: model.save_pretrained(folder, "
            "save_original_format=False)."
        )


def _numbered(names: Sequence[str]) -> tuple[str, dict[int, str]]:
    """Names that differ in one number: what they have in common with * for it, and each by its
    number. ("", {}) for others.
    """
    split = [name.split(".") for name in names]
    if not split or len({len(parts) for parts in split}) != 1:
        return "", {}
    places = list(_places(split))
    if len(places) != 1 or not all(_is_number(parts[places[0]]) for parts in split):
        return "", {}
    [place] = places
    template = [*split[0][:place], "*", *split[0][place + 1 :]]
    return ".".join(template), {int(parts[place]): ".".join(parts) for parts in split}


def _places(split: Sequence[Sequence[str]]) -> Iterator[int]:
    """Where names differ; of a single name, the last number in it."""
    differing = [
        index for index, parts in enumerate(zip(*split, strict=True)) if len(set(parts)) > 1
    ]
    if len(split) > 1:
        yield from differing
    else:
        numbers = [index for index, part in enumerate(split[0]) if _is_number(part)]
        yield from numbers[-1:]


def _is_number(part: str) -> bool:
    return part.isdecimal() and len(part) < 10


def refuse(problem: str) -> NoReturn:
    """Raise the error of a checkpoint that does not have what the model needs."""
    raise CheckpointMismatch(
        f"Model and checkpoint must agree on every expert: {problem}. Build the model with the "
        "checkpoint's own config, or download the files again."
    )


def listed(names: Sequence[str]) -> str:
    """Some of the names, and how many more."""
    more = f" and {len(names) - _MOST_LISTED} more" * (len(names) > _MOST_LISTED)
    return ", ".join(names[:_MOST_LISTED]) + more
