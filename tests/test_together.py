"""Several streamed models in one process, under one budget."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import nexus_ext as nexus
from nexus_ext.errors import BudgetError, StreamError
from tests.test_ops import WIDTH, X, stack

SIZES = (5, 9, 7)


@pytest.fixture(autouse=True)
def _poisoned_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_POISON", "1")


@pytest.fixture
def resident(tmp_path: Path) -> list[Any]:
    """Three stacks of different heights; their files are 0.safetensors and so on."""
    models = [stack(*[WIDTH] * size) for size in SIZES]
    for index, model in enumerate(models):
        save_file(model.state_dict(), tmp_path / f"{index}.safetensors")
    return models


def requests(resident: list[Any], folder: Path) -> list[Any]:
    return [
        (copy.deepcopy(model), folder / f"{index}.safetensors", {})
        for index, model in enumerate(resident)
    ]


def bytes_of(models: list[Any]) -> int:
    return sum(p.numel() * p.element_size() for model in models for p in model.parameters())


def test_models_share_one_budget_and_are_right_in_any_order(
    resident: list[Any], tmp_path: Path
) -> None:
    budget = bytes_of(resident) * 2 // 3
    models = nexus.stream_all(requests(resident, tmp_path), budget=budget, io="direct")
    plans = [nexus.plan_of(model) for model in models]
    assert sum(plan.device_bytes for plan in plans) <= budget
    assert all(plan.streamed for plan in plans)
    # What is left over goes to residents, not to waste: less than a group each.
    assert sum(plan.device_bytes for plan in plans) > budget - len(plans) * 19_200
    for index in (0, 1, 2, 1, 0, 0, 2):
        assert torch.equal(models[index](X), resident[index](X))
    assert all(nexus.stats(model).bytes_read > 0 for model in models)


def test_each_gets_the_same_share_of_what_it_could_use(resident: list[Any], tmp_path: Path) -> None:
    models = nexus.stream_all(requests(resident, tmp_path), budget=bytes_of(resident) * 3 // 4)
    shares = [
        (plan.budget_bytes - plan.minimum_bytes) / (sum(plan.group_bytes) + plan.outside_bytes)
        for plan in map(nexus.plan_of, models)
    ]
    assert max(shares) < 2 * min(shares)


def test_with_room_for_all_everything_is_resident(resident: list[Any], tmp_path: Path) -> None:
    models = nexus.stream_all(requests(resident, tmp_path), budget="1GiB")
    assert all(not nexus.plan_of(model).streamed for model in models)
    models = nexus.stream_all(requests(resident, tmp_path))
    assert all(torch.equal(ours(X), plain(X)) for ours, plain in zip(models, resident, strict=True))


def test_threads_may_run_different_models_at_once(resident: list[Any], tmp_path: Path) -> None:
    models = nexus.stream_all(requests(resident, tmp_path), budget=bytes_of(resident) // 2)
    answers: list[bool] = []

    def run(index: int) -> None:
        want = resident[index](X)
        answers.extend(torch.equal(models[index](X), want) for _ in range(20))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 60


def test_a_budget_too_small_for_all_names_the_smallest_that_works(
    resident: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match="holds the smallest that works for each") as refused:
        nexus.stream_all(requests(resident, tmp_path), budget=1000)
    needed = int(str(refused.value).split("needed ")[1].split(" =")[0])
    models = nexus.stream_all(requests(resident, tmp_path), budget=needed)
    assert all(torch.equal(ours(X), plain(X)) for ours, plain in zip(models, resident, strict=True))
    with pytest.raises(BudgetError):
        nexus.stream_all(requests(resident, tmp_path), budget=needed - 1)


def test_if_one_cannot_be_streamed_none_is(resident: list[Any], tmp_path: Path) -> None:
    asked = requests(resident, tmp_path)
    asked[2][0].blocks[1].forward = lambda x: x
    with pytest.raises(StreamError, match="forward must be its class's"):
        nexus.stream_all(asked, budget="1GiB")
    for model, path, _ in asked[:2]:
        with nexus.stream(model, path, budget="1GiB"):
            pass


def test_options_may_differ(resident: list[Any], tmp_path: Path) -> None:
    asked = requests(resident, tmp_path)
    asked[1] = (*asked[1][:2], {"io": "mmap", "groups": "blocks"})
    models = nexus.stream_all(asked, budget=bytes_of(resident) // 2, io="direct")
    assert [nexus.stats(model).io_mode_requested for model in models] == [
        "direct",
        "mmap",
        "direct",
    ]
    assert all(torch.equal(ours(X), plain(X)) for ours, plain in zip(models, resident, strict=True))
