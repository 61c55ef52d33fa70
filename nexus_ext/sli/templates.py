"""Where the structure of a layer comes from, when all that was kept is its tensors.

given ▶ what this process cached ▶ registered ▶ the model's own config ▶ StreamError
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeAlias

from torch import nn

from nexus_ext.errors import ConfigError, StreamError
from nexus_ext.sli.skeleton import Skeleton
from nexus_ext.sli.sources import source_of
from nexus_ext.sli.storing import StoredLayer

__all__ = ["Template", "Templates"]

Template: TypeAlias = "nn.Module | Callable[[int], nn.Module]"


class Templates:
    """The structures that one cache knows. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._registered: dict[str, Template] = {}
        self._known: dict[tuple[str, int], Skeleton] = {}

    def remember(self, model: str, index: int, layer: nn.Module) -> None:
        """Keep the structure of a layer; none of its tensors."""
        skeleton = Skeleton(layer)
        with self._lock:
            self._known[model, index] = skeleton

    def register(self, model: str, template: Template) -> None:
        """Use this for all layers of a model.

        Raises:
            ConfigError: Neither a module nor a function.
        """
        _check(template)
        with self._lock:
            self._registered[model] = template
            for key in [key for key in self._known if key[0] == model]:
                del self._known[key]

    def build(
        self,
        model: str,
        index: int,
        stored: StoredLayer,
        where: str,
        template: Template | None = None,
    ) -> nn.Module:
        """A layer over the tensors.

        Raises:
            StreamError: Nobody knows the structure.
            CheckpointMismatch: It is another one.
            ConfigError: The template is neither a module nor a function that returns one.
        """
        if template is not None:
            return _made(template, index).build(stored, where)
        with self._lock:
            skeleton = self._known.get((model, index))
            registered = self._registered.get(model)
        if skeleton is not None:
            return skeleton.build(stored, where)
        if registered is not None:
            skeleton = _made(registered, index)
            layer = skeleton.build(stored, where)
        else:
            skeleton, layer = _from_config(model, index, stored, where)
        with self._lock:
            self._known[model, index] = skeleton
        return layer


def _from_config(
    model: str, index: int, stored: StoredLayer, where: str
) -> tuple[Skeleton, nn.Module]:
    source = source_of(model)
    if source is None and stored.about.origin is not None:
        origin, index, digest = stored.about.origin
        source = source_of(origin)
        if source is not None and source.config_digest != digest:
            source = None  # another model stands there now
    if source is None or index >= source.num_layers:
        raise StreamError(
            f"A cached layer is tensors, and its code comes from a template; there is none for "
            f"{where}, a {stored.about.kind}. Call get_layer(..., template=module) or "
            "set_template(model, module), or name the model by its folder or hub id."
        )
    bare = Skeleton(source.block(index))
    # With the hook that completes calls: copies of the skeleton have it too.
    skeleton = Skeleton(source.called_alone(index, bare.build(stored, where)))
    return skeleton, skeleton.build(stored, where)


def _made(template: Template, index: int) -> Skeleton:
    _check(template)
    module = template if isinstance(template, nn.Module) else template(index)
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"a template function returns the module for a layer's number; it returned a "
            f"{type(module).__name__}."
        )
    return Skeleton(module)


def _check(template: object) -> None:
    is_function = callable(template) and not isinstance(template, type)
    if not isinstance(template, nn.Module) and not is_function:
        raise ConfigError(
            f"a template is a module or a function from a layer's number to one, got {template!r}. "
            "Write template=Block(config), or template=lambda number: Block(config)."
        )
