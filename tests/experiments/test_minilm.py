from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from experiments.tasks.minilm import Rating, spearman


def test_scores_of_ratings_are_those_of_all_batches_together() -> None:
    truth = torch.tensor([1.0, -2.0, 0.5, 3.0])

    class Ratings(nn.Module):
        def forward(self, ratings: Tensor) -> Tensor:
            return ratings[:, None] ** 3 / 2

    batches = [({"ratings": truth[:3]}, truth[:3]), ({"ratings": truth[3:]}, truth[3:])]
    scores = Rating().scores(Ratings(), batches)
    errors = [(value**3 / 2 - value) ** 2 for value in truth.tolist()]
    assert scores == {"loss": pytest.approx(sum(errors) / 4), "spearman": pytest.approx(1.0), "count": 4}


def test_spearman_in_closed_form() -> None:
    first = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0])
    assert spearman(first, first.exp()) == pytest.approx(1.0)
    assert spearman(first, -first) == pytest.approx(-1.0)
    # Ranks 2 1 4 3 5: 1 - 6 * 4 / (5 * 24).
    assert spearman(first, torch.tensor([2.0, 1.0, 4.0, 3.0, 5.0])) == pytest.approx(0.8)
    # Ties share ranks 1.5 and 3.5: covariance 2, variances 5/4 * 4 and 4, out of their means.
    assert spearman(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 0.0, 7.0, 7.0])) == pytest.approx(
        4 / math.sqrt(5 * 4)
    )
    assert spearman(first, torch.ones(5)) == 0.0
