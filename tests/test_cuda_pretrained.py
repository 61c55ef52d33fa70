"""transformers' models on a GPU, real or simulated: tokens, packed weights, weights by rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import nexus_ext as nexus
from nexus_ext.demo import make_llama
from nexus_ext.device import Device
from nexus_ext.errors import ConfigError
from nexus_ext.pretrained import plan_pretrained
from tests.test_cuda_module import SLOT, SMALL, _poisoned_arenas, device

pytestmark = pytest.mark.takes_simcuda
__all__ = ["_poisoned_arenas", "device"]  # fixtures

TINY = {"num_blocks": 5, "hidden": 64, "intermediate": 96, "vocabulary": 128}
FROM_DISK = {"io": "direct", "ram_budget": 3 * SLOT, **SMALL}
FROM_RAM = {"io": "direct", "ram_budget": "16MiB"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    make_llama(path, **TINY, data_alignment=72)
    return path


@pytest.fixture(scope="module")
def packed(llama: Path) -> Callable[[str], Path]:
    def convert(mode: str) -> Path:
        folder = llama.parent / mode
        if not folder.exists():
            nexus.convert(llama, folder, mode)
        return folder

    return convert


@pytest.fixture
def prompt(device: Device) -> torch.Tensor:
    return torch.tensor([[1, 5, 9, 2]], device=device.torch_device)


@pytest.fixture
def resident(llama: Path, device: Device) -> Any:
    return LlamaForCausalLM.from_pretrained(llama).eval().to(device.torch_device)


def smallest(path: Path, device: Device, **options: Any) -> int:
    return plan_pretrained(path, device=device, budget="1GiB", **options).minimum_bytes


def logits(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(prompt).logits


# -- logits and tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [FROM_DISK, FROM_RAM], ids=["disk", "ram"])
def test_logits_and_tokens_equal_those_of_transformers(
    resident: Any, llama: Path, device: Device, prompt: torch.Tensor, options: Any
) -> None:
    budget = smallest(llama, device)
    with nexus.from_pretrained(llama, device=device, budget=budget, **options) as model:
        assert isinstance(model, LlamaForCausalLM)
        assert len(nexus.plan_of(model).streamed) == TINY["num_blocks"]
        assert torch.equal(logits(model, prompt), logits(resident, prompt))
        settings = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(
            model.generate(prompt, **settings), resident.generate(prompt, **settings)
        )
        assert torch.equal(logits(model, prompt), logits(resident, prompt))
        assert nexus.stats(model).device == "cuda:0"


def test_transformers_takes_it_for_a_model_on_the_device(llama: Path, device: Device) -> None:
    with nexus.from_pretrained(
        llama, device=device, budget=smallest(llama, device), **FROM_DISK
    ) as model:
        assert model.device == device.torch_device
        assert model.dtype == torch.float32
        assert {parameter.device for parameter in model.parameters()} == {device.torch_device}
        assert {buffer.device for buffer in model.buffers()} == {device.torch_device}


def test_sampling_draws_the_same_tokens(
    resident: Any, llama: Path, device: Device, prompt: torch.Tensor
) -> None:
    def sample(model: Any) -> torch.Tensor:
        torch.manual_seed(7)
        return model.generate(
            prompt.repeat(3, 1), max_new_tokens=6, do_sample=True, num_return_sequences=2
        )

    with nexus.from_pretrained(
        llama, device=device, budget=smallest(llama, device), **FROM_RAM
    ) as model:
        assert torch.equal(sample(model), sample(resident))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats(tmp_path: Path, device: Device, prompt: torch.Tensor, dtype: Any) -> None:
    make_llama(tmp_path / "m", **TINY, dtype=dtype)
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "m", dtype="auto").eval()
    want = logits(plain.to(device.torch_device), prompt)
    with nexus.from_pretrained(
        tmp_path / "m", device=device, budget=smallest(tmp_path / "m", device), **FROM_DISK
    ) as model:
        for _ in range(2):
            assert torch.equal(logits(model, prompt), want)


# -- plans -----------------------------------------------------------------------------------------


def test_a_plan_is_that_of_the_model(llama: Path, device: Device) -> None:
    for options in (
        {"budget": smallest(llama, device), **FROM_RAM},
        {"budget": "500KiB", **FROM_DISK},
        {"budget": "1GiB"},
    ):
        plan = plan_pretrained(llama, device=device, **options)
        with nexus.from_pretrained(llama, device=device, **options) as model:
            real = nexus.plan_of(model)
        assert (plan.resident, plan.streamed) == (real.resident, real.streamed)
        assert plan.device_bytes == real.device_bytes <= plan.budget_bytes
        assert plan.in_ram == real.in_ram


def test_a_plan_for_a_device_predicts_from_its_link(llama: Path, device: Device) -> None:
    plan = plan_pretrained(llama, device=device, budget=smallest(llama, device), **FROM_RAM)
    assert plan.in_ram == plan.streamed
    assert plan.predicted_io_seconds is not None
    assert plan.predicted_io_seconds > 0
    host = plan_pretrained(llama, budget=smallest(llama, device), **FROM_RAM)
    assert host.in_ram == ()


def test_a_device_that_cannot_be_is_refused_before_anything_is_read(llama: Path) -> None:
    for use in (nexus.from_pretrained, plan_pretrained):
        with pytest.raises(ConfigError, match="'cpu' or 'cuda'; got 'mps'"):
            use(llama, device="mps")


# -- packed weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["nf4", "nf4-nested", "nf4-fine", "int8", "mixed"])
def test_packed_models_stream_to_the_very_bits(
    packed: Callable[[str], Path], device: Device, prompt: torch.Tensor, mode: str
) -> None:
    path = packed(mode)
    with nexus.from_pretrained(path, device=device, budget="1GiB", io="direct") as model:
        assert not nexus.plan_of(model).streamed
        want = logits(model, prompt)
    if device.torch_device.type == "cpu":  # the other way there is right
        with nexus.from_pretrained(path, budget="1GiB", io="direct") as model:
            assert torch.equal(logits(model, prompt), want)
    for options in (FROM_DISK, FROM_RAM):
        with nexus.from_pretrained(
            path, device=device, budget=smallest(path, device), **options
        ) as model:
            assert len(nexus.plan_of(model).streamed) == TINY["num_blocks"]
            for _ in range(3):
                assert torch.equal(logits(model, prompt), want)


@pytest.mark.parametrize("mode", ["nf4", "nf4-nested", "int8"])
def test_all_parts_of_packed_weights_are_on_the_device(
    packed: Callable[[str], Path], device: Device, mode: str
) -> None:
    path = packed(mode)
    with nexus.from_pretrained(
        path, device=device, budget=smallest(path, device), **FROM_DISK
    ) as model:
        projection = model.model.layers[0].mlp.up_proj
        parts = projection._nexus_tensors["weight"]
        assert len(parts) > 1
        assert {part.device for part in parts.values()} == {device.torch_device}
        assert projection.weight.device == device.torch_device


# -- by rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [FROM_DISK, FROM_RAM], ids=["disk", "ram"])
def test_head_and_embedding_may_be_read_by_rows(
    resident: Any, llama: Path, device: Device, prompt: torch.Tensor, options: Any
) -> None:
    by_rows = ["lm_head", "model.embed_tokens"]
    more = {"by_rows": by_rows, "tile_bytes": "16KiB", **options}
    budget = smallest(llama, device, by_rows=by_rows, tile_bytes="16KiB")
    assert budget < smallest(llama, device)
    with nexus.from_pretrained(llama, device=device, budget=budget, **more) as model:
        for _ in range(3):
            torch.testing.assert_close(logits(model, prompt), logits(resident, prompt))
        ours = model.generate(prompt, max_new_tokens=5, do_sample=False)
        theirs = resident.generate(prompt, max_new_tokens=5, do_sample=False)
        assert torch.equal(ours, theirs)
        assert nexus.stats(model).num_rows >= 3 * prompt.numel()
