"""The op that streamed experts are: its schema, compilers, gradients, and what its id names."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters

import nexus_ext as nexus
from nexus_ext.errors import EngineClosed, StreamError
from tests.expert_subjects import (
    PROMPT,
    PROMPTS,
    ROOMY,
    TEXT,
    Subject,
    experts_of,
    generate,
    ids,
    load_resident,
    logits,
    make_subject,
)

OP = torch.ops.nexus.streamed_experts.default
GRAD = torch.ops.nexus.streamed_experts_grad.default

pytestmark = [
    pytest.mark.usefixtures("one_quiet_thread"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _clean_slate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NEXUS_POISON", "1")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["qwen3-f32"])
def subject(request: pytest.FixtureRequest, folder: Path) -> Iterator[Subject]:
    """Streamed through the fewest slots: whatever reads late reads poison."""
    name, _, format_ = request.param.rpartition("-")
    made = make_subject(name, format_, folder)
    made.stream(budget=made.dense_bytes + made.floor, expert_budget=made.floor, io="direct")
    yield made
    made.close()


def inputs(
    num_tokens: int = 5, *, requires_grad: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, top_k_index, top_k_weights: two of twelve experts for each token."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(num_tokens, 64, generator=generator).to(dtype)
    index = torch.randint(0, 12, (num_tokens, 2), generator=generator)
    weights = torch.rand(num_tokens, 2, generator=generator).to(dtype)
    return hidden.requires_grad_(requires_grad), index, weights.requires_grad_(requires_grad)


def id_of(model: Any, layer: int = 0) -> torch.Tensor:
    found: torch.Tensor = experts_of(model)[layer]._nexus_experts_id
    return found


# -- the op --------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", ["qwen3-f32", "gpt-oss-f32", "qwen3-nf4"], indirect=True)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_finds_nothing_wrong(subject: Subject, requires_grad: bool) -> None:
    found = torch.library.opcheck(
        OP, (*inputs(requires_grad=requires_grad), id_of(subject.model, 1))
    )
    assert set(found.values()) == {"SUCCESS"}


def test_the_gradient_is_pure_and_has_a_fake(subject: Subject) -> None:
    """opcheck would run its kernel below autograd, where it could not take a gradient."""
    assert not GRAD._schema.is_mutable
    given = (torch.randn(5, 64), *inputs(), id_of(subject.model))
    before = [tensor.clone() for tensor in given]
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = GRAD(*(mode.from_tensor(tensor) for tensor in given))
    for fake, real in zip(fakes, GRAD(*given), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
        assert not real.requires_grad
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))


@pytest.mark.parametrize("shape", ["transposed", "every other row", "no tokens"])
def test_opcheck_takes_any_strides(subject: Subject, shape: str) -> None:
    hidden, index, weights = inputs(6)
    if shape == "transposed":
        hidden = hidden.t().contiguous().t()
    elif shape == "every other row":
        hidden, index, weights = hidden[::2], index[::2], weights[::2]
    else:
        hidden, index, weights = hidden[:0], index[:0], weights[:0]
    found = torch.library.opcheck(OP, (hidden, index, weights, id_of(subject.model)))
    assert set(found.values()) == {"SUCCESS"}


def test_the_op_changes_nothing_that_it_is_given(subject: Subject) -> None:
    assert not OP._schema.is_mutable
    given = (*inputs(), id_of(subject.model))
    before = [tensor.clone() for tensor in given]
    out = OP(*given)
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))
    assert out.untyped_storage().data_ptr() != given[0].untyped_storage().data_ptr()


def test_the_fakes_touch_no_engine_and_take_any_size() -> None:
    with torch._subclasses.FakeTensorMode():
        hidden = torch.empty(7, 64, dtype=torch.bfloat16)
        index, weights = torch.empty(7, 3, dtype=torch.int64), torch.empty(7, 3)
        no_model = torch.tensor(1 << 62)
        out = OP(hidden, index, weights, no_model)
        assert (out.shape, out.dtype) == (hidden.shape, hidden.dtype)
        grads = GRAD(hidden, hidden, index, weights, no_model)
        assert [grad.shape for grad in grads] == [hidden.shape, weights.shape]
        assert [grad.dtype for grad in grads] == [hidden.dtype, weights.dtype]


# -- what an id stands for -----------------------------------------------------------------------


def test_every_layer_of_every_model_has_an_id_of_its_own(subject: Subject) -> None:
    with nexus.from_pretrained(subject.folder, budget=ROOMY) as other:
        found = {int(id_of(model, layer)) for model in (subject.model, other) for layer in range(3)}
        assert len(found) == 6
        given = inputs()
        for layer in range(3):
            want = experts_of(subject.resident)[layer](*given)
            assert torch.equal(OP(*given, id_of(subject.model, layer)), want)
            assert torch.equal(OP(*given, id_of(other, layer)), want)


def test_the_id_of_a_closed_model_names_nothing(subject: Subject) -> None:
    old = id_of(subject.model)
    nexus.close(subject.model)
    with pytest.raises(EngineClosed, match=r"names none.*closed.*Stream the model again"):
        OP(*inputs(), old)
    with pytest.raises(EngineClosed):
        GRAD(torch.randn(5, 64), *inputs(), old)
    with pytest.raises(EngineClosed):
        logits(subject.model, PROMPT, TEXT)
    subject.stream(io="direct")
    assert int(id_of(subject.model)) != int(old)
    with pytest.raises(EngineClosed):
        OP(*inputs(), old)
    assert torch.equal(logits(subject.model, PROMPT, TEXT), logits(subject.resident, PROMPT, TEXT))


def test_a_model_that_is_gone_takes_its_ids_along(subject: Subject) -> None:
    model = nexus.from_pretrained(subject.folder, budget=ROOMY)
    old = id_of(model).clone()
    OP(*inputs(), old)
    del model
    gc.collect()
    with pytest.raises(EngineClosed):
        OP(*inputs(), old)


def test_an_id_of_nobody_names_nothing() -> None:
    for number in (0, -1, 1 << 40):
        with pytest.raises(EngineClosed, match=f"; {number} names none"):
            OP(*inputs(), torch.tensor(number))


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
def test_closing_restores_the_implementation(subject: Subject, implementation: str) -> None:
    model = nexus.from_pretrained(subject.folder, budget=ROOMY)
    nexus.close(model)
    model.set_experts_implementation(implementation)
    before = model.config._experts_implementation
    assert before == implementation
    for _ in range(2):
        with nexus.stream(model, subject.checkpoint, budget=ROOMY, strict=False):
            assert model.config._experts_implementation == "nexus"
            assert torch.equal(logits(model, PROMPT, TEXT), logits(subject.resident, PROMPT, TEXT))
        assert model.config._experts_implementation == before
        nexus.close(model)
        assert model.config._experts_implementation == before


def test_a_stream_that_fails_restores_the_implementation(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at its very end, when the experts are attached."""
    nexus.close(subject.model)
    before = subject.model.config._experts_implementation
    assert before != "nexus"

    def fail(*_: object) -> None:
        raise StreamError("not now")

    with monkeypatch.context() as patch:
        patch.setattr("nexus_ext.module.subclass_all", fail)
        with pytest.raises(StreamError, match="not now"):
            subject.stream(io="direct")
    assert subject.model.config._experts_implementation == before
    with pytest.raises(EngineClosed):
        OP(*inputs(), id_of(subject.model))


# -- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", ["qwen3-f32", "gpt-oss-f32", "mixtral-nf4"], indirect=True)
@pytest.mark.parametrize("index", [None, [[3, 3], [0, 3], [5, 0]]], ids=["random", "twice"])
def test_gradients_are_those_of_the_resident_module(
    subject: Subject, index: list[list[int]] | None
) -> None:
    hidden, chosen, weights = inputs(9)
    if index is not None:
        chosen = torch.tensor(index)
        hidden, weights = hidden[:3], weights[:3]
    chosen = chosen % subject.architecture.num_experts
    probe = torch.randn(hidden.shape)
    for mine, theirs in zip(experts_of(subject.model), experts_of(subject.resident), strict=True):
        found = []
        for module in (mine, theirs):
            x, w = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
            out = module(x, chosen, w)
            (out * probe).sum().backward()
            assert x.grad is not None
            assert w.grad is not None
            assert w.grad.abs().min() > 0
            found.append((out.detach(), x.grad, w.grad))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_the_whole_model(subject: Subject) -> None:
    """Dense weights stream beside: backward goes through their groups, and loads experts again."""
    embedded = torch.randn(2, 6, 64)
    grads = []
    for model in (subject.model, subject.resident):
        x = embedded.clone().requires_grad_()
        model(inputs_embeds=x, use_cache=False).logits.square().mean().backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)
    # And it computes on.
    assert torch.equal(logits(subject.model, PROMPT, TEXT), logits(subject.resident, PROMPT, TEXT))


def test_only_what_needs_a_gradient_gets_one(subject: Subject) -> None:
    for hidden_needs, weights_need in ((True, False), (False, True)):
        hidden, index, weights = inputs()
        hidden.requires_grad_(hidden_needs)
        weights.requires_grad_(weights_need)
        experts_of(subject.model)[0](hidden, index, weights).sum().backward()
        assert (hidden.grad is not None) == hidden_needs
        assert (weights.grad is not None) == weights_need


def test_a_gradient_of_the_gradient_is_refused(subject: Subject) -> None:
    hidden, index, weights = inputs(requires_grad=True)
    out = experts_of(subject.model)[0](hidden, index, weights)
    [first] = torch.autograd.grad(out.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_all_modes_of_autograd_give_the_same_bits(subject: Subject, mode: Any) -> None:
    given = inputs()
    with torch.no_grad():
        want = experts_of(subject.resident)[0](*given)
    with mode():
        got = experts_of(subject.model)[0](*given)
        assert torch.equal(got, want)
        assert not got.requires_grad
        assert got.is_inference() == (mode is torch.inference_mode)


# -- compilers -----------------------------------------------------------------------------------


def test_one_graph_serves_the_experts_of_all_layers(subject: Subject) -> None:
    counter = CompileCounter()
    given = inputs()
    with torch.no_grad():
        for mine, theirs in zip(
            experts_of(subject.model), experts_of(subject.resident), strict=True
        ):
            mine.compile(backend=counter, fullgraph=True)
            for _ in range(2):
                assert torch.equal(mine(*given), theirs(*given))
    assert counter.frame_count == 1


def test_another_budget_or_file_needs_no_other_graph(subject: Subject) -> None:
    counter = CompileCounter()
    given = inputs()
    with torch.no_grad():
        want = experts_of(subject.resident)[1](*given)
        experts_of(subject.model)[1].compile(backend=counter, fullgraph=True)
        for options in ({}, {"io": "buffered", "expert_budget": "40%"}, {"io": "mmap"}):
            nexus.close(subject.model)
            subject.stream(**options)
            assert torch.equal(experts_of(subject.model)[1](*given), want)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_block_of_router_and_experts_is_one_graph(subject: Subject, backend: str) -> None:
    x = torch.randn(2, 7, 64)
    with torch.no_grad():
        mine, theirs = subject.model.model.layers[2].mlp, subject.resident.model.layers[2].mlp
        want = theirs(x)
        mine.compile(backend=backend, fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(mine(x), want, rtol=1e-5, atol=1e-5)
            assert backend == "inductor" or torch.equal(mine(x), want)
    assert not counters["graph_break"]


def test_decoder_layers_recompile_no_more_than_resident_ones(subject: Subject) -> None:
    """transformers' layers have their number among their attributes."""
    ours, theirs = CompileCounterWithBackend("eager"), CompileCounterWithBackend("eager")
    for layer in subject.model.model.layers:
        layer.compile(backend=ours, fullgraph=True)
    for layer in subject.resident.model.layers:
        layer.compile(backend=theirs, fullgraph=True)
    try:
        with torch.no_grad():
            for prompt in (PROMPTS, PROMPTS[:, :3]):
                got = subject.model(prompt, use_cache=False).logits
                assert torch.equal(got, subject.resident(prompt, use_cache=False).logits)
    finally:
        for layer in subject.resident.model.layers:
            layer._compiled_call_impl = None
        for layer in subject.model.model.layers:
            layer._compiled_call_impl = None
    assert 0 < ours.frame_count <= theirs.frame_count
    assert not counters["graph_break"]


@pytest.mark.parametrize("subject", ["gpt-oss-f32"], indirect=True)
def test_a_whole_model_compiles_to_the_same_bits(subject: Subject) -> None:
    with torch.no_grad():
        compiled = torch.compile(subject.model, backend="aot_eager", fullgraph=True)
        like = torch.compile(subject.resident, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            got = compiled(PROMPTS, use_cache=False).logits
            assert torch.equal(got, like(PROMPTS, use_cache=False).logits)
    assert not counters["graph_break"]


def test_generate_with_a_static_cache_and_compiled_layers(subject: Subject) -> None:
    want = generate(subject.resident, PROMPT, 6)
    for layer in subject.model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    try:
        with torch._dynamo.config.patch(recompile_limit=64):
            got = subject.model.generate(
                PROMPT,
                attention_mask=torch.ones_like(PROMPT),
                max_new_tokens=6,
                min_new_tokens=6,
                do_sample=False,
                cache_implementation="static",
            )
    finally:
        for layer in subject.model.model.layers:
            layer._compiled_call_impl = None
    assert torch.equal(got, want)


def test_gradients_through_compiled_experts_are_the_eager_ones(subject: Subject) -> None:
    """The op is pure, so that compiled backward may load again what it needs."""
    experts = experts_of(subject.model)[0]
    found = []
    for run in (experts, torch.compile(experts, backend="aot_eager", fullgraph=True)):
        hidden, index, weights = inputs(requires_grad=True)
        run(hidden, index, weights).square().sum().backward()
        found.append((hidden.grad, weights.grad))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_what_is_compiled_after_an_eager_prefill_is_no_prefill(subject: Subject) -> None:
    """transformers compiles the decoding alone."""
    compiled = torch.compile(subject.model, backend="eager", fullgraph=True)
    with torch.no_grad():
        subject.model(PROMPT, use_cache=False)
        before = nexus.stats(subject.model).experts
        compiled(ids(2, 1), use_cache=False)
        after = nexus.stats(subject.model).experts
    assert after.num_prefill_runs == before.num_prefill_runs
    assert after.num_runs == before.num_runs + 3


def test_other_models_keep_their_implementation(subject: Subject) -> None:
    other = load_resident(subject.folder)
    assert other.config._experts_implementation == "grouped_mm"
    assert subject.model.config._experts_implementation == "nexus"
    assert torch.equal(experts_of(other)[0](*inputs()), experts_of(subject.model)[0](*inputs()))
