"""What a model's experts module does when its experts stream, and the op it does it with.

    hidden, top_k_index, top_k_weights ──▶ streamed_experts ──▶ hidden

Rows are sorted by expert as transformers' `grouped_mm` does, and each expert is one product over
its rows, as there: on a CPU results are equal to the last bit. On a GPU its products run over the
slots, all experts that are there in one launch. Owns the table of what ids stand for. The op is
pure: where experts are and how they got there cannot be seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from nexus_ext import ops
from nexus_ext.errors import EngineClosed, StreamError
from nexus_ext.experts.find import ExpertLayer, ExpertPiece
from nexus_ext.experts.pool import Pool
from nexus_ext.profiling import annotate

__all__ = ["Runner", "StreamedExperts", "experts_forward", "forget", "remember"]


class Runner(Protocol):
    """Who knows where experts are; see `nexus_ext.experts.runner.ExpertRunner`."""

    def run(
        self,
        layer: int,
        hidden: torch.Tensor,
        experts: Sequence[int],
        compute: Callable[[Sequence[int]], None],
    ) -> None: ...

    def tensors(self, layer: int, expert: int) -> Mapping[str, torch.Tensor]: ...
    def slot(self, layer: int, expert: int) -> int: ...
    def slot_table(self, layer: int) -> torch.Tensor | None: ...


class StreamedExperts:
    """One experts module of a streamed model."""

    def __init__(
        self,
        module: nn.Module,
        number: int,
        layer: ExpertLayer,
        runner: Runner,
        layer_id: torch.Tensor,
    ) -> None:
        self._module = weakref.ref(module)
        self.number = number
        self.id = layer_id
        self.path = layer.path
        self._weights = [expert.weights for expert in layer.experts]
        self._runner = runner
        self.num_experts = len(layer.experts)
        self.pool: Pool | None = None  # products over slots, on a GPU

    @property
    def module(self) -> Any:
        module = self._module()
        if module is None:
            raise EngineClosed("This model is gone. Stream it again to use it.")
        return module

    def forward(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden [T, H], top_k_index and top_k_weights [T, K] give [T, H], dtype of hidden."""
        out = self._without_the_host(hidden, top_k_index)
        if out is None:
            out = self._with_the_host(hidden, top_k_index)
        if out is None:  # no tokens
            return hidden.new_zeros(hidden.shape)
        module = self.module
        if getattr(module, "has_post_expert_norm", False):
            out = module.post_expert_norm(out)
        weighted = out * top_k_weights.reshape(-1, 1)
        return weighted.view(*top_k_index.shape, -1).sum(dim=1).to(hidden.dtype)

    def _without_the_host(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor
    ) -> torch.Tensor | None:
        """Where all experts of the layer stay, nobody but the device need know who was chosen."""
        pool = self.pool
        if pool is None or not top_k_index.numel() or not pool.can_take(top_k_index.numel()):
            return None
        table = self._runner.slot_table(self.number)
        if table is None:
            return None
        rows = hidden.repeat_interleave(top_k_index.shape[-1], dim=0)
        return pool.product(rows, table[top_k_index.reshape(-1)])

    def _with_the_host(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor
    ) -> torch.Tensor | None:
        """One row for each choice, in the order of choices: [T * K, H]."""
        rows = _Rows(hidden, top_k_index, self.num_experts)

        def compute(experts: Sequence[int]) -> None:
            rows.put(experts, self._through(rows, experts))

        with annotate("experts", hidden):
            self._runner.run(self.number, hidden, rows.experts, compute)
        return rows.by_choice()

    def _through(self, rows: _Rows, experts: Sequence[int]) -> torch.Tensor:
        """The rows of experts that have landed through them."""
        x, counts = rows.take(experts), rows.count(experts)
        pool = self.pool
        if pool is None or not pool.can_take(len(x)):
            return self._one_by_one(x, counts, experts)
        slots = torch.tensor([self._runner.slot(self.number, expert) for expert in experts])
        slots = slots.repeat_interleave(torch.tensor(counts)).to(x.device, non_blocking=True)
        return pool.product(x, slots)

    def backward(
        self,
        grad: torch.Tensor,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of hidden and of top_k_weights; experts are loaded again, and frozen."""
        rows = _Rows(hidden, top_k_index, self.num_experts)
        weights = top_k_weights.reshape(-1)[rows.order].unsqueeze(-1)
        grad_rows = grad[rows.tokens]
        grad_hidden = torch.zeros_like(rows.hidden)
        grad_weights = torch.zeros_like(weights)
        module = self.module
        norm = module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None

        def compute(experts: Sequence[int]) -> None:
            for expert in experts:
                part = rows.of(expert)
                with torch.enable_grad():
                    x = rows.hidden[part].detach().requires_grad_()
                    result = self._one_by_one(x, [len(x)], [expert])
                    result = norm(result) if norm is not None else result
                    w = weights[part].detach().requires_grad_()
                    given = torch.autograd.grad(
                        result * w, (x, w), grad_rows[part].to(result.dtype)
                    )
                grad_hidden[part], grad_weights[part] = given

        self._runner.run(self.number, hidden, rows.experts, compute)
        by_choice = grad_hidden[rows.inverse].view(*top_k_index.shape, -1)
        return (
            by_choice.sum(dim=1).to(hidden.dtype),
            grad_weights[rows.inverse].view(top_k_weights.shape).to(top_k_weights.dtype),
        )

    def _one_by_one(
        self, x: torch.Tensor, counts: list[int], experts: Sequence[int]
    ) -> torch.Tensor:
        """So many rows for each of these experts through him: [n, H] to [n, H]. Their tensors are
        there for this call.
        """
        module = self.module
        there = [self._runner.tensors(self.number, expert) for expert in experts]
        y = x.to(next(iter(there[0].values())).device)
        has_gate = getattr(module, "has_gate", True)
        y = self._linear(y, "gate_up_proj" if has_gate else "up_proj", counts, experts, there)
        y = module._apply_gate(y) if has_gate else module.act_fn(y)
        return self._linear(y, "down_proj", counts, experts, there).to(x.device)

    def _linear(
        self,
        x: torch.Tensor,
        name: str,
        counts: list[int],
        experts: Sequence[int],
        there: list[Mapping[str, torch.Tensor]],
    ) -> torch.Tensor:
        is_transposed = getattr(self.module, "is_transposed", False)
        results = []
        for rows, expert, tensors in zip(torch.split(x, counts), experts, there, strict=True):
            weights = self._weights[expert]
            parts = [_product(rows, piece, tensors, is_transposed) for piece in weights[name]]
            y = _joined(parts, dim=-1)
            bias = weights.get(f"{name}_bias")
            results.append(y if bias is None else y.add_(tensors[bias[0].parts[""]]))
        return _joined(results, dim=0)


def _joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _product(
    x: torch.Tensor, piece: ExpertPiece, tensors: Mapping[str, torch.Tensor], is_transposed: bool
) -> torch.Tensor:
    if piece.packing is None:
        weight = tensors[piece.parts[""]]
        x = x if x.dtype is weight.dtype else x.to(weight.dtype)
        return torch.mm(x, weight if is_transposed else weight.t())
    parts = {part: tensors[name] for part, name in piece.parts.items()} | dict(piece.constants)
    if is_transposed:
        return torch.mm(x, piece.packing.decode(parts, x.dtype))
    return piece.packing.linear(x, parts)


class _Rows:
    """Tokens' rows, one for each choice, sorted by expert.

    Attributes:
        order: The choices (flat) in the order of experts; `inverse` leads back.
        tokens: The token of each row.
        hidden: [T * K, H], in that order.
        experts: Who was chosen at all, in order.
    """

    def __init__(self, hidden: torch.Tensor, top_k_index: torch.Tensor, num_experts: int) -> None:
        flat = top_k_index.reshape(-1)
        chosen, self.order = torch.sort(flat)
        self.tokens = self.order // top_k_index.shape[-1]
        self.hidden = hidden[self.tokens]
        self.inverse = self.order.argsort()
        # The host must know whom to load: on a GPU it waits for the router here, once.
        steps = torch.arange(num_experts + 1, device=flat.device)
        bounds: list[int] = torch.searchsorted(chosen, steps).tolist()
        if bounds[0] != 0 or bounds[-1] != len(flat):
            raise StreamError(
                f"A router names experts in [0, {num_experts}), got {int(flat.min())} to "
                f"{int(flat.max())}. Expert parallelism cannot be streamed; load the model "
                "without it."
            )
        self._bounds = bounds
        self.experts = [e for e in range(num_experts) if bounds[e] < bounds[e + 1]]
        self._out: torch.Tensor | None = None

    def of(self, expert: int) -> slice:
        """The rows of an expert."""
        return slice(self._bounds[expert], self._bounds[expert + 1])

    def count(self, experts: Sequence[int]) -> list[int]:
        """How many rows each of these has."""
        return [self._bounds[expert + 1] - self._bounds[expert] for expert in experts]

    def take(self, experts: Sequence[int]) -> torch.Tensor:
        """The rows of these experts, one after the other."""
        if experts == self.experts:
            return self.hidden
        return _joined([self.hidden[self.of(expert)] for expert in experts], dim=0)

    def put(self, experts: Sequence[int], results: torch.Tensor) -> None:
        """What became of the rows that `take` gave."""
        if experts == self.experts:
            self._out = results
            return
        if self._out is None:
            self._out = results.new_empty(len(self.hidden), results.shape[-1])
        parts = torch.split(results, self.count(experts))
        for expert, part in zip(experts, parts, strict=True):
            self._out[self.of(expert)] = part

    def by_choice(self) -> torch.Tensor | None:
        """What became of all rows, in the order of choices; None if there are none."""
        return None if self._out is None else self._out[self.inverse]


# What ids stand for. Filled and emptied with models.
_known: dict[int, StreamedExperts] = {}


def remember(experts: StreamedExperts) -> None:
    """Let the op find it by its id, until `forget`."""
    _known[int(experts.id)] = experts


def forget(experts: StreamedExperts) -> None:
    """From now on its id names nothing; may be called twice."""
    _known.pop(int(experts.id), None)


def experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """`experts_implementation="nexus"`: what transformers calls instead of a module's forward."""
    handle = getattr(self, "_nexus_experts_id", None)
    if handle is None:
        raise StreamError(
            'experts_implementation="nexus" needs a model whose experts stream; this one was '
            "loaded as a whole. Use nexus_ext.from_pretrained() or nexus_ext.stream(), or another "
            "experts_implementation."
        )
    result: torch.Tensor = ops.native.streamed_experts(
        hidden_states, top_k_index, top_k_weights, handle
    )
    return result


def _lookup(id_: torch.Tensor) -> StreamedExperts:
    found = _known.get(int(id_))
    if found is None:
        raise EngineClosed(
            f"An id must name experts of a model that streams; {int(id_)} names none. The model "
            "was closed, or the graph was saved by another process. Stream the model again."
        )
    return found


@torch.library.impl("nexus::streamed_experts", ("CPU", "CUDA"))
def _experts(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    layer_id: torch.Tensor,
) -> torch.Tensor:
    return _lookup(layer_id).forward(hidden, top_k_index, top_k_weights)


@torch.library.impl("nexus::streamed_experts_grad", ("CPU", "CUDA"))
def _experts_grad(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    layer_id: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _lookup(layer_id).backward(grad, hidden, top_k_index, top_k_weights)


@torch.library.register_fake("nexus::streamed_experts")  # type: ignore[untyped-decorator]
def _experts_fake(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    layer_id: torch.Tensor,
) -> torch.Tensor:
    return hidden.new_empty(hidden.shape)  # contiguous, whatever hidden is


@torch.library.register_fake("nexus::streamed_experts_grad")  # type: ignore[untyped-decorator]
def _experts_grad_fake(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    layer_id: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return hidden.new_empty(hidden.shape), top_k_weights.new_empty(top_k_weights.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


# The gradient has none.
@once_differentiable
def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grads = ops.native.streamed_experts_grad(grad, *ctx.saved_tensors)
    return grads[0], None, grads[1], None


torch.library.register_autograd("nexus::streamed_experts", _backward, setup_context=_setup)
