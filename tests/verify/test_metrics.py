"""The bounds of the checks: how many flips, how far apart, how many other decisions."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from nipq.prepare.batches import BatchReader
from nipq.verify.metrics import LayerComparison, OutputComparison, exact_check, most_by_chance
from nipq.verify.reference import labels_of


def test_one_flip_of_one_level_is_allowed_and_no_more() -> None:
    assert LayerComparison(codes=100, flips=1, jump=1).layer_fault() is None
    assert "flipped" in str(LayerComparison(codes=100, flips=2, jump=1).layer_fault())
    assert LayerComparison(codes=50_000, flips=5, jump=1).layer_fault() is None
    assert "flipped" in str(LayerComparison(codes=50_000, flips=6, jump=1).layer_fault())
    assert "by up to 2 levels" in str(LayerComparison(codes=50_000, flips=1, jump=2).layer_fault())


def test_what_is_not_a_number_fails() -> None:
    nan = float("nan")
    assert LayerComparison(codes=9, jump=nan).layer_fault() is not None
    assert LayerComparison(codes=9, error=nan, largest=1).layer_fault() is not None
    distance = OutputComparison()
    distance.add(torch.ones(4, 2), torch.full((4, 2), nan), torch.ones(4, 2), None)
    assert not distance.check({}).passed


def test_what_is_not_a_number_in_one_batch_is_not_forgotten_in_the_next() -> None:
    found = OutputComparison()
    for value in (float("nan"), 1.0):
        found.add(torch.ones(4, 2), torch.full((4, 2), value), torch.ones(4, 2), None)
    assert not exact_check({}, found.exact).passed


def test_calls_that_differ_fail_both_layer_checks() -> None:
    seen = LayerComparison(calls_differ=True)
    assert "differently often" in str(seen.layer_fault())
    assert "differently often" in str(seen.exact_fault())


def test_the_limit_of_the_distance_is_the_models_own_noise() -> None:
    """Largest logit 1, own noise 0.02: 0.05 passes, 0.07 does not; without noise three flips, 0.09 / samples."""
    trained = torch.eye(4).repeat(25, 1)

    def passes(batch_noise: float, kernel_noise: float, apart: float) -> bool:
        distance = OutputComparison()
        distance.add_batch_noise(trained, trained + batch_noise)
        distance.add_kernel_noise(trained, trained + kernel_noise)
        distance.add(trained, trained + apart, trained, None)
        return distance.check({}).passed

    for noise in ((0.02, 0.0), (0.0, 0.02)):
        assert passes(*noise, 0.05)
        assert not passes(*noise, 0.07)
    assert passes(0.0, 0.0, 8.9e-4)
    assert not passes(0.0, 0.0, 9.1e-4)


def test_flips_that_the_layers_were_seen_to_make_are_allowed_for_up_to_one_in_twenty_samples() -> None:
    """In units of 3 % of the largest logit, 1, in one of 400 samples: ten flips, of which chance makes 17, allow 17."""
    trained = torch.eye(4).repeat(100, 1)

    def passes(flips: int, in_units_of_a_flip: float) -> bool:
        distance = OutputComparison()
        distance.add(trained, trained + in_units_of_a_flip * 0.03 / 400, trained, None)
        return distance.check({}, flips).passed

    assert passes(0, 2.9)
    assert not passes(0, 3.1)
    assert passes(1, 2.9)
    assert most_by_chance(10) == 17
    assert passes(10, 16.9)
    assert not passes(10, 17.1)
    assert passes(10_000, 19.9)
    assert not passes(10_000, 20.1)


def test_decisions_must_agree_unless_the_trained_model_disagrees_with_itself() -> None:
    logits = torch.tensor([[1.0, 0.9999]]).repeat(1000, 1)

    def passes(flipped: int, own: int) -> bool:
        other, again = logits.clone(), logits.clone()
        other[:flipped] = other[:flipped].flip(1)
        again[:own] = again[:own].flip(1)
        distance = OutputComparison()
        distance.add_batch_noise(logits, again)
        distance.add_kernel_noise(logits, again)
        distance.add(logits, other, other, None)
        return distance.check({}).passed

    assert passes(10, 0)  # 0.5 % are 5; more than 10 come by chance in 1.4 % of cases
    assert not passes(11, 0)
    assert passes(42, 10)  # 3 times 10, and what chance adds
    assert not passes(43, 10)


def test_chance_fails_a_right_model_seldom_and_a_wrong_one_nearly_always() -> None:
    draws = np.random.default_rng(0).binomial  # independent of the Poisson law that the limit comes from
    for samples in (8, 64, 500, 10_000):
        limit = most_by_chance(0.005 * samples)
        right, wrong = draws(samples, 0.005, 20_000), draws(samples, 0.05, 20_000)
        assert (right > limit).mean() < 0.02 + 4 * (0.02 / 20_000) ** 0.5
        assert samples < 500 or (wrong > limit).mean() > 0.99
    assert most_by_chance(0) == 1


def test_labels_are_found_where_loaders_put_them() -> None:
    x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    reader = BatchReader(nn.Linear(3, 2))
    assert labels_of((x, y), reader) is y
    assert labels_of((x, y, x), reader) is y
    assert labels_of(({"input": x}, y), BatchReader(nn.Linear(3, 2))) is y
    assert labels_of({"input": x, "labels": y}, BatchReader(nn.Linear(3, 2))) is y
    assert labels_of(x, reader) is None
    assert labels_of((x,), reader) is None
    assert labels_of((x, x), reader) is None
