"""Which names of a checkpoint stand for which names of a model.

transformers renames and merges tensors while it loads them: `block_sparse_moe.gate` becomes
`mlp.gate`, and one tensor for each expert one for all of them. Its own rules are asked, one name of
the checkpoint after the other; no tensor is read. Where there are no rules, a name is a name.

    Conversion.of(model, checkpoint) ──rename(name)────▶ the checkpoint's name
                                     └─converted(name)─▶ the names it is made of, and how
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nexus_ext.checkpoint import Checkpoint
from nexus_ext.errors import StreamError

__all__ = ["Conversion", "Converted"]


@dataclass(frozen=True)
class Converted:
    """A tensor of a model that is made of others.

    Attributes:
        sources: By the pattern that a name fits: names of the checkpoint, numbers in them
            ascending. Patterns in the order in which they are joined; one may have no names.
        operations: What transformers would do, objects of `transformers.core_model_loading`.
    """

    sources: Mapping[str, tuple[str, ...]]
    operations: tuple[Any, ...]

    @property
    def names(self) -> list[str]:
        """All names of the checkpoint that are needed."""
        return [name for names in self.sources.values() for name in names]

    def __str__(self) -> str:
        return ", then ".join(map(repr, self.operations))


class Conversion:
    """What every tensor of one model is called in one checkpoint.

    It is a function from name to name too: `conversion(name)` is `conversion.rename(name)`.
    """

    def __init__(
        self,
        names: Iterable[str] = (),
        prefix: str = "",
        renamed: Mapping[str, str] | None = None,
        converted: Mapping[str, Converted] | None = None,
        makers: Sequence[tuple[str, tuple[str, ...]]] = (),
    ) -> None:
        """Use `of`.

        Args:
            names: Those of the checkpoint.
            prefix: Of the base model, as "model."; names may have it or lack it.
            renamed: From a name of the model to the name of the checkpoint.
            converted: What is made of other tensors, by its name in the model.
            makers: What may be made so: part of a name in the model, and patterns of sources.
        """
        self._prefix = prefix
        self._renamed = dict(renamed or {})
        self._converted = dict(converted or {})
        self._makers = tuple(makers)
        taken = {source for name, source in self._renamed.items() if name != source}
        taken = taken.union(*(made.names for made in self._converted.values()))
        self._free = set(names) - taken

    @classmethod
    def of(cls, model: nn.Module, checkpoint: Checkpoint) -> Conversion:
        """Ask transformers, where the model is one of its own."""
        prefix = getattr(model, "base_model_prefix", "")
        rules = _Rules.of(model, checkpoint)
        found = rules.apply() if rules is not None else ()
        return cls(checkpoint.entries, f"{prefix}." if prefix else "", *found)

    def __call__(self, name: str) -> str:
        return self.rename(name)

    def rename(self, name: str) -> str:
        """The checkpoint's name for a tensor of the model; the same where it has none.

        Raises:
            StreamError: The checkpoint has what the tensor is made of, and not the tensor.
        """
        if name in self._renamed:
            return self._renamed[name]
        if name in self._converted:
            made = self._converted[name]
            raise StreamError(
                f"Weights stream as they lie in the checkpoint, but {name} is made of "
                f"{', '.join(made.names[:4])} by {made}. Write them as the model has them, with "
                "transformers: model.save_pretrained(folder, save_original_format=False)."
            )
        candidates = (name, name.removeprefix(self._prefix), self._prefix + name)
        return next((c for c in candidates if c in self._free), name)

    def converted(self, name: str) -> Converted | None:
        """What a tensor of the model is made of; None where the checkpoint has it as it is."""
        return None if name in self._renamed else self._converted.get(name)

    def sources(self, name: str) -> list[str]:
        """The checkpoint's names of all that a tensor of the model needs."""
        made = self.converted(name)
        return [self.rename(name)] if made is None else made.names

    def patterns(self, name: str) -> tuple[str, ...]:
        """Which names could make a tensor of the model, were they there; for messages."""
        return next((patterns for target, patterns in self._makers if target in name), ())


class _Rules:
    """transformers' renamings and converters for one model."""

    def __init__(
        self, rename_source_key: Any, transforms: Sequence[Any], model: Any, checkpoint: Checkpoint
    ) -> None:
        self._rename_source_key = rename_source_key
        self._converters = [rule for rule in transforms if hasattr(rule, "operations")]
        self._renamings = [rule for rule in transforms if not hasattr(rule, "operations")]
        # As transformers: of two converters with one pattern the later counts.
        self._by_pattern = {
            pattern: rule for rule in self._converters for pattern in rule.source_patterns
        }
        self._prefix = model.base_model_prefix
        self._tensors: dict[str, Any] = model.state_dict()
        self._checkpoint = checkpoint

    @classmethod
    def of(cls, model: nn.Module, checkpoint: Checkpoint) -> _Rules | None:
        is_theirs = any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__)
        if not is_theirs or not hasattr(model, "base_model_prefix"):
            return None
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import rename_source_key
        except ImportError:  # before version 5
            return None
        theirs: Any = model
        return cls(rename_source_key, get_model_conversion_mapping(theirs), theirs, checkpoint)

    def apply(self) -> tuple[dict[str, str], dict[str, Converted], list[Any]]:
        """What is renamed, what is made of what, and what else could be made."""
        renamed: dict[str, str] = {}
        made: dict[str, tuple[Any, dict[str, list[str]]]] = {}
        # Experts in the order of their numbers; and a renaming may wait for the first of its group.
        for name in sorted(self._checkpoint.entries, key=_natural):
            target, pattern = self._target(name)
            if pattern is not None:
                rule = self._by_pattern[pattern]
                for one in self._targets(rule, target):
                    sources = made.setdefault(one, (rule, {}))[1]
                    sources.setdefault(pattern, []).append(name)
            elif target in self._tensors and (target == name or target not in renamed):
                renamed[target] = name
        converted = {}
        for target, (rule, sources) in made.items():
            if self._is_kept(target, rule, sources):
                renamed.setdefault(target, next(iter(sources.values()))[0])
            elif target not in renamed:
                ordered = {p: tuple(sources.get(p, ())) for p in rule.source_patterns}
                converted[target] = Converted(ordered, tuple(rule.operations))
        return renamed, converted, self._makers()

    def _target(self, name: str) -> tuple[str, str | None]:
        """The name in the model, and the pattern of the converter that makes it, if one does."""
        target, pattern = self._rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._tensors
        )
        if target not in self._tensors and name in self._tensors:
            return name, None  # it is called so already
        return target, pattern

    def _targets(self, rule: Any, first: str) -> list[str]:
        """All that a converter makes of a tensor; `first` has the first pattern's text."""
        patterns = rule.target_patterns
        names = [first.replace(patterns[0], pattern) for pattern in patterns]
        return [name for name in names if name in self._tensors]

    def _is_kept(self, target: str, rule: Any, sources: Mapping[str, list[str]]) -> bool:
        """Whether a converter leaves a tensor as it is: the shape is right already."""
        names = [name for found in sources.values() for name in found]
        kinds = {type(operation).__name__ for operation in rule.operations}
        checked = all(getattr(operation, "check_dims", False) for operation in rule.operations)
        if len(names) != 1 or kinds != {"Transpose"} or not checked:
            return False
        return self._checkpoint.entries[names[0]].shape == tuple(self._tensors[target].shape)

    def _makers(self) -> list[tuple[str, tuple[str, ...]]]:
        return [
            (target, tuple(rule.source_patterns))
            for rule in self._converters
            for target in rule.target_patterns
        ]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Numbers between dots as numbers, and before words."""
    return [(0, int(part), "") if _is_number(part) else (1, 0, part) for part in name.split(".")]


def _is_number(part: str) -> bool:
    return part.isdecimal() and len(part) < 10  # a name is untrusted, and int() refuses long ones
