"""Guesses learn what is there to learn, admission is arithmetic, and a trial ends what costs."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from nexus_ext.experts.predict import Admission, Predictor, Trial

MIB = 1 << 20
EXPERTS, TOP_K = 16, 3


def planted(num_tokens: int, noise: float) -> list[tuple[torch.Tensor, list[int]]]:
    """Scores of a router, and what it selects when it sees them better: noise apart."""
    source = torch.Generator().manual_seed(0)
    true = torch.randn(num_tokens, EXPERTS, generator=source)
    seen = true + noise * torch.randn(num_tokens, EXPERTS, generator=source)
    return list(zip(seen, true.topk(TOP_K).indices.tolist(), strict=True))


def recall(chance: torch.Tensor, experts: list[int]) -> float:
    return len(set(chance.topk(len(experts)).indices.tolist()).intersection(experts)) / len(experts)


def surprise(chance: torch.Tensor, experts: list[int]) -> float:
    """Minus the logarithm of the chance that was given to what happened."""
    used = torch.zeros(EXPERTS)
    used[torch.tensor(experts)] = 1
    return float(torch.nn.functional.binary_cross_entropy(chance.clamp(1e-6, 1 - 1e-6), used))


# -- which -----------------------------------------------------------------------------------------


def test_scores_of_the_next_router_say_what_it_selects() -> None:
    predictor = Predictor([EXPERTS, EXPERTS])
    recalls = []
    for scores, experts in planted(200, noise=0.1):
        recalls.append(recall(predictor.guess(1, scores), experts))
        predictor.observe(1, experts)
    assert sum(recalls[50:]) / 150 > 0.85


def test_how_much_scores_are_trusted_is_learned() -> None:
    """Chances become true: without information all alike, with much of it near 0 and 1."""
    spreads = {}
    for noise in (0.05, 100.0):
        predictor, chances = Predictor([EXPERTS]), []
        for scores, experts in planted(600, noise):
            chances.append(predictor.guess(0, scores))
            predictor.observe(0, experts)
        late = torch.stack(chances[300:])
        spreads[noise] = float((late.amax(1) - late.amin(1)).mean())
        assert float(late.sum(1).mean()) == pytest.approx(TOP_K, rel=0.1)
    assert spreads[0.05] > 0.9
    assert spreads[100.0] < 0.35


def test_learning_makes_guesses_less_surprising() -> None:
    predictor, surprises = Predictor([EXPERTS]), []
    for scores, experts in planted(400, noise=5.0):
        surprises.append(surprise(predictor.guess(0, scores), experts))
        predictor.observe(0, experts)
    assert sum(surprises[200:]) / 200 < 0.9 * sum(surprises[:20]) / 20


def test_without_scores_what_was_selected_before_is_likely() -> None:
    predictor = Predictor([EXPERTS])
    for _ in range(30):
        predictor.guess(0)
        predictor.observe(0, [1, 4, 9])
    chance = predictor.guess(0)
    assert set(chance.topk(3).indices.tolist()) == {1, 4, 9}
    assert float(chance[1]) > 0.8
    assert float(chance[0]) < 0.1


def test_both_are_better_than_either() -> None:
    """Half of what a token selects it shares with the one before; scores show all, dimly."""
    source, same = random.Random(0), [0, 1, 2]
    recalls: dict[str, list[float]] = {"both": [], "scores": [], "recent": []}
    both, recent = Predictor([EXPERTS]), Predictor([EXPERTS])
    for token in range(600):
        if token % 60 == 0:
            same = source.sample(range(EXPERTS), 3)
        experts = sorted({*source.sample(same, 2), source.randrange(EXPERTS)})
        scores = torch.tensor([source.gauss(2.0 * (e in experts), 1) for e in range(EXPERTS)])
        recalls["both"].append(recall(both.guess(0, scores), experts))
        recalls["recent"].append(recall(recent.guess(0), experts))
        recalls["scores"].append(recall(scores, experts))
        both.observe(0, experts)
        recent.observe(0, experts)
    mean = {name: sum(values[100:]) / 500 for name, values in recalls.items()}
    assert mean["both"] > max(mean["scores"], mean["recent"]) + 0.03


def test_layers_learn_for_themselves() -> None:
    predictor = Predictor([4, EXPERTS])
    before = predictor.guess(0).clone()
    for _ in range(10):
        predictor.guess(1)
        predictor.observe(1, [0])
    assert torch.equal(predictor.guess(0), before)


def test_only_a_guess_that_was_made_is_learned_from() -> None:
    predictor = Predictor([EXPERTS])
    predictor.observe(0, [1])
    weights = [each.clone() for each in predictor._layers[0]._weights]
    predictor.observe(0, [2])
    assert all(map(torch.equal, weights, predictor._layers[0]._weights))
    predictor.guess(0)
    predictor.observe(0, [2])
    assert not torch.equal(weights[0], predictor._layers[0]._weights[0])
    assert torch.equal(weights[1], predictor._layers[0]._weights[1])
    weights = [each.clone() for each in predictor._layers[0]._weights]
    predictor.observe(0, [2])
    assert all(map(torch.equal, weights, predictor._layers[0]._weights))


def test_several_tokens_are_one_guess_for_any_of_them() -> None:
    predictor = Predictor([EXPERTS])
    scores = torch.full((2, EXPERTS), -1.0)
    scores[0, 3] = scores[1, 7] = 5.0
    assert set(predictor.guess(0, scores).topk(2).indices.tolist()) == {3, 7}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_may_have_any_floating_dtype(dtype: torch.dtype) -> None:
    chance = Predictor([EXPERTS]).guess(0, torch.arange(EXPERTS).to(dtype))
    assert chance.dtype == torch.float32
    assert int(chance.argmax()) == EXPERTS - 1


@pytest.mark.parametrize("scores", [float("nan"), float("inf"), 0.0, 1e30])
def test_bad_scores_do_not_spoil_later_guesses(scores: float) -> None:
    predictor = Predictor([EXPERTS, 1])
    for layer, count in enumerate([EXPERTS, 1]):
        predictor.guess(layer, torch.full((count,), scores))
        predictor.observe(layer, [0])
        chance = predictor.guess(layer, torch.arange(float(count)))
        assert chance.isfinite().all()
        assert ((chance >= 0) & (chance <= 1)).all()


# -- how much --------------------------------------------------------------------------------------


def test_bytes_are_what_arrives_in_the_window() -> None:
    admission = Admission(expert_bytes=MIB, bandwidth=1000 * MIB)
    admission.note_idle(0.010)
    # 0.8 * 10 ms at 1 MiB a ms.
    assert admission.window_seconds == pytest.approx(0.008)
    assert admission.allow() == pytest.approx(8 * MIB, abs=2)


def test_a_disk_that_is_busy_gets_nothing() -> None:
    admission = Admission(expert_bytes=MIB, bandwidth=1000 * MIB)
    admission.note_idle(0.0)
    assert admission.allow() == 0


@pytest.mark.parametrize("bandwidth", [1e9, None])
def test_while_something_is_not_known_one_expert_is_allowed(bandwidth: float | None) -> None:
    admission = Admission(expert_bytes=3 * MIB, bandwidth=bandwidth)
    if bandwidth is None:
        admission.note_idle(1.0)
    assert admission.allow() == 3 * MIB


def test_a_layer_that_seldom_misses_is_not_asked_until_it_does() -> None:
    admission = Admission(expert_bytes=MIB, bandwidth=1e9)
    assert admission.is_worth_asking(3), "nothing is known"
    admission.note_missed(3, 0)
    assert not admission.is_worth_asking(3)
    assert admission.is_worth_asking(4), "of another layer"
    for _ in range(10):
        admission.note_missed(3, 1)
    assert admission.is_worth_asking(3)


@pytest.mark.parametrize(("expert", "most"), [(MIB, 256 * MIB), (352 * MIB, 352 * MIB)])
def test_there_is_a_most_of_256_mib_or_one_expert(expert: int, most: int) -> None:
    admission = Admission(expert_bytes=expert, bandwidth=1e12)
    admission.note_idle(1.0)
    assert admission.allow() == most


def test_what_is_noted_is_averaged_with_what_was() -> None:
    admission = Admission(expert_bytes=1, bandwidth=None)
    admission.note_idle(1.0)
    admission.note_idle(2.0)
    assert admission.window_seconds == pytest.approx(0.8 * 1.2)
    for _ in range(100):
        admission.note_idle(3.0)
    assert admission.window_seconds == pytest.approx(0.8 * 3)


# -- whether ---------------------------------------------------------------------------------------


def run(trial: Trial, num_steps: int, seconds: Callable[[bool], float]) -> tuple[float, int]:
    """Steps of so many seconds with and without: all seconds, and how many steps were with."""
    total, num_on = 0.0, 0
    for _ in range(num_steps):
        num_on += trial.is_on
        spent = seconds(trial.is_on)
        trial.step(spent)
        total += spent
    return total, num_on


def test_prediction_that_helps_stays_on() -> None:
    trial = Trial()
    run(trial, 2000, lambda is_on: 0.9 if is_on else 1.0)
    assert trial.is_on
    assert trial.value == pytest.approx(1 / 0.9)
    assert trial.num_switches == 0


def test_prediction_that_costs_is_switched_off() -> None:
    trial = Trial()
    _, num_on = run(trial, 500, lambda is_on: 1.1 if is_on else 1.0)
    assert not trial.is_on
    assert trial.value == pytest.approx(1 / 1.1)
    assert trial.num_switches == 1
    assert num_on < 60


def test_a_little_slower_is_not_at_least_as_fast() -> None:
    trial = Trial()
    run(trial, 100, lambda is_on: 1.001 if is_on else 1.0)
    assert not trial.is_on


@pytest.mark.parametrize("slowdown", [1.02, 1.1, 1.5, 2.0, 10.0])
def test_in_the_long_run_prediction_never_costs_one_percent(slowdown: float) -> None:
    trial, num_steps = Trial(), 20_000
    total, num_on = run(trial, num_steps, lambda is_on: slowdown if is_on else 1.0)
    assert num_steps / total >= 0.99
    assert num_on > 0


@pytest.mark.parametrize("slowdown", [1.01, 1.05, 1.3])
def test_noise_does_not_make_a_cost_look_like_a_gain_for_long(slowdown: float) -> None:
    for seed in range(4):
        source, plain = random.Random(seed), [0.0]

        def seconds(
            is_on: bool, source: random.Random = source, plain: list[float] = plain
        ) -> float:
            step = source.lognormvariate(0, 0.15)
            plain[0] += step
            return step * (slowdown if is_on else 1.0)

        total, _ = run(Trial(), 20_000, seconds)
        assert plain[0] / total >= 0.99


def test_what_is_only_noise_is_off() -> None:
    trial, source = Trial(), random.Random(1)
    run(trial, 2000, lambda is_on: source.lognormvariate(0, 0.15))
    assert not trial.is_on


def test_trials_become_rare() -> None:
    trial = Trial()
    cost = lambda is_on: 1.1 if is_on else 1.0  # noqa: E731
    on = [run(trial, 4000, cost)[1] for _ in range(8)]
    assert on[0] > 0
    assert sum(on[4:]) < sum(on[:4])


def test_pauses_grow_even_where_trials_cost_nothing() -> None:
    _, num_on = run(Trial(), 20_000, lambda is_on: 1.0001 if is_on else 1.0)
    assert 0 < num_on < 400


def test_a_slow_start_is_not_blamed_on_prediction() -> None:
    trial, num_steps = Trial(), [0]

    def seconds(is_on: bool) -> float:
        num_steps[0] += 1
        return 5.0 if num_steps[0] <= 16 else 0.95 if is_on else 1.0

    run(trial, 200, seconds)
    assert trial.is_on


def test_prediction_that_begins_to_help_is_switched_on_again() -> None:
    trial = Trial()
    run(trial, 1000, lambda is_on: 1.2 if is_on else 1.0)
    assert not trial.is_on
    run(trial, 20_000, lambda is_on: 0.8 if is_on else 1.0)
    assert trial.is_on
    assert trial.num_switches == 2
    assert trial.value == pytest.approx(1 / 0.8)


def test_what_is_much_slower_is_not_tried_to_the_end() -> None:
    trial = Trial()
    _, num_on = run(trial, 400, lambda is_on: 2.0 if is_on else 1.0)
    # The first window, which does not count, then a few steps of the first one that does.
    assert num_on <= 16 + 6
    assert not trial.is_on


def test_a_drift_is_not_taken_for_an_effect() -> None:
    """Every step is slower than the one before: each kind has its early and its late windows."""
    trial, clock = Trial(), [0.0]

    def seconds(is_on: bool) -> float:
        clock[0] += 1
        return (1 + 0.001 * clock[0]) * (0.98 if is_on else 1.0)

    run(trial, 80, seconds)
    assert trial.value == pytest.approx(1 / 0.98, rel=0.01)
    trial.value = None
    run(trial, 512 + 64, seconds)
    assert trial.value == pytest.approx(1 / 0.98, rel=0.01)
    assert trial.is_on


@pytest.mark.parametrize("mode", ["on", "off"])
def test_what_the_user_decided_is_not_tried(mode: str) -> None:
    trial = Trial(mode)  # type: ignore[arg-type]
    _, num_on = run(trial, 3000, lambda is_on: 5.0 if is_on else 1.0)
    assert num_on == (3000 if mode == "on" else 0)
    assert (trial.value, trial.num_switches) == (None, 0)


def test_outliers_do_not_decide() -> None:
    trial, source = Trial(), random.Random(0)

    def seconds(is_on: bool) -> float:
        return 50.0 if source.random() < 0.1 else 0.95 if is_on else 1.0

    run(trial, 200, seconds)
    assert trial.is_on
