from __future__ import annotations

import math

import pytest
import torch

from experiments.tasks.decoder import NextCharacter, guess_without_reading


def test_bits_per_character_in_closed_form() -> None:
    """A model that gives the right one of four characters half of the probability: one bit each."""
    targets = torch.tensor([[0, 1, 2], [3, 3, 0]])
    shares = torch.full((2, 3, 4), 1 / 6).scatter(2, targets[..., None], 0.5)

    class Fixed(torch.nn.Module):
        def forward(self, _: torch.Tensor) -> torch.Tensor:
            return shares.log()

    scores = NextCharacter().scores(Fixed(), [(targets, targets)])
    assert scores["bits_per_character"] == pytest.approx(1.0)
    assert scores["loss"] == pytest.approx(math.log(2))
    assert scores["accuracy"] == 100
    assert scores["count"] == 6


def test_a_guesser_who_knows_frequencies_needs_their_entropy() -> None:
    assert guess_without_reading(torch.tensor([0, 0, 1, 3])) == pytest.approx(1.5)
